//! Which tensors a model of a config has, one of each expert's.
//!
//! Binding has the last word: a list that it does not agree with is refused before anything is written.

use apr_model::{Config, LayerRole, Role};

/// What each tensor is for, and its shape.
pub(crate) fn tensors(config: &Config) -> Vec<(Role, Vec<usize>)> {
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let mut tensors = vec![(Role::TokenEmbd, vec![vocab, hidden])];
    for layer in 0..config.num_hidden_layers {
        let of_layer =
            attention(config).into_iter().map(|(role, shape)| (Role::Layer(layer, role), shape));
        tensors.extend(of_layer);
        feed_forward(config, layer, &mut tensors);
    }
    tensors.push((Role::OutputNorm, vec![hidden]));
    if !config.tie_word_embeddings {
        tensors.push((Role::Output, vec![vocab, hidden]));
    }
    tensors
}

fn attention(config: &Config) -> Vec<(LayerRole, Vec<usize>)> {
    use LayerRole::*;
    let (hidden, head_dim) = (config.hidden_size, config.head_dim);
    let (q_dim, kv_dim) = (config.q_dim(), config.kv_dim());
    let mut tensors = vec![
        (AttnNorm, vec![hidden]),
        (AttnQ, vec![q_dim, hidden]),
        (AttnK, vec![kv_dim, hidden]),
        (AttnV, vec![kv_dim, hidden]),
        (AttnOutput, vec![hidden, q_dim]),
        (FfnNorm, vec![hidden]),
    ];
    if config.attention_bias {
        let biases = [(AttnQBias, q_dim), (AttnKBias, kv_dim), (AttnVBias, kv_dim)];
        tensors.extend(biases.map(|(role, rows)| (role, vec![rows])));
    }
    if config.qk_norm {
        tensors.extend([AttnQNorm, AttnKNorm].map(|role| (role, vec![head_dim])));
    }
    tensors
}

fn feed_forward(config: &Config, layer: usize, tensors: &mut Vec<(Role, Vec<usize>)>) {
    use LayerRole::*;
    let hidden = config.hidden_size;
    let matrices = |gate, up, down, ffn| {
        [(gate, vec![ffn, hidden]), (up, vec![ffn, hidden]), (down, vec![hidden, ffn])]
    };
    let Some(moe) = config.experts_of(layer) else {
        let dense = matrices(FfnGate, FfnUp, FfnDown, config.intermediate_size);
        tensors.extend(dense.map(|(role, shape)| (Role::Layer(layer, role), shape)));
        return;
    };
    tensors.push((Role::Layer(layer, FfnGateInp), vec![moe.num_experts, hidden]));
    for expert in 0..moe.num_experts {
        let parts = matrices(FfnGateExps, FfnUpExps, FfnDownExps, moe.moe_intermediate_size);
        tensors.extend(parts.map(|(role, shape)| (Role::Expert(layer, role, expert), shape)));
    }
}
