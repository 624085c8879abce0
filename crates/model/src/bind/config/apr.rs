//! From the metadata of an `.apr` file, which knows Hugging Face's keys under names of its own too.

use apr_format::Checkpoint;

use super::{
    Spelling, consistent,
    hugging_face::{moe, refuse_what_changes_numbers, rope_scaling},
    keys::Keys,
    rows_of,
};
use crate::{Architecture, Config, LayerRole, Result, names::Role};

pub(super) fn read(checkpoint: &Checkpoint) -> Result<Config> {
    let keys = Keys::of(checkpoint);
    let named = match keys.metadata.str("hf_architecture")? {
        Some(name) => name,
        None => match keys.metadata.str("architecture")? {
            Some(name) => name,
            None => keys.str("model_type")?,
        },
    };
    // `hf_architecture` is the class: Qwen2ForCausalLM.
    let name = named.strip_suffix("ForCausalLM").unwrap_or(named).to_ascii_lowercase();
    let architecture = keys.architecture(&name)?;
    refuse_what_changes_numbers(&keys)?;
    if architecture != Architecture::Qwen3Moe {
        keys.refuse_unless("num_experts", 0.0)?;
    }
    let hidden_size = keys.count("hidden_size")?;
    let num_attention_heads = keys.any_count(&["num_heads", "num_attention_heads"])?;
    let head_dim = match keys.optional_count("head_dim")? {
        Some(head_dim) => head_dim,
        None => match rows_of(checkpoint, Role::Layer(0, LayerRole::AttnQ)) {
            Some(rows) if rows.is_multiple_of(num_attention_heads) => rows / num_attention_heads,
            _ => keys.head_dim(hidden_size, num_attention_heads)?,
        },
    };
    let config = Config {
        architecture,
        num_hidden_layers: keys.any_count(&["num_layers", "num_hidden_layers"])?,
        hidden_size,
        num_attention_heads,
        num_key_value_heads: keys
            .any_optional_count(&["num_kv_heads", "num_key_value_heads"])?
            .unwrap_or(num_attention_heads),
        head_dim,
        intermediate_size: keys.count("intermediate_size")?,
        vocab_size: keys.count("vocab_size")?,
        max_position_embeddings: keys.count("max_position_embeddings")?,
        rms_norm_eps: keys.number("rms_norm_eps")?,
        rope_theta: keys.number("rope_theta")?,
        rope_scaling: rope_scaling(&keys)?,
        rotary_dim: head_dim,
        attention_bias: rows_of(checkpoint, Role::Layer(0, LayerRole::AttnQBias)).is_some(),
        qk_norm: architecture.has_qk_norm(),
        tie_word_embeddings: rows_of(checkpoint, Role::Output).is_none(),
        moe: match architecture {
            Architecture::Qwen3Moe => Some(moe(&keys)?),
            _ => None,
        },
    };
    consistent(&keys, &Spelling::hugging_face(), config)
}
