//! The small model inside the binary.

use anyhow::Result;
use apr_format::Checkpoint;
use apr_tensor::Bytes;

/// Its name where it is kept.
pub(crate) const FILE: &str = "pycoder-3m-Q4_K_M.gguf";
/// Its bytes: a GGUF file.
pub(crate) const BYTES: &[u8] =
    include_bytes!("../../../fixtures/pycoder-3m/pycoder-3m-Q4_K_M.gguf");
/// The beginning of a program, such as it was trained on.
pub(crate) const PROMPT: &str = "def fib(n):\n    if n";

/// The model.
pub(crate) fn checkpoint() -> Result<Checkpoint> {
    let name = format!("{FILE} (embedded)");
    Ok(Checkpoint::from_bytes(&name, Bytes::from_static(BYTES))?)
}
