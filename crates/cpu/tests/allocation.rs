//! Decoding allocates nothing once it runs. The only test of its file: others would allocate beside it.

use std::alloc::System;

use apr_cpu::{Cpu, CpuOptions};
use apr_format::Checkpoint;
use apr_model::{Cache, LogitRows, Model, Phase, StepInput, Unobserved};
use apr_tensor::{Bytes, DType, Stored, quantize_row};
use apr_testkit::{Draft, TINY, fixture, invariants::tokens};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Scores grow with the position, and what holds them is doubled at each power of two: between two of these.
const PROMPT: usize = 33;
const STEPS: usize = 64 - PROMPT;

/// Models of every architecture in f16 and in 8 bits, and one in 4 to 6.
fn models() -> Vec<(String, Checkpoint)> {
    let open = |file: &str| Checkpoint::open(fixture(file)).unwrap();
    let mut models = vec![("Q4_K_M".to_owned(), open("pycoder-3m/pycoder-3m-Q4_K_M.gguf"))];
    for name in TINY {
        let f16 = open(&format!("tiny/{name}/{name}-F16.gguf"));
        models.push((format!("{name} in Q8_0"), in_eight_bits(&f16)));
        models.push((format!("{name} in F16"), f16));
    }
    models
}

fn in_eight_bits(checkpoint: &Checkpoint) -> Checkpoint {
    let mut draft = Draft::of(checkpoint);
    for (_, stored) in &mut draft.tensors {
        let shape = stored.shape().clone();
        if shape.dims().len() < 2 {
            continue;
        }
        let mut bytes = Vec::new();
        for row in stored.to_f32().unwrap().chunks_exact(shape.cols()) {
            let mut blocks = vec![0; row.len() / 32 * 34];
            quantize_row(DType::Q8_0, row, None, &mut blocks).unwrap();
            bytes.extend(blocks);
        }
        *stored = Stored::new(DType::Q8_0, shape, Bytes::from(bytes)).unwrap();
    }
    draft.gguf()
}

/// How often memory is asked for by `STEPS` steps that follow a prompt. The fewest times of some rounds: a worker thread
/// asks for some when it starts, and that may be late.
fn allocations_of_decoding(checkpoint: &Checkpoint, threads: usize) -> usize {
    let cpu = Cpu::new(CpuOptions { threads: Some(threads), ..CpuOptions::default() }).unwrap();
    let model = Model::load(cpu, checkpoint).unwrap();
    let mut cache = model.cache(PROMPT + STEPS).unwrap();
    let tokens = tokens(PROMPT + STEPS);
    let step = |tokens: &[u32], phase, cache: &mut Cache<Cpu>| {
        let input = StepInput { tokens, phase, chunk: 0, logits: LogitRows::Last };
        let logits = model.step(input, cache, &mut Unobserved).unwrap();
        assert!(logits.last().is_some());
    };
    step(&tokens[..PROMPT], Phase::Prefill, &mut cache);
    let mut round = || {
        cache.truncate(PROMPT);
        let region = Region::new(ALLOCATOR);
        for token in tokens[PROMPT..].chunks(1) {
            step(token, Phase::Decode, &mut cache);
        }
        let change = region.change();
        change.allocations + change.reallocations
    };
    (0..4).map(|_| round()).min().unwrap()
}

#[test]
fn a_decode_step_that_nobody_looks_at_allocates_nothing() {
    for (name, checkpoint) in models() {
        for threads in [1, 2] {
            let allocations = allocations_of_decoding(&checkpoint, threads);
            assert_eq!(allocations, 0, "{name} on {threads} threads, in {STEPS} steps");
        }
    }
}
