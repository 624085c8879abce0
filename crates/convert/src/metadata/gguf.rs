//! GGUF's keys, as llama.cpp's converter writes them.

use apr_format::{Map, Value};
use apr_model::{Architecture, RopeScaling};

use super::Facts;
use crate::{Error, Layout, Recipe, Result, Target};

/// The version of ggml's block layouts.
const QUANTIZATION_VERSION: u32 = 2;

const FILE_TYPE: &str = "general.file_type";

/// The keys that say what `facts` say.
pub(super) fn write(facts: &Facts<'_>) -> Result<Map> {
    refuse(facts)?;
    let config = facts.config;
    let architecture = config.architecture.gguf_name();
    let mut map = Map::default();
    map.insert("general.architecture", architecture);
    map.insert("general.type", "model");
    map.insert("general.name", facts.name.as_str());
    let mut set = |suffix: &str, value: Value| {
        map.insert(format!("{architecture}.{suffix}"), value);
    };
    for (suffix, count) in [
        ("vocab_size", config.vocab_size),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("block_count", config.num_hidden_layers),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.rotary_dim),
    ] {
        set(suffix, (count as u64).into());
    }
    set("attention.layer_norm_rms_epsilon", (config.rms_norm_eps as f32).into());
    set("rope.freq_base", (config.rope_theta as f32).into());
    // Llama 3's rule is a tensor.
    if let RopeScaling::Linear { factor } = config.rope_scaling {
        set("rope.scaling.type", "linear".into());
        set("rope.scaling.factor", (factor as f32).into());
    }
    if let Some(moe) = &config.moe {
        for (suffix, count) in [
            ("expert_count", moe.num_experts),
            ("expert_used_count", moe.num_experts_per_tok),
            ("expert_feed_forward_length", moe.moe_intermediate_size),
        ] {
            set(suffix, (count as u64).into());
        }
        if !moe.norm_topk_prob {
            set("expert_weights_norm", false.into());
        }
    }
    if let Some(parts) = &facts.tokenizer {
        for (key, value) in parts.gguf_metadata(config.vocab_size)?.iter() {
            map.insert(key, value.clone());
        }
    }
    map.insert("general.quantization_version", QUANTIZATION_VERSION);
    if let Some(number) = file_type(facts.layout) {
        map.insert(FILE_TYPE, number);
    }
    Ok(map)
}

/// The keys of a GGUF file whose tensors may be stored in other types now.
pub(super) fn updated(mut original: Map, facts: &Facts<'_>) -> Map {
    let stated = original.get(FILE_TYPE).and_then(Value::as_u64);
    let stated = Recipe::all().find(|recipe| stated == Some(recipe.file_type().into()));
    // A mix is called after a type that some of its tensors have.
    let has = |recipe: Recipe| facts.source.tensors().any(|(_, t)| t.dtype() == recipe.dtype());
    let is_another = facts.layout.recipe.is_some() || stated.is_some_and(|recipe| !has(recipe));
    if is_another && let Some(number) = file_type(facts.layout) {
        original.insert(FILE_TYPE, number);
        original.insert("general.quantization_version", QUANTIZATION_VERSION);
    }
    original
}

/// Whether a key tells of how the tensors are stored, and not of the model.
pub(super) fn is_of_layout(key: &str) -> bool {
    key == FILE_TYPE
}

/// llama.cpp's number of the mix of types.
fn file_type(layout: &Layout) -> Option<u32> {
    let simple = || Recipe::all().find(|recipe| recipe.dtype() == layout.dtype);
    layout.recipe.or_else(simple).map(Recipe::file_type)
}

/// What llama.cpp computes otherwise, whatever a file says.
fn refuse(facts: &Facts<'_>) -> Result<()> {
    let config = facts.config;
    let inexpressible = |what: &str, why| {
        Err(Error::Inexpressible { target: Target::Gguf, what: what.to_owned(), why })
    };
    if config.attention_bias && config.qk_norm {
        return inexpressible("attention_bias", "qwen3 has no biases there");
    }
    if let Some(moe) = &config.moe
        && (moe.decoder_sparse_step != 1 || !moe.mlp_only_layers.is_empty())
    {
        return inexpressible(
            "decoder_sparse_step, mlp_only_layers",
            "all layers of qwen3moe have experts there",
        );
    }
    if config.architecture == Architecture::Qwen2 && !config.attention_bias {
        return inexpressible("q, k and v without biases", "qwen2 always has them");
    }
    Ok(())
}
