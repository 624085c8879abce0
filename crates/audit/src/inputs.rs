//! What each stage is computed from.
//!
//! The forward pass itself is in `apr_model`; this table only says which values an op reads, so that a verdict can name
//! what a stage was judged from and a hypothesis can be computed. A test holds it against the forward pass.

use apr_model::{Config, Site, Stage};

/// The stages that an op of the forward pass reads.
pub fn inputs(site: Site, config: &Config) -> Vec<Site> {
    use Stage::*;
    let Some(layer) = site.layer else {
        return match site.stage {
            FinalNorm => vec![stream_before(config.num_hidden_layers)],
            LmHead => vec![Site::whole(FinalNorm)],
            _ => Vec::new(),
        };
    };
    let layer = layer as usize;
    let at = |stage| Site::layer(layer, stage);
    let qkv = at(if config.attention_bias { QkvBias } else { QkvMatmul });
    match site.stage {
        AttnNorm => vec![stream_before(layer)],
        QkvMatmul => vec![at(AttnNorm)],
        QkvBias => vec![at(QkvMatmul)],
        QNorm | KNorm => vec![qkv],
        QPostRope => vec![if config.qk_norm { at(QNorm) } else { qkv }],
        KPostRope => vec![if config.qk_norm { at(KNorm) } else { qkv }],
        AttnScores => vec![at(QPostRope), at(KPostRope)],
        AttnSoftmax => vec![at(AttnScores)],
        Attention => vec![at(AttnSoftmax), qkv],
        AttnOut => vec![at(Attention)],
        PostAttnResidual => vec![stream_before(layer), at(AttnOut)],
        FfnNorm => vec![at(PostAttnResidual)],
        FfnGate | FfnUp => vec![at(FfnNorm)],
        FfnSilu => vec![at(FfnGate)],
        FfnSwigl => vec![at(FfnSilu), at(FfnUp)],
        MoeRouter => vec![at(FfnNorm)],
        MoeRouterIndices => vec![at(MoeRouter)],
        MoeRouterWeights => vec![at(MoeRouter), at(MoeRouterIndices)],
        MoeExpertGate | MoeExpertUp => vec![at(FfnNorm), at(MoeRouterIndices)],
        MoeExpertSilu => vec![at(MoeExpertGate)],
        MoeExpertSwigl => vec![at(MoeExpertSilu), at(MoeExpertUp)],
        MoeExpertOut => vec![at(MoeExpertSwigl), at(MoeRouterIndices)],
        FfnOut if config.experts_of(layer).is_some() => {
            vec![at(MoeExpertOut), at(MoeRouterWeights)]
        }
        FfnOut => vec![at(FfnSwigl)],
        PostFfnResidual => vec![at(PostAttnResidual), at(FfnOut)],
        Embedding | FinalNorm | LmHead => Vec::new(),
    }
}

/// The residual stream that layer `layer` reads.
fn stream_before(layer: usize) -> Site {
    match layer {
        0 => Site::whole(Stage::Embedding),
        _ => Site::layer(layer - 1, Stage::PostFfnResidual),
    }
}
