//! The audit as a judge.

use std::path::Path;

use apr_audit::{Audit, Options, audit, diagnose};
use apr_capture::Capture;
use apr_faults::{Judge, Verdict};
use apr_format::Checkpoint;

/// Judges as `apr audit` does.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Auditor;

impl Judge for Auditor {
    fn judge(&self, capture: &Path, model: &Checkpoint) -> Verdict {
        // What cannot be read cannot be judged, and that is what there is to say.
        judged(capture, model).unwrap_or_else(|error| Verdict {
            unmeasured: Some(error.to_string()),
            ..Verdict::default()
        })
    }
}

fn judged(path: &Path, model: &Checkpoint) -> apr_audit::Result<Verdict> {
    let capture = Capture::open(path)?;
    let audit = audit(&capture, model, &Options::default(), &mut |_| {})?;
    let first = diagnose(&capture, model, &audit, 1)?.into_iter().next();
    let stated =
        first.into_iter().flat_map(|first| first.finding.into_iter().chain(first.also_fits));
    Ok(Verdict {
        sites: audit.faults().map(|stage| stage.site).collect(),
        diagnoses: stated.map(|explained| explained.hypothesis.to_owned()).collect(),
        unmeasured: unmeasured(&audit),
    })
}

/// What the audit names as not judged, or not judged by itself.
fn unmeasured(audit: &Audit) -> Option<String> {
    if let Some(what) = audit.not_measured.first() {
        return Some(what.to_string());
    }
    let over = audit.stages.iter().find(|stage| !stage.span.is_empty())?;
    let missing = over.span.first().expect("it is not empty");
    Some(format!("{missing} was not captured; judged at {}", over.site))
}
