//! The models and golden captures under `fixtures/`.

use std::path::{Path, PathBuf};

/// The tiny random models, one per architecture: a directory name under `fixtures/tiny`.
pub const TINY: [&str; 5] = ["qwen2", "qwen3", "qwen3-moe", "llama", "llama3-rope"];

/// A path under `fixtures/`.
pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(path)
}

/// What Hugging Face's implementation says about a fixture.
#[derive(Clone, Debug)]
pub struct Golden {
    /// The directory of the capture.
    pub capture: PathBuf,
    /// The prompt as text.
    pub prompt: String,
    /// The prompt as ids.
    pub prompt_ids: Vec<u32>,
    /// Its greedy continuation.
    pub greedy_ids: Vec<u32>,
}

/// The golden record `name` under `fixtures/golden`.
///
/// # Panics
/// If it is not there or cannot be read.
pub fn golden(name: &str) -> Golden {
    let directory = fixture("golden").join(name);
    let path = directory.join("golden.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let json: serde_json::Value =
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let ids = |key: &str| {
        let ids = json[key].as_array().unwrap_or_else(|| panic!("{}: {key}", path.display()));
        ids.iter().map(|id| id.as_u64().expect("ids are numbers") as u32).collect()
    };
    Golden {
        capture: directory.join("capture"),
        prompt: json["prompt"].as_str().unwrap_or_default().to_owned(),
        prompt_ids: ids("prompt_ids"),
        greedy_ids: ids("greedy_ids"),
    }
}
