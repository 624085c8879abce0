//! What is not converted: refused before any work, or with nothing left under the final name.

mod common;

use std::{fs, path::Path};

use apr_convert::{Options, Output, Plan, Recipe, Target};
use apr_format::Draft;
use common::{converted, fixture, open, try_convert, vector};

#[track_caller]
fn refused<T>(result: apr_convert::Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("it was not refused") };
    let text = error.to_string();
    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
}

fn with(recipe: Recipe) -> Options {
    Options { recipe: Some(recipe), ..Options::default() }
}

#[test]
fn quantised_weights_are_quantised_again_only_on_request() {
    let scratch = tempfile::tempdir().unwrap();
    let source = fixture("pycoder-3m/pycoder-3m-Q8_0.gguf");
    let path = scratch.path().join("again.gguf");
    let result = try_convert(&source, &path, with(Recipe::Q4_K_M));
    refused(result, &["Q8_0 already", "--requantize"]);
    let options = Options { requantize: true, ..with(Recipe::Q4_K_M) };
    try_convert(&source, &path, options).unwrap();
    // To the same type is no second rounding.
    let again = scratch.path().join("same.gguf");
    try_convert(&open(&path), &again, with(Recipe::Q4_K_M)).unwrap();
    assert_eq!(open(&again).index_sha256(), open(&path).index_sha256());
}

#[test]
fn a_container_refuses_recipes_of_types_that_it_lacks() {
    let source = fixture("tiny/qwen2");
    let plan = |target, recipe| Plan::new(&source, target, with(recipe));
    refused(plan(Target::Safetensors, Recipe::Q8_0), &["safetensors", "q8_0", "f32, f16, bf16"]);
    refused(plan(Target::Apr, Recipe::Q5_K_M), &["apr", "Q5_K", "q4_k_m", "q6_k"]);
}

#[test]
fn what_would_be_lost_is_listed_and_needs_consent() {
    let scratch = tempfile::tempdir().unwrap();
    let source = fixture("tiny/qwen2");
    let alone = scratch.path().join("alone.safetensors");
    let result = try_convert(&source, &alone, Options::default());
    refused(result, &["config.json", "tokenizer.json", "--lossy"]);
    assert!(!alone.exists());
    let lossy = Options { lossy: true, ..Options::default() };
    try_convert(&source, &alone, lossy).unwrap();
    assert_eq!(open(&alone).tensors().len(), source.tensors().len());
}

#[test]
fn what_does_not_run_is_not_converted_even_with_consent() {
    let lossy = Options { lossy: true, ..Options::default() };
    let plan =
        |draft: &Draft| Plan::new(&draft.to_gguf("bad.gguf").unwrap(), Target::Apr, lossy.clone());
    let whole = Draft::of(&fixture("tiny/qwen2/qwen2-F16.gguf"));
    let mut draft = whole.clone();
    draft.tensors.push(("blk.0.attn_extra.weight".to_owned(), vector(&[1.0])));
    refused(plan(&draft), &["bad.gguf", "`blk.0.attn_extra.weight`", "qwen2"]);
    let mut draft = whole.clone();
    draft.remove_tensor("blk.1.attn_q.bias");
    refused(plan(&draft), &["bad.gguf", "`blk.1.attn_q.bias`", "missing"]);
    let mut draft = whole;
    *draft.tensor_mut("blk.1.ffn_norm.weight").unwrap() = vector(&[1.0]);
    refused(plan(&draft), &["bad.gguf", "blk.1.ffn_norm.weight", "shape"]);
}

#[test]
fn a_number_too_large_for_its_type_leaves_nothing_behind() {
    let scratch = tempfile::tempdir().unwrap();
    let mut draft = Draft::of(&fixture("tiny/qwen2"));
    let name = "model.layers.1.mlp.down_proj.weight";
    let stored = draft.tensor_mut(name).unwrap();
    let mut values = stored.to_f32().unwrap();
    let cols = stored.shape().cols();
    values[3 * cols + 2] = 1e5;
    *stored = vector(&values).with_shape(stored.shape().clone()).unwrap();
    let large = scratch.path().join("large");
    fs::create_dir(&large).unwrap();
    fs::write(large.join("model.safetensors"), draft.safetensors().unwrap()).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(apr_testkit::fixture("tiny/qwen2").join(file), large.join(file)).unwrap();
    }
    let path = scratch.path().join("model.gguf");
    let result = try_convert(&open(&large), &path, with(Recipe::F16));
    refused(result, &["`blk.1.ffn_down.weight`", "row 3", "element 2", "1e5", "F16"]);
    let left: Vec<_> = fs::read_dir(scratch.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left, std::slice::from_ref(&large), "neither the file nor a part of it");
    // A wider type takes it.
    try_convert(&open(&large), &path, with(Recipe::BF16)).unwrap();
}

#[test]
fn what_is_there_is_replaced_only_on_request_and_only_by_its_like() {
    let scratch = tempfile::tempdir().unwrap();
    let source = fixture("tiny/qwen2");
    let output = |path: &Path, target, force| Output::new(path, target, &source, force);
    let file = scratch.path().join("model.gguf");
    fs::write(&file, "precious").unwrap();
    refused(output(&file, Target::Gguf, false), &["a file already", "--force"]);
    output(&file, Target::Gguf, true).unwrap();
    refused(output(&file, Target::Safetensors, true), &["a file already"]);

    let directory = scratch.path().join("model");
    fs::create_dir(&directory).unwrap();
    output(&directory, Target::Safetensors, false).expect("an empty directory is nothing");
    fs::write(directory.join("thesis.tex"), "precious").unwrap();
    refused(output(&directory, Target::Safetensors, false), &["a directory already"]);
    refused(output(&directory, Target::Safetensors, true), &["no directory of a model"]);
    refused(output(&directory, Target::Apr, true), &["no directory of a model"]);
    fs::write(directory.join("config.json"), "{}").unwrap();
    output(&directory, Target::Safetensors, true).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn a_directory_of_a_model_is_replaced_as_a_whole() {
    let scratch = tempfile::tempdir().unwrap();
    let source = fixture("tiny/qwen2");
    let path = scratch.path().join("model");
    converted(&source, path.clone(), None);
    fs::write(path.join("stale.json"), "{}").unwrap();
    let plan = Plan::new(&source, Target::Safetensors, with(Recipe::F32)).unwrap();
    let output = Output::new(&path, Target::Safetensors, &source, true).unwrap();
    apr_convert::convert(&plan, &output, &Default::default(), &mut |_, _| ()).unwrap();
    assert!(!path.join("stale.json").exists());
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "the old one is gone");
}

#[test]
fn a_model_is_not_written_onto_itself() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("model.gguf");
    let source = converted(&fixture("tiny/qwen2"), path.clone(), None);
    let same = scratch.path().join("./model.gguf");
    refused(Output::new(&same, Target::Gguf, &source, true), &["what is being converted"]);
    // Nor a directory that holds it.
    let directory = scratch.path().join("model");
    let inner = converted(&fixture("tiny/qwen2"), directory.clone(), None);
    let single = open(&directory.join("model.safetensors"));
    for source in [inner, single] {
        let result = Output::new(&directory, Target::Safetensors, &source, true);
        refused(result, &["what is being converted"]);
    }
}
