//! What is written opens, runs, and is the same again.

use std::{fs, path::Path};

use apr_cpu::{Cpu, CpuOptions};
use apr_format::Checkpoint;
use apr_model::{LogitRows, Model, Phase, StepInput, Unobserved, read_config};
use apr_tensor::DType;
use apr_testkit::fixture;
use tempfile::TempDir;

use crate::{Args, Doomed, Parser, hollow::config_of, shape::Shape, tensors::tensors};

/// The arguments of a model in the shape of the fixture `tiny`.
fn args(tiny: &str, quantize: &str, output: &Path, more: &[&str]) -> Args {
    let shape = fixture("tiny").join(tiny).join("config.json");
    let words = ["synth", "--shape", shape.to_str().unwrap(), "--quantize", quantize];
    let words = words.iter().chain(more).copied();
    Args::try_parse_from(words.chain([output.to_str().unwrap()])).unwrap()
}

fn directory() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn what_is_written_opens_and_runs() {
    let directory = directory();
    for (tiny, quantize) in
        [("qwen2", "q4_k_m"), ("qwen3", "bf16"), ("qwen3-moe", "q8_0"), ("llama", "q6_k")]
    {
        let path = directory.path().join(format!("{tiny}.gguf"));
        args(tiny, quantize, &path, &[]).write(&Doomed::default()).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let model = Model::load(Cpu::new(CpuOptions::default()).unwrap(), &checkpoint).unwrap();
        let mut cache = model.cache(4).unwrap();
        let input = StepInput {
            tokens: &[5, 6, 7],
            phase: Phase::Prefill,
            chunk: 0,
            logits: LogitRows::Last,
        };
        let logits = model.step(input, &mut cache, &mut Unobserved).unwrap();
        let logits = logits.last().unwrap();
        assert!(logits.iter().all(|x| x.is_finite()), "{tiny}");
        let power = logits.iter().map(|x| f64::from(x * x)).sum::<f64>() / logits.len() as f64;
        assert!((0.2..5.0).contains(&power), "{tiny}: {power}");
    }
}

#[test]
fn types_are_those_of_the_recipe_and_weights_have_the_variance_of_their_row() {
    let directory = directory();
    let path = directory.path().join("model.gguf");
    args("qwen2", "q4_k_m", &path, &[]).write(&Doomed::default()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let dtype = |name: &str| checkpoint.require(name).unwrap().dtype();
    // Rows of 64 are no whole blocks of 256.
    assert_eq!(dtype("blk.0.ffn_up.weight"), DType::Q5_0);
    assert_eq!(dtype("blk.0.attn_norm.weight"), DType::F32);
    let table = checkpoint.require("token_embd.weight").unwrap();
    let (values, cols) = (table.to_f32().unwrap(), table.shape().cols());
    let power = values.iter().map(|x| f64::from(x * x)).sum::<f64>() / values.len() as f64;
    assert!((power * cols as f64 - 1.0).abs() < 0.05, "{power}");
    let mut rows: Vec<&[u8]> =
        table.bytes().chunks(table.bytes().len() / table.shape().rows()).collect();
    rows.sort_unstable();
    rows.dedup();
    assert_eq!(rows.len(), table.shape().rows(), "no two tokens have one row");
}

#[test]
fn the_bytes_depend_on_the_seed_alone() {
    let directory = directory();
    let written = |name: &str, seed: &str| {
        let path = directory.path().join(name);
        args("qwen3-moe", "q4_0", &path, &["--seed", seed]).write(&Doomed::default()).unwrap();
        fs::read(path).unwrap()
    };
    let first = written("a.gguf", "7");
    assert!(first == written("b.gguf", "7"));
    assert!(first != written("c.gguf", "8"));
}

#[test]
fn known_shapes_have_the_weights_that_their_publishers_count() {
    for (name, expected) in [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
    ] {
        let config = config_of(&Shape::named(name).unwrap()).unwrap();
        let count = |shape: &Vec<usize>| shape.iter().product::<usize>();
        let found: usize = tensors(&config).iter().map(|(_, shape)| count(shape)).sum();
        assert_eq!(found, expected, "{name}");
    }
    let mixture = config_of(&Shape::named("moe-64x8").unwrap()).unwrap().moe.unwrap();
    assert_eq!((mixture.num_experts, mixture.num_experts_per_tok), (64, 8));
}

#[test]
fn a_tokenizer_of_ones_own_goes_in_and_one_that_is_too_large_does_not() {
    let directory = directory();
    let path = directory.path().join("model.gguf");
    let own = fixture("tiny/qwen2/tokenizer.json");
    args("qwen2", "f16", &path, &["--tokenizer", own.to_str().unwrap()])
        .write(&Doomed::default())
        .unwrap();
    let tokenizer = |path: &Path| {
        let checkpoint = Checkpoint::open(path).unwrap();
        let (parts, _) = apr_tokenizer::Parts::of(&checkpoint).unwrap().unwrap();
        parts
    };
    let theirs = tokenizer(&fixture("tiny/qwen2"));
    assert_eq!(theirs.difference(&tokenizer(&path)), None);

    let shape = directory.path().join("config.json");
    let config = fs::read_to_string(fixture("tiny/qwen2/config.json")).unwrap();
    let config = config.replace("\"vocab_size\": 320", "\"vocab_size\": 300");
    fs::write(&shape, config.replace(": 317", ": 299")).unwrap();
    let mut small = args("qwen2", "f16", &path, &["--force", "--tokenizer", own.to_str().unwrap()]);
    small.shape = Shape::named(shape.to_str().unwrap()).unwrap();
    let error = format!("{:#}", small.write(&Doomed::default()).unwrap_err());
    assert!(error.contains("tokenizer"), "{error}");
    assert_eq!(read_config(&Checkpoint::open(&path).unwrap()).unwrap().vocab_size, 320);
}

#[test]
fn what_is_there_is_not_replaced_without_being_asked_to() {
    let directory = directory();
    let path = directory.path().join("model.gguf");
    fs::write(&path, "precious").unwrap();
    let error = args("qwen2", "f16", &path, &[]).write(&Doomed::default()).unwrap_err().to_string();
    assert!(error.contains("--force"), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    args("qwen2", "f16", &path, &["--force"]).write(&Doomed::default()).unwrap();
    assert!(Checkpoint::open(&path).is_ok());
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left behind");
}

#[test]
fn unknown_shapes_and_recipes_are_refused_with_those_that_there_are() {
    let shape = Shape::named("qwen2.5-9b").unwrap_err();
    assert!(shape.contains("qwen2.5-7b") && shape.contains("moe-64x8"), "{shape}");
    let words = ["synth", "--shape", "moe-64x8", "--quantize", "q4_k_x", "model.gguf"];
    let error = Args::try_parse_from(words).unwrap_err().to_string();
    assert!(error.contains("q4_k_m"), "{error}");
}
