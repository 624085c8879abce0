//! Which type each tensor is stored in: llama.cpp's published mixes.
//!
//! A mix has one type for most matrices, and more bits where an error costs more: the values and the way down in the
//! first and last layers, the head, and what little a mixture of experts has that all tokens share. The rules are those
//! of `llama-quantize`, tensor by tensor, for the architectures that are known here.

use std::{fmt, str::FromStr};

use apr_model::{Architecture, Config, LayerRole, Role};
use apr_tensor::DType;

/// A named choice of types, as `llama-quantize` has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, non_camel_case_types, reason = "the field's own names")]
pub enum Recipe {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K_S,
    Q3_K_M,
    Q3_K_L,
    Q4_K_S,
    Q4_K_M,
    Q5_K_S,
    Q5_K_M,
    Q6_K,
}

/// Recipe, name, llama.cpp's `general.file_type`, the type of most tensors.
const TABLE: [(Recipe, &str, u32, DType); 17] = [
    (Recipe::F32, "f32", 0, DType::F32),
    (Recipe::F16, "f16", 1, DType::F16),
    (Recipe::BF16, "bf16", 32, DType::BF16),
    (Recipe::Q4_0, "q4_0", 2, DType::Q4_0),
    (Recipe::Q4_1, "q4_1", 3, DType::Q4_1),
    (Recipe::Q5_0, "q5_0", 8, DType::Q5_0),
    (Recipe::Q5_1, "q5_1", 9, DType::Q5_1),
    (Recipe::Q8_0, "q8_0", 7, DType::Q8_0),
    (Recipe::Q2_K, "q2_k", 10, DType::Q2_K),
    (Recipe::Q3_K_S, "q3_k_s", 11, DType::Q3_K),
    (Recipe::Q3_K_M, "q3_k_m", 12, DType::Q3_K),
    (Recipe::Q3_K_L, "q3_k_l", 13, DType::Q3_K),
    (Recipe::Q4_K_S, "q4_k_s", 14, DType::Q4_K),
    (Recipe::Q4_K_M, "q4_k_m", 15, DType::Q4_K),
    (Recipe::Q5_K_S, "q5_k_s", 16, DType::Q5_K),
    (Recipe::Q5_K_M, "q5_k_m", 17, DType::Q5_K),
    (Recipe::Q6_K, "q6_k", 18, DType::Q6_K),
];

impl Recipe {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    fn row(self) -> &'static (Self, &'static str, u32, DType) {
        &TABLE[self as usize]
    }

    /// The name, in lower case.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// llama.cpp's number of it, for `general.file_type`.
    pub fn file_type(self) -> u32 {
        self.row().2
    }

    /// The type of most tensors.
    pub fn dtype(self) -> DType {
        self.row().3
    }
}

impl Recipe {
    /// The type for the matrix of `role`, whose rows have `cols` columns. `importance` is whether there is an importance
    /// matrix.
    ///
    /// Norms, biases and routers are not asked for: no recipe touches them.
    pub fn dtype_of(self, config: &Config, role: Role, cols: usize, importance: bool) -> DType {
        if !self.dtype().is_quantized() {
            return self.dtype();
        }
        let wanted = match role {
            Role::Output => self.dtype_of_head(cols),
            Role::TokenEmbd if config.tie_word_embeddings => self.dtype_of_head(cols),
            Role::Layer(layer, part) | Role::Expert(layer, part, _) => {
                self.dtype_in_layer(config, layer, part, importance)
            }
            Role::TokenEmbd | Role::OutputNorm | Role::RopeFreqs => self.dtype(),
        };
        whole_blocks(wanted, cols)
    }

    fn dtype_of_head(self, cols: usize) -> DType {
        let most = self.dtype();
        match most == DType::Q8_0 || !cols.is_multiple_of(most.block_len()) {
            true => DType::Q8_0,
            false => DType::Q6_K,
        }
    }

    fn dtype_in_layer(
        self,
        config: &Config,
        layer: usize,
        part: LayerRole,
        importance: bool,
    ) -> DType {
        use DType::{Q3_K, Q4_1, Q4_K, Q5_1, Q5_K, Q6_K, Q8_0};
        let most = self.dtype();
        let layers = config.num_hidden_layers;
        let delicate = is_delicate(layer, layers);
        // What all tokens share is small beside eight experts.
        let of_eight = config.moe.as_ref().is_some_and(|moe| moe.num_experts == 8);
        match part {
            LayerRole::AttnV | LayerRole::AttnK if of_eight => Q8_0,
            LayerRole::AttnV => {
                let wanted = match self {
                    Self::Q2_K if queries_per_key(config) >= 4 => Q4_K,
                    Self::Q2_K => Q3_K,
                    Self::Q3_K_M if layer >= 2 => Q4_K,
                    Self::Q3_K_M | Self::Q3_K_L => Q5_K,
                    Self::Q4_K_M | Self::Q5_K_M if delicate => Q6_K,
                    Self::Q4_K_S if layer < 4 => Q5_K,
                    _ => most,
                };
                match wanted {
                    Q3_K | Q4_K if is_70b(config) => Q5_K,
                    wanted => wanted,
                }
            }
            LayerRole::AttnOutput => match self {
                Self::Q2_K | Self::Q3_K_S | Self::Q3_K_M | Self::Q4_K_S | Self::Q4_K_M
                    if of_eight =>
                {
                    Q5_K
                }
                _ if of_eight => most,
                Self::Q2_K => Q3_K,
                Self::Q3_K_M => Q4_K,
                Self::Q3_K_L => Q5_K,
                _ => most,
            },
            LayerRole::FfnDown | LayerRole::FfnDownExps => match self {
                Self::Q2_K => Q3_K,
                Self::Q3_K_M if layer >= layers / 16 => Q4_K,
                Self::Q3_K_M | Self::Q3_K_L => Q5_K,
                Self::Q4_K_M | Self::Q5_K_M if delicate => Q6_K,
                Self::Q4_K_S if layer < layers / 8 => Q5_K,
                Self::Q4_0 if importance && layer < layers / 8 => Q4_1,
                Self::Q5_0 if importance && layer < layers / 8 => Q5_1,
                _ => most,
            },
            _ => most,
        }
    }
}

/// The first and the last eighth of the layers, and every third between.
fn is_delicate(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

fn queries_per_key(config: &Config) -> usize {
    config.num_attention_heads / config.num_key_value_heads
}

/// Whether llama.cpp takes the model for one of 70 billion weights, whose eight query heads share one `attn_v`.
fn is_70b(config: &Config) -> bool {
    let is_65b = config.architecture == Architecture::Llama && queries_per_key(config) == 1;
    let has_the_size = matches!(config.architecture, Architecture::Llama | Architecture::Qwen2);
    config.num_hidden_layers == 80 && has_the_size && !is_65b
}

/// `wanted`, or a type of smaller blocks of which `cols` are a whole number.
fn whole_blocks(wanted: DType, cols: usize) -> DType {
    let fits = |dtype: DType| cols.is_multiple_of(dtype.block_len());
    if fits(wanted) {
        return wanted;
    }
    let smaller = match wanted {
        DType::Q2_K | DType::Q3_K => DType::Q4_0,
        DType::Q4_K => DType::Q5_0,
        DType::Q5_K => DType::Q5_1,
        DType::Q6_K => DType::Q8_0,
        other => other,
    };
    if fits(smaller) { smaller } else { DType::F16 }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Recipe {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::all().find(|recipe| recipe.name().eq_ignore_ascii_case(name)).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum_and_names_are_read_back() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, i, "{}", row.1);
            assert_eq!(row.1.to_uppercase().parse(), Ok(row.0));
        }
    }
}
