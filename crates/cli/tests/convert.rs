//! `apr convert`: what it writes runs as what it was made from, and what it refuses leaves nothing.

mod common;

use std::{fs, path::Path};

use apr_testkit::golden;
use common::{Scratch, apr, fixture, numbers};
use serde_json::Value;

/// A directory under `fixtures/`, and its golden capture.
const MODELS: [(&str, &str); 6] = [
    ("pycoder-3m", "pycoder-3m"),
    ("tiny/llama", "tiny-llama"),
    ("tiny/llama3-rope", "tiny-llama3-rope"),
    ("tiny/qwen2", "tiny-qwen2"),
    ("tiny/qwen3", "tiny-qwen3"),
    ("tiny/qwen3-moe", "tiny-qwen3-moe"),
];

/// Tokens to compare.
const TOKENS: &str = "16";

/// The ids of the prompt and of its greedy continuation, on the cpu backend.
#[track_caller]
fn greedy(model: &str, prompt: &str) -> (Vec<u32>, Vec<u32>) {
    let args = ["run", model, "-p", prompt, "-n", TOKENS, "--ignore-eos", "--json"];
    let json = apr(args).expect(0).json();
    (numbers(&json["prompt_token_ids"]), numbers(&json["token_ids"]))
}

#[test]
fn every_container_says_the_same_tokens_as_the_source() {
    for (model, name) in MODELS {
        let scratch = Scratch::new();
        let prompt = golden(name).prompt;
        let source = fixture(model);
        let expected = greedy(&source, &prompt);
        let mut previous = source;
        for target in ["a.gguf", "b.apr", "c.gguf", "d", "e.apr"] {
            let next = scratch.path(target);
            apr(["convert", &previous, &next]).expect(0);
            assert_eq!(greedy(&next, &prompt), expected, "{model}: {previous} -> {next}");
            previous = next;
        }
    }
}

#[test]
fn json_says_what_was_written_in_which_types_and_how_far_it_is_off() {
    let scratch = Scratch::new();
    let output = scratch.path("model.gguf");
    let source = fixture("pycoder-3m");
    let json =
        apr(["convert", &source, &output, "--quantize", "Q4_K_M", "--json"]).expect(0).json();
    assert_eq!(json["schema"], "apr-convert/1");
    assert_eq!(
        (&json["source_container"], &json["container"]),
        (&"safetensors".into(), &"gguf".into())
    );
    assert_eq!(json["recipe"], "q4_k_m");
    assert_eq!(json["outcome"]["verified"], true);
    assert_eq!(json["outcome"]["file_bytes"], fs::metadata(&output).unwrap().len());
    let types = json["types"].as_array().unwrap();
    let line = |dtype: &str| types.iter().find(|line| line["dtype"] == dtype).unwrap();
    // As in the file of llama.cpp beside the fixture.
    assert_eq!((&line("Q4_K")["tensors"], &line("Q6_K")["tensors"]), (&24.into(), &5.into()));
    let error = |dtype: &str| line(dtype)["relative_rmse"].as_f64();
    assert!((0.03..0.12).contains(&error("Q4_K").unwrap()), "{json}");
    assert!((0.005..0.03).contains(&error("Q6_K").unwrap()), "{json}");
    assert_eq!(error("F32"), None, "norms are not rounded");
    let total: u64 = types.iter().map(|line| line["bytes"].as_u64().unwrap()).sum();
    assert_eq!(json["tensor_bytes"], total);
}

#[test]
fn a_dry_run_shows_the_mix_and_writes_nothing() {
    let scratch = Scratch::new();
    let output = scratch.path("model.gguf");
    let source = fixture("tiny/qwen2");
    let args = ["convert", &source, &output, "--quantize", "q8_0", "--dry-run"];
    let done = apr(args).expect(0);
    assert!(done.stdout.contains("safetensors -> gguf, q8_0"), "{}", done.stdout);
    assert!(done.stdout.contains("Q8_0"), "{}", done.stdout);
    let json = apr(args.into_iter().chain(["--json"])).expect(0).json();
    assert_eq!(json["outcome"], Value::Null);
    assert!(!Path::new(&output).exists());
}

/// Runs `apr convert`, which has to refuse with these words, and returns what is in the directory afterwards.
#[track_caller]
fn refused(args: &[&str], words: &[&str]) {
    let done = apr(["convert"].into_iter().chain(args.iter().copied())).expect(2);
    assert_eq!(done.stdout, "", "{args:?}");
    for word in words {
        assert!(done.stderr.contains(word), "{args:?} does not say {word:?}: {}", done.stderr);
    }
}

#[test]
fn wrong_arguments_are_refused_with_what_to_do() {
    let scratch = Scratch::new();
    let source = fixture("tiny/qwen2");
    let output = scratch.path("model.gguf");
    refused(&[&source, &scratch.path("model.bin")], &[".gguf", "--to"]);
    refused(&[&source, &output, "--quantize", "q4_k_xl"], &["q4_k_xl", "q4_k_m"]);
    refused(&[&source, &output, "--quantize", "q8_0", "--dtype", "f16"], &["--dtype"]);
    refused(&[&source, &output, "--imatrix", "x.gguf"], &["--quantize"]);
    let missing = scratch.path("missing.gguf");
    refused(&[&source, &output, "--quantize", "q4_0", "--imatrix", &missing], &["missing.gguf"]);
    refused(&[&source, &scratch.path("model"), "--quantize", "q8_0"], &["safetensors", "Q8_0"]);
    refused(&[&source, &scratch.path("model"), "--shard-size", "5 apples"], &["5GB"]);
    let file = scratch.path("one.gguf");
    refused(&[&source, &file, "--shard-size", "5GB"], &["--shard-size", "one file"]);
    refused(&[&source, &scratch.path("nowhere/model.gguf")], &["nowhere"]);
    fs::write(&output, "precious").unwrap();
    refused(&[&source, &output], &["already", "--force"]);
    assert_eq!(fs::read_to_string(&output).unwrap(), "precious");
    apr(["convert", &source, &output, "--force"]).expect(0);
    refused(&[&output, &output, "--force"], &["what is being converted"]);
}

#[test]
#[cfg(unix)]
fn what_is_no_file_is_never_replaced() {
    use std::os::unix::{fs::FileTypeExt, net::UnixListener};

    let scratch = Scratch::new();
    let socket = scratch.path("socket.gguf");
    let _listener = UnixListener::bind(&socket).unwrap();
    refused(&[&fixture("tiny/qwen2"), &socket, "--force"], &["neither a file nor a directory"]);
    assert!(fs::symlink_metadata(&socket).unwrap().file_type().is_socket());
}

#[test]
fn what_is_no_whole_model_is_refused() {
    let scratch = Scratch::new();
    let output = scratch.path("out.apr");
    let gguf = fs::read(fixture("tiny/qwen2/qwen2-F16.gguf")).unwrap();
    let empty = scratch.write("empty.gguf", "");
    refused(&[&empty, &output], &["empty.gguf", "expected a GGUF"]);
    let cut = scratch.write("cut.gguf", &gguf[..gguf.len() / 2]);
    refused(&[&cut, &output], &["cut.gguf", "truncated"]);
    // Renamed, a tensor is missing and another one is foreign.
    let (from, to) = (b"blk.1.attn_q.bias", b"blk.1.attn_z.bias");
    let at = gguf.windows(from.len()).position(|window| window == from).unwrap();
    let mut renamed = gguf.clone();
    renamed[at..at + to.len()].copy_from_slice(to);
    let renamed = scratch.write("renamed.gguf", renamed);
    refused(&[&renamed, &output, "--lossy"], &["attn_q.bias", "missing"]);
    assert!(!Path::new(&output).exists());
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let scratch = Scratch::new();
    for output in ["model.gguf", "model.apr", "model"] {
        let output = scratch.path(output);
        // 64 KiB.
        let args = ["convert", &fixture("tiny/qwen2"), &output];
        let done = common::apr_with_file_limit("128", &args).expect(2);
        assert!(done.stderr.contains("cannot write the model"), "{}", done.stderr);
        let left: Vec<_> = fs::read_dir(scratch.path("")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
