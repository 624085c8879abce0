//! What every backend promises, on every instruction set of this machine, alone and on several threads.

use apr_cpu::{Activations, Cpu, CpuOptions, Isa, KvType};
use apr_testkit::{Collect, Shown, invariants};

fn best(threads: usize) -> impl Fn() -> Cpu {
    move || Cpu::new(CpuOptions { threads: Some(threads), ..CpuOptions::default() }).unwrap()
}

fn bits(value: &Shown) -> Vec<u64> {
    value.tensor.values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn looking_changes_no_bit() {
    invariants::observed_equals_unobserved(best(2));
}

#[test]
fn bits_do_not_depend_on_chunking() {
    invariants::bits_do_not_depend_on_chunking(best(2));
}

#[test]
fn logits_do_not_depend_on_the_rows_asked_for() {
    invariants::logits_do_not_depend_on_the_rows_asked_for(best(2));
}

#[test]
fn every_stage_is_shown_in_order() {
    invariants::every_stage_is_shown_in_order(best(1));
}

#[test]
fn replaced_values_are_used() {
    invariants::replaced_values_are_used(best(2));
}

#[test]
fn bad_input_is_refused() {
    invariants::bad_input_is_refused(best(1));
}

#[test]
fn bits_depend_on_the_arithmetic_but_not_on_isa_threads_or_the_order_of_rows() {
    let files = ["tiny/llama/llama-F16.gguf", "pycoder-3m/pycoder-3m-Q4_K_M.gguf"];
    for file in files {
        let tokens = invariants::tokens(11);
        let run = |options| {
            let model = invariants::load(Cpu::new(options).unwrap(), file);
            let mut seen = Collect::new(model.all_taps());
            let logits = invariants::logits(&model, &tokens, &[8, 3], &mut seen);
            let stages: Vec<_> = seen.shown.into_iter().map(|(at, v)| (at, bits(&v))).collect();
            (logits, stages)
        };
        let mut arithmetics = Vec::new();
        for activations in [Activations::Native, Activations::F32] {
            for kv in [KvType::F16, KvType::F32] {
                let options = CpuOptions { activations, kv, ..CpuOptions::default() };
                let expected =
                    run(CpuOptions { threads: Some(1), isa: Some(Isa::Scalar), ..options });
                for isa in Isa::available() {
                    for (threads, no_repack) in [(1, true), (1, false), (2, false), (4, true)] {
                        let (threads, isa) = (Some(threads), Some(isa));
                        let options = CpuOptions { threads, isa, no_repack, ..options };
                        let (logits, stages) = run(options);
                        for (ours, expected) in stages.iter().zip(&expected.1) {
                            let ((step, site), _) = ours;
                            assert!(ours == expected, "{file}: {options:?}: {site} of step {step}");
                        }
                        assert!((logits, stages) == expected, "{file}: {options:?}");
                    }
                }
                arithmetics.push(expected.0);
            }
        }
        let [native, native_f32_cache, f32, _] = &arithmetics[..] else { unreachable!() };
        assert!(native != native_f32_cache, "{file}: the cache's type is ignored");
        let has_quantized_weights = file.contains("Q4_K");
        assert_eq!(native != f32, has_quantized_weights, "{file}");
    }
}
