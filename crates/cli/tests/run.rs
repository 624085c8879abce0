//! `apr run`: the text, and what JSON says about it.

mod common;

use apr_testkit::{TINY, golden};
use common::{Scratch, apr, apr_reading, fixture, ids, numbers};

/// Tokens to compare with Hugging Face's.
const TOKENS: usize = 24;

#[test]
fn greedy_text_is_that_of_hugging_face_from_either_container() {
    for name in TINY {
        let golden = golden(&format!("tiny-{name}"));
        for file in [format!("tiny/{name}"), format!("tiny/{name}/{name}-F16.gguf")] {
            let n = TOKENS.to_string();
            let args = ["run", &fixture(&file), "-p", &golden.prompt, "-n", &n, "--ignore-eos"];
            let exact = ["--backend", "reference", "--json"];
            let json = apr(args.into_iter().chain(exact)).expect(0).json();
            assert_eq!(numbers(&json["prompt_token_ids"]), golden.prompt_ids, "{file}");
            assert_eq!(numbers(&json["token_ids"]), golden.greedy_ids[..TOKENS], "{file}");
        }
    }
}

#[test]
fn json_says_what_ran_and_how_likely_each_token_was() {
    let model = fixture("tiny/qwen2");
    let args = ["run", &model, "-p", "def f(", "-n", "3", "--json", "--logprobs", "4"];
    let json = apr(args).expect(0).json();
    assert_eq!(json["schema"], "apr-run/1");
    assert_eq!(json["model"], model);
    assert_eq!(json["backend"], "cpu");
    assert_eq!(json["prompt_mode"], "text");
    assert_eq!(json["prompt_text"], "def f(");
    assert_eq!(json["finish"], "length");
    assert_eq!(json["plan"].as_str().unwrap().len(), 64);
    let tokens = json["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 3);
    let mut text = String::new();
    for (token, id) in tokens.iter().zip(numbers(&json["token_ids"])) {
        let top = token["top"].as_array().unwrap();
        assert_eq!(top.len(), 4);
        // Greedy: the token is the likeliest, and the others follow.
        assert_eq!(
            (top[0]["id"].as_u64(), token["id"].as_u64()),
            (Some(id.into()), Some(id.into()))
        );
        assert_eq!(top[0]["logprob"], token["logprob"]);
        let logprobs: Vec<f64> = top.iter().map(|t| t["logprob"].as_f64().unwrap()).collect();
        assert!(logprobs.is_sorted_by(|a, b| a >= b) && logprobs[0] < 0.0, "{logprobs:?}");
        // A part of a character is bytes by itself, and a replacement character in the text.
        let piece = token["text"].as_str().unwrap();
        text += if piece.starts_with("<0x") { "\u{FFFD}" } else { piece };
    }
    assert_eq!(json["text"], text);
}

#[test]
fn ids_text_and_stdin_are_the_same_prompt() {
    let golden = golden("tiny-qwen3");
    let (model, prompt) = (fixture("tiny/qwen3"), ids(&golden.prompt_ids));
    let tail = ["-n", "8", "--json"];
    let run = |stdin: &str, prompt: [&str; 2]| {
        let json = apr_reading(stdin, ["run", &model].into_iter().chain(prompt).chain(tail));
        let json = json.expect(0).json();
        (numbers(&json["prompt_token_ids"]), numbers(&json["token_ids"]), json["text"].clone())
    };
    let typed = run("", ["-p", &golden.prompt]);
    assert_eq!(typed.0, golden.prompt_ids);
    assert_eq!(run("", ["--tokens", &prompt]), typed);
    assert_eq!(run(&golden.prompt, ["-p", "-"]), typed);
}

#[test]
fn the_template_is_applied_with_chat_only_and_the_same_from_either_container() {
    let run = |file: &str, more: &[&str]| {
        let model = fixture(file);
        let args = ["run", &model, "-p", "2+2?", "-n", "1", "--json"];
        apr(args.into_iter().chain(more.iter().copied())).expect(0).json()
    };
    for file in ["tiny/qwen2", "tiny/qwen2/qwen2-F16.gguf"] {
        assert_eq!(run(file, &[])["prompt_text"], "2+2?", "{file}");
        let chat = run(file, &["--chat", "--system", "Be brief."]);
        assert_eq!(chat["prompt_mode"], "chat");
        let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n\
                        <|im_start|>assistant\n";
        assert_eq!(chat["prompt_text"], expected, "{file}");
        assert_eq!(numbers(&chat["prompt_token_ids"])[0], 318, "<|im_start|> is one token: {file}");
    }
}

#[test]
fn streamed_text_is_the_text_of_json_and_statistics_go_to_stderr() {
    let model = fixture("tiny/llama");
    let args = ["run", &model, "-p", "def f(", "-n", "12"];
    let streamed = apr(args).expect(0);
    let json = apr(args.into_iter().chain(["--json"])).expect(0).json();
    assert_eq!(streamed.stdout, json["text"].as_str().unwrap().to_owned() + "\n");
    assert!(streamed.stderr.contains("prompt: ") && streamed.stderr.contains("tokens/s"));
}

#[test]
fn sampling_follows_its_seed() {
    let model = fixture("tiny/qwen2");
    let run = |seed: &str| {
        let args = ["run", &model, "-p", "x", "-n", "16", "--json", "--temperature", "1.5"];
        let args = args.into_iter().chain(["--seed", seed, "--top-k", "50", "--top-p", "0.95"]);
        numbers(&apr(args).expect(0).json()["token_ids"])
    };
    assert_eq!(run("7"), run("7"));
    assert_ne!(run("7"), run("8"));
}

#[test]
fn a_full_context_ends_the_text_and_is_said() {
    let model = fixture("tiny/qwen2");
    let prompt = vec!["5"; 510].join(",");
    let args = ["run", &model, "--tokens", &prompt, "-n", "9", "--ignore-eos"];
    assert!(apr(args).expect(0).stderr.contains("note: stopped: the context of 512 is full"));
    let json = apr(args.into_iter().chain(["--json"])).expect(0).json();
    assert_eq!((json["finish"].as_str(), numbers(&json["token_ids"]).len()), (Some("context"), 3));
}

#[test]
fn the_cache_has_room_for_what_may_be_said_and_no_more_than_the_context() {
    let model = fixture("tiny/qwen2");
    let inspected = apr(["inspect", &model, "--json"]).expect(0).json();
    let per_position = inspected["kv_bytes_per_position"].as_u64().unwrap();
    let cache = |n: &str, more: &[&str]| {
        let args = ["run", &model, "--tokens", "5,6,7,8", "-n", n, "--json"];
        let json = apr(args.into_iter().chain(more.iter().copied())).expect(0).json();
        json["cache_bytes"].as_u64().unwrap()
    };
    // The cpu backend keeps positions in blocks of 16.
    assert_eq!(cache("3", &[]), 16 * per_position);
    assert_eq!(cache("13", &["--kv", "f32"]), 32 * 2 * per_position);
    assert_eq!(cache("18446744073709551615", &[]), 512 * per_position);
}

#[test]
fn a_bad_prompt_is_told_before_a_backend_that_cannot_be_had() {
    let model = fixture("tiny/qwen2");
    let foreign = if cfg!(target_arch = "aarch64") { "avx2" } else { "neon" };
    let stderr = |prompt: &str| {
        apr(["run", &model, "-p", prompt, "--isa", foreign, "-n", "1"]).expect(2).stderr
    };
    assert!(stderr("").contains("the prompt is empty"));
    assert!(stderr("x").contains("this machine cannot run"));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    use std::{
        io::Read,
        process::{Command, Stdio},
    };
    let model = fixture("tiny/qwen2");
    for args in [
        &["run", &model, "-p", "x", "-n", "300"][..],
        &["trace", &model, "-p", "x", "--decode", "200"],
        &["inspect", &model],
        &["completions", "bash"],
        &["man"],
    ] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_apr"))
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = [0; 1];
        child.stdout.take().unwrap().read_exact(&mut first).unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
        assert!(!stderr.contains("panic") && !stderr.contains("error"), "{args:?}: {stderr}");
    }
}

#[test]
fn ids_are_enough_for_a_model_without_a_tokenizer() {
    let scratch = Scratch::new();
    let model = scratch.copy(&fixture("tiny/qwen2"), "model");
    std::fs::remove_file(format!("{model}/tokenizer.json")).unwrap();
    let args = ["run", &model, "--tokens", "5,6,7", "-n", "3", "--ignore-eos"];
    let json = apr(args.into_iter().chain(["--json"])).expect(0).json();
    assert!(json["text"].is_null());
    let shown = apr(args).expect(0);
    assert_eq!(shown.stdout.trim_end(), ids(&numbers(&json["token_ids"])));
    assert!(shown.stderr.contains("note: tokens are shown as ids only"));
}
