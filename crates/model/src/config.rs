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
    /// Llama 2 and 3.
    Llama,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Qwen2, Self::Qwen3, Self::Llama];

    /// The name in GGUF's `general.architecture` and in `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Llama => "llama",
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Architecture {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|a| a.name() == name).ok_or(())
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
