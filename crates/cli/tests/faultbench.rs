//! `apr faultbench`: a bench that can be run in parts, and says what was found and what not.

mod common;

use common::apr;

#[test]
fn a_kind_of_fault_is_found_in_all_models_and_scored_in_json() {
    let score = apr(["faultbench", "--only", "relu", "--json"]).expect(0).json();
    let outcomes = score["outcomes"].as_array().unwrap();
    assert_eq!(score["judge"]["localised"].as_u64(), Some(outcomes.len() as u64));
    assert_eq!(score["diagnoses"]["right"].as_u64(), Some(outcomes.len() as u64));
    assert_eq!(score["by_family"]["activations"], score["judge"]);
    assert!(score["seconds_per_case"].as_f64().unwrap() > 0.0);
    let formats = ["F32", "Q8_0", "Q4_K_M"];
    for model in ["trained", "qwen2", "qwen3", "qwen3_moe", "llama"] {
        for format in formats {
            let name = format!("{model}-{format} on ");
            let of_model = outcomes.iter().filter(|o| o["case"].as_str().unwrap().contains(&name));
            // One of each half of the layers.
            assert_eq!(of_model.count(), 2, "{name}");
        }
    }
    for outcome in outcomes {
        let site = outcome["expectation"]["sites"][0].as_str().unwrap();
        let is_silu = site.ends_with(".ffn_silu") || site.ends_with(".moe_expert_silu");
        assert!(is_silu, "{outcome}");
        assert_eq!(outcome["verdict"]["sites"][0].as_str(), Some(site), "{outcome}");
        assert_eq!(outcome["verdict"]["diagnoses"][0], "relu-for-silu", "{outcome}");
        assert!(outcome["effect"]["relative_l2"].as_f64().unwrap() > 0.0, "{outcome}");
    }
}

#[test]
fn the_table_has_the_audit_its_families_and_both_classic_methods() {
    let done = apr(["faultbench", "--quick", "--only", "relu,control"]).expect(0);
    for words in [
        "audit",
        "activations",
        "std ratio outside 0.7..1.4",
        "cosine below 0.999",
        "1 (100.0 %)",
        "0 of 15",
        "right 1 of 1",
        "16 cases",
    ] {
        assert!(done.stdout.contains(words), "{words:?} is not in:\n{}", done.stdout);
    }
    assert!(!done.stdout.contains("not localised"), "{}", done.stdout);
}

#[test]
fn the_same_seed_gives_the_same_cases() {
    let cases = |seed: &str| {
        let args = ["faultbench", "--quick", "--only", "block-zeroed", "--json", "--seed", seed];
        let score = apr(args).expect(0).json();
        let outcomes = score["outcomes"].as_array().unwrap().iter();
        outcomes.map(|o| (o["case"].clone(), o["effect"].clone())).collect::<Vec<_>>()
    };
    assert_eq!(cases("7"), cases("7"));
    assert_ne!(cases("7"), cases("8"));
}

#[test]
fn kinds_are_listed_with_what_goes_wrong() {
    let done = apr(["faultbench", "--list"]).expect(0);
    for words in ["gate-up-swapped", "weights", "Gate and up projection are exchanged.", " kinds"] {
        assert!(done.stdout.contains(words), "{words:?} is not in:\n{}", done.stdout);
    }
}

#[test]
fn an_unknown_name_is_refused_with_the_families_that_there_are() {
    let done = apr(["faultbench", "--only", "relu,bit-rot"]).expect(2);
    assert_eq!(done.stdout, "");
    for words in ["`bit-rot`", "kernel", "attention", "`control`", "--list"] {
        assert!(done.stderr.contains(words), "{words:?} is not in: {}", done.stderr);
    }
}
