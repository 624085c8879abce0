//! What the tests of this crate share.

use apr_faults::Trained;
use apr_format::Checkpoint;
use apr_testkit::{fixture, golden};

/// The trained model, and two dozen tokens of its own kind of text.
pub(crate) fn trained() -> Trained {
    let model = Checkpoint::open(fixture("pycoder-3m/pycoder-3m-Q4_K_M.gguf")).unwrap();
    let golden = golden("pycoder-3m-Q4_K_M");
    let prompt = golden.prompt_ids.into_iter().chain(golden.greedy_ids).take(26).collect();
    Trained { model, prompt }
}
