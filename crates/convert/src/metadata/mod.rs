//! What a checkpoint says about itself, in another container's words.

use apr_format::{Checkpoint, Map};
use apr_model::Config;

use crate::{Layout, Loss, Result, Target};

/// Metadata in the target's words.
#[derive(Clone, Debug, Default)]
pub struct Translated {
    /// The container's own keys.
    pub map: Map,
    /// Names and contents of the files beside the tensors of a Hugging Face directory: `config.json`, `tokenizer.json`, ...
    pub files: Vec<(String, Vec<u8>)>,
    /// What the target cannot say.
    pub losses: Vec<Loss>,
}

/// What `source`, whose config is `config`, says about itself, for tensors stored as `layout` says.
pub fn translate(
    source: &Checkpoint,
    config: &Config,
    target: Target,
    layout: &Layout,
) -> Result<Translated> {
    let _ = (source, config, target, layout);
    Ok(Translated::default())
}
