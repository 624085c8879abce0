//! Comparing what two model files declare: the dimensions and constants that no tensor holds.
//!
//! What is compared is what the decoder would run with, whatever the containers call it. A tie of the embedding to the head is
//! left to the tensors: a head is compared with the embedding that stands for it.

use std::fmt::Display;

use apr_model::{Config, MoeConfig, RopeFrequencies, RopeScaling};
use serde::Serialize;

use super::pairing::Side as Model;
use crate::Side;

/// The largest relative difference of rotary frequencies that come from different rules: factors are stored as F32.
const FREQUENCY_TOLERANCE: f64 = 1e-6;
/// No model rotates more channels; a config may claim any number.
const MAX_ROTARY_DIM: usize = 1 << 16;
/// No model has more layers; likewise.
const MAX_LAYERS: usize = 1 << 12;

/// How the configs of two model files differ.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ConfigComparison {
    /// The keys that differ, under the names of `config.json`.
    pub differences: Vec<ConfigDifference>,
    /// The sides whose config cannot be read: then nothing was compared.
    pub unreadable: Vec<UnreadableConfig>,
}

/// A key of the config that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConfigDifference {
    /// Its name in `config.json`.
    pub key: &'static str,
    /// What the file under test says.
    pub a: String,
    /// What the reference says.
    pub b: String,
    /// What depends on it.
    pub effect: &'static str,
}

/// A config that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UnreadableConfig {
    /// Whose it is.
    pub side: Side,
    /// What is wrong with it.
    pub why: String,
}

pub(super) fn compare(a: &Model<'_>, b: &Model<'_>) -> ConfigComparison {
    match (a.config(), b.config()) {
        (Ok(config_a), Ok(config_b)) => {
            let factors = |model: &Model<'_>| model.rope_factors();
            let differences =
                differences((config_a, factors(a).as_deref()), (config_b, factors(b).as_deref()));
            ConfigComparison { differences, unreadable: Vec::new() }
        }
        (config_a, config_b) => {
            let unreadable = [(Side::A, config_a), (Side::B, config_b)]
                .into_iter()
                .filter_map(|(side, config)| {
                    Some(UnreadableConfig { side, why: config.err()?.to_string() })
                })
                .collect();
            ConfigComparison { differences: Vec::new(), unreadable }
        }
    }
}

/// A config, and the factors that its file stores as a tensor.
type Declared<'a> = (&'a Config, Option<&'a [f32]>);

fn differences(a: Declared<'_>, b: Declared<'_>) -> Vec<ConfigDifference> {
    let ((config_a, _), (config_b, _)) = (a, b);
    // A new key of the config is compared below, or named here as the one that is left to the tensors.
    let Config {
        architecture: _,
        num_hidden_layers: _,
        hidden_size: _,
        num_attention_heads: _,
        num_key_value_heads: _,
        head_dim: _,
        intermediate_size: _,
        vocab_size: _,
        max_position_embeddings: _,
        rms_norm_eps: _,
        rope_theta: _,
        rope_scaling: _,
        rotary_dim: _,
        attention_bias: _,
        qk_norm: _,
        tie_word_embeddings: _,
        moe: _,
    } = config_a;
    let mut found = Vec::new();
    let mut note = |key, same: bool, a: &dyn Display, b: &dyn Display| {
        if !same {
            let (a, b, effect) = (a.to_string(), b.to_string(), effect(key));
            found.push(ConfigDifference { key, a, b, effect });
        }
    };
    macro_rules! compare {
        ($same:expr; $($key:ident)*) => {$(
            let (a, b) = (&config_a.$key, &config_b.$key);
            note(stringify!($key), $same(a, b), a, b);
        )*};
    }
    let (name_a, name_b) = (config_a.architecture, config_b.architecture);
    note("model_type", name_a == name_b, &name_a, &name_b);
    compare!(|a: &usize, b: &usize| a == b;
        num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim
        intermediate_size vocab_size max_position_embeddings);
    for (key, a, b) in [
        ("rms_norm_eps", config_a.rms_norm_eps, config_b.rms_norm_eps),
        ("rope_theta", config_a.rope_theta, config_b.rope_theta),
    ] {
        // GGUF stores such constants as F32, config.json in decimal.
        let (a, b) = (a as f32, b as f32);
        note(key, a == b, &format!("{a:?}"), &format!("{b:?}"));
    }
    let same = same_scaling(a, b);
    note("rope_scaling", same, &scaling_text(a), &scaling_text(b));
    compare!(|a: &usize, b: &usize| a == b; rotary_dim);
    compare!(|a: &bool, b: &bool| a == b; attention_bias qk_norm);
    if let (Some(moe_a), Some(moe_b)) = (&config_a.moe, &config_b.moe) {
        let MoeConfig {
            num_experts,
            num_experts_per_tok,
            moe_intermediate_size,
            norm_topk_prob,
            decoder_sparse_step,
            mlp_only_layers,
        } = moe_a;
        for (key, a, b) in [
            ("num_experts", num_experts, moe_b.num_experts),
            ("num_experts_per_tok", num_experts_per_tok, moe_b.num_experts_per_tok),
            ("moe_intermediate_size", moe_intermediate_size, moe_b.moe_intermediate_size),
        ] {
            note(key, *a == b, a, &b);
        }
        let (a, b) = (norm_topk_prob, moe_b.norm_topk_prob);
        note("norm_topk_prob", *a == b, a, &b);
        // Two spellings of the same layers are the same model.
        let layers = config_a.num_hidden_layers.max(config_b.num_hidden_layers).min(MAX_LAYERS);
        let alike = (0..layers).all(|layer| moe_a.has_layer(layer) == moe_b.has_layer(layer));
        let (a, b) = (decoder_sparse_step, moe_b.decoder_sparse_step);
        note("decoder_sparse_step", alike || *a == b, a, &b);
        let (a, b) = (mlp_only_layers, &moe_b.mlp_only_layers);
        note("mlp_only_layers", alike || a == b, &format!("{a:?}"), &format!("{b:?}"));
    }
    found
}

/// What depends on a key. A dimension changes the shapes of tensors, which are compared by themselves.
fn effect(key: &str) -> &'static str {
    match key {
        "rms_norm_eps" => "every norm",
        "rope_theta" | "rope_scaling" | "rotary_dim" => {
            "the rotation of q and k, the more the later the token"
        }
        "max_position_embeddings" => "how long a context may be, and no number",
        "attention_bias" => "qkv_bias of every layer",
        "qk_norm" => "q_norm and k_norm of every layer",
        "num_attention_heads" | "num_key_value_heads" | "head_dim" => {
            "which channels make a head, and the scale of scores"
        }
        "norm_topk_prob" => "moe_router_weights",
        "num_experts_per_tok" => "which experts a token meets, and their weights",
        "decoder_sparse_step" | "mlp_only_layers" => "which layers have experts",
        "model_type" => "the order of operations",
        _ => "the shapes of tensors",
    }
}

/// Whether both stretch every pair of channels alike, by whatever rule.
fn same_scaling(a: Declared<'_>, b: Declared<'_>) -> bool {
    if a.0.rope_scaling == b.0.rope_scaling && a.1 == b.1 {
        return true;
    }
    match (stretch(a), stretch(b)) {
        (Some(a), Some(b)) => {
            a.len() == b.len()
                && a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= FREQUENCY_TOLERANCE * b.abs())
        }
        _ => false,
    }
}

/// By how much each frequency is divided; `None` if the stored factors are not one for each, or there are absurdly many.
fn stretch((config, stored): Declared<'_>) -> Option<Vec<f64>> {
    if config.rotary_dim > MAX_ROTARY_DIM {
        return None;
    }
    let mut config = config.clone();
    if let (Some(factors), false) = (stored, matches!(config.rope_scaling, RopeScaling::Factors(_)))
    {
        config.rope_scaling = RopeScaling::Factors(factors.to_vec());
    }
    let plain = RopeFrequencies::new(config.rope_theta, config.rotary_dim);
    if let RopeScaling::Factors(factors) = &config.rope_scaling
        && factors.len() != plain.as_slice().len()
    {
        return None;
    }
    let scaled = config.rope_frequencies();
    Some(plain.as_slice().iter().zip(scaled.as_slice()).map(|(plain, f)| plain / f).collect())
}

fn scaling_text((config, stored): Declared<'_>) -> String {
    match &config.rope_scaling {
        _ if stored.is_some() => "the factors of a tensor".to_owned(),
        RopeScaling::None => "none".to_owned(),
        RopeScaling::Linear { factor } => format!("linear by {factor}"),
        RopeScaling::Llama3(s) => format!(
            "llama3 by {}, from {} to {} of {}",
            s.factor, s.low_freq_factor, s.high_freq_factor, s.original_max_position_embeddings
        ),
        RopeScaling::Factors(_) => "factors".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use apr_model::{Architecture, Llama3Scaling};

    use super::*;

    fn config() -> Config {
        Config {
            architecture: Architecture::Llama,
            num_hidden_layers: 2,
            hidden_size: 64,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            intermediate_size: 128,
            vocab_size: 320,
            max_position_embeddings: 512,
            rms_norm_eps: 1e-5,
            rope_theta: 500_000.0,
            rope_scaling: RopeScaling::None,
            rotary_dim: 16,
            attention_bias: false,
            qk_norm: false,
            moe: None,
            tie_word_embeddings: false,
        }
    }

    fn keys(a: &Config, b: &Config) -> Vec<&'static str> {
        differences((a, None), (b, None)).iter().map(|d| d.key).collect()
    }

    fn mixture(norm_topk_prob: bool, step: usize, mlp_only_layers: &[usize]) -> Config {
        let moe = MoeConfig {
            num_experts: 8,
            num_experts_per_tok: 2,
            moe_intermediate_size: 32,
            norm_topk_prob,
            decoder_sparse_step: step,
            mlp_only_layers: mlp_only_layers.to_vec(),
        };
        Config { architecture: Architecture::Qwen3Moe, moe: Some(moe), ..config() }
    }

    #[test]
    fn mixtures_that_weigh_choose_or_place_their_experts_otherwise_are_other_models() {
        let one = mixture(true, 1, &[]);
        assert_eq!(keys(&one, &one), [""; 0]);
        assert_eq!(keys(&one, &mixture(false, 1, &[])), ["norm_topk_prob"]);
        assert_eq!(keys(&one, &mixture(true, 2, &[])), ["decoder_sparse_step"]);
        assert_eq!(keys(&one, &mixture(true, 1, &[1])), ["mlp_only_layers"]);
        let mut other = one.clone();
        let moe = other.moe.as_mut().unwrap();
        (moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size) = (16, 4, 64);
        let expected = ["num_experts", "num_experts_per_tok", "moe_intermediate_size"];
        assert_eq!(keys(&one, &other), expected);
    }

    #[test]
    fn the_same_layers_with_experts_in_another_spelling_are_no_difference() {
        // Of two layers, the second.
        assert_eq!(keys(&mixture(true, 2, &[]), &mixture(true, 1, &[0])), [""; 0]);
    }

    #[test]
    fn every_key_that_differs_is_named_and_rounding_to_f32_is_no_difference() {
        let stored = Config { rms_norm_eps: f64::from(1e-5f32), ..config() };
        assert_eq!(keys(&config(), &stored), [""; 0]);
        let other = Config {
            architecture: Architecture::Qwen3,
            num_hidden_layers: 3,
            num_attention_heads: 8,
            rms_norm_eps: 1e-6,
            rope_theta: 10_000.0,
            qk_norm: true,
            moe: None,
            ..config()
        };
        let expected = [
            "model_type",
            "num_hidden_layers",
            "num_attention_heads",
            "rms_norm_eps",
            "rope_theta",
            "qk_norm",
        ];
        assert_eq!(keys(&config(), &other), expected);
    }

    #[test]
    fn a_rule_and_the_factors_it_comes_to_are_the_same_scaling() {
        let scaling = Llama3Scaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        let rule = Config { rope_scaling: RopeScaling::Llama3(scaling), ..config() };
        let mut factors: Vec<f32> =
            stretch((&rule, None)).unwrap().into_iter().map(|f| f as f32).collect();
        assert_eq!(differences((&rule, None), (&config(), Some(&factors))), []);
        *factors.last_mut().unwrap() *= 1.001;
        let found = differences((&rule, None), (&config(), Some(&factors)));
        assert_eq!((found.len(), found[0].key), (1, "rope_scaling"));
        let short = &factors[1..];
        assert_eq!(differences((&rule, None), (&config(), Some(short)))[0].key, "rope_scaling");
        assert_eq!(keys(&rule, &config()), ["rope_scaling"]);
    }
}
