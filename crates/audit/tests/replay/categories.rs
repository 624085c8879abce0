//! What is no number, and what is no capture of this run.

use apr_audit::{Options, Verdict, consequence};
use apr_capture::Layout;

use crate::engine::{Captured, Q4, Run, faults, native, open, site};

#[test]
fn a_nan_on_one_side_is_a_fault_of_the_stage_that_made_it() {
    let checkpoint = open(Q4);
    let run = Run::default().planting(1, "layers.2.ffn_gate", |_, values| values[40] = f64::NAN);
    let audit = run.on(native(), &checkpoint).audited(&checkpoint);
    assert_eq!(faults(&audit), ["layers.2.ffn_gate"]);
    let gate = audit.stage(site("layers.2.ffn_gate")).unwrap();
    assert_eq!((gate.not_finite, gate.worst.excess), (1, f64::INFINITY));
}

#[test]
fn an_infinity_is_no_large_number() {
    let checkpoint = open("tiny/llama");
    let run =
        Run::default().planting(0, "layers.0.attn_out", |_, values| values[3] = f64::INFINITY);
    let audit = run.on(native(), &checkpoint).audited(&checkpoint);
    assert_eq!(faults(&audit).first().map(String::as_str), Some("layers.0.attn_out"));
}

#[test]
fn values_that_are_nan_on_both_sides_are_not_measured() {
    let checkpoint = open("tiny/qwen2");
    let run = Run::default().planting(3, "final_norm", |_, values| values.fill(f64::NAN));
    // The logits of that step are NaN, and have to be.
    let audit = run.on(native(), &checkpoint).audited(&checkpoint);
    assert_eq!(faults(&audit), ["final_norm"]);
    let because = audit.not_measured.iter().find(|why| why.site == Some(site("lm_head")));
    let because = &because.expect("the logits are in part not measured").because;
    assert!(because.contains("not finite on either side"), "{because}");
}

#[test]
fn a_capture_of_nothing_but_nan_never_matches() {
    let checkpoint = open("tiny/qwen2");
    let run = Run::default();
    let sites: Vec<String> = {
        let model = apr_model::Model::load(native(), &checkpoint).unwrap();
        model.plan().sites().iter().map(ToString::to_string).collect()
    };
    let inner = |name: &str| {
        ["attn_scores", "attn_softmax", "ffn_silu"].iter().any(|inner| name.ends_with(inner))
    };
    let run = sites.iter().filter(|name| !inner(name)).fold(run, |run, name| {
        (0..4).fold(run, |run, step| run.planting(step, name, |_, values| values.fill(f64::NAN)))
    });
    let audit = run.on(native(), &checkpoint).audited(&checkpoint);
    assert!(!matches!(audit.verdict, Verdict::Match), "{}", audit.verdict);
    assert_eq!(faults(&audit).first().map(String::as_str), Some("embedding"));
}

#[test]
fn a_capture_that_holds_no_stage_is_unmeasured() {
    let checkpoint = open("tiny/qwen2");
    let captured = Run::default().on(native(), &checkpoint);
    captured.edit(|manifest| manifest["steps"] = serde_json::json!([]));
    for common in [false, true] {
        let options = Options { common, ..Options::default() };
        let audit = captured.audited_with(&checkpoint, &options);
        assert_eq!(audit.verdict.exit_code(), 3, "{}", audit.verdict);
    }
}

#[test]
fn a_capture_of_another_prompt_diverges_at_the_embedding() {
    let checkpoint = open(Q4);
    let captured = Run { first_token: 5, ..Run::default() }.on(native(), &checkpoint);
    let ours = Run::default().tokens();
    captured.edit(|manifest| {
        let mut next = ours.iter();
        for step in manifest["steps"].as_array_mut().unwrap() {
            let n = step["token_ids"].as_array().unwrap().len();
            step["token_ids"] = next.by_ref().take(n).copied().collect();
        }
    });
    let audit = captured.audited(&checkpoint);
    assert_eq!(faults(&audit), ["embedding"], "each stage is judged by itself");
}

#[test]
fn a_capture_of_another_model_is_refused_by_the_dimension_that_differs() {
    let captured = Run::default().on(native(), &open("tiny/qwen2"));
    let error = apr_audit::audit(&captured.open(), &open(Q4), &Options::default(), &mut |_| {})
        .unwrap_err();
    assert!(error.to_string().contains("num_hidden_layers"), "{error}");
}

#[test]
fn weights_of_another_model_of_the_same_shape_are_not_a_match() {
    let captured = Run::default().on(native(), &open("pycoder-3m/pycoder-3m-Q8_0.gguf"));
    let audit = captured.audited(&open(Q4));
    assert_eq!(audit.verdict.exit_code(), 1, "{}", audit.verdict);
}

#[test]
fn what_was_captured_and_cannot_be_judged_is_missed_even_where_nothing_else_is() {
    let checkpoint = open("tiny/qwen2");
    let captured = Run { lengths: vec![5], layout: Layout::Aprt, ..Run::default() };
    let captured = captured.on(native(), &checkpoint);
    reshape(&captured, "layers.0.q_post_rope");
    let options = Options { common: true, ..Options::default() };
    let audit = captured.audited_with(&checkpoint, &options);
    assert_eq!(audit.verdict.exit_code(), 3, "{}", audit.verdict);
    assert_eq!(audit.not_measured[0].site, Some(site("layers.0.q_post_rope")));
}

#[test]
fn what_cannot_be_judged_does_not_keep_the_consequence_of_a_fault_from_being_known() {
    let checkpoint = open("tiny/qwen2");
    let run = Run { lengths: vec![5], layout: Layout::Aprt, ..Run::default() };
    let run = run.planting(0, "final_norm", |_, values| values.iter_mut().for_each(|x| *x *= 2.0));
    let captured = run.on(native(), &checkpoint);
    reshape(&captured, "layers.0.q_post_rope");
    let audit = captured.audited(&checkpoint);
    assert_eq!(faults(&audit), ["final_norm"]);
    let place = tempfile::tempdir().unwrap();
    let place = place.path().join("right");
    let consequence = consequence(&captured.open(), &checkpoint, &audit, &place).unwrap();
    assert!(consequence.unwrap().relative_l2 > 0.9);
}

#[test]
fn tokens_of_one_step_are_not_taken_for_those_of_several() {
    let checkpoint = open("tiny/qwen2");
    let run = Run::default();
    let options = Options { tokens: Some(run.tokens()), ..Options::default() };
    let audit = run.on(native(), &checkpoint).audited_with(&checkpoint, &options);
    assert_eq!(audit.verdict.exit_code(), 3, "{}", audit.verdict);
}

/// Says of a value with heads that it has one wide head.
fn reshape(captured: &Captured, name: &str) {
    captured.edit(|manifest| {
        let tensors = manifest["steps"][0]["tensors"].as_array_mut().unwrap();
        let tensor = tensors.iter_mut().find(|tensor| tensor["name"] == name).unwrap();
        let [n, heads, width] = [0, 1, 2].map(|axis| tensor["shape"][axis].as_u64().unwrap());
        tensor["shape"] = serde_json::json!([n, 1, heads * width]);
    });
}
