//! What steps cost, next to counts by hand.

use apr_cpu::{Activations, Cpu, CpuOptions};
use apr_format::Checkpoint;
use apr_model::{Cost, Costs, Model};
use apr_testkit::fixture;

fn costs(file: &str, activations: Activations) -> (Costs, Checkpoint) {
    let checkpoint = Checkpoint::open(fixture(file)).unwrap();
    let options = CpuOptions { threads: Some(1), activations, ..CpuOptions::default() };
    let model = Model::load(Cpu::new(options).unwrap(), &checkpoint).unwrap();
    (Costs::of(&model, &checkpoint).unwrap(), checkpoint)
}

/// Two layers; 64 channels in 4 heads of 16, of which 2 are kept; 2 of 8 experts of 32 channels; 320 ids; bf16.
const TINY_MOE: &str = "tiny/qwen3-moe";

#[test]
fn a_token_of_a_mixture_costs_what_its_own_experts_do() {
    let (costs, _) = costs(TINY_MOE, Activations::Native);
    let norms = 64 + 64 + 16 + 16;
    let attention = (64 + 32 + 32) * 64 + 64 * 64;
    let (router, two_experts) = (8 * 64, 2 * 3 * 64 * 32);
    let head = 320 * 64;
    let (embedding_row, final_norm) = (64, 64);
    let layer = attention + router + two_experts;
    let expected = Cost {
        weight_bytes: 2 * (2 * (norms + layer) + head + embedding_row + final_norm),
        kv_bytes: 11 * 2 * (2 * 32) * 2,
        integer_multiply_adds: 0,
        float_multiply_adds: 2 * layer + head + 2 * (2 * 64 * 11),
    };
    assert_eq!(costs.step(10, 1, 1), expected);
}

#[test]
fn many_tokens_meet_all_experts_and_never_more() {
    let (costs, checkpoint) = costs(TINY_MOE, Activations::Native);
    let all: u64 = checkpoint.tensors().map(|(_, stored)| stored.bytes().len() as u64).sum();
    let embedding = 2 * 320 * 64;
    let of = |n: usize| costs.step(0, n, 1).weight_bytes - 2 * 64 * n as u64;
    let growing: Vec<u64> = [1, 2, 4, 8, 512].into_iter().map(of).collect();
    assert!(growing.is_sorted_by(|few, more| few < more), "{growing:?}");
    assert_eq!(of(512), all - embedding);
    // Two tokens miss an expert each with probability 3/4: together they meet 7/16 of them.
    let experts = 2 * 2 * 3 * 8 * 64 * 32;
    assert_eq!(of(2) - of(1), experts * 7 / 16 - experts / 4);
}

#[test]
fn a_step_reads_all_tensors_of_a_dense_model_with_a_tied_head_once() {
    let file = "pycoder-3m/pycoder-3m-Q4_K_M.gguf";
    let (native, checkpoint) = costs(file, Activations::Native);
    let all: u64 = checkpoint.tensors().map(|(_, stored)| stored.bytes().len() as u64).sum();
    let layer = (256 + 2 * 128) * 256 + 256 * 256 + 3 * 768 * 256;
    let head = 2048 * 256;
    for (n, first) in [(1, 0), (1, 100), (7, 100)] {
        let seen: u64 = (1..=n).map(|i| first + i).sum();
        let cost = native.step(first as usize, n as usize, 1);
        let expected = Cost {
            weight_bytes: all,
            kv_bytes: 4 * (first + n) * (2 * 128) * 2,
            integer_multiply_adds: n * 4 * layer + head,
            float_multiply_adds: 4 * 2 * 256 * seen,
        };
        assert_eq!(cost, expected);
    }
    let (float, _) = costs(file, Activations::F32);
    let (native, float) = (native.step(3, 1, 1), float.step(3, 1, 1));
    assert_eq!(float.integer_multiply_adds, 0, "activations that are not rounded are floats");
    assert_eq!(
        float.float_multiply_adds,
        native.float_multiply_adds + native.integer_multiply_adds
    );
}

#[test]
fn a_step_without_logits_reads_no_head_but_the_rows_that_it_looks_up() {
    let (costs, _) = costs(TINY_MOE, Activations::Native);
    let (with, without) = (costs.step(0, 3, 1), costs.step(0, 3, 0));
    assert_eq!(with.weight_bytes - without.weight_bytes, 2 * 320 * 64);
    assert_eq!(with.float_multiply_adds - without.float_multiply_adds, 320 * 64);
    assert_eq!(costs.cache_bytes(3), with.kv_bytes);
}
