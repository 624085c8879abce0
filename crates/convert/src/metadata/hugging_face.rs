//! The files of a Hugging Face directory, as transformers reads them.

use apr_format::{Map, Value};
use apr_model::{Architecture, Config, Llama3Scaling, MoeConfig, RopeScaling};
use apr_tensor::DType;
use apr_tokenizer::{Kind, Parts};
use serde_json::json;

use super::{Facts, decimal, json};
use crate::{Error, Loss, Result, Target, rope};

/// The files of a directory, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Files(pub(super) Vec<(String, Content)>);

/// What is in a file.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Content {
    Json(serde_json::Value),
    Text(String),
}

impl Files {
    pub(super) fn texts(self) -> Vec<(String, Vec<u8>)> {
        self.0.into_iter().map(|(name, content)| (name, content.bytes())).collect()
    }

    pub(super) fn json_mut(&mut self, name: &str) -> Option<&mut serde_json::Value> {
        self.0.iter_mut().find_map(|(n, content)| match content {
            Content::Json(value) if n == name => Some(value),
            _ => None,
        })
    }
}

impl Content {
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::Json(value) => format!("{value:#}\n").into_bytes(),
            Self::Text(text) => text.into_bytes(),
        }
    }
}

/// The files that say what `facts` say, and what they cannot.
pub(super) fn write(facts: &Facts<'_>) -> Result<(Files, Option<Loss>)> {
    refuse(facts.config)?;
    let (config, loss) = config(facts);
    let mut files = vec![("config.json".to_owned(), Content::Json(config))];
    if let Some(parts) = &facts.tokenizer {
        for (name, value) in [
            ("generation_config.json", generation_config(facts, parts)),
            ("tokenizer.json", parts.tokenizer_json()?),
            ("tokenizer_config.json", tokenizer_config(facts, parts)),
        ] {
            files.push((name.to_owned(), Content::Json(value)));
        }
    }
    Ok((Files(files), loss))
}

/// The files of a directory whose tensors may be stored in another type now.
pub(super) fn updated(mut files: Files, facts: &Facts<'_>) -> Files {
    if let Some(config) = files.json_mut("config.json") {
        for key in ["torch_dtype", "dtype"] {
            if let Some(dtype) = config.get_mut(key) {
                *dtype = name_of(facts.layout.dtype).into();
            }
        }
        if config["tie_word_embeddings"].as_bool().unwrap_or(false) == facts.layout.head {
            config["tie_word_embeddings"] = (!facts.layout.head).into();
        }
    }
    files
}

/// The class of a model in transformers.
pub(super) fn class_of(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Qwen2 => "Qwen2ForCausalLM",
        Architecture::Qwen3 => "Qwen3ForCausalLM",
        Architecture::Qwen3Moe => "Qwen3MoeForCausalLM",
        Architecture::Llama => "LlamaForCausalLM",
    }
}

/// `rope_scaling`, where there is one that can be said in numbers.
pub(super) fn rope_scaling(scaling: &RopeScaling) -> Option<Map> {
    let mut map = Map::default();
    match *scaling {
        RopeScaling::None | RopeScaling::Factors(_) => return None,
        RopeScaling::Linear { factor } => {
            map.insert("rope_type", "linear");
            map.insert("factor", decimal(factor));
        }
        RopeScaling::Llama3(Llama3Scaling {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: original,
        }) => {
            map.insert("rope_type", "llama3");
            map.insert("factor", factor);
            map.insert("low_freq_factor", low_freq_factor);
            map.insert("high_freq_factor", high_freq_factor);
            // A number of positions, of which transformers wants a whole one.
            let whole = original.fract() == 0.0 && original < f64::from(u32::MAX);
            let original: Value = if whole { (original as u64).into() } else { original.into() };
            map.insert("original_max_position_embeddings", original);
        }
    }
    Some(map)
}

/// The keys of a mixture of experts.
pub(super) fn experts(moe: &MoeConfig, map: &mut Map) {
    map.insert("num_experts", moe.num_experts as u64);
    map.insert("num_experts_per_tok", moe.num_experts_per_tok as u64);
    map.insert("moe_intermediate_size", moe.moe_intermediate_size as u64);
    map.insert("norm_topk_prob", moe.norm_topk_prob);
    map.insert("decoder_sparse_step", moe.decoder_sparse_step as u64);
    let dense: Vec<u64> = moe.mlp_only_layers.iter().map(|&layer| layer as u64).collect();
    map.insert("mlp_only_layers", dense);
}

fn config(facts: &Facts<'_>) -> (serde_json::Value, Option<Loss>) {
    let config = facts.config;
    let mut map = Map::default();
    map.insert("architectures", vec![class_of(config.architecture)]);
    map.insert("model_type", config.architecture.name());
    if config.architecture != Architecture::Qwen2 {
        map.insert("attention_bias", config.attention_bias);
    }
    if let Some(parts) = &facts.tokenizer {
        for (key, id) in [
            ("bos_token_id", parts.bos),
            ("eos_token_id", parts.eos),
            ("pad_token_id", parts.padding),
        ] {
            map.insert(key, id.map_or(Value::Null, Value::from));
        }
    }
    map.insert("hidden_act", "silu");
    for (key, count) in [
        ("head_dim", config.head_dim),
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("max_position_embeddings", config.max_position_embeddings),
        ("num_attention_heads", config.num_attention_heads),
        ("num_hidden_layers", config.num_hidden_layers),
        ("num_key_value_heads", config.num_key_value_heads),
        ("vocab_size", config.vocab_size),
    ] {
        map.insert(key, count as u64);
    }
    map.insert("rms_norm_eps", decimal(config.rms_norm_eps));
    map.insert("rope_theta", decimal(config.rope_theta));
    let (scaling, loss) = rope::in_numbers(config);
    if let Some(scaling) = rope_scaling(&scaling) {
        map.insert("rope_scaling", scaling);
    }
    map.insert("tie_word_embeddings", !facts.layout.head);
    map.insert("torch_dtype", name_of(facts.layout.dtype));
    if let Some(moe) = &config.moe {
        experts(moe, &mut map);
    }
    (serde_json::Value::from(&map), loss)
}

fn generation_config(facts: &Facts<'_>, parts: &Parts) -> serde_json::Value {
    let mut map = serde_json::Map::new();
    if let Some(bos) = parts.bos {
        map.insert("bos_token_id".to_owned(), bos.into());
    }
    map.insert("eos_token_id".to_owned(), json!(facts.ends));
    if let Some(padding) = parts.padding {
        map.insert("pad_token_id".to_owned(), padding.into());
    }
    map.into()
}

fn tokenizer_config(facts: &Facts<'_>, parts: &Parts) -> serde_json::Value {
    let added = |(id, (text, _)): (u32, &(String, Kind))| {
        let special = match parts.kind_in_use(id) {
            Kind::Control | Kind::Unknown => true,
            Kind::UserDefined => false,
            Kind::Normal | Kind::Unused | Kind::Byte => return None,
        };
        let token = json!({
            "content": text,
            "lstrip": false,
            "normalized": false,
            "rstrip": false,
            "single_word": false,
            "special": special,
        });
        Some((id.to_string(), token))
    };
    let added: serde_json::Map<_, _> = (0u32..).zip(&parts.tokens).filter_map(added).collect();
    let mut config = json!({
        "added_tokens_decoder": added,
        "bos_token": facts.token(|parts| parts.bos),
        "clean_up_tokenization_spaces": false,
        "eos_token": facts.token(|parts| parts.eos),
        "model_max_length": facts.config.max_position_embeddings,
        "pad_token": facts.token(|parts| parts.padding),
        // Takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": facts.token(|parts| parts.unknown),
    });
    if let Some(template) = &parts.template {
        config["chat_template"] = match parts.named_templates.as_slice() {
            [] => template.as_str().into(),
            named => {
                let entry =
                    |name: &str, template: &str| json!({"name": name, "template": template});
                let named = named.iter().map(|(name, template)| entry(name, template));
                std::iter::once(entry("default", template)).chain(named).collect()
            }
        };
    }
    config
}

/// PyTorch's name of a type.
fn name_of(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    }
}

/// What transformers computes otherwise, whatever a config says.
fn refuse(config: &Config) -> Result<()> {
    let inexpressible =
        |what: String, why| Err(Error::Inexpressible { target: Target::Safetensors, what, why });
    match (config.architecture, config.attention_bias) {
        (Architecture::Qwen2, false) => {
            inexpressible("q, k and v without biases".to_owned(), "Qwen2 always has them there")
        }
        (Architecture::Qwen2, true) | (_, false) if config.rotary_dim != config.head_dim => {
            let what = format!("{} of {} rotated channels", config.rotary_dim, config.head_dim);
            inexpressible(what, "transformers rotates all of them")
        }
        (Architecture::Qwen2, true) | (_, false) => Ok(()),
        (_, true) => inexpressible(
            "biases of q, k and v alone".to_owned(),
            "attention_bias adds one to the output projection as well",
        ),
    }
}

/// The JSON files of the source of `facts`, or of any directory.
pub(super) fn files_of(source: &apr_format::Checkpoint) -> Result<Files> {
    let config: Map = source
        .metadata()
        .iter()
        .filter(|(key, _)| *key != "__metadata__")
        .map(|(key, value)| (key, value.clone()))
        .collect();
    let mut files =
        vec![("config.json".to_owned(), Content::Json(serde_json::Value::from(&config)))];
    let companions = source.companions();
    for (name, file) in [
        ("generation_config.json", &companions.generation_config),
        ("special_tokens_map.json", &companions.special_tokens_map),
        ("tokenizer.json", &companions.tokenizer),
        ("tokenizer_config.json", &companions.tokenizer_config),
    ] {
        if let Some(file) = file {
            files.push((name.to_owned(), Content::Json(json::parsed(file)?)));
        }
    }
    if let Some(file) = &companions.chat_template {
        files.push(("chat_template.jinja".to_owned(), Content::Text(file.text()?.to_owned())));
    }
    Ok(Files(files))
}
