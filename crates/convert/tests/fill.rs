//! A plan written with weights of the caller's.

mod common;

use apr_convert::{Options, Output, Plan, Recipe, Result, Settings, Target, fill};
use common::{fixture, open};

/// Writes `byte` wherever the plan has weights, but `short` bytes less of each tensor.
fn filled(directory: &std::path::Path, byte: u8, short: u64) -> Result<u64> {
    let source = fixture("tiny/qwen3-moe");
    let output = Output::new(&directory.join("model.gguf"), Target::Gguf, &source, false)?;
    let options = Options { recipe: Some(Recipe::Q8_0), ..Options::default() };
    let plan = Plan::new(&source, Target::Gguf, options)?;
    fill(&plan, &output, &Settings::default(), &mut |tensor, put| {
        let bytes = vec![byte; (tensor.bytes() - short) as usize];
        bytes.chunks(100).try_for_each(put)
    })
}

#[test]
fn tensors_are_the_plans_and_bytes_the_callers() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = filled(directory.path(), 7, 0).unwrap();
    let path = directory.path().join("model.gguf");
    assert_eq!(path.metadata().unwrap().len(), bytes);
    let written = open(&path);
    let gate = written.require("blk.1.ffn_gate_exps.weight").unwrap();
    assert_eq!((gate.dtype(), gate.shape().dims()), (apr_tensor::DType::Q8_0, &[8, 32, 64][..]));
    assert!(written.tensors().all(|(_, stored)| stored.bytes().iter().all(|&byte| byte == 7)));
}

#[test]
fn a_tensor_that_does_not_come_whole_is_refused_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let error = filled(directory.path(), 7, 1).unwrap_err().to_string();
    assert!(error.contains("token_embd.weight"), "{error}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}
