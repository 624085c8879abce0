//! Llama 3's rotary scaling, which Hugging Face has as four numbers and GGUF as one factor for each pair.

use apr_format::{Checkpoint, Map};
use apr_model::{Config, Role, RopeFrequencies, RopeScaling};
use apr_tensor::{DType, Stored};

use crate::Result;

/// The frequencies that `checkpoint`, whose config is `config`, is run with.
pub(crate) fn frequencies(checkpoint: &Checkpoint, config: &Config) -> Result<RopeFrequencies> {
    let plain = config.rope_frequencies();
    let Some(stored) = checkpoint.tensor(&Role::RopeFreqs.gguf_name()) else { return Ok(plain) };
    let (expected, found) = ([config.rotary_dim / 2].into(), stored.shape().clone());
    if found != expected {
        let (file, name) = (checkpoint.path().display().to_string(), Role::RopeFreqs.gguf_name());
        return Err(apr_model::Error::TensorShape { file, name, expected, found }.into());
    }
    Ok(plain.divided_by(&stored.to_f32()?))
}

/// What GGUF stores in `rope_freqs.weight` for a model that is scaled by Llama 3's rule.
pub(crate) fn llama3_factors(config: &Config) -> Option<Stored> {
    let RopeScaling::Llama3(scaling) = &config.rope_scaling else { return None };
    let plain = RopeFrequencies::new(config.rope_theta, config.rotary_dim);
    let scaled = plain.clone().llama3(scaling);
    let pairs = plain.as_slice().iter().zip(scaled.as_slice());
    let factors: Vec<u8> = pairs.flat_map(|(p, s)| ((p / s) as f32).to_le_bytes()).collect();
    let stored = Stored::new(DType::F32, [config.rotary_dim / 2].into(), factors.into());
    Some(stored.expect("one factor for each pair"))
}

/// Whether metadata in Hugging Face's words say how frequencies are scaled.
pub(crate) fn says_scaling(map: &Map) -> bool {
    map.get("rope_scaling").is_some()
}
