//! The config, from whichever metadata the container has.
//!
//! Each container spells the same facts its own way; [`Config`] has Hugging Face's names for them. A value
//! that would change the numbers and that the decoder does not know is refused here, by its key.

mod apr;
mod gguf;
mod hugging_face;
mod keys;

use apr_format::{Checkpoint, Container};

use crate::{
    Architecture, Config, MoeConfig, Result, RopeScaling, names::Role, rope::Llama3Scaling,
};
use keys::Keys;

/// In which order the rows of a head of `q_proj` and `k_proj` are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadRows {
    /// Pair `i` is rows `i` and `i + head_dim / 2`: Hugging Face's order, and the decoder's.
    Halves,
    /// Pair `i` is rows `2i` and `2i + 1`: llama.cpp's order for Llama.
    Interleaved,
}

/// The dimensions and constants that `checkpoint` declares.
pub fn read_config(checkpoint: &Checkpoint) -> Result<Config> {
    match checkpoint.container() {
        Container::Gguf { .. } => gguf::read(checkpoint),
        Container::Safetensors => hugging_face::read(checkpoint),
        Container::Apr => apr::read(checkpoint),
    }
}

/// The order that `checkpoint` stores the rows of heads in.
pub fn head_rows(checkpoint: &Checkpoint, config: &Config) -> Result<HeadRows> {
    let keys = Keys::of(checkpoint);
    let interleaved = match checkpoint.container() {
        Container::Gguf { .. } => config.architecture == Architecture::Llama,
        Container::Apr => match keys.metadata.u64("rope_type")? {
            Some(0) => true,
            Some(2) => false,
            Some(other) => {
                return Err(keys.unsupported(
                    "rope_type",
                    other,
                    "supported: 0 (pairs), 2 (halves)",
                ));
            }
            // Only llama.cpp's converter stores pairs, and only under its own tensor names.
            None if config.architecture == Architecture::Llama
                && checkpoint.tensor("token_embd.weight").is_some() =>
            {
                return Err(keys.missing("rope_type"));
            }
            None => false,
        },
        Container::Safetensors => false,
    };
    if interleaved && config.rotary_dim != config.head_dim {
        let key = "rope.dimension_count";
        return Err(keys.unsupported(
            key,
            config.rotary_dim,
            "interleaved heads are rotated whole",
        ));
    }
    Ok(if interleaved { HeadRows::Interleaved } else { HeadRows::Halves })
}

/// The rows of the tensor with this role, if it is there.
fn rows_of(checkpoint: &Checkpoint, role: Role) -> Option<usize> {
    let stored = checkpoint.tensor(&role.gguf_name()).or(checkpoint.tensor(&role.hf_name()))?;
    Some(stored.shape().rows())
}

/// What a container calls the facts that [`consistent`] checks.
struct Spelling {
    kv_heads: String,
    rotary_dim: String,
    rms_norm_eps: String,
    rope_theta: String,
    factor: String,
    experts_per_tok: String,
}

impl Spelling {
    /// Hugging Face's.
    fn hugging_face() -> Self {
        Self {
            kv_heads: "num_key_value_heads".to_owned(),
            rotary_dim: "head_dim * partial_rotary_factor".to_owned(),
            rms_norm_eps: "rms_norm_eps".to_owned(),
            rope_theta: "rope_theta".to_owned(),
            factor: "rope_scaling.factor".to_owned(),
            experts_per_tok: "num_experts_per_tok".to_owned(),
        }
    }

    /// GGUF's.
    fn gguf(architecture: Architecture) -> Self {
        let key = |suffix: &str| format!("{}.{suffix}", architecture.gguf_name());
        Self {
            kv_heads: key("attention.head_count_kv"),
            rotary_dim: key("rope.dimension_count"),
            rms_norm_eps: key("attention.layer_norm_rms_epsilon"),
            rope_theta: key("rope.freq_base"),
            factor: key("rope.scaling.factor"),
            experts_per_tok: key("expert_used_count"),
        }
    }
}

/// Checks what the decoder relies on.
fn consistent(keys: &Keys<'_>, spelling: &Spelling, config: Config) -> Result<Config> {
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        let why = format!("it must divide the {heads} query heads");
        return Err(keys.impossible(&spelling.kv_heads, kv_heads, why));
    }
    let (rotary_dim, head_dim) = (config.rotary_dim, config.head_dim);
    if rotary_dim == 0 || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
        let why = format!("an even number from 2 to head_dim = {head_dim} is needed");
        return Err(keys.impossible(&spelling.rotary_dim, rotary_dim, why));
    }
    if let Some(MoeConfig { num_experts, num_experts_per_tok, .. }) = config.moe
        && num_experts_per_tok > num_experts
    {
        let why = format!("there are {num_experts} experts");
        return Err(keys.impossible(&spelling.experts_per_tok, num_experts_per_tok, why));
    }
    if !(config.rms_norm_eps.is_finite() && config.rms_norm_eps >= 0.0) {
        return Err(keys.impossible(
            &spelling.rms_norm_eps,
            config.rms_norm_eps,
            "it must be finite and not negative",
        ));
    }
    if !(config.rope_theta.is_finite() && config.rope_theta > 0.0) {
        return Err(keys.impossible(
            &spelling.rope_theta,
            config.rope_theta,
            "it must be positive",
        ));
    }
    if let RopeScaling::Linear { factor } | RopeScaling::Llama3(Llama3Scaling { factor, .. }) =
        config.rope_scaling
        && !(factor.is_finite() && factor > 0.0)
    {
        return Err(keys.impossible(&spelling.factor, factor, "it must be positive"));
    }
    Ok(config)
}
