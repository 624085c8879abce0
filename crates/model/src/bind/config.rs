//! The config, from whichever metadata the container has.
//!
//! Each container spells the same facts its own way; [`Config`] has Hugging Face's names for them. A value
//! that would change the numbers and that the decoder does not know is refused here, by its key.

use apr_format::{Checkpoint, Container, Metadata};

use crate::{
    Architecture, Config, Error, LayerRole, Result, RopeScaling, names::Role, rope::Llama3Scaling,
};

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
        Container::Gguf { .. } => from_gguf(checkpoint),
        Container::Safetensors => from_hugging_face(checkpoint),
        Container::Apr => from_apr(checkpoint),
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

fn from_gguf(checkpoint: &Checkpoint) -> Result<Config> {
    let keys = Keys::of(checkpoint);
    let architecture = keys.architecture(keys.str("general.architecture")?)?;
    let key = |suffix: &str| format!("{architecture}.{suffix}");
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
        ("expert_count", 0.0),
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
        intermediate_size: count("feed_forward_length")?,
        vocab_size,
        max_position_embeddings: count("context_length")?,
        rms_norm_eps: keys.number(&key("attention.layer_norm_rms_epsilon"))?,
        // llama.cpp's default for files that do not say.
        rope_theta: keys.metadata.f64(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        rope_scaling,
        rotary_dim: keys.optional_count(&key("rope.dimension_count"))?.unwrap_or(head_dim),
        attention_bias: rows_of(checkpoint, Role::Layer(0, LayerRole::AttnQBias)).is_some(),
        qk_norm: architecture == Architecture::Qwen3,
        tie_word_embeddings: rows_of(checkpoint, Role::Output).is_none(),
    };
    keys.consistent(config)
}

fn from_hugging_face(checkpoint: &Checkpoint) -> Result<Config> {
    let keys = Keys::of(checkpoint);
    if keys.metadata.get("model_type").is_none() {
        return Err(Error::MissingKey {
            file: keys.file.clone(),
            key: "model_type".to_owned(),
            hint: "; a bare .safetensors file has no config: put its config.json beside it",
        });
    }
    let architecture = keys.architecture(keys.str("model_type")?)?;
    keys.refuse_if("use_sliding_window", true)?;
    let layer_types = keys.metadata.strings("layer_types")?.unwrap_or_default();
    if let Some(other) = layer_types.iter().find(|&&kind| kind != "full_attention") {
        return Err(keys.unsupported("layer_types", other, "supported: full_attention"));
    }
    keys.refuse_if("mlp_bias", true)?;
    keys.refuse_if("is_causal", false)?;
    match keys.metadata.str("hidden_act")? {
        None | Some("silu") => {}
        Some(other) => return Err(keys.unsupported("hidden_act", other, "supported: silu")),
    }
    let hidden_size = keys.count("hidden_size")?;
    let num_attention_heads = keys.count("num_attention_heads")?;
    let head_dim = match (keys.optional_count("head_dim")?, architecture) {
        (Some(head_dim), _) => head_dim,
        // Qwen3Config's default, which is not hidden_size / num_attention_heads.
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
        rope_scaling: hugging_face_scaling(&keys)?,
        rotary_dim: partial.map_or(head_dim, |p| (p * head_dim as f64) as usize),
        attention_bias: match architecture {
            Architecture::Qwen2 => true,
            _ => keys.metadata.bool("attention_bias")?.unwrap_or(false),
        },
        qk_norm: architecture == Architecture::Qwen3,
        tie_word_embeddings: keys.metadata.bool("tie_word_embeddings")?.unwrap_or(false),
    };
    keys.consistent(config)
}

/// `rope_scaling` of transformers 4 and `rope_parameters` of transformers 5.
fn hugging_face_scaling(keys: &Keys<'_>) -> Result<RopeScaling> {
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

fn from_apr(checkpoint: &Checkpoint) -> Result<Config> {
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
    if keys.optional_count("num_experts")?.is_some_and(|n| n > 0) {
        return Err(keys.unsupported(
            "num_experts",
            "set",
            "mixtures of experts are not supported",
        ));
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
        rope_scaling: hugging_face_scaling(&keys)?,
        rotary_dim: head_dim,
        attention_bias: rows_of(checkpoint, Role::Layer(0, LayerRole::AttnQBias)).is_some(),
        qk_norm: architecture == Architecture::Qwen3,
        tie_word_embeddings: rows_of(checkpoint, Role::Output).is_none(),
    };
    keys.consistent(config)
}

/// The rows of the tensor with this role, if it is there.
fn rows_of(checkpoint: &Checkpoint, role: Role) -> Option<usize> {
    let stored = checkpoint.tensor(&role.gguf_name()).or(checkpoint.tensor(&role.hf_name()))?;
    Some(stored.shape().rows())
}

/// Metadata, with errors that name the file and the key.
struct Keys<'c> {
    file: String,
    metadata: &'c Metadata,
}

impl<'c> Keys<'c> {
    fn of(checkpoint: &'c Checkpoint) -> Self {
        Self { file: checkpoint.path().display().to_string(), metadata: checkpoint.metadata() }
    }

    fn missing(&self, key: &str) -> Error {
        Error::MissingKey { file: self.file.clone(), key: key.to_owned(), hint: "" }
    }

    fn unsupported(&self, key: &str, found: impl ToString, supported: impl Into<String>) -> Error {
        Error::UnsupportedValue {
            file: self.file.clone(),
            key: key.to_owned(),
            found: found.to_string(),
            supported: supported.into(),
        }
    }

    fn architecture(&self, found: &str) -> Result<Architecture> {
        found.parse().map_err(|()| Error::UnsupportedArchitecture {
            file: self.file.clone(),
            found: found.to_owned(),
            supported: Architecture::ALL.map(Architecture::name).join(", "),
        })
    }

    fn str(&self, key: &str) -> Result<&'c str> {
        self.metadata.str(key)?.ok_or_else(|| self.missing(key))
    }

    fn number(&self, key: &str) -> Result<f64> {
        self.metadata.f64(key)?.ok_or_else(|| self.missing(key))
    }

    fn any_f64(&self, keys: &[&str]) -> Result<Option<f64>> {
        for key in keys {
            if let Some(value) = self.metadata.f64(key)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        match self.metadata.u64(key)? {
            // Larger than any dimension that exists; products of two do not overflow.
            Some(n) if n > MAX_DIMENSION => {
                Err(self.unsupported(key, n, format!("at most {MAX_DIMENSION} is sensible")))
            }
            n => Ok(n.map(|n| n as usize)),
        }
    }

    fn count(&self, key: &str) -> Result<usize> {
        match self.optional_count(key)? {
            None => Err(self.missing(key)),
            Some(0) => Err(self.unsupported(key, 0, "at least 1 is needed")),
            Some(n) => Ok(n),
        }
    }

    fn any_optional_count(&self, keys: &[&str]) -> Result<Option<usize>> {
        for key in keys {
            if let Some(n) = self.optional_count(key)? {
                return Ok(Some(n));
            }
        }
        Ok(None)
    }

    fn any_count(&self, keys: &[&str]) -> Result<usize> {
        self.any_optional_count(keys)?.ok_or_else(|| self.missing(keys[0]))
    }

    fn head_dim(&self, hidden_size: usize, heads: usize) -> Result<usize> {
        if !hidden_size.is_multiple_of(heads) {
            let supported = "not a whole multiple of the number of heads, and no head_dim is given";
            return Err(self.unsupported("hidden_size", hidden_size, supported));
        }
        Ok(hidden_size / heads)
    }

    fn refuse_unless(&self, key: &str, neutral: f64) -> Result<()> {
        match self.metadata.f64(key)? {
            Some(value) if value != neutral => {
                Err(self.unsupported(key, value, format!("supported: absent or {neutral}")))
            }
            _ => Ok(()),
        }
    }

    fn refuse_if(&self, key: &str, value: bool) -> Result<()> {
        match self.metadata.bool(key)? == Some(value) {
            true => Err(self.unsupported(key, value, format!("supported: absent or {}", !value))),
            false => Ok(()),
        }
    }

    /// Checks what the decoder relies on.
    fn consistent(&self, config: Config) -> Result<Config> {
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let supported = format!("it must divide the {heads} query heads");
            return Err(self.unsupported("num_key_value_heads", kv_heads, supported));
        }
        let (rotary_dim, head_dim) = (config.rotary_dim, config.head_dim);
        if rotary_dim == 0 || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
            let supported = format!("an even number from 2 to head_dim = {head_dim} is needed");
            return Err(self.unsupported("rotary dimensions", rotary_dim, supported));
        }
        if !(config.rms_norm_eps.is_finite() && config.rms_norm_eps >= 0.0) {
            return Err(self.unsupported("rms_norm_eps", config.rms_norm_eps, "it must be finite"));
        }
        if !(config.rope_theta.is_finite() && config.rope_theta > 0.0) {
            return Err(self.unsupported("rope_theta", config.rope_theta, "it must be positive"));
        }
        if let RopeScaling::Linear { factor } | RopeScaling::Llama3(Llama3Scaling { factor, .. }) =
            config.rope_scaling
            && !(factor.is_finite() && factor > 0.0)
        {
            return Err(self.unsupported("rotary scaling factor", factor, "it must be positive"));
        }
        Ok(config)
    }
}

const MAX_DIMENSION: u64 = 1 << 24;
