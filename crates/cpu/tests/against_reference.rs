//! The CPU backend against the reference emulating the same arithmetic: what is left is the rounding of f32 sums.

#![allow(
    clippy::print_stdout,
    reason = "the distances measured, for those who ask with --nocapture"
)]

use apr_cpu::{Activations, Cpu, CpuOptions, KvType};
use apr_model::Model;
use apr_reference::{Arithmetic, Reference};
use apr_tensor::DType;
use apr_testkit::{
    Collect, Isolated,
    invariants::{load, logits, tiny_files, tokens},
};

/// What f32 may leave unexplained in a stage.
///
/// A sum of `n` rounded products in a tree of 16 lanes is off by at most `(n / 16 + 4) * 2^-24` of the sum of their magnitudes,
/// and on average by the root of that count: for `n` up to 1024 about 5e-7 of the result's norm. A score is a chain of `n` roundings
/// with `n` at most 64, which comes to the same. Elementwise stages round a handful of times, 6e-8 each.
const UNEXPLAINED: f64 = 1e-6;

fn files() -> Vec<String> {
    let mut files = tiny_files();
    files.push("pycoder-3m".to_owned());
    files.extend(["Q4_K_M", "Q8_0"].map(|q| format!("pycoder-3m/pycoder-3m-{q}.gguf")));
    files
}

/// Every stage of a prefill and of decode steps, recomputed from the CPU's own inputs.
fn unexplained(file: &str, options: CpuOptions, arithmetic: Arithmetic) {
    let lengths = [9, 1, 1];
    let tokens = tokens(11);
    let cpu: Model<Cpu> = load(Cpu::new(options).unwrap(), file);
    let mut theirs = Collect::new(cpu.all_taps());
    logits(&cpu, &tokens, &lengths, &mut theirs);

    let reference: Model<Reference<f64>> = load(Reference::new(arithmetic), file);
    let mut isolated = Isolated::new(&theirs);
    logits(&reference, &tokens, &lengths, &mut isolated);

    assert_eq!(isolated.distances.len(), lengths.len() * cpu.plan().sites().len(), "{file}");
    for (&(step, site), &distance) in &isolated.distances {
        assert!(distance <= UNEXPLAINED, "{file}: {site} of step {step} is {distance:e} off");
    }
    let (distance, site) = isolated.worst();
    println!("{file}: {options:?}: at most {distance:.1e} ({site})");
}

#[test]
fn native_arithmetic_leaves_nothing_unexplained() {
    for file in files() {
        unexplained(&file, CpuOptions::default(), Arithmetic::CPU);
    }
}

#[test]
fn exact_activations_and_cache_leave_nothing_unexplained() {
    let options =
        CpuOptions { activations: Activations::F32, kv: KvType::F32, ..CpuOptions::default() };
    let arithmetic = Arithmetic::EXACT.with_kv(DType::F32);
    for file in files() {
        unexplained(&file, options, arithmetic.clone());
    }
}

#[test]
fn undeclared_rounding_is_noticed() {
    // The check above would be worth nothing if the exact reference passed it too.
    let file = "pycoder-3m/pycoder-3m-Q4_K_M.gguf";
    let tokens = tokens(4);
    let cpu: Model<Cpu> = load(Cpu::new(CpuOptions::default()).unwrap(), file);
    let mut theirs = Collect::new(cpu.all_taps());
    logits(&cpu, &tokens, &[4], &mut theirs);
    let exact: Model<Reference<f64>> = load(Reference::new(Arithmetic::EXACT), file);
    let mut isolated = Isolated::new(&theirs);
    logits(&exact, &tokens, &[4], &mut isolated);
    assert!(isolated.worst().0 > 1e-3, "{:?}", isolated.worst());
}
