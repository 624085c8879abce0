//! What every backend promises, checked on the reference in both precisions.

use apr_reference::{Arithmetic, Reference};
use apr_testkit::invariants;

fn exact() -> Reference<f64> {
    Reference::new(Arithmetic::EXACT)
}

fn emulated() -> Reference<f32> {
    Reference::new(Arithmetic::LLAMA_CPP)
}

#[test]
fn looking_changes_nothing() {
    invariants::observed_equals_unobserved(exact);
    invariants::observed_equals_unobserved(emulated);
}

#[test]
fn bits_do_not_depend_on_chunking() {
    invariants::bits_do_not_depend_on_chunking(exact);
    invariants::bits_do_not_depend_on_chunking(emulated);
}

#[test]
fn logits_do_not_depend_on_the_rows_asked_for() {
    invariants::logits_do_not_depend_on_the_rows_asked_for(exact);
}

#[test]
fn every_stage_is_shown_in_order() {
    invariants::every_stage_is_shown_in_order(exact);
}

#[test]
fn replaced_values_are_used() {
    invariants::replaced_values_are_used(exact);
}

#[test]
fn bad_input_is_refused() {
    invariants::bad_input_is_refused(exact);
}
