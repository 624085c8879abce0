//! The numbers that the shapes of stages are made of.

use apr_model::{Config, Site, Stage};
use serde::{Deserialize, Serialize};

/// A model's dimensions, spelt as in Hugging Face's `config.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the keys of config.json, which documents them")]
pub struct Dims {
    pub num_hidden_layers: usize,
    pub hidden_size: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub qk_norm: bool,
}

impl From<&Config> for Dims {
    fn from(config: &Config) -> Self {
        Self {
            num_hidden_layers: config.num_hidden_layers,
            hidden_size: config.hidden_size,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            intermediate_size: config.intermediate_size,
            vocab_size: config.vocab_size,
            attention_bias: config.attention_bias,
            qk_norm: config.qk_norm,
        }
    }
}

impl Dims {
    /// Whether a model of these dimensions computes `site`.
    pub fn has(&self, site: Site) -> bool {
        let layer = match site.layer {
            Some(layer) => {
                !site.stage.is_whole_model() && (layer as usize) < self.num_hidden_layers
            }
            None => site.stage.is_whole_model(),
        };
        layer && self.has_stage(site.stage)
    }

    /// Whether a model of these dimensions has `stage`.
    pub fn has_stage(&self, stage: Stage) -> bool {
        match stage {
            Stage::QkvBias => self.attention_bias,
            Stage::QNorm | Stage::KNorm => self.qk_norm,
            _ => true,
        }
    }

    /// All stages of the model, in the order of computation.
    pub fn stages(&self) -> impl Iterator<Item = Stage> {
        Stage::all().filter(|&stage| self.has_stage(stage))
    }

    /// The shape of `stage` for `rows` rows that can see `keys` positions; [`Stage::axes`] says what the axes mean.
    /// Dimensions come from files, so products of them are to be checked.
    pub fn shape(&self, stage: Stage, rows: usize, keys: usize) -> Vec<usize> {
        let q_dim = self.num_attention_heads.saturating_mul(self.head_dim);
        let kv_dim = self.num_key_value_heads.saturating_mul(self.head_dim);
        match stage {
            Stage::QkvMatmul | Stage::QkvBias => {
                vec![rows, q_dim.saturating_add(kv_dim.saturating_mul(2))]
            }
            Stage::QNorm | Stage::QPostRope => vec![rows, self.num_attention_heads, self.head_dim],
            Stage::KNorm | Stage::KPostRope => vec![rows, self.num_key_value_heads, self.head_dim],
            Stage::AttnScores | Stage::AttnSoftmax => vec![self.num_attention_heads, rows, keys],
            Stage::Attention => vec![rows, q_dim],
            Stage::FfnGate | Stage::FfnUp | Stage::FfnSilu | Stage::FfnSwigl => {
                vec![rows, self.intermediate_size]
            }
            Stage::LmHead => vec![rows, self.vocab_size],
            Stage::Embedding
            | Stage::AttnNorm
            | Stage::AttnOut
            | Stage::PostAttnResidual
            | Stage::FfnNorm
            | Stage::FfnOut
            | Stage::PostFfnResidual
            | Stage::FinalNorm => vec![rows, self.hidden_size],
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn tiny() -> Dims {
        Dims {
            num_hidden_layers: 2,
            hidden_size: 8,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 2,
            intermediate_size: 12,
            vocab_size: 16,
            attention_bias: true,
            qk_norm: false,
        }
    }

    #[test]
    fn every_shape_has_one_dimension_per_axis() {
        let dims = tiny();
        for stage in Stage::all() {
            let shape = dims.shape(stage, 3, 5);
            assert_eq!(shape.len(), stage.axes().names().len(), "{stage}");
            assert_eq!(shape[stage.axes().row_axis()], 3, "{stage}");
        }
        assert_eq!(dims.shape(Stage::QkvMatmul, 3, 5), [3, 16]);
        assert_eq!(dims.shape(Stage::AttnScores, 3, 5), [4, 3, 5]);
    }

    #[test]
    fn a_model_without_bias_or_head_norms_has_no_such_stages() {
        let dims = tiny();
        assert!(
            dims.has(Site::layer(1, Stage::QkvBias)) && !dims.has(Site::layer(2, Stage::QkvBias))
        );
        assert!(!dims.has(Site::layer(0, Stage::QNorm)));
        assert_eq!(dims.stages().count(), 20);
    }
}
