//! What was translated, read again as whoever opens the target will read it.
//!
//! No weight is needed for that, only tensors whose presence says something: they are a row each.

use apr_format::{Checkpoint, Draft};
use apr_model::{Config, LayerRole, Role, RopeScaling, read_config};
use apr_tensor::{Bytes, DType, Stored};
use apr_tokenizer::{Parts, Tokenizer};

use super::{Facts, Translated, carried};
use crate::{
    Error, Result, Target, rope,
    verify::{differing, same_frequencies},
};

/// Refuses a translation that says something else than `facts`, but for what is listed as lost.
pub(super) fn reads_as(facts: &Facts<'_>, target: Target, translated: &Translated) -> Result<()> {
    let written = opened(facts, target, translated)?;
    let found = read_config(&written)?;
    let differs = |what: &str| Err(contradiction(facts, target, what));
    let expected = expected(facts, target);
    if let Some(key) = differing(&expected, &found) {
        return differs(key);
    }
    if !same_frequencies(&expected.rope_frequencies(), &found.rope_frequencies()) {
        return differs("rope_scaling");
    }
    let is_lossless = facts.omissions.is_empty();
    let Some(parts) = facts.tokenizer.as_ref().filter(|_| is_lossless) else { return Ok(()) };
    let Some((found, _)) = Parts::of(&written)? else { return differs("the tokenizer") };
    if let Some(part) = parts.difference(&found) {
        return differs(part);
    }
    let sorted = |mut ids: Vec<u32>| {
        ids.sort_unstable();
        ids
    };
    let ends = Tokenizer::from_checkpoint(&written)?.eos_ids().to_vec();
    match sorted(ends) == sorted(facts.ends.clone()) {
        true => Ok(()),
        false => differs("the tokens that end a generation"),
    }
}

/// The target as a checkpoint, with the tensors that configs look at.
fn opened(facts: &Facts<'_>, target: Target, translated: &Translated) -> Result<Checkpoint> {
    let config = facts.config;
    let mut roles = vec![(Role::TokenEmbd, config.vocab_size)];
    if facts.layout.head {
        roles.push((Role::Output, config.vocab_size));
    }
    if config.attention_bias {
        roles.push((Role::Layer(0, LayerRole::AttnQBias), 1));
    }
    let tensor = |(role, rows): (Role, usize)| {
        let stored = Stored::new(DType::F16, [rows, 1].into(), vec![0; 2 * rows].into())?;
        Ok((target.name_of(role), stored))
    };
    let tensors = roles.into_iter().map(tensor).collect::<Result<Vec<_>>>()?;
    let mut draft = Draft { metadata: translated.map.clone(), tensors };
    let name = format!("the metadata to be written for {}", facts.source.path().display());
    Ok(match target {
        Target::Gguf => draft.to_gguf(&name)?,
        Target::Apr => draft.to_apr(&name)?,
        Target::Safetensors => {
            draft.metadata = Default::default();
            let weights = ("model.safetensors".to_owned(), Bytes::from(draft.safetensors()?));
            let files =
                translated.files.iter().map(|(name, text)| (name.clone(), text.clone().into()));
            Checkpoint::from_files(&name, &files.chain([weights]).collect::<Vec<_>>())?
        }
    })
}

/// The config that the target should read as. What is a tensor there is not in it.
fn expected(facts: &Facts<'_>, target: Target) -> Config {
    let mut config = facts.config.clone();
    config.tie_word_embeddings = !facts.layout.head;
    config.rope_scaling = match (target, &config.rope_scaling) {
        (Target::Safetensors, _) => rope::in_numbers(&config).0,
        (Target::Gguf, RopeScaling::Llama3(_)) | (_, RopeScaling::Factors(_)) => RopeScaling::None,
        (_, scaling) => scaling.clone(),
    };
    config
}

/// The fault of the copy that the source carries, if that is where the translation is from.
fn contradiction(facts: &Facts<'_>, target: Target, what: &str) -> Error {
    let copy = match target {
        Target::Gguf => carried::GGUF,
        Target::Apr | Target::Safetensors => carried::FILES,
    };
    match facts.source.metadata().get(copy) {
        Some(_) => Error::Contradiction {
            file: facts.source.path().to_owned(),
            copy,
            what: what.to_owned(),
        },
        None => Error::Verification {
            what: format!("metadata for {target}"),
            why: format!("{what}: it would not read as in the source"),
        },
    }
}
