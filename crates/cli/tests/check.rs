//! `apr check`: what holds, what is broken, and what was not looked at, by exit code and by name.

mod common;

use std::fs;

use common::{Scratch, apr, fixture};
use serde_json::Value;

/// The outcomes of a JSON report by check.
fn outcomes(json: &Value) -> Vec<(&str, &str)> {
    let checks = json["checks"].as_array().unwrap();
    checks.iter().map(|c| (c["name"].as_str().unwrap(), c["outcome"].as_str().unwrap())).collect()
}

/// Checks of what .apr files and mixtures of experts have.
const OF_OTHERS: [&str; 2] = ["checksum", "routing"];

#[test]
fn a_sound_model_holds_every_check_in_every_container() {
    for model in ["tiny/qwen3", "tiny/llama/llama-F16.gguf", "pycoder-3m/pycoder-3m-Q4_K_M.gguf"] {
        let done = apr(["check", &fixture(model), "--quick", "--json"]).expect(0);
        let json = done.json();
        assert_eq!((&json["schema"], &json["verdict"]), (&"apr-check/1".into(), &"held".into()));
        assert_eq!(json["prompt_token_ids"].as_array().unwrap().len(), 8, "{model}");
        for (name, outcome) in outcomes(&json) {
            let expected = if OF_OTHERS.contains(&name) { "not_applicable" } else { "held" };
            assert_eq!(outcome, expected, "{model}: {name}");
        }
        assert_eq!(done.stderr, "", "work as short as this shows no progress");
    }
}

#[test]
fn the_text_has_a_symbol_and_a_word_for_each_check() {
    let done = apr(["check", &fixture("tiny/qwen2"), "--quick"]).expect(0);
    let list = apr(["check", "--list"]).expect(0).stdout;
    for line in list.lines() {
        let name = line.split_whitespace().next().unwrap();
        let outcome = if OF_OTHERS.contains(&name) { "· not applicable" } else { "✓ held" };
        let said = format!("{outcome:<18}{name} ");
        assert!(done.stdout.contains(&said), "no {said:?} in\n{}", done.stdout);
    }
    let count = list.lines().count();
    let held = count - OF_OTHERS.len();
    let summary = format!("HELD: {count} checks: {held} held, 2 not applicable\n");
    assert!(done.stdout.ends_with(&summary), "{}", done.stdout);
}

#[test]
fn a_model_with_a_nan_is_broken_in_the_file_and_in_the_first_value_that_it_reaches() {
    let scratch = Scratch::new();
    let model = scratch.model_with_nan("model.layers.1.mlp.up_proj.weight");
    let done = apr(["check", &model, "--quick"]).expect(1);
    for words in [
        "finite-weights is BROKEN",
        "model.layers.1.mlp.up_proj.weight: 1 of ",
        "the first is NaN in row 0, column 0",
        "finite-values is BROKEN",
        "first at layers.1.ffn_up, position 0, channel 0: NaN",
    ] {
        assert!(done.stdout.contains(words), "no {words:?} in\n{}", done.stdout);
    }
    let json = apr(["check", &model, "--quick", "--json"]).expect(1).json();
    let broken: Vec<&str> =
        outcomes(&json).into_iter().filter(|(_, o)| *o == "broken").map(|(name, _)| name).collect();
    assert_eq!(broken, ["finite-weights", "finite-values"]);
    assert_eq!(json["verdict"], "broken");
}

#[test]
fn only_the_checks_that_are_named_are_made() {
    let model = fixture("tiny/qwen2");
    let json = apr(["check", &model, "--only", "decode,config", "--json"]).expect(0).json();
    assert_eq!(outcomes(&json), [("config", "held"), ("decode", "held")]);
}

#[test]
fn a_name_that_no_check_has_is_refused_with_all_names() {
    let done = apr(["check", &fixture("tiny/qwen2"), "--only", "decode,prefil"]).expect(2);
    assert_eq!(done.stdout, "");
    for words in [
        "no check is called `prefil`",
        "checksum, layout, config, vocabulary",
        "rewind, threads, isa",
    ] {
        assert!(done.stderr.contains(words), "{}", done.stderr);
    }
}

#[test]
fn what_there_is_no_model_in_is_refused() {
    let scratch = Scratch::new();
    let gguf = fs::read(fixture("tiny/qwen2/qwen2-F16.gguf")).unwrap();
    for (path, word) in [
        (scratch.write("cut.gguf", &gguf[..gguf.len() / 2]), "tensor `"),
        (scratch.write("text.gguf", "this is no model"), "expected a GGUF"),
        (scratch.path("missing.gguf"), "os error 2"),
    ] {
        let done = apr(["check", &path]).expect(2);
        assert_eq!(done.stdout, "", "{path}");
        assert!(
            done.stderr.starts_with("error: ") && done.stderr.contains(word),
            "{}",
            done.stderr
        );
        assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    }
}

#[test]
fn a_file_that_contradicts_itself_is_broken_and_its_runs_are_unmeasured() {
    let scratch = Scratch::new();
    let model = scratch.copy(&fixture("tiny/qwen2"), "changed");
    let path = format!("{model}/config.json");
    let config = fs::read_to_string(&path).unwrap();
    let change = ("\"intermediate_size\": ", "\"intermediate_size\": 1");
    assert!(config.contains(change.0));
    fs::write(&path, config.replace(change.0, change.1)).unwrap();
    let json = apr(["check", &model, "--json"]).expect(1).json();
    let outcomes = outcomes(&json);
    assert!(outcomes.contains(&("config", "broken")), "{outcomes:?}");
    assert!(outcomes.contains(&("decode", "not_measured")), "{outcomes:?}");
    assert!(outcomes.contains(&("finite-weights", "held")), "{outcomes:?}");
    assert!(json["plan"].is_null());
}

#[test]
fn what_was_asked_for_and_not_measured_is_never_success() {
    let model = fixture("tiny/qwen2");
    apr(["check", &model, "--tokens", "5", "--only", "decode"]).expect(3);
    let reference = ["check", &model, "--backend", "reference", "--quick"];
    let done = apr(reference).expect(0);
    assert!(done.stdout.contains("not applicable: threads, isa"), "{}", done.stdout);
    apr(reference.into_iter().chain(["--only", "threads"])).expect(3);
    let scratch = Scratch::new();
    let other = scratch.copy(&model, "other");
    let path = format!("{other}/config.json");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(&path, config.replace("\"qwen2\"", "\"gpt9\"")).unwrap();
    let other = apr(["check", &other, "--quick"]).expect(3).stdout;
    assert!(other.contains("gpt9") && other.contains("UNMEASURED"), "{other}");
}

#[test]
fn the_prompt_may_be_text_ids_or_derived_and_is_named_in_the_report() {
    let scratch = Scratch::new();
    let model = fixture("tiny/qwen2");
    let check = |model: &str, prompt: &[&str]| {
        let args = ["check", model, "--only", "repeat", "--json"];
        apr(args.into_iter().chain(prompt.iter().copied())).expect(0).json()
    };
    let ids = check(&model, &["--tokens", "3,1,4,1,5"]);
    assert_eq!(common::numbers(&ids["prompt_token_ids"]), [3, 1, 4, 1, 5]);
    assert_eq!(check(&model, &["-p", "x = 1"])["prompt"], "\"x = 1\"");
    assert_eq!(check(&model, &[])["prompt"], "the beginning of a fixed text");

    let bare = scratch.copy(&model, "bare");
    fs::remove_file(format!("{bare}/tokenizer.json")).unwrap();
    let derived = check(&bare, &[]);
    assert_eq!(derived["prompt"], "derived from the size of the vocabulary");
    assert_eq!(common::numbers(&derived["prompt_token_ids"])[..3], [11, 48, 85]);

    let outside = apr(["check", &model, "--tokens", "1,320"]).expect(2);
    assert!(outside.stderr.contains("vocabulary of 320"), "{}", outside.stderr);
}
