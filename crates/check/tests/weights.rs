//! Files whose weights or shapes are wrong are told which tensor it is, and files that are merely odd are not failed.

mod support;

use apr_check::{Break, Check, Checked, Outcome};
use apr_format::Checkpoint;
use apr_tensor::{DType, Stored};
use apr_testkit::Draft;
use half::f16;
use support::{Mischief, checked, open};

const WEIGHTS: [Check; 6] = [
    Check::Config,
    Check::FiniteWeights,
    Check::DeadWeights,
    Check::DuplicateWeights,
    Check::NormScale,
    Check::RowScale,
];

fn draft() -> Draft {
    Draft::of(&open("tiny/qwen2/qwen2-F16.gguf"))
}

/// Changes the numbers of a tensor, which is stored as F16 or F32.
fn change(draft: &mut Draft, name: &str, change: impl FnOnce(&mut [f32])) {
    let stored = draft.tensor(name);
    let mut values = stored.to_f32().unwrap();
    change(&mut values);
    let bytes: Vec<u8> = match stored.dtype() {
        DType::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        other => panic!("{name} is {other}"),
    };
    *stored = Stored::new(stored.dtype(), stored.shape().clone(), bytes.into()).unwrap();
}

fn of(checkpoint: &Checkpoint, check: Check) -> Checked {
    checked(checkpoint, Mischief::None, &[check]).checks.remove(0)
}

/// The checks of the file that `draft` becomes, of which only `check` may be broken: by this tensor, in these words.
#[track_caller]
fn breaks(draft: &Draft, check: Check, tensor: &str, words: &str) {
    let checkup = checked(&draft.gguf(), Mischief::None, &WEIGHTS);
    for checked in &checkup.checks {
        match &checked.outcome {
            Outcome::Broken { breaks } => {
                assert_eq!(checked.name, check, "{breaks:?}");
                let [Break::Tensor { tensor: named, what }] = &breaks[..] else {
                    panic!("{breaks:?}");
                };
                assert_eq!(named, tensor);
                assert!(what.contains(words), "{what}");
            }
            outcome => {
                assert_eq!(*outcome, Outcome::Held, "{}", checked.name);
                assert_ne!(checked.name, check, "it holds");
            }
        }
    }
}

#[test]
fn a_sound_file_passes_without_a_note() {
    let checkup = checked(&draft().gguf(), Mischief::None, &WEIGHTS);
    for checked in checkup.checks {
        assert_eq!(checked.outcome, Outcome::Held, "{}", checked.name);
        assert_eq!(checked.notes, [], "{}", checked.name);
    }
}

#[test]
fn one_nan_in_one_tensor_is_found_and_located() {
    let mut draft = draft();
    let name = "blk.1.ffn_up.weight";
    let cols = draft.tensor(name).shape().cols();
    change(&mut draft, name, |values| values[2 * cols + 3] = f32::NAN);
    breaks(&draft, Check::FiniteWeights, name, "the first is NaN in row 2, column 3");
}

#[test]
fn a_matrix_of_one_number_is_dead() {
    for value in [0.0, 0.5] {
        let mut draft = draft();
        change(&mut draft, "blk.0.attn_k.weight", |values| values.fill(value));
        breaks(&draft, Check::DeadWeights, "blk.0.attn_k.weight", &format!("numbers are {value}"));
    }
}

#[test]
fn a_norm_of_zeros_is_dead_and_a_norm_of_ones_or_a_bias_of_zeros_is_a_note() {
    let mut zero = draft();
    change(&mut zero, "blk.0.ffn_norm.weight", |values| values.fill(0.0));
    let found = of(&zero.gguf(), Check::DeadWeights);
    assert!(matches!(found.outcome, Outcome::Broken { .. }));

    let mut ones = draft();
    change(&mut ones, "blk.0.ffn_norm.weight", |values| values.fill(1.0));
    change(&mut ones, "blk.1.attn_q.bias", |values| values.fill(0.0));
    let found = of(&ones.gguf(), Check::DeadWeights);
    assert_eq!(found.outcome, Outcome::Held);
    assert_eq!(found.notes.len(), 2, "{:?}", found.notes);
}

#[test]
fn a_tensor_that_is_there_twice_is_named_with_its_twin() {
    let mut draft = draft();
    let first = draft.tensor("blk.0.ffn_down.weight").clone();
    *draft.tensor("blk.1.ffn_down.weight") = first;
    let twin = "same bytes as `blk.0.ffn_down.weight`";
    breaks(&draft, Check::DuplicateWeights, "blk.1.ffn_down.weight", twin);
}

#[test]
fn a_head_that_is_the_embedding_is_tied_and_no_duplicate() {
    let mut draft = draft();
    let table = draft.tensor("token_embd.weight").clone();
    draft.tensors.retain(|(name, _)| name != "output.weight");
    draft.tensors.push(("output.weight".to_owned(), table));
    assert_eq!(of(&draft.gguf(), Check::DuplicateWeights).outcome, Outcome::Held);
}

#[test]
fn oddities_of_scale_are_notes_that_name_the_tensor_and_the_row() {
    let mut draft = draft();
    change(&mut draft, "output_norm.weight", |values| values.iter_mut().for_each(|x| *x *= 1e4));
    change(&mut draft, "blk.0.attn_norm.weight", |values| {
        values.iter_mut().for_each(|x| *x -= 2.0)
    });
    let name = "blk.1.attn_output.weight";
    let cols = draft.tensor(name).shape().cols();
    change(&mut draft, name, |values| {
        values[7 * cols..8 * cols].iter_mut().for_each(|x| *x *= 300.)
    });
    change(&mut draft, "token_embd.weight", |values| values[..cols].fill(0.0));
    let file = draft.gguf();
    let noted = |check, words: &[&str]| {
        let found = of(&file, check);
        assert_eq!(found.outcome, Outcome::Held, "{check}");
        let notes: Vec<String> = found.notes.iter().map(ToString::to_string).collect();
        let notes = notes.join("\n");
        assert!(words.iter().all(|word| notes.contains(word)), "{check}: {notes}");
        assert_eq!(found.notes.len(), words.len(), "{check}: {notes}");
    };
    noted(Check::NormScale, &["output_norm.weight: the mean", "blk.0.attn_norm.weight"]);
    noted(Check::RowScale, &["blk.1.attn_output.weight: the norms of 1 rows"]);
    noted(Check::DeadWeights, &["token_embd.weight: 1 rows of zeros (first: row 0)"]);
}

#[test]
fn a_shape_that_contradicts_the_config_is_told_and_leaves_the_runs_unmeasured() {
    let mut draft = draft();
    let gate = draft.tensor("blk.1.ffn_gate.weight");
    let (rows, cols) = (gate.shape().rows(), gate.shape().cols());
    *gate = gate.with_shape([cols, rows]).unwrap();
    let checkup = checked(&draft.gguf(), Mischief::None, &[]);
    assert_eq!(checkup.exit_code(), 1);
    for checked in checkup.checks {
        match (checked.name, &checked.outcome) {
            (Check::Config, Outcome::Broken { breaks }) => {
                let said = format!("{breaks:?}");
                assert!(said.contains("blk.1.ffn_gate.weight") && said.contains("shape"), "{said}");
            }
            (name, Outcome::NotMeasured { .. }) => assert!(name >= Check::Plan, "{name}"),
            (name, outcome) => assert!(name < Check::Plan, "{name}: {outcome:?}"),
        }
    }
}

#[test]
fn what_this_engine_does_not_run_is_unmeasured_and_its_weights_are_looked_at_all_the_same() {
    let mut draft = draft();
    draft.metadata.insert("general.architecture", "rwkv");
    let file = draft.gguf();
    let checkup = checked(&file, Mischief::None, &[Check::Config, Check::FiniteWeights]);
    let [config, weights] = &checkup.checks[..] else { panic!("two checks were asked for") };
    let Outcome::NotMeasured { why } = &config.outcome else { panic!("{:?}", config.outcome) };
    assert!(why.contains("rwkv"), "{why}");
    assert_eq!(weights.outcome, Outcome::Held);
    assert_eq!(checkup.exit_code(), 3);
}
