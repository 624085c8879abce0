//! Arithmetic that nobody declared.

use std::fs;

use apr_audit::{ArithmeticFrom, Audit, Options, audit};
use apr_capture::{Capture, Dims, Layout, OpenOptions};
use apr_cpu::{Activations, Cpu, CpuOptions, KvType};
use apr_model::{LogitRows, read_config};
use apr_reference::{Arithmetic, Reference};

use crate::engine::{Captured, Q4, Run, assert_match, faults, native, open};

fn undeclared(captured: &Captured) {
    captured.edit(|manifest| {
        let manifest = manifest.as_object_mut().unwrap();
        manifest.remove("plan");
        manifest.remove("kv");
        manifest.remove("backend");
    });
}

#[track_caller]
fn assert_inferred(audit: &Audit, name: &str) {
    assert!(matches!(audit.arithmetic.from, ArithmeticFrom::Inferred { .. }));
    let found = &audit.arithmetic;
    assert!(found.name.starts_with(&format!("{name} (")), "{name} is taken for {found:?}");
}

#[test]
fn the_cpu_backends_arithmetics_are_inferred() {
    let checkpoint = open(Q4);
    for (activations, kv, name) in [
        (Activations::Native, KvType::F16, "cpu"),
        (Activations::Native, KvType::F32, "cpu-kv32"),
        (Activations::F32, KvType::F16, "f32-kv16"),
        (Activations::F32, KvType::F32, "f32"),
    ] {
        let options = CpuOptions { activations, kv, ..CpuOptions::default() };
        let captured = Run::default().on(Cpu::new(options).unwrap(), &checkpoint);
        undeclared(&captured);
        let audit = captured.audited(&checkpoint);
        assert_inferred(&audit, name);
        assert_match(&audit, name);
    }
}

#[test]
fn exact_and_llama_cpps_arithmetics_are_inferred() {
    for file in [Q4, "pycoder-3m/pycoder-3m-Q8_0.gguf"] {
        let checkpoint = open(file);
        for (arithmetic, name) in [(Arithmetic::EXACT, "f32"), (Arithmetic::LLAMA_CPP, "llama-cpp")]
        {
            let captured = Run::default().on(Reference::<f32>::new(arithmetic), &checkpoint);
            undeclared(&captured);
            let audit = captured.audited(&checkpoint);
            assert_inferred(&audit, name);
            assert_match(&audit, name);
        }
    }
}

#[test]
fn a_fault_does_not_change_what_is_inferred() {
    let checkpoint = open(Q4);
    let run = Run::default().planting(0, "layers.0.ffn_gate", |_, values| {
        values.iter_mut().for_each(|x| *x = -*x);
    });
    let captured = run.on(native(), &checkpoint);
    undeclared(&captured);
    let audit = captured.audited(&checkpoint);
    assert_inferred(&audit, "cpu");
    assert_eq!(faults(&audit), ["layers.0.ffn_gate"]);
}

#[test]
fn a_stage_that_is_infinitely_wrong_does_not_decide_what_is_inferred() {
    let checkpoint = open("tiny/qwen2");
    let run = Run::default().planting(0, "lm_head", |_, values| values[0] = f64::NAN);
    let captured = run.on(native(), &checkpoint);
    undeclared(&captured);
    assert_inferred(&captured.audited(&checkpoint), "f32-kv16");
}

#[test]
fn a_manifest_that_declares_coarse_sums_is_quoted() {
    let checkpoint = open("tiny/qwen2");
    let captured = Run::default().on(native(), &checkpoint);
    captured.edit(|manifest| {
        for op in manifest["plan"]["ops"].as_array_mut().unwrap() {
            op["accumulation"] = serde_json::json!("BF16");
        }
    });
    let name = captured.audited(&checkpoint).arithmetic.name;
    assert!(name.contains("products are summed up in BF16"), "{name}");
}

#[test]
fn a_plan_that_says_nothing_of_products_declares_no_arithmetic() {
    let checkpoint = open(Q4);
    let captured = Run::default().on(native(), &checkpoint);
    captured.edit(|manifest| {
        manifest["plan"]["ops"].as_array_mut().unwrap().retain(|op| op["op"] != "linear");
    });
    assert_inferred(&captured.audited(&checkpoint), "cpu");
}

/// A prompt in one step, as foreign captures have it.
fn prompt() -> Run {
    Run { lengths: vec![9], logits: LogitRows::Last, ..Run::default() }
}

#[test]
fn a_bare_aprt_tree_is_judged_with_tokens_from_elsewhere() {
    let checkpoint = open(Q4);
    let captured = Run { layout: Layout::Aprt, ..prompt() }.on(native(), &checkpoint);
    fs::remove_file(captured.path().join("manifest.json")).unwrap();
    let dims = Some(Dims::from(&read_config(&checkpoint).unwrap()));
    let capture =
        Capture::open_with(captured.path(), &OpenOptions { dims, ..OpenOptions::default() })
            .unwrap();
    let silent = audit(&capture, &checkpoint, &Options::default(), &mut |_| {}).unwrap();
    assert_eq!(silent.verdict.exit_code(), 3, "{}", silent.verdict);
    let options = Options { tokens: Some(prompt().tokens()), ..Options::default() };
    let audit = audit(&capture, &checkpoint, &options, &mut |_| {}).unwrap();
    assert_inferred(&audit, "cpu");
    assert_match(&audit, "a bare APRT tree");
}

#[test]
fn npy_files_are_judged_with_tokens_from_elsewhere() {
    let checkpoint = open(Q4);
    let captured = prompt().on(native(), &checkpoint);
    let ours = captured.open();
    let arrays = arrays(&ours);
    let capture = Capture::open(arrays.path()).unwrap();
    assert_eq!(capture.sites(), ours.sites());
    let options = Options { tokens: Some(prompt().tokens()), ..Options::default() };
    let audit = audit(&capture, &checkpoint, &options, &mut |_| {}).unwrap();
    assert_inferred(&audit, "cpu");
    assert_match(&audit, "a directory of .npy files");
}

#[test]
fn a_stage_that_the_model_does_not_have_is_not_passed_over() {
    let checkpoint = open("tiny/qwen2");
    let arrays = arrays(&prompt().on(native(), &checkpoint).open());
    fs::write(arrays.path().join("layers.0.q_norm.npy"), npy(&[9, 4, 16], &[0.0; 9 * 4 * 16]))
        .unwrap();
    let capture = Capture::open(arrays.path()).unwrap();
    for common in [false, true] {
        let tokens = Some(prompt().tokens());
        let options = Options { tokens, common, ..Options::default() };
        let audit = audit(&capture, &checkpoint, &options, &mut |_| {}).unwrap();
        assert_eq!(audit.verdict.exit_code(), 3, "{}", audit.verdict);
        assert!(audit.verdict.to_string().contains("q_norm"), "{}", audit.verdict);
    }
}

/// The first step as a directory of `.npy` files.
fn arrays(capture: &Capture) -> tempfile::TempDir {
    let arrays = tempfile::tempdir().unwrap();
    for site in capture.sites() {
        let tensor = capture.tensor(0, site).unwrap();
        let path = arrays.path().join(format!("{site}.npy"));
        fs::write(path, npy(tensor.shape(), &tensor.to_f32())).unwrap();
    }
    arrays
}

/// A version 1 `.npy` file.
fn npy(shape: &[usize], values: &[f32]) -> Vec<u8> {
    let shape: String = shape.iter().map(|d| format!("{d}, ")).collect();
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}\n");
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.bytes());
    file.extend(values.iter().flat_map(|x| x.to_le_bytes()));
    file
}
