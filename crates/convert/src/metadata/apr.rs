//! The keys of `.apr`, as aprender's reader and ours want them.

use apr_format::{Container, Map, Value};
use apr_model::{HeadRows, RopeScaling};

use super::{Facts, decimal, hugging_face};
use crate::{Error, Layout, Result, Target};

/// In which order the rows of heads are stored.
const ROPE_TYPE: &str = "rope_type";

/// The keys that say what `facts` say.
pub(super) fn write(facts: &Facts<'_>) -> Result<Map> {
    let config = facts.config;
    if config.rotary_dim != config.head_dim {
        return Err(Error::Inexpressible {
            target: Target::Apr,
            what: format!("{} of {} rotated channels", config.rotary_dim, config.head_dim),
            why: "there is no key for it",
        });
    }
    let mut map = Map::default();
    map.insert("model_type", config.architecture.name());
    map.insert("name", facts.name.as_str());
    map.insert("architecture", config.architecture.name());
    map.insert("hf_architecture", hugging_face::class_of(config.architecture));
    map.insert(
        "original_format",
        match facts.source.container() {
            Container::Gguf { .. } => "gguf",
            Container::Safetensors => "safetensors",
            Container::Apr => "apr",
        },
    );
    for (key, count) in [
        ("hidden_size", config.hidden_size),
        ("num_layers", config.num_hidden_layers),
        ("num_heads", config.num_attention_heads),
        ("num_kv_heads", config.num_key_value_heads),
        ("head_dim", config.head_dim),
        ("vocab_size", config.vocab_size),
        ("intermediate_size", config.intermediate_size),
        ("max_position_embeddings", config.max_position_embeddings),
    ] {
        map.insert(key, count as u64);
    }
    map.insert("rope_theta", decimal(config.rope_theta));
    map.insert(ROPE_TYPE, rope_type(facts.layout));
    if config.rope_scaling != RopeScaling::None {
        hugging_face::rope_scaling(&config.rope_scaling)
            .map(|scaling| map.insert("rope_scaling", Value::from(scaling)));
    }
    map.insert("rms_norm_eps", decimal(config.rms_norm_eps));
    map.insert("tie_word_embeddings", !facts.layout.head);
    if let Some(moe) = &config.moe {
        hugging_face::experts(moe, &mut map);
    }
    if let Some(parts) = &facts.tokenizer {
        for (key, value) in parts.apr_metadata()?.iter() {
            map.insert(key, value.clone());
        }
    }
    Ok(map)
}

/// The keys of an `.apr` file whose rows may be stored in another order now.
pub(super) fn updated(mut original: Map, facts: &Facts<'_>) -> Map {
    if original.get(ROPE_TYPE).is_some() {
        original.insert(ROPE_TYPE, rope_type(facts.layout));
    }
    original
}

fn rope_type(layout: &Layout) -> u32 {
    match layout.head_rows {
        HeadRows::Interleaved => 0,
        HeadRows::Halves => 2,
    }
}
