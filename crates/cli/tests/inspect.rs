//! `apr inspect --check`: what is wrong with a file, by exit code, in a table and as JSON.

mod common;

use std::fs;

use common::{Scratch, apr, fixture};

#[test]
fn a_sound_file_of_each_container_is_0_and_says_which_checks_it_passed() {
    for model in ["tiny/qwen3", "tiny/llama/llama-F16.gguf", "pycoder-3m/pycoder-3m-Q4_K_M.gguf"] {
        let done = apr(["inspect", "--check", &fixture(model)]).expect(0);
        assert!(done.stdout.contains("✓ held            layout"), "{}", done.stdout);
        assert!(done.stdout.ends_with("13 held, 1 not applicable\n"), "{}", done.stdout);
        assert_eq!(done.stderr, "", "work as short as this shows no progress");
    }
}

#[test]
fn a_mixture_shows_its_experts_and_how_many_weights_a_token_meets_alike_in_both_containers() {
    let of = |model: &str| apr(["inspect", &fixture(model), "--json"]).expect(0).json();
    let (directory, gguf) = (of("tiny/qwen3-moe"), of("tiny/qwen3-moe/qwen3-moe-F16.gguf"));
    // Of 8 experts of 3 matrices of 32 x 64 in 2 layers, a token meets 2.
    let met = 165_248 - 2 * 6 * 3 * 32 * 64;
    for shown in [&directory, &gguf] {
        assert_eq!(shown["parameters_per_token"], met);
        let config = &shown["config"];
        assert_eq!(
            (&config["num_experts"], &config["num_experts_per_tok"]),
            (&8.into(), &2.into())
        );
        assert_eq!(config["moe_intermediate_size"], 32);
        assert_eq!(config["norm_topk_prob"], true);
    }
    let text = apr(["inspect", &fixture("tiny/qwen3-moe")]).expect(0).stdout;
    assert!(text.contains("165248 (0.165 M), 0.092 M of them per token\n"), "{text}");
    assert!(of("tiny/qwen3")["parameters_per_token"].is_null(), "a dense model has no experts");
}

#[test]
fn a_config_that_contradicts_itself_is_1() {
    for (from, to, words) in [
        ("\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 9", "is 9; there are 8 experts"),
        ("\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 0", "is 0; at least 1 is needed"),
        (
            "\"num_key_value_heads\": 2",
            "\"num_key_value_heads\": 3",
            "must divide the 4 query heads",
        ),
    ] {
        let scratch = Scratch::new();
        let model = scratch.copy(&fixture("tiny/qwen3-moe"), "contradiction");
        let path = format!("{model}/config.json");
        let config = fs::read_to_string(&path).unwrap();
        assert!(config.contains(from), "{config}");
        fs::write(&path, config.replace(from, to)).unwrap();
        let done = apr(["inspect", "--check", &model]).expect(1);
        assert!(done.stdout.contains("config is BROKEN"), "{}", done.stdout);
        assert!(done.stdout.contains(words), "{}", done.stdout);
    }
}

#[test]
fn a_nan_is_1_and_stands_in_the_table_and_the_json_with_its_tensor() {
    let scratch = Scratch::new();
    let name = "model.layers.1.mlp.up_proj.weight";
    let model = scratch.model_with_nan(name);
    let text = apr(["inspect", "--check", &model]).expect(1).stdout;
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{text}"));
    assert!(
        line.contains("✗  finite-weights  1 of ") && line.contains("row 0, column 0"),
        "{line}"
    );
    let json = apr(["inspect", "--check", &model, "--json"]).expect(1).json();
    assert_eq!(
        (&json["schema"], &json["verdict"]),
        (&"apr-inspect-check/1".into(), &"broken".into())
    );
    assert_eq!(json["tensors"][0]["name"], name);
    assert_eq!(json["tensors"][0]["findings"][0]["check"], "finite-weights");
}

#[test]
fn a_file_that_cannot_be_read_as_a_model_is_1_and_one_that_is_not_there_is_2() {
    let scratch = Scratch::new();
    let gguf = fs::read(fixture("tiny/qwen2/qwen2-F16.gguf")).unwrap();
    for (path, words) in [
        (scratch.write("cut.gguf", &gguf[..gguf.len() / 2]), "it is truncated ("),
        (scratch.write("empty.gguf", ""), "found an empty file"),
    ] {
        let done = apr(["inspect", "--check", &path]).expect(1);
        assert!(done.stdout.contains("layout is BROKEN"), "{}", done.stdout);
        assert!(done.stdout.contains(words), "{}", done.stdout);
        assert!(done.stdout.contains("1 broken, 13 not measured"), "{}", done.stdout);
    }
    let done = apr(["inspect", "--check", &scratch.path("missing.gguf")]).expect(2);
    assert!(done.stdout.is_empty() && done.stderr.contains("missing.gguf"), "{}", done.stderr);
    apr(["inspect", "--check", "--tensor", "x", &fixture("tiny/qwen2")]).expect(2);
}

#[test]
fn a_model_that_this_engine_does_not_run_is_3() {
    let scratch = Scratch::new();
    let mut gguf = fs::read(fixture("tiny/qwen2/qwen2-F16.gguf")).unwrap();
    let name = b"general.architecture";
    let at = gguf.windows(name.len()).position(|window| window == name).unwrap();
    // After the key: the type, the length, the text.
    gguf[at + name.len() + 12..][..5].copy_from_slice(b"other");
    let done = apr(["inspect", "--check", &scratch.write("other.gguf", gguf)]).expect(3);
    assert!(done.stdout.contains("not measured: config"), "{}", done.stdout);
}

#[test]
fn a_type_that_is_unknown_here_is_3_and_not_said_to_be_broken() {
    let scratch = Scratch::new();
    let model = scratch.copy(&fixture("tiny/qwen3-moe"), "typed");
    let path = format!("{model}/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let dtype = b"\"dtype\":\"BF16\"";
    let at = bytes.windows(dtype.len()).position(|window| window == dtype).unwrap();
    bytes[at..][..dtype.len()].copy_from_slice(b"\"dtype\":\"XF16\"");
    fs::write(&path, bytes).unwrap();
    let done = apr(["inspect", "--check", &model]).expect(3);
    assert!(done.stdout.contains("XF16, which is not supported"), "{}", done.stdout);
    let config = done.stdout.lines().find(|line| line.contains(" config ")).unwrap();
    assert!(config.starts_with("· not measured"), "{config}");
}
