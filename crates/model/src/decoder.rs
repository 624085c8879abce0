//! The decoder: embedding, layers, final norm, head. The one forward pass.
//!
//! Qwen2, Qwen3, Qwen3-MoE and Llama are the same decoder; what differs is which weights a layer has and what the
//! [`Config`] says. All of it is here, in the order of the papers (Touvron et al. 2023 for the block, Shazeer 2020
//! for SwiGLU, Ainslie et al. 2023 for grouped queries, Shazeer et al. 2017 for mixtures of experts).

use crate::{Backend, Config, Cx, MoeConfig, Result, RopeFrequencies, RopeTable, Site, Stage::*};

/// A decoder's weights, in a backend's own form.
#[derive(Debug)]
pub(crate) struct Decoder<W, V> {
    pub(crate) config: Config,
    pub(crate) rope: RopeFrequencies,
    pub(crate) embed_tokens: W, // [vocab, hidden]
    pub(crate) layers: Vec<Layer<W, V>>,
    pub(crate) norm: V, // [hidden]
    /// `None` if the head is tied to the embedding.
    pub(crate) lm_head: Option<W>, // [vocab, hidden]
}

/// The weights of one layer.
#[derive(Debug)]
pub(crate) struct Layer<W, V> {
    pub(crate) attn_norm: V,        // [hidden]
    pub(crate) qkv: W,              // [q_dim + 2 * kv_dim, hidden]
    pub(crate) qkv_bias: Option<V>, // [q_dim + 2 * kv_dim]
    pub(crate) q_norm: Option<V>,   // [head_dim]
    pub(crate) k_norm: Option<V>,   // [head_dim]
    pub(crate) attn_output: W,      // [hidden, q_dim]
    pub(crate) ffn_norm: V,         // [hidden]
    pub(crate) ffn: Ffn<W>,
}

/// What comes after attention.
#[derive(Debug)]
pub(crate) enum Ffn<W> {
    /// One network for all tokens.
    Dense {
        gate: W, // [ffn, hidden]
        up: W,   // [ffn, hidden]
        down: W, // [hidden, ffn]
    },
    /// A mixture of experts, one below the other in each matrix.
    Moe {
        config: MoeConfig,
        router: W, // [experts, hidden]
        gate: W,   // [experts * moe_ffn, hidden]
        up: W,     // [experts * moe_ffn, hidden]
        down: W,   // [experts * hidden, moe_ffn]
    },
}

/// Token ids in, logits of the rows asked for out: `[logit rows, vocab]`. Leaves the step's angles in `rotation`.
pub(crate) fn forward<B: Backend>(
    cx: &mut Cx<'_, B>,
    decoder: &Decoder<B::Weight, B::Vector>,
    kv: &mut [B::Kv],
    rotation: &mut RopeTable,
) -> Result<B::Tensor> {
    let Decoder { config, rope, embed_tokens, layers, norm, lm_head } = decoder;
    assert_eq!(kv.len(), layers.len(), "the cache is one of this model's");
    let step = cx.step();
    rope.fill(rotation, step.first_position..step.first_position + step.tokens.len());

    let mut x = cx.embed(Site::whole(Embedding), embed_tokens)?; // [n, hidden]
    for ((index, layer), kv) in layers.iter().enumerate().zip(kv) {
        x = decoder_layer(cx, config, index, layer, x, kv, rotation)?;
    }
    let x = cx.rms_norm(Site::whole(FinalNorm), &x, norm, config.rms_norm_eps)?;
    let x = cx.rows(&x, step.logit_rows.clone())?;
    cx.linear(Site::whole(LmHead), &x, lm_head.as_ref().unwrap_or(embed_tokens))
}

fn decoder_layer<B: Backend>(
    cx: &mut Cx<'_, B>,
    config: &Config,
    index: usize,
    layer: &Layer<B::Weight, B::Vector>,
    x: B::Tensor, // [n, hidden]
    kv: &mut B::Kv,
    rotation: &RopeTable,
) -> Result<B::Tensor> {
    let x = plus_attention(cx, config, index, layer, x, kv, rotation)?;
    plus_feed_forward(cx, config.rms_norm_eps, index, layer, x)
}

// Each part of a layer has a scope of its own, so that its tensors are gone when the next one begins: those of a long prompt are large.

/// `x + attention(norm(x))`
fn plus_attention<B: Backend>(
    cx: &mut Cx<'_, B>,
    config: &Config,
    index: usize,
    layer: &Layer<B::Weight, B::Vector>,
    x: B::Tensor, // [n, hidden]
    kv: &mut B::Kv,
    rotation: &RopeTable,
) -> Result<B::Tensor> {
    let [q, k, v] = queries_keys_values(cx, config, index, layer, &x, rotation)?;
    cx.kv_append(kv, &k, &v)?;
    let a = cx.attention(index, &q, kv, 1.0 / (config.head_dim as f64).sqrt())?; // [n, q_dim]
    let a = cx.linear(Site::layer(index, AttnOut), &a, &layer.attn_output)?;
    cx.add(Site::layer(index, PostAttnResidual), x, &a)
}

/// Of `norm(x)`, with their positions: `[n, heads, head_dim]` each, of which keys and values have `kv_heads`.
fn queries_keys_values<B: Backend>(
    cx: &mut Cx<'_, B>,
    config: &Config,
    index: usize,
    layer: &Layer<B::Weight, B::Vector>,
    x: &B::Tensor, // [n, hidden]
    rotation: &RopeTable,
) -> Result<[B::Tensor; 3]> {
    let at = |stage| Site::layer(index, stage);
    let eps = config.rms_norm_eps;
    let (heads, kv_heads, head_dim) =
        (config.num_attention_heads, config.num_key_value_heads, config.head_dim);

    let [mut q, mut k, v] = {
        let h = cx.rms_norm(at(AttnNorm), x, &layer.attn_norm, eps)?;
        let mut qkv = cx.linear(at(QkvMatmul), &h, &layer.qkv)?;
        if let Some(bias) = &layer.qkv_bias {
            qkv = cx.add_bias(at(QkvBias), qkv, bias)?;
        }
        [
            cx.heads(&qkv, 0, heads, head_dim)?,
            cx.heads(&qkv, heads * head_dim, kv_heads, head_dim)?,
            cx.heads(&qkv, (heads + kv_heads) * head_dim, kv_heads, head_dim)?,
        ]
    };
    if let Some(norm) = &layer.q_norm {
        q = cx.rms_norm(at(QNorm), &q, norm, eps)?;
    }
    if let Some(norm) = &layer.k_norm {
        k = cx.rms_norm(at(KNorm), &k, norm, eps)?;
    }
    q = cx.rope(at(QPostRope), &q, rotation)?;
    k = cx.rope(at(KPostRope), &k, rotation)?;
    Ok([q, k, v])
}

/// `x + ffn(norm(x))`
fn plus_feed_forward<B: Backend>(
    cx: &mut Cx<'_, B>,
    eps: f64,
    index: usize,
    layer: &Layer<B::Weight, B::Vector>,
    x: B::Tensor, // [n, hidden]
) -> Result<B::Tensor> {
    let at = |stage| Site::layer(index, stage);
    let h = cx.rms_norm(at(FfnNorm), &x, &layer.ffn_norm, eps)?;
    let f = match &layer.ffn {
        // down(silu(gate(h)) * up(h))
        Ffn::Dense { gate, up, down } => {
            let gate = cx.linear(at(FfnGate), &h, gate)?; // [n, ffn]
            let up = cx.linear(at(FfnUp), &h, up)?;
            let f = cx.swiglu(at(FfnSilu), at(FfnSwigl), gate, &up)?;
            cx.linear(at(FfnOut), &f, down)?
        }
        // The same by each of the k experts that the router gives the largest probabilities, and the sum by these
        Ffn::Moe { config, router, gate, up, down } => {
            let (experts, k) = (config.num_experts, config.num_experts_per_tok);
            let logits = cx.linear(at(MoeRouter), &h, router)?; // [n, experts]
            let ids = cx.top_k(at(MoeRouterIndices), &logits, k)?; // [n, k]
            let weights =
                cx.route_weights(at(MoeRouterWeights), &logits, &ids, config.norm_topk_prob)?;
            let gate = cx.expert_linear(at(MoeExpertGate), &h, gate, experts, &ids)?; // [n, k, moe_ffn]
            let up = cx.expert_linear(at(MoeExpertUp), &h, up, experts, &ids)?;
            let f = cx.swiglu(at(MoeExpertSilu), at(MoeExpertSwigl), gate, &up)?;
            let f = cx.expert_linear(at(MoeExpertOut), &f, down, experts, &ids)?; // [n, k, hidden]
            cx.weighted_sum(at(FfnOut), &f, &weights)?
        }
    };
    cx.add(at(PostFfnResidual), x, &f)
}
