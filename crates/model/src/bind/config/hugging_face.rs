//! From Hugging Face's `config.json`.

use apr_format::Checkpoint;

use super::{Spelling, consistent, keys::Keys};
use crate::{Architecture, Config, Error, MoeConfig, Result, RopeScaling, rope::Llama3Scaling};

pub(super) fn read(checkpoint: &Checkpoint) -> Result<Config> {
    let keys = Keys::of(checkpoint);
    if keys.metadata.get("model_type").is_none() {
        return Err(Error::MissingKey {
            file: keys.file.clone(),
            key: "model_type".to_owned(),
            hint: "; a bare .safetensors file has no config: put its config.json beside it",
        });
    }
    let architecture = keys.architecture(keys.str("model_type")?)?;
    refuse_what_changes_numbers(&keys)?;
    let hidden_size = keys.count("hidden_size")?;
    let num_attention_heads = keys.count("num_attention_heads")?;
    let head_dim = match (keys.optional_count("head_dim")?, architecture) {
        (Some(head_dim), _) => head_dim,
        // Qwen3Config's default, which is not hidden_size / num_attention_heads. Qwen3MoeConfig has none.
        (None, Architecture::Qwen3) => 128,
        (None, _) => keys.head_dim(hidden_size, num_attention_heads)?,
    };
    let partial =
        keys.any_f64(&["partial_rotary_factor", "rope_parameters.partial_rotary_factor"])?;
    let config = Config {
        architecture,
        num_hidden_layers: keys.count("num_hidden_layers")?,
        hidden_size,
        num_attention_heads,
        num_key_value_heads: keys
            .optional_count("num_key_value_heads")?
            .unwrap_or(num_attention_heads),
        head_dim,
        intermediate_size: keys.count("intermediate_size")?,
        vocab_size: keys.count("vocab_size")?,
        max_position_embeddings: keys.count("max_position_embeddings")?,
        rms_norm_eps: keys.number("rms_norm_eps")?,
        // The default of all three config classes; files of the first Llamas rely on it.
        rope_theta: keys
            .any_f64(&["rope_parameters.rope_theta", "rope_theta"])?
            .unwrap_or(10_000.0),
        rope_scaling: rope_scaling(&keys)?,
        rotary_dim: partial.map_or(head_dim, |p| (p * head_dim as f64) as usize),
        attention_bias: match architecture {
            Architecture::Qwen2 => true,
            _ => keys.metadata.bool("attention_bias")?.unwrap_or(false),
        },
        qk_norm: architecture.has_qk_norm(),
        tie_word_embeddings: keys.metadata.bool("tie_word_embeddings")?.unwrap_or(false),
        moe: match architecture {
            Architecture::Qwen3Moe => Some(moe(&keys)?),
            _ => None,
        },
    };
    consistent(&keys, &Spelling::hugging_face(), config)
}

/// The keys of `Qwen3MoeConfig`, with its defaults where they are neutral.
pub(super) fn moe(keys: &Keys<'_>) -> Result<MoeConfig> {
    let step = match keys.optional_count("decoder_sparse_step")? {
        None => 1,
        Some(_) => keys.count("decoder_sparse_step")?,
    };
    Ok(MoeConfig {
        num_experts: keys.any_count(&["num_experts", "num_local_experts"])?,
        num_experts_per_tok: keys.count("num_experts_per_tok")?,
        moe_intermediate_size: keys.count("moe_intermediate_size")?,
        // The class's default; every published model says true.
        norm_topk_prob: keys.metadata.bool("norm_topk_prob")?.unwrap_or(false),
        decoder_sparse_step: step,
        mlp_only_layers: keys.numbers("mlp_only_layers")?,
    })
}

/// Refuses keys of `config.json` under which the decoder would compute something else.
pub(super) fn refuse_what_changes_numbers(keys: &Keys<'_>) -> Result<()> {
    // The list says it layer by layer; older files have only the switch.
    match keys.metadata.strings("layer_types")? {
        Some(types) => {
            if let Some(other) = types.iter().find(|&&kind| kind != "full_attention") {
                return Err(keys.unsupported("layer_types", other, "supported: full_attention"));
            }
        }
        None => keys.refuse_if("use_sliding_window", true)?,
    }
    keys.refuse_if("mlp_bias", true)?;
    keys.refuse_if("is_causal", false)?;
    match keys.metadata.str("hidden_act")? {
        None | Some("silu") => {}
        Some(other) => return Err(keys.unsupported("hidden_act", other, "supported: silu")),
    }
    Ok(())
}

/// `rope_scaling` of transformers 4 and `rope_parameters` of transformers 5.
pub(super) fn rope_scaling(keys: &Keys<'_>) -> Result<RopeScaling> {
    for parent in ["rope_parameters", "rope_scaling"] {
        let key = |name: &str| format!("{parent}.{name}");
        let kind = match keys.metadata.str(&key("rope_type"))? {
            Some(kind) => kind,
            None => match keys.metadata.str(&key("type"))? {
                Some(kind) => kind,
                // A factor without a rule would be passed over.
                None if keys.metadata.get(&key("factor")).is_some() => {
                    return Err(keys.missing(&key("rope_type")));
                }
                None => continue,
            },
        };
        return match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: keys.number(&key("factor"))? }),
            "llama3" => Ok(RopeScaling::Llama3(Llama3Scaling {
                factor: keys.number(&key("factor"))?,
                low_freq_factor: keys.number(&key("low_freq_factor"))?,
                high_freq_factor: keys.number(&key("high_freq_factor"))?,
                original_max_position_embeddings: keys
                    .number(&key("original_max_position_embeddings"))?,
            })),
            other => {
                let supported = "supported: default, linear, llama3";
                Err(keys.unsupported(&key("rope_type"), other, supported))
            }
        };
    }
    Ok(RopeScaling::None)
}
