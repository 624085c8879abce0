//! Importance matrices: what they change, and which are refused.

mod common;

use std::path::Path;

use apr_convert::{Importance, Options, Plan, Recipe, Result, Target};
use apr_format::Checkpoint;
use apr_model::{Role, read_config};
use common::{fixture, imatrix, open, save_gguf, try_convert};

const DOWN: &str = "blk.1.ffn_down.weight";

/// Every fourth column matters, a hundred times as much as those that it shares its block with.
fn of_columns(cols: usize) -> Vec<f32> {
    (0..cols).map(|column| if matters(column) { 500.0 } else { 5.0 }).collect()
}

fn matters(column: usize) -> bool {
    column.is_multiple_of(4)
}

fn options(importance: Option<Importance>) -> Options {
    Options { recipe: Some(Recipe::Q3_K_M), importance, ..Options::default() }
}

/// The mean square of the errors in the columns of `DOWN` that matter.
fn noise(source: &Checkpoint, written: &Checkpoint) -> f64 {
    let exact = source.require("model.layers.1.mlp.down_proj.weight").unwrap();
    let cols = exact.shape().cols();
    let (x, y) = (exact.to_f32().unwrap(), written.require(DOWN).unwrap().to_f32().unwrap());
    let errors = x.iter().zip(&y).enumerate().filter(|(i, _)| matters(i % cols));
    errors.map(|(_, (x, y))| f64::from(x - y).powi(2)).sum()
}

#[test]
fn columns_that_matter_more_are_kept_nearer() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let source = fixture("pycoder-3m");
    let cols = source.require("model.layers.1.mlp.down_proj.weight").unwrap().shape().cols();
    imatrix(&path("imatrix.gguf"), &[(DOWN, vec![5.0], of_columns(cols))]);
    let importance = Importance::open(&path("imatrix.gguf")).unwrap();
    let plan = Plan::new(&source, Target::Gguf, options(Some(importance.clone()))).unwrap();
    let quantised = plan.tensors.iter().filter(|tensor| tensor.dtype.is_quantized()).count();
    assert_eq!(plan.without_importance().count(), quantised - 1, "it is of one tensor");

    try_convert(&source, &path("with.gguf"), options(Some(importance))).unwrap();
    try_convert(&source, &path("without.gguf"), options(None)).unwrap();
    let (with, without) = (open(&path("with.gguf")), open(&path("without.gguf")));
    let gain = noise(&source, &with) / noise(&source, &without);
    assert!(gain < 0.9, "their errors are {gain} of what they were");
    let other = "blk.0.ffn_down.weight";
    assert!(
        with.require(other).unwrap().bytes()[..] == without.require(other).unwrap().bytes()[..],
        "what it says nothing about is as it was"
    );
}

#[test]
fn each_expert_has_an_importance_of_its_own() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("imatrix.gguf");
    let source = fixture("tiny/qwen3-moe");
    let config = read_config(&source).unwrap();
    let moe = config.moe.clone().unwrap();
    let (experts, cols) = (moe.num_experts, config.hidden_size);
    let name = "blk.0.ffn_up_exps.weight";
    let sums: Vec<f32> = (0..experts).flat_map(|expert| vec![expert as f32; cols]).collect();
    let mut counts = vec![2.0; experts];
    // The text never chose expert 1.
    counts[1] = 0.0;
    imatrix(&path, &[(name, counts, sums)]);
    let importance = Importance::open(&path).unwrap();
    let role = |expert| Role::Expert(0, apr_model::LayerRole::FfnUpExps, expert);
    assert_eq!(importance.of(role(3)).unwrap(), vec![1.5; cols]);
    assert_eq!(importance.of(role(1)).unwrap(), vec![1.0; cols]);
    assert_eq!(importance.of(Role::Output), None);
    Plan::new(&source, Target::Gguf, options(Some(importance))).unwrap();
}

#[track_caller]
fn refused<T>(result: Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("it was not refused") };
    let text = error.to_string();
    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
}

#[test]
fn importance_of_another_model_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("imatrix.gguf");
    let source = fixture("pycoder-3m");
    let plan = |importance| Plan::new(&source, Target::Gguf, options(Some(importance)));
    let of = |entries: &[(&str, Vec<f32>, Vec<f32>)]| {
        imatrix(&path, entries);
        Importance::open(&path)
    };
    let deep = of(&[("blk.40.ffn_down.weight", vec![1.0], vec![1.0; 768])]);
    refused(plan(deep.unwrap()), &["imatrix.gguf", "`blk.40.ffn_down.weight`", "no such tensor"]);
    let narrow = of(&[(DOWN, vec![1.0], vec![1.0; 700])]);
    refused(plan(narrow.unwrap()), &["700 columns", "768"]);
    let many = of(&[(DOWN, vec![1.0; 2], vec![1.0; 2 * 768])]);
    refused(plan(many.unwrap()), &["2 matrices", "has 1"]);
    refused(of(&[("encoder.weight", vec![1.0], vec![1.0; 8])]), &["`encoder.weight`"]);
    refused(of(&[(DOWN, vec![1.0], vec![f32::NAN; 768])]), &[DOWN, "NaN"]);
    refused(of(&[]), &["in_sum2", "llama-imatrix"]);
}

#[test]
fn a_file_without_counts_or_of_another_kind_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("imatrix.gguf");
    imatrix(&path, &[(DOWN, vec![1.0], vec![1.0; 768])]);
    let mut draft = apr_format::Draft::of(&open(&path));
    draft.remove_tensor(&format!("{DOWN}.counts"));
    save_gguf(&draft, &path);
    refused(Importance::open(&path), &["blk.1.ffn_down.weight.counts"]);
    refused(Importance::open(Path::new("nowhere.gguf")), &["nowhere.gguf"]);
}
