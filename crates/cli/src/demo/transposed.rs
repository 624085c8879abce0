//! The bug that this program was born from: an engine that reads the F32 `lm_head` of a quantised model transposed.
//!
//! It took two and a half weeks to find, because every instrument measured something else than the run that was
//! wrong. Here the same mistake is planted in the run of the embedded model, and found.

use std::path::Path;

use anyhow::Result;
use apr_audit::{
    Against, Bisect, BisectOptions, Engine, Error as AuditError, Loaded, Result as AuditResult,
    Run, Script, bisect,
};
use apr_cpu::{Cpu, CpuOptions};
use apr_format::{Checkpoint, Draft};
use apr_model::{Role, Site, Stage};
use apr_reference::{Arithmetic, Reference};
use apr_tensor::{DType, Stored};

/// The embedded model with its head as a matrix of its own, in F32: the file of the story.
pub(super) fn with_f32_head(model: &Checkpoint) -> Result<Checkpoint> {
    let table = model.require(&Role::TokenEmbd.gguf_name())?;
    let head: Vec<u8> = table.to_f32()?.into_iter().flat_map(f32::to_le_bytes).collect();
    let head = Stored::new(DType::F32, table.shape().clone(), head.into())?;
    let mut draft = Draft::of(model);
    draft.tensors.push((Role::Output.gguf_name(), head));
    Ok(draft.to_gguf("pycoder-3m-Q4_K_M with an F32 head")?)
}

/// The cpu backend, but for one kernel that takes the head's rows for its columns.
pub(super) struct Faulty;

impl Engine for Faulty {
    fn name(&self) -> String {
        "cpu, with a kernel that reads the F32 head transposed".to_owned()
    }

    fn load(&self, checkpoint: &Checkpoint) -> AuditResult<Box<dyn Run>> {
        let misread = misread(checkpoint).map_err(|e| AuditError::Engine(e.into()))?;
        let cpu = Cpu::new(CpuOptions::default()).map_err(|e| AuditError::Engine(e.into()))?;
        Ok(Box::new(Loaded::new(cpu, &misread, None)?))
    }
}

/// What that engine makes of `checkpoint`.
pub(super) fn misread(checkpoint: &Checkpoint) -> Result<Checkpoint> {
    let name = Role::Output.gguf_name();
    let head = transposed(checkpoint.require(&name)?)?;
    Ok(checkpoint.with_tensors([(name, head)]))
}

/// What becomes of a matrix whose buffer is read column by column.
fn transposed(matrix: &Stored) -> Result<Stored> {
    let values = matrix.to_f32()?;
    let (rows, cols) = (matrix.shape().rows(), matrix.shape().cols());
    let read = (0..rows * cols).map(|i| values[i % cols * rows + i / cols]);
    let bytes: Vec<u8> = read.flat_map(f32::to_le_bytes).collect();
    Ok(Stored::new(DType::F32, matrix.shape().clone(), bytes.into())?)
}

/// The backend that computes exactly.
struct Exact;

impl Engine for Exact {
    fn name(&self) -> String {
        "reference".to_owned()
    }

    fn load(&self, checkpoint: &Checkpoint) -> AuditResult<Box<dyn Run>> {
        Ok(Box::new(Loaded::new(Reference::<f64>::new(Arithmetic::EXACT), checkpoint, None)?))
    }
}

/// Whether the verdict is the right one: the head, for the right reason, and nothing else once it is put right.
pub(super) fn is_found(found: &Bisect) -> bool {
    let faults: Vec<_> = found.a.audit.iter().flat_map(|audit| audit.faults()).collect();
    let reason = found.a.diagnoses.first().and_then(|diagnosis| diagnosis.finding.as_ref());
    faults.len() == 1
        && faults[0].site == Site::whole(Stage::LmHead)
        && reason.is_some_and(|reason| reason.hypothesis == "weight-transposed")
        && found.grafts.last().is_some_and(|graft| graft.remaining.is_empty())
}

/// Finds it, with captures in `place`.
pub(super) fn find(file: &Checkpoint, prompt: Vec<u32>, place: &Path) -> Result<Bisect> {
    let against = Against::Model { checkpoint: file, engine: &Exact };
    let script = Script::Greedy { prompt, decode: 2 };
    Ok(bisect(file, &Faulty, &against, &script, place, &BisectOptions::default(), &mut |_| {})?)
}
