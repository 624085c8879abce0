//! The shapes that models can have: Hugging Face's `config.json`, of a known model or of any other.

use std::{fs, path::Path};

/// Name, and the config as its publisher has it, as far as it is about numbers.
const KNOWN: [(&str, &str); 4] = [
    ("qwen2.5-0.5b", include_str!("shapes/qwen2.5-0.5b.json")),
    ("qwen2.5-1.5b", include_str!("shapes/qwen2.5-1.5b.json")),
    ("qwen2.5-7b", include_str!("shapes/qwen2.5-7b.json")),
    ("moe-64x8", include_str!("shapes/moe-64x8.json")),
];

/// What a model is to look like.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// What to call it.
    pub(crate) name: String,
    /// Its `config.json`.
    pub(crate) config: String,
}

impl Shape {
    /// The known shape of this name, or that of the `config.json` at this path.
    pub(crate) fn named(text: &str) -> Result<Self, String> {
        if let Some((name, config)) = KNOWN.iter().find(|known| known.0 == text) {
            return Ok(Self { name: (*name).to_owned(), config: (*config).to_owned() });
        }
        let path = Path::new(text);
        if path.extension().is_none_or(|extension| extension != "json") {
            return Err(format!("there are: {}, or the path of a config.json", names()));
        }
        let config = fs::read_to_string(path).map_err(|error| error.to_string())?;
        // A config is called as its directory is.
        let directory = path.canonicalize().ok();
        let directory = directory.as_deref().and_then(Path::parent).and_then(Path::file_name);
        let name = directory.unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Ok(Self { name, config })
    }
}

/// The names of the known shapes, for messages.
fn names() -> String {
    KNOWN.map(|known| known.0).join(", ")
}

/// What `--help` says.
pub(crate) fn help() -> String {
    format!("A known shape ({}), or the path of any config.json that `apr` runs", names())
}
