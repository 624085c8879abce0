//! A model's dimensions and constants, under the names of Hugging Face's `config.json`.

use std::{fmt, str::FromStr};

use crate::rope::{Llama3Scaling, RopeFrequencies};

/// The architectures that run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3, dense: RMSNorm on each head of q and k.
    Qwen3,
    /// Qwen3 with a mixture of experts in place of the feed-forward network.
    Qwen3Moe,
    /// Llama 2 and 3.
    Llama,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Qwen2, Self::Qwen3, Self::Qwen3Moe, Self::Llama];

    /// The name in Hugging Face's `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Llama => "llama",
        }
    }

    /// The name in GGUF's `general.architecture`, which its keys begin with.
    pub fn gguf_name(self) -> &'static str {
        match self {
            Self::Qwen3Moe => "qwen3moe",
            other => other.name(),
        }
    }

    /// Whether each head of q and k is normalised.
    pub fn has_qk_norm(self) -> bool {
        matches!(self, Self::Qwen3 | Self::Qwen3Moe)
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// From either name.
impl FromStr for Architecture {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|a| a.name() == name || a.gguf_name() == name).ok_or(())
    }
}

/// A decoder's dimensions and constants.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the keys of config.json, which documents them")]
pub struct Config {
    pub architecture: Architecture,
    pub num_hidden_layers: usize,
    pub hidden_size: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    /// Channels of each head that are rotated; the others pass through.
    pub rotary_dim: usize,
    /// Whether q, k and v have a bias.
    pub attention_bias: bool,
    /// Whether each head of q and k is normalised.
    pub qk_norm: bool,
    pub tie_word_embeddings: bool,
    /// The experts of a mixture; `None` where all layers are dense.
    pub moe: Option<MoeConfig>,
}

/// The dimensions and constants of a mixture of experts.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[allow(missing_docs, reason = "the keys of config.json, which documents them")]
pub struct MoeConfig {
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    pub moe_intermediate_size: usize,
    /// Whether the weights of a token's experts are divided by their sum.
    pub norm_topk_prob: bool,
    /// Every how many layers there are experts; the others have a feed-forward network of `intermediate_size`.
    #[serde(default = "every_layer")]
    pub decoder_sparse_step: usize,
    /// Layers that have no experts all the same.
    #[serde(default)]
    pub mlp_only_layers: Vec<usize>,
}

fn every_layer() -> usize {
    1
}

impl MoeConfig {
    /// Whether layer `layer` has experts.
    pub fn has_layer(&self, layer: usize) -> bool {
        (layer + 1).is_multiple_of(self.decoder_sparse_step)
            && !self.mlp_only_layers.contains(&layer)
    }
}

/// How rotary frequencies are changed for contexts longer than those of the first training.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by one factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's rule.
    Llama3(Llama3Scaling),
    /// Divided by factors stored in the file (GGUF's `rope_freqs.weight`).
    Factors(Vec<f32>),
}

impl Config {
    /// Channels of all query heads.
    pub fn q_dim(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Channels of all key heads.
    pub fn kv_dim(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// The experts of layer `layer`, if it has any.
    pub fn experts_of(&self, layer: usize) -> Option<&MoeConfig> {
        self.moe.as_ref().filter(|moe| moe.has_layer(layer))
    }

    /// The angular frequency of each rotated pair, scaled as the config says.
    ///
    /// # Panics
    /// If there are stored factors, but not one for each pair.
    pub fn rope_frequencies(&self) -> RopeFrequencies {
        let plain = RopeFrequencies::new(self.rope_theta, self.rotary_dim);
        match &self.rope_scaling {
            RopeScaling::None => plain,
            RopeScaling::Linear { factor } => plain.linear(*factor),
            RopeScaling::Llama3(scaling) => plain.llama3(scaling),
            RopeScaling::Factors(factors) => plain.divided_by(factors),
        }
    }
}
