//! Captures that hold some rows of a step.

use apr_audit::Options;
use apr_capture::Rows;
use apr_model::LogitRows;

use crate::engine::{Q4, Run, assert_quiet, faults, native, open, site, tiny};

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
