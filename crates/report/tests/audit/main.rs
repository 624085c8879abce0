//! Reports as text, as JSON and as a page: mostly audits of captures by Hugging Face, with the right weights and with wrong ones.

mod bench;
mod bisect;
mod file_check;
mod page;
mod routing;
mod schema;
mod text;

use std::path::Path;

use apr_audit::{Audit, Diagnosis, Options, audit, diagnose};
use apr_capture::{Capture, Provenance};
use apr_format::Checkpoint;
use apr_report::audit::AuditReport;
use apr_tensor::Stored;
use apr_testkit::{Draft, fixture, golden};

/// An audit with what its report needs.
struct Case {
    capture: Capture,
    audit: Audit,
    diagnoses: Vec<Diagnosis>,
}

impl Case {
    fn of(capture: &Path, checkpoint: &Checkpoint, common: bool) -> Self {
        let capture = Capture::open(capture).unwrap();
        let options = Options { common, ..Options::default() };
        let audit = audit(&capture, checkpoint, &options, &mut |_| {}).unwrap();
        let diagnoses = diagnose(&capture, checkpoint, &audit, 8).unwrap();
        Self { capture, audit, diagnoses }
    }

    /// The capture of tiny Qwen2, with its own weights.
    fn right() -> Self {
        Self::of(&golden("tiny-qwen2").capture, &tiny(), false)
    }

    /// The same with 16 rows of a weight other than they were.
    fn wrong() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let checkpoint = with_wrong_gate(directory.path());
        Self::of(&golden("tiny-qwen2").capture, &checkpoint, false)
    }

    fn report(&self) -> AuditReport<'_> {
        AuditReport {
            consequence: None,
            audit: &self.audit,
            diagnoses: &self.diagnoses,
            provenance: self.provenance(),
        }
    }

    fn provenance(&self) -> Option<&Provenance> {
        self.capture.provenance()
    }
}

fn tiny() -> Checkpoint {
    Checkpoint::open(fixture("tiny/qwen2")).unwrap()
}

/// Tiny Qwen2 with 16 zeroed rows of a weight, in `directory`.
fn with_wrong_gate(directory: &Path) -> Checkpoint {
    let mut draft = Draft::of(&tiny());
    let weight = draft.tensor("model.layers.1.mlp.gate_proj.weight");
    let mut bytes = weight.bytes().to_vec();
    let row = weight.shape().cols() * 2;
    bytes[16 * row..32 * row].fill(0);
    *weight = Stored::new(weight.dtype(), weight.shape().clone(), bytes.into()).unwrap();
    draft.hugging_face(directory)
}
