//! Captures that hold some rows of a step.

use apr_audit::Options;
use apr_capture::{Layout, Rows};
use apr_model::LogitRows;

use crate::engine::{Captured, Q4, Run, assert_quiet, faults, native, open, site, tiny};

fn common() -> Options {
    Options { common: true, ..Options::default() }
}

#[test]
fn some_rows_of_a_faultless_run_are_quiet_and_not_taken_for_all() {
    for file in tiny().iter().map(String::as_str).chain([Q4]) {
        let checkpoint = open(file);
        for rows in [Rows::Last, Rows::Range(2..5), Rows::Range(5..12)] {
            let run = Run { rows: rows.clone(), ..Run::default() };
            let captured = run.on(native(), &checkpoint);
            assert_quiet(
                &captured.audited_with(&checkpoint, &common()),
                &format!("{file}, {rows}"),
            );
            assert_eq!(captured.audited(&checkpoint).verdict.exit_code(), 3, "{file}, {rows}");
        }
    }
}

#[test]
fn a_fault_in_a_whole_step_is_found_after_a_step_of_which_some_rows_were_captured() {
    let checkpoint = open(Q4);
    let run = Run { rows: Rows::Last, ..Run::default() };
    // Step 2 has one row, which is captured.
    let run = run.planting(2, "layers.1.ffn_norm", |_, values| values[7] += 0.01);
    let audit = run.on(native(), &checkpoint).audited_with(&checkpoint, &common());
    assert_eq!(faults(&audit), ["layers.1.ffn_norm"]);
}

#[test]
fn a_fault_in_a_row_that_was_not_captured_shows_with_the_stages_it_may_be_in() {
    let checkpoint = open(Q4);
    let run = Run { rows: Rows::Last, lengths: vec![7], ..Run::default() };
    let run = run.planting(0, "layers.1.k_post_rope", |shape, values| {
        let width = shape[1] * shape[2];
        values[3 * width..4 * width].iter_mut().for_each(|x| *x = -*x);
    });
    let audit = run.on(native(), &checkpoint).audited_with(&checkpoint, &common());
    let found = faults(&audit);
    assert_eq!(found.first().map(String::as_str), Some("layers.1.attn_scores"));
    let scores = audit.stage(site("layers.1.attn_scores")).unwrap();
    assert!(scores.span.contains(&site("layers.1.k_post_rope")), "{:?}", scores.span);
}

#[test]
fn the_last_row_presented_as_a_whole_prompt_diverges() {
    let checkpoint = open("tiny/qwen2");
    let run = Run { rows: Rows::Last, lengths: vec![5], logits: LogitRows::Last, ..Run::default() };
    let captured = run.on(native(), &checkpoint);
    // One token, one row: as a whole step it is the first position of another prompt.
    captured.edit(|manifest| {
        let step = &mut manifest["steps"][0];
        let last = step["token_ids"][4].clone();
        step["token_ids"] = serde_json::json!([last]);
        step["positions"] = serde_json::json!([0]);
        for tensor in step["tensors"].as_array_mut().unwrap() {
            tensor["positions"] = serde_json::json!([0]);
        }
    });
    let audit = captured.audited_with(&checkpoint, &common());
    assert_eq!(audit.verdict.exit_code(), 1, "{}", audit.verdict);
}

#[test]
fn a_stage_that_one_step_lacks_is_missed() {
    let checkpoint = open(Q4);
    let captured = in_files().on(native(), &checkpoint);
    let last_layer = site("layers.3.post_ffn_residual");
    drop_values(&captured, 1, |name| name == last_layer.to_string() || name == "final_norm");
    let audit = captured.audited(&checkpoint);
    assert_eq!(audit.verdict.exit_code(), 0, "what follows was captured: {}", audit.verdict);
    let head = audit.stage(site("lm_head")).unwrap();
    assert_eq!(head.span, [last_layer, site("final_norm")]);

    drop_values(&captured, 1, |name| name == "lm_head");
    let audit = captured.audited(&checkpoint);
    assert_eq!(audit.verdict.exit_code(), 3, "{}", audit.verdict);
    let missed: Vec<_> = audit.not_measured.iter().filter_map(|gap| gap.site).collect();
    assert_eq!(missed, [last_layer, site("final_norm")]);
    assert!(audit.not_measured[0].because.contains("in step 1"), "{:?}", audit.not_measured);
}

#[test]
fn a_step_of_which_nothing_was_captured_is_missed() {
    let checkpoint = open("tiny/qwen3");
    let captured = in_files().on(native(), &checkpoint);
    drop_values(&captured, 3, |_| true);
    assert_eq!(captured.audited(&checkpoint).verdict.exit_code(), 3);
    assert_eq!(captured.audited_with(&checkpoint, &common()).verdict.exit_code(), 0);
}

#[test]
fn rows_in_another_order_are_not_judged_as_if_they_were_in_theirs() {
    let checkpoint = open("tiny/qwen2");
    for positions in [[1, 0, 2, 3, 4], [0, 0, 1, 2, 3]] {
        let run = Run { lengths: vec![5], ..Run::default() };
        let captured = run.on(native(), &checkpoint);
        captured.edit(|manifest| {
            for tensor in manifest["steps"][0]["tensors"].as_array_mut().unwrap() {
                if tensor["name"] == "layers.0.attn_out" {
                    tensor["positions"] = serde_json::json!(positions);
                }
            }
        });
        for options in [Options::default(), common()] {
            let audit = captured.audited_with(&checkpoint, &options);
            assert_eq!(audit.verdict.exit_code(), 3, "{}", audit.verdict);
            assert!(audit.verdict.to_string().contains("in order"), "{}", audit.verdict);
        }
    }
}

#[test]
fn a_row_within_a_fused_op_is_named_with_what_is_computed_from_it() {
    let checkpoint = open("tiny/llama");
    let run = Run { rows: Rows::Last, lengths: vec![6], ..Run::default() };
    let audit = run.on(native(), &checkpoint).audited_with(&checkpoint, &common());
    // One row of the softmax weights is known, and cannot be put in place alone.
    let attention = audit.stage(site("layers.0.attention")).unwrap();
    assert!(attention.span.contains(&site("layers.0.attn_softmax")), "{:?}", attention.span);
}

/// A capture in one file per value, so that the manifest may leave some out.
fn in_files() -> Run {
    Run { layout: Layout::Aprt, ..Run::default() }
}

/// Takes values out of a step.
fn drop_values(captured: &Captured, step: usize, which: impl Fn(&str) -> bool) {
    captured.edit(|manifest| {
        let values = manifest["steps"][step]["tensors"].as_array_mut().unwrap();
        values.retain(|value| !which(value["name"].as_str().unwrap()));
    });
}
