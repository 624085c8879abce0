//! From GGUF's keys.

use apr_format::Checkpoint;

use super::{Spelling, consistent, keys::Keys, rows_of};
use crate::{Architecture, Config, LayerRole, MoeConfig, Result, RopeScaling, names::Role};

pub(super) fn read(checkpoint: &Checkpoint) -> Result<Config> {
    let keys = Keys::of(checkpoint);
    let architecture = keys.architecture(keys.str("general.architecture")?)?;
    let key = |suffix: &str| format!("{}.{suffix}", architecture.gguf_name());
    let count = |suffix: &str| keys.count(&key(suffix));
    let hidden_size = count("embedding_length")?;
    let num_attention_heads = count("attention.head_count")?;
    let head_dim = match keys.optional_count(&key("attention.key_length"))? {
        Some(head_dim) => head_dim,
        None => keys.head_dim(hidden_size, num_attention_heads)?,
    };
    if let Some(value_length) = keys.optional_count(&key("attention.value_length"))?
        && value_length != head_dim
    {
        let supported = format!("keys have {head_dim} channels; supported: the same for both");
        return Err(keys.unsupported(&key("attention.value_length"), value_length, supported));
    }
    for (suffix, neutral) in [
        ("attention.sliding_window", 0.0),
        ("attention.clamp_kqv", 0.0),
        ("attention.max_alibi_bias", 0.0),
        ("attention.scale", 0.0),
        ("logit_scale", 1.0),
        ("residual_scale", 1.0),
        ("embedding_scale", 1.0),
        ("rope.scaling.attn_factor", 1.0),
        ("attn_logit_softcapping", 0.0),
        ("final_logit_softcapping", 0.0),
    ] {
        keys.refuse_unless(&key(suffix), neutral)?;
    }
    keys.refuse_if(&key("attention.causal"), false)?;
    let moe = match architecture {
        Architecture::Qwen3Moe => Some(moe(&keys, &key)?),
        _ => {
            keys.refuse_unless(&key("expert_count"), 0.0)?;
            None
        }
    };
    // As in llama.cpp: a factor is enough, under either name, and 0 is none.
    let factor = keys.any_f64(&[&key("rope.scaling.factor"), &key("rope.scale_linear")])?;
    let rope_scaling = match (keys.metadata.str(&key("rope.scaling.type"))?, factor) {
        (Some("none"), _) | (None | Some("linear"), None | Some(0.0)) => RopeScaling::None,
        (None | Some("linear"), Some(factor)) => RopeScaling::Linear { factor },
        (Some(other), _) => {
            return Err(keys.unsupported(
                &key("rope.scaling.type"),
                other,
                "supported: none, linear, and llama3 as `rope_freqs.weight`",
            ));
        }
    };
    let vocab_size = match keys.optional_count(&key("vocab_size"))? {
        Some(n) => n,
        None => {
            rows_of(checkpoint, Role::TokenEmbd).ok_or_else(|| keys.missing(&key("vocab_size")))?
        }
    };
    let config = Config {
        architecture,
        num_hidden_layers: count("block_count")?,
        hidden_size,
        num_attention_heads,
        num_key_value_heads: keys
            .optional_count(&key("attention.head_count_kv"))?
            .unwrap_or(num_attention_heads),
        head_dim,
        // Where every layer has experts, it is of no use and may be missing.
        intermediate_size: match (&moe, keys.optional_count(&key("feed_forward_length"))?) {
            (Some(moe), None | Some(0)) => moe.moe_intermediate_size,
            _ => count("feed_forward_length")?,
        },
        vocab_size,
        max_position_embeddings: count("context_length")?,
        rms_norm_eps: keys.number(&key("attention.layer_norm_rms_epsilon"))?,
        // llama.cpp's default for files that do not say.
        rope_theta: keys.metadata.f64(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        rope_scaling,
        rotary_dim: keys.optional_count(&key("rope.dimension_count"))?.unwrap_or(head_dim),
        attention_bias: rows_of(checkpoint, Role::Layer(0, LayerRole::AttnQBias)).is_some(),
        qk_norm: architecture.has_qk_norm(),
        tie_word_embeddings: rows_of(checkpoint, Role::Output).is_none(),
        moe,
    };
    consistent(&keys, &Spelling::gguf(architecture), config)
}

/// As llama.cpp builds `qwen3moe`: softmax, weights divided by their sum, no groups, no bias, no shared expert.
fn moe(keys: &Keys<'_>, key: &impl Fn(&str) -> String) -> Result<MoeConfig> {
    for (suffix, neutral) in [
        ("expert_shared_count", 0.0),
        ("expert_shared_feed_forward_length", 0.0),
        ("expert_group_count", 1.0),
        ("expert_weights_scale", 1.0),
        ("leading_dense_block_count", 0.0),
        ("moe_every_n_layers", 1.0),
        // 1 is softmax.
        ("expert_gating_func", 1.0),
    ] {
        keys.refuse_unless(&key(suffix), neutral)?;
    }
    Ok(MoeConfig {
        num_experts: keys.count(&key("expert_count"))?,
        num_experts_per_tok: keys.count(&key("expert_used_count"))?,
        moe_intermediate_size: keys.count(&key("expert_feed_forward_length"))?,
        norm_topk_prob: keys.metadata.bool(&key("expert_weights_norm"))?.unwrap_or(true),
        decoder_sparse_step: 1,
        mlp_only_layers: Vec::new(),
    })
}
