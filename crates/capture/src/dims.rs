//! The numbers that the shapes of stages are made of.

use apr_model::{Config, MoeConfig, Site, Stage};
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
    #[serde(flatten)]
    pub moe: Option<MoeConfig>,
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
            moe: config.moe.clone(),
        }
    }
}

impl Dims {
    /// Whether a model of these dimensions computes `site`.
    pub fn has(&self, site: Site) -> bool {
        let Some(layer) = site.layer else {
            return site.stage.is_whole_model();
        };
        let layer = layer as usize;
        let of_experts = self.moe.as_ref().is_some_and(|moe| moe.has_layer(layer));
        !site.stage.is_whole_model()
            && layer < self.num_hidden_layers
            && self.has_stage(site.stage)
            && site.stage.of_experts().is_none_or(|experts| experts == of_experts)
    }

    /// Whether a model of these dimensions has `stage`, in some layer at least.
    pub fn has_stage(&self, stage: Stage) -> bool {
        match stage {
            Stage::QkvBias => self.attention_bias,
            Stage::QNorm | Stage::KNorm => self.qk_norm,
            _ => match (stage.of_experts(), &self.moe) {
                (Some(true), None) => false,
                (Some(experts), Some(moe)) => {
                    // Nothing else repeats after one round of the step and the list.
                    let all = moe.decoder_sparse_step.saturating_add(moe.mlp_only_layers.len());
                    (0..self.num_hidden_layers.min(all))
                        .any(|layer| moe.has_layer(layer) == experts)
                }
                _ => true,
            },
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
            Stage::MoeRouter => vec![rows, self.of_experts(|moe| moe.num_experts)],
            Stage::MoeRouterIndices | Stage::MoeRouterWeights => vec![rows, self.experts_per_tok()],
            Stage::MoeExpertGate
            | Stage::MoeExpertUp
            | Stage::MoeExpertSilu
            | Stage::MoeExpertSwigl => {
                let width = self.of_experts(|moe| moe.moe_intermediate_size);
                vec![rows, self.experts_per_tok(), width]
            }
            Stage::MoeExpertOut => vec![rows, self.experts_per_tok(), self.hidden_size],
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

    fn experts_per_tok(&self) -> usize {
        self.of_experts(|moe| moe.num_experts_per_tok)
    }

    fn of_experts(&self, dimension: impl Fn(&MoeConfig) -> usize) -> usize {
        self.moe.as_ref().map_or(0, dimension)
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
            moe: None,
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
