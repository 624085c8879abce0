//! What is damaged in a file is named, with its place, and nothing else is called broken for it.

use std::{fs, path::Path};

use apr_check::{Break, Check, FileCheckup, Outcome, Unwatched, check_file};
use apr_format::{Checkpoint, Value};
use apr_model::Model;
use apr_reference::{Arithmetic, Reference};
use apr_tensor::{DType, Stored};
use apr_testkit::{Draft, fixture};

fn checked(path: &Path) -> FileCheckup {
    let bind = |checkpoint: &Checkpoint| {
        let model = Model::load(Reference::<f64>::new(Arithmetic::EXACT), checkpoint)?;
        Ok(model.config().clone())
    };
    check_file(path, bind, &Unwatched).unwrap()
}

/// The same of a file with these bytes.
fn checked_bytes(bytes: &[u8]) -> FileCheckup {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model");
    fs::write(&path, bytes).unwrap();
    checked(&path)
}

fn bytes_of(checkpoint: &Checkpoint) -> Vec<u8> {
    checkpoint.files()[0].bytes().to_vec()
}

/// What is broken: the check, the tensor if it is one, and what.
fn broken(checkup: &FileCheckup) -> Vec<(Check, String)> {
    let mut found = Vec::new();
    for checked in &checkup.checks {
        let Outcome::Broken { breaks } = &checked.outcome else { continue };
        found.extend(breaks.iter().map(|one| match one {
            Break::Tensor { tensor, what } => (checked.name, format!("{tensor}: {what}")),
            Break::Other { what } => (checked.name, what.clone()),
            other => panic!("{other:?} of a file"),
        }));
    }
    found
}

/// That exactly these checks are broken, once each, in these words.
#[track_caller]
fn breaks(checkup: &FileCheckup, expected: &[(Check, &[&str])]) {
    let found = broken(checkup);
    let checks: Vec<Check> = found.iter().map(|(check, _)| *check).collect();
    let expected_checks: Vec<Check> = expected.iter().map(|(check, _)| *check).collect();
    assert_eq!(checks, expected_checks, "{found:?}");
    for ((_, what), (_, words)) in found.iter().zip(expected) {
        for word in *words {
            assert!(what.contains(word), "no {word:?} in {what:?}");
        }
    }
    assert_eq!(checkup.exit_code(), 1);
}

fn outcome(checkup: &FileCheckup, check: Check) -> &Outcome {
    &checkup.checks.iter().find(|checked| checked.name == check).unwrap().outcome
}

/// The tiny Qwen2 model, to be written as `.apr`.
fn apr() -> Draft {
    Draft::of(&Checkpoint::open(fixture("tiny/qwen2")).unwrap())
}

/// The same as GGUF.
fn gguf() -> Draft {
    Draft::of(&Checkpoint::open(fixture("tiny/qwen2/qwen2-F16.gguf")).unwrap())
}

#[test]
fn a_sound_file_of_each_container_holds_without_a_note() {
    for path in ["tiny/qwen2", "tiny/qwen3/qwen3-F16.gguf", "pycoder-3m/pycoder-3m-Q4_K_M.gguf"] {
        let checkup = checked(&fixture(path));
        for checked in &checkup.checks {
            assert_eq!(checked.notes, [], "{path}: {}", checked.name);
        }
        assert_eq!((broken(&checkup), checkup.exit_code()), (vec![], 0), "{path}");
        let of_file: Vec<Check> = checkup.checks.iter().map(|checked| checked.name).collect();
        assert_eq!(of_file, Check::of_file().collect::<Vec<_>>());
        let Outcome::NotApplicable { why } = outcome(&checkup, Check::Checksum) else {
            panic!("{path} states no checksum");
        };
        assert!(why.contains("state no checksum"), "{why}");
    }
}

#[test]
fn a_checksum_of_an_apr_file_that_fits_holds() {
    let checkup = checked_bytes(&bytes_of(&apr().apr()));
    assert_eq!(*outcome(&checkup, Check::Checksum), Outcome::Held);
    assert_eq!(*outcome(&checkup, Check::Layout), Outcome::Held);
}

#[test]
fn one_flipped_bit_in_the_data_of_an_apr_file_breaks_its_checksum_with_both_numbers() {
    let mut file = bytes_of(&apr().apr());
    let end = file.len() - 4;
    let stated = u32::from_le_bytes(file[end..].try_into().unwrap());
    // The last mantissa bit of some weight.
    file[end - 200] ^= 1;
    let checkup = checked_bytes(&file);
    let (at, stated) = (format!("at offset {end}"), format!("{stated:#010x}"));
    breaks(&checkup, &[(Check::Checksum, &["of the file", &at, &stated, "its bytes have 0x"])]);
}

#[test]
fn a_wrong_checksum_of_an_apr_header_is_a_finding_and_the_rest_is_checked() {
    let mut file = bytes_of(&apr().apr());
    file[40] ^= 0xff;
    let checkup = checked_bytes(&file);
    let found = broken(&checkup);
    assert!(found.iter().all(|(check, _)| *check == Check::Checksum), "{found:?}");
    assert!(found[0].1.contains("of the header, at offset 40"), "{found:?}");
    assert_eq!(*outcome(&checkup, Check::FiniteWeights), Outcome::Held);
}

#[test]
fn an_apr_header_that_is_wrong_in_itself_breaks_its_checksum_and_the_layout() {
    let mut file = bytes_of(&apr().apr());
    file[32] ^= 1;
    let checkup = checked_bytes(&file);
    breaks(
        &checkup,
        &[
            (Check::Checksum, &["offset 40", "header's checksum"]),
            (Check::Layout, &["offset 32", "multiple of 64"]),
        ],
    );
    assert!(matches!(outcome(&checkup, Check::Config), Outcome::NotMeasured { .. }));
}

#[test]
fn a_file_that_is_cut_or_empty_or_none_at_all_is_told_by_layout() {
    let whole = fs::read(fixture("tiny/qwen2/qwen2-F16.gguf")).unwrap();
    for (bytes, words) in [
        (&whole[..whole.len() - 1000], ["truncated (", "tensor `"]),
        (&[], ["an empty file", "download it again"]),
        (b"<!DOCTYPE html><html>404</html>", ["an HTML page", "download it again"]),
    ] {
        breaks(&checked_bytes(bytes), &[(Check::Layout, &words)]);
    }
    let directory = tempfile::tempdir().unwrap();
    fs::copy(fixture("tiny/qwen2/model.safetensors"), directory.path().join("model.safetensors"))
        .unwrap();
    breaks(&checked(directory.path()), &[(Check::Layout, &["with config.json", "model.safeten"])]);
    let nowhere = directory.path().join("nowhere");
    let bind = |_: &Checkpoint| -> apr_model::Result<apr_model::Config> { unreachable!() };
    assert!(check_file(&nowhere, bind, &Unwatched).is_err(), "there is nothing to look at");
}

#[test]
fn an_index_that_lists_a_tensor_that_no_shard_has_is_told_by_layout() {
    let directory = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(fixture("tiny/qwen2")).unwrap();
    for name in ["config.json", "tokenizer.json"] {
        fs::copy(fixture("tiny/qwen2").join(name), directory.path().join(name)).unwrap();
    }
    let shard = "model-00001-of-00001.safetensors";
    fs::copy(fixture("tiny/qwen2/model.safetensors"), directory.path().join(shard)).unwrap();
    let index = |more: &[&str]| {
        let names = source.tensors().map(|(name, _)| name).chain(more.iter().copied());
        let map: serde_json::Map<_, _> =
            names.map(|name| (name.to_owned(), shard.into())).collect();
        let text = serde_json::json!({ "weight_map": map }).to_string();
        fs::write(directory.path().join("model.safetensors.index.json"), text).unwrap();
    };
    index(&[]);
    assert_eq!(checked(directory.path()).exit_code(), 0);
    index(&["model.layers.9.extra.weight"]);
    let words: &[&str] = &["model.layers.9.extra.weight", "no such tensor there"];
    breaks(&checked(directory.path()), &[(Check::Layout, words)]);
}

#[test]
fn padding_that_is_not_zero_and_bytes_after_the_last_tensor_are_notes_of_layout() {
    let checkpoint = Checkpoint::open(fixture("tiny/qwen2/qwen2-F16.gguf")).unwrap();
    let mut draft = Draft::of(&checkpoint);
    let odd = Stored::new(DType::F32, [3].into(), vec![0x3f; 12].into()).unwrap();
    *draft.tensor("blk.0.attn_k.bias") = odd;
    let file = draft.gguf();
    let mut bytes = bytes_of(&file);
    let padding = file.gaps().iter().find(|gap| gap.is_padding && gap.after.is_some()).unwrap();
    bytes[padding.start as usize + 1] = 7;
    bytes.extend([1; 100]);
    let checkup = checked_bytes(&bytes);
    assert_eq!(*outcome(&checkup, Check::Layout), Outcome::Held);
    let layout = checkup.checks.iter().find(|checked| checked.name == Check::Layout).unwrap();
    let notes: Vec<String> = layout.notes.iter().map(ToString::to_string).collect();
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(notes[0].contains("20 bytes of padding") && notes[0].contains("`blk.0.attn_k.bias`"));
    assert!(
        notes[1].contains("100 bytes") && notes[1].contains("belong to no tensor"),
        "{notes:?}"
    );
}

/// The small trained model with its bytes changed, at an offset from where a tensor begins.
fn quantised(name: &str, change: impl FnOnce(&mut [u8])) -> FileCheckup {
    let mut draft =
        Draft::of(&Checkpoint::open(fixture("pycoder-3m/pycoder-3m-Q4_K_M.gguf")).unwrap());
    let stored = draft.tensor(name);
    let mut bytes = stored.bytes().to_vec();
    change(&mut bytes);
    *stored = Stored::new(stored.dtype(), stored.shape().clone(), bytes.into()).unwrap();
    checked_bytes(&bytes_of(&draft.gguf()))
}

/// A matrix of the small trained model that is stored in this type.
fn stored_as(dtype: DType) -> (String, usize) {
    let checkpoint = Checkpoint::open(fixture("pycoder-3m/pycoder-3m-Q4_K_M.gguf")).unwrap();
    let (name, stored) = checkpoint.tensors().find(|(_, stored)| stored.dtype() == dtype).unwrap();
    (name.to_owned(), dtype.row_bytes(stored.shape().cols()).unwrap())
}

#[test]
fn a_nan_for_the_scale_of_one_block_is_named_with_row_and_block() {
    let (name, row) = stored_as(DType::Q4_K);
    let nan = half::f16::NAN.to_le_bytes();
    let checkup = quantised(&name, |bytes| bytes[3 * row..3 * row + 2].copy_from_slice(&nan));
    let place = "the first is NaN in row 3, column 0 (block 0 of the row)";
    breaks(&checkup, &[(Check::FiniteWeights, &[&name, "256 of ", place])]);
}

#[test]
fn an_absurd_scale_of_one_block_is_named_with_row_and_block() {
    let (name, row) = stored_as(DType::Q4_K);
    let huge = half::f16::MAX.to_le_bytes();
    let checkup = quantised(&name, |bytes| bytes[2 * row..2 * row + 2].copy_from_slice(&huge));
    breaks(&checkup, &[(Check::BlockScale, &[&name, "beyond 65504", "in row 2, column "])]);
}

#[test]
fn a_scale_with_a_flipped_exponent_bit_is_a_note_that_names_the_block() {
    let (name, row) = stored_as(DType::Q6_K);
    // The highest bit of the exponent, in the scale that stands last in its block.
    let checkup = quantised(&name, |bytes| bytes[4 * row + 209] ^= 0x40);
    let scale = checkup.checks.iter().find(|c| c.name == Check::BlockScale).unwrap();
    assert_eq!(scale.outcome, Outcome::Held);
    let [note] = &scale.notes[..] else { panic!("{:?}", scale.notes) };
    assert_eq!(note.tensor.as_deref(), Some(&*name));
    assert!(note.what.contains("in row 4, column ") && note.what.contains("is usual"), "{note}");
}

/// A mixture of experts, merged as GGUF has them, with its numbers changed.
fn experts(change: impl FnOnce(&mut [f32], usize)) -> (String, FileCheckup) {
    let mut draft =
        Draft::of(&Checkpoint::open(fixture("tiny/qwen3-moe/qwen3-moe-F16.gguf")).unwrap());
    let name = "blk.1.ffn_up_exps.weight".to_owned();
    let stored = draft.tensor(&name);
    let mut values = stored.to_f32().unwrap();
    let expert = values.len() / stored.shape().dims()[0];
    change(&mut values, expert);
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    *stored = Stored::new(DType::F32, stored.shape().clone(), bytes.into()).unwrap();
    (name, checked_bytes(&bytes_of(&draft.gguf())))
}

#[test]
fn an_expert_of_zeros_or_with_a_nan_or_there_twice_is_named_by_its_number() {
    let (name, sound) = experts(|_, _| ());
    assert_eq!(broken(&sound), []);

    let (_, dead) = experts(|values, expert| values[2 * expert..3 * expert].fill(0.0));
    breaks(&dead, &[(Check::DeadWeights, &[&name, "expert 2: all numbers are 0"])]);

    let (_, nan) = experts(|values, expert| values[3 * expert + 5] = f32::NAN);
    breaks(&nan, &[(Check::FiniteWeights, &[&name, "NaN in expert 3, row 0, column 5"])]);

    let (_, twice) = experts(|values, expert| values.copy_within(0..expert, expert));
    let words = ["expert 1 holds the same bytes as", "`, expert 0"];
    breaks(&twice, &[(Check::DuplicateWeights, &words)]);
}

#[test]
fn a_shape_with_its_dimensions_swapped_is_named_with_both_shapes() {
    let mut draft = gguf();
    let gate = draft.tensor("blk.1.ffn_gate.weight");
    let (rows, cols) = (gate.shape().rows(), gate.shape().cols());
    *gate = gate.with_shape([cols, rows]).unwrap();
    let checkup = checked_bytes(&bytes_of(&draft.gguf()));
    let (found, expected) = (format!("[{cols}, {rows}]"), format!("[{rows}, {cols}]"));
    breaks(&checkup, &[(Check::Config, &["blk.1.ffn_gate.weight", &found, &expected])]);
}

/// The tiny GGUF model with one of its lists of texts changed.
fn with_texts(key: &str, change: impl FnOnce(&mut Vec<Value>)) -> FileCheckup {
    let mut draft = gguf();
    let Some(Value::Array(list)) = draft.metadata.remove(key) else { panic!("no {key}") };
    let mut list = list.iter().collect();
    change(&mut list);
    draft.metadata.insert(key, list);
    checked_bytes(&bytes_of(&draft.gguf()))
}

#[test]
fn a_vocabulary_that_is_one_short_is_told_with_both_numbers() {
    let mut draft = gguf();
    for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type"] {
        let Some(Value::Array(list)) = draft.metadata.remove(key) else { panic!("no {key}") };
        let mut list: Vec<_> = list.iter().collect();
        list.pop();
        draft.metadata.insert(key, list);
    }
    let checkup = checked_bytes(&bytes_of(&draft.gguf()));
    let found = broken(&checkup);
    let vocabulary = found.iter().find(|(check, _)| *check == Check::Vocabulary);
    let (_, what) = vocabulary.unwrap_or_else(|| panic!("{found:?}"));
    assert!(what.contains("319 ids for 320 rows"), "{what}");
}

#[test]
fn merges_of_unknown_tokens_and_tokens_that_are_there_twice_are_told_once() {
    let merges = with_texts("tokenizer.ggml.merges", |list| list[7] = "no such".into());
    breaks(&merges, &[(Check::Tokenizer, &["merges[7]", "not in the vocabulary"])]);
    assert!(matches!(outcome(&merges, Check::Vocabulary), Outcome::NotMeasured { .. }));

    let twice = with_texts("tokenizer.ggml.tokens", |list| list[40] = list[41].clone());
    breaks(&twice, &[(Check::Tokenizer, &["twice: ids 40 and 41"])]);
}

#[test]
fn special_ids_that_are_no_tokens_are_broken_or_for_padding_a_note() {
    let mut draft = gguf();
    draft.metadata.insert("tokenizer.ggml.eos_token_id", 100_000u32);
    let checkup = checked_bytes(&bytes_of(&draft.gguf()));
    breaks(&checkup, &[(Check::Tokenizer, &["eos_token_id is 100000", "320"])]);

    let mut draft = gguf();
    draft.metadata.insert("tokenizer.ggml.padding_token_id", 320u32);
    let checkup = checked_bytes(&bytes_of(&draft.gguf()));
    assert_eq!(checkup.exit_code(), 0);
    let vocabulary = checkup.checks.iter().find(|c| c.name == Check::Vocabulary).unwrap();
    assert!(vocabulary.notes[0].what.contains("padding_token_id is 320"), "{vocabulary:?}");
}

#[test]
fn a_type_that_nothing_here_can_read_leaves_weights_unmeasured() {
    let mut file = fs::read(fixture("tiny/qwen2/qwen2-F16.gguf")).unwrap();
    let name = b"blk.1.attn_output.weight";
    let at = file.windows(name.len()).position(|window| window == name).unwrap();
    // After the name: the number of dimensions, two of them, the type.
    file[at + name.len() + 4 + 16] = 99;
    let checkup = checked_bytes(&file);
    assert!(matches!(outcome(&checkup, Check::FiniteWeights), Outcome::NotMeasured { .. }));
    let layout = checkup.checks.iter().find(|c| c.name == Check::Layout).unwrap();
    assert_eq!(layout.notes[0].tensor.as_deref(), Some("blk.1.attn_output.weight"));
    assert_ne!(checkup.exit_code(), 0);
}
