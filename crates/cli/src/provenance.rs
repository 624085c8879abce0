//! What a capture says of the run that it was made in.

use apr_capture::{Dims, Provenance, manifest};
use apr_format::Checkpoint;
use apr_model::{Backend, Model};

use crate::prompt::Prompt;

/// The provenance of values that `model`, loaded from `checkpoint`, computes for `prompt`.
pub(crate) fn provenance<B: Backend>(
    model: &Model<B>,
    checkpoint: &Checkpoint,
    prompt: Option<&Prompt>,
) -> Provenance {
    let info = model.backend().info();
    Provenance {
        tool: manifest::Tool { name: "apr".into(), version: env!("CARGO_PKG_VERSION").into() },
        model: manifest::Model {
            path: checkpoint.path().display().to_string(),
            format: checkpoint.container().to_string(),
            architecture: Some(model.config().architecture.name().to_owned()),
            index_sha256: Some(checkpoint.index_sha256()),
            file_sha256: None,
            config: Some(Dims::from(model.config())),
        },
        prompt: prompt.map(|prompt| manifest::Prompt {
            mode: prompt.mode.to_owned(),
            text: prompt.text.clone(),
        }),
        backend: Some((&info).into()),
        plan: Some(model.plan().into()),
        kv: Some(info.kv.name().to_lowercase()),
    }
}
