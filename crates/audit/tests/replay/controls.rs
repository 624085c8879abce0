//! Engines that do what they declare: no alarm.

use apr_audit::Options;
use apr_capture::{Capture, Layout, Precision};
use apr_cpu::{Activations, Cpu, CpuOptions, KvType};
use apr_model::LogitRows;
use apr_reference::{Arithmetic, Reference};
use apr_testkit::golden;

use crate::engine::{Run, assert_match, open, tiny, trained};

fn files() -> impl Iterator<Item = String> {
    tiny().into_iter().chain(trained())
}

#[test]
fn the_cpu_backend_matches_in_all_its_arithmetics() {
    for file in files() {
        let checkpoint = open(&file);
        for (activations, kv, threads) in [
            (Activations::Native, KvType::F16, 1),
            (Activations::Native, KvType::F32, 2),
            (Activations::F32, KvType::F16, 2),
            (Activations::F32, KvType::F32, 1),
        ] {
            let threads = Some(threads);
            let options = CpuOptions { activations, kv, threads, ..CpuOptions::default() };
            let captured = Run::default().on(Cpu::new(options).unwrap(), &checkpoint);
            assert_match(&captured.audited(&checkpoint), &format!("{file}, {options:?}"));
        }
    }
}

#[test]
fn the_reference_matches_in_f64_and_in_f32() {
    for file in files() {
        let checkpoint = open(&file);
        let single = Run::default().on(Reference::<f32>::new(Arithmetic::EXACT), &checkpoint);
        assert_match(&single.audited(&checkpoint), &format!("{file}, reference in f32"));
        let run = Run { precision: Precision::F64, ..Run::default() };
        let double = run.on(Reference::<f64>::new(Arithmetic::EXACT), &checkpoint);
        let audit = double.audited(&checkpoint);
        assert_match(&audit, &format!("{file}, reference in f64"));
        assert!(audit.stages.iter().all(|stage| stage.errors.local == 0.0), "{file}: not itself");
    }
}

#[test]
fn the_reference_matches_in_the_arithmetics_that_it_emulates() {
    for file in trained() {
        let checkpoint = open(&file);
        for arithmetic in [Arithmetic::CPU, Arithmetic::LLAMA_CPP] {
            let engine = Reference::<f32>::new(arithmetic.clone());
            // The plan of the emulation does not say what queries are rounded to.
            let options = Options {
                arithmetic: (arithmetic.queries != Arithmetic::EXACT.queries)
                    .then(|| apr_audit::Declared::named("llama-cpp").unwrap()),
                ..Options::default()
            };
            let captured = Run::default().on(engine, &checkpoint);
            let audit = captured.audited_with(&checkpoint, &options);
            assert_match(&audit, &format!("{file}, {arithmetic:?}"));
        }
    }
}

#[test]
fn captures_of_hugging_face_match() {
    for (capture, file) in [
        ("tiny-qwen2", "tiny/qwen2"),
        ("tiny-qwen3", "tiny/qwen3"),
        ("tiny-qwen3-moe", "tiny/qwen3-moe"),
        ("tiny-llama", "tiny/llama"),
        ("tiny-llama3-rope", "tiny/llama3-rope"),
        ("pycoder-3m", "pycoder-3m"),
    ] {
        let capture = Capture::open(golden(capture).capture).unwrap();
        let options = Options { common: true, ..Options::default() };
        let audit = apr_audit::audit(&capture, &open(file), &options, &mut |_| {}).unwrap();
        assert_match(&audit, &format!("Hugging Face's {file}"));
    }
}

#[test]
fn last_logits_only_are_not_taken_for_the_logits_of_all_rows() {
    let checkpoint = open("tiny/qwen3");
    let run = Run { logits: LogitRows::Last, ..Run::default() };
    let audit = run.on(crate::engine::native(), &checkpoint).audited(&checkpoint);
    assert_match(&audit, "the last row's logits");
    let head = audit.stage(crate::engine::site("lm_head")).unwrap();
    assert_eq!(head.rows.iter().map(|row| row.position).collect::<Vec<_>>(), [6, 10, 11, 12]);
}

#[test]
fn an_aprt_tree_with_a_manifest_matches() {
    let checkpoint = open("tiny/qwen2");
    let run = Run { layout: Layout::Aprt, ..Run::default() };
    assert_match(&run.on(crate::engine::native(), &checkpoint).audited(&checkpoint), "APRT");
}
