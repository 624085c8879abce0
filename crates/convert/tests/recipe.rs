//! The types that our recipes choose are those that `llama-quantize` has chosen, in files that it wrote.
#![allow(clippy::print_stdout, reason = "a skipped test says so, and how much was compared")]

use std::{fs, path::Path};

use apr_convert::Recipe;
use apr_format::Checkpoint;
use apr_model::{
    Architecture, Config, LayerRole, MoeConfig, Role, RopeScaling, read_config, role_of,
};
use apr_tensor::DType;

/// A model of `layers` layers in which `heads` queries share `kv_heads` keys.
fn config(architecture: Architecture, layers: usize, heads: usize, kv_heads: usize) -> Config {
    Config {
        architecture,
        num_hidden_layers: layers,
        hidden_size: 256,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim: 32,
        intermediate_size: 512,
        vocab_size: 320,
        max_position_embeddings: 512,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::None,
        rotary_dim: 32,
        attention_bias: false,
        qk_norm: false,
        tie_word_embeddings: false,
        moe: None,
    }
}

/// The matrices of a model, but for the routers.
fn matrices(config: &Config) -> Vec<Role> {
    use LayerRole::*;
    let dense = [FfnGate, FfnUp, FfnDown];
    let experts = [FfnGateExps, FfnUpExps, FfnDownExps];
    let in_layers = (0..config.num_hidden_layers).flat_map(|layer| {
        let ffn = if config.experts_of(layer).is_some() { experts } else { dense };
        [AttnQ, AttnK, AttnV, AttnOutput].into_iter().chain(ffn).map(move |r| Role::Layer(layer, r))
    });
    let head = (!config.tie_word_embeddings).then_some(Role::Output);
    [Role::TokenEmbd].into_iter().chain(head).chain(in_layers).collect()
}

/// What differs from the recipe's main type: `attn_v 0 Q6_K`. `down` is the width of `ffn_down`'s rows.
fn exceptions(recipe: Recipe, config: &Config, down: usize, importance: bool) -> String {
    let of = |role: Role| {
        let cols = match role {
            Role::Layer(_, LayerRole::FfnDown | LayerRole::FfnDownExps) => down,
            _ => 256,
        };
        let dtype = recipe.dtype_of(config, role, cols, importance);
        let name = role.gguf_name();
        let name = name.trim_end_matches(".weight").trim_start_matches("blk.");
        (dtype != recipe.dtype()).then(|| format!("{name} {dtype}"))
    };
    matrices(config).into_iter().filter_map(of).collect::<Vec<_>>().join(", ")
}

#[test]
fn a_mix_is_that_of_llama_quantize_for_a_tied_model() {
    let tied = Config { tie_word_embeddings: true, ..config(Architecture::Qwen2, 4, 4, 2) };
    for (recipe, expected) in [
        (
            Recipe::Q4_K_M,
            "token_embd Q6_K, 2.attn_v Q6_K, 2.ffn_down Q6_K, 3.attn_v Q6_K, 3.ffn_down Q6_K",
        ),
        (
            Recipe::Q3_K_M,
            "token_embd Q6_K, 0.attn_v Q5_K, 0.attn_output Q4_K, 0.ffn_down Q4_K, 1.attn_v Q5_K, 1.attn_output Q4_K, \
             1.ffn_down Q4_K, 2.attn_v Q4_K, 2.attn_output Q4_K, 2.ffn_down Q4_K, 3.attn_v Q4_K, 3.attn_output Q4_K, \
             3.ffn_down Q4_K",
        ),
        (Recipe::Q5_1, "token_embd Q6_K"),
        (Recipe::Q6_K, ""),
        (Recipe::Q8_0, ""),
        (Recipe::F16, ""),
    ] {
        assert_eq!(exceptions(recipe, &tied, 768, false), expected, "{recipe}");
    }
}

#[test]
fn a_mix_is_that_of_llama_quantize_where_rows_are_no_whole_blocks() {
    let shared = config(Architecture::Llama, 3, 8, 2);
    for (recipe, expected) in [
        (
            Recipe::Q2_K,
            "output Q6_K, 0.attn_v Q4_K, 0.attn_output Q3_K, 0.ffn_down Q4_0, 1.attn_v Q4_K, 1.attn_output Q3_K, \
             1.ffn_down Q4_0, 2.attn_v Q4_K, 2.attn_output Q3_K, 2.ffn_down Q4_0",
        ),
        (
            Recipe::Q4_K_M,
            "output Q6_K, 0.ffn_down Q5_0, 1.ffn_down Q5_0, 2.attn_v Q6_K, 2.ffn_down Q8_0",
        ),
        (
            Recipe::Q5_K_M,
            "output Q6_K, 0.ffn_down Q5_1, 1.ffn_down Q5_1, 2.attn_v Q6_K, 2.ffn_down Q8_0",
        ),
        (Recipe::Q6_K, "0.ffn_down Q8_0, 1.ffn_down Q8_0, 2.ffn_down Q8_0"),
    ] {
        assert_eq!(exceptions(recipe, &shared, 384, false), expected, "{recipe}");
    }
}

#[test]
fn a_mix_is_that_of_llama_quantize_for_eight_experts() {
    let moe = MoeConfig {
        num_experts: 8,
        num_experts_per_tok: 2,
        moe_intermediate_size: 128,
        norm_topk_prob: true,
        decoder_sparse_step: 1,
        mlp_only_layers: Vec::new(),
    };
    let mut experts = Config { moe: Some(moe), ..config(Architecture::Qwen3Moe, 2, 4, 2) };
    for (recipe, expected) in [
        (
            Recipe::Q4_K_M,
            "output Q6_K, 0.attn_k Q8_0, 0.attn_v Q8_0, 0.attn_output Q5_K, 0.ffn_down_exps Q5_0, 1.attn_k Q8_0, \
             1.attn_v Q8_0, 1.attn_output Q5_K, 1.ffn_down_exps Q8_0",
        ),
        (Recipe::Q4_0, "output Q6_K, 0.attn_k Q8_0, 0.attn_v Q8_0, 1.attn_k Q8_0, 1.attn_v Q8_0"),
    ] {
        assert_eq!(exceptions(recipe, &experts, 128, false), expected, "{recipe}");
    }
    // Of any other number they are treated as a dense model.
    experts.moe.as_mut().unwrap().num_experts = 64;
    assert_eq!(exceptions(Recipe::Q4_0, &experts, 128, false), "output Q6_K");
}

#[test]
fn an_importance_matrix_changes_the_first_ways_down_of_the_plainest_recipes() {
    let deep = config(Architecture::Qwen2, 16, 4, 2);
    let expected = "output Q6_K, 0.ffn_down Q4_1, 1.ffn_down Q4_1";
    assert_eq!(exceptions(Recipe::Q4_0, &deep, 512, true), expected);
    assert_eq!(exceptions(Recipe::Q4_0, &deep, 512, false), "output Q6_K");
}

#[test]
fn rows_that_no_block_divides_are_f16() {
    let config = config(Architecture::Qwen2, 1, 4, 2);
    let role = Role::Layer(0, LayerRole::FfnDown);
    assert_eq!(Recipe::Q4_K_M.dtype_of(&config, role, 200, false), DType::F16);
    assert_eq!(Recipe::Q4_K_M.dtype_of(&config, Role::Output, 200, false), DType::F16);
}

/// A directory of GGUF files that `llama-quantize` wrote without an importance matrix.
const FILES: &str = "APR_LLAMA_QUANTIZE_FILES";

#[test]
fn every_tensor_of_files_that_llama_quantize_wrote_has_the_type_that_we_choose() {
    let Some(directory) = std::env::var_os(FILES) else {
        println!("skipped: set {FILES} to a directory of GGUF files that llama-quantize wrote");
        return;
    };
    let mut compared = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "gguf") {
            compared += compare(&path);
        }
    }
    println!("{compared} tensors compared");
    assert!(compared > 0);
}

fn compare(path: &Path) -> usize {
    let file = Checkpoint::open(path).unwrap();
    let config = read_config(&file).unwrap();
    let number = file.metadata().u64("general.file_type").unwrap().unwrap();
    // Recipes that we do not have, such as IQ4_XS.
    let Some(recipe) = Recipe::all().find(|recipe| u64::from(recipe.file_type()) == number) else {
        return 0;
    };
    let mut compared = 0;
    for (name, stored) in file.tensors() {
        let role = role_of(name).unwrap();
        let is_router = matches!(role, Role::Layer(_, LayerRole::FfnGateInp));
        if stored.shape().dims().len() > 1 && !is_router {
            let dtype = recipe.dtype_of(&config, role, stored.shape().cols(), false);
            assert_eq!(dtype, stored.dtype(), "{}, {name}", path.display());
            compared += 1;
        }
    }
    compared
}
