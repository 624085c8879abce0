//! Damage to what was written, which verifying it finds.

mod common;

use std::{fs, path::Path};

use apr_convert::{Options, Plan, Recipe, Target, verify};
use apr_format::{Checkpoint, Draft, Value};
use apr_tensor::Stored;
use common::{converted, fixture, open, save_gguf, try_convert, vector};

fn plan(source: &Checkpoint, target: Target, recipe: Option<Recipe>) -> Plan {
    Plan::new(source, target, Options { recipe, ..Options::default() }).unwrap()
}

fn verified(plan: &Plan, path: &Path) -> apr_convert::Result<()> {
    verify(plan, path, &mut |_| ())
}

/// Converts `name` to GGUF, damages that, and has verifying say `words`.
#[track_caller]
fn found(name: &str, recipe: Option<Recipe>, damage: impl FnOnce(&mut Draft), words: &[&str]) {
    let scratch = tempfile::tempdir().unwrap();
    let source = fixture(name);
    let path = scratch.path().join("whole.gguf");
    let mut draft = Draft::of(&converted(&source, path.clone(), recipe));
    let plan = plan(&source, Target::Gguf, recipe);
    verified(&plan, &path).unwrap();
    damage(&mut draft);
    let damaged = scratch.path().join("damaged.gguf");
    save_gguf(&draft, &damaged);
    let message = verified(&plan, &damaged).expect_err(name).to_string();
    assert!(message.starts_with("verification failed"), "{message}");
    assert!(words.iter().all(|word| message.contains(word)), "{words:?}: {message}");
}

/// Flips the lowest bit of byte `at` of a tensor.
fn flip(stored: &mut Stored, at: usize) {
    let mut bytes = stored.bytes().to_vec();
    bytes[at] ^= 1;
    *stored = Stored::new(stored.dtype(), stored.shape().clone(), bytes.into()).unwrap();
}

#[test]
fn one_flipped_bit_is_found_in_what_was_moved_rounded_and_made_of_experts() {
    for (model, recipe, tensor) in [
        ("tiny/qwen2", None, "blk.1.ffn_down.weight"),
        // These rows are moved to another order.
        ("tiny/llama", None, "blk.1.attn_q.weight"),
        ("tiny/qwen3", Some(Recipe::Q4_K_M), "blk.0.attn_v.weight"),
        ("tiny/qwen3-moe", Some(Recipe::Q8_0), "blk.1.ffn_up_exps.weight"),
        ("tiny/llama3-rope", None, "rope_freqs.weight"),
    ] {
        for part in 0..3 {
            let damage = |draft: &mut Draft| {
                let stored = draft.tensor_mut(tensor).unwrap();
                flip(stored, (stored.bytes().len() - 1) * part / 2);
            };
            found(model, recipe, damage, &[tensor, "bytes"]);
        }
    }
}

#[test]
fn a_tensor_that_is_missing_or_has_another_name_or_type_is_found() {
    let name = "blk.0.ffn_up.weight";
    let index = |draft: &Draft| draft.tensors.iter().position(|(n, _)| n == name).unwrap();
    found("tiny/qwen2", None, |draft| drop(draft.remove_tensor(name)), &["tensors", "instead of"]);
    let rename = |draft: &mut Draft| {
        let index = index(draft);
        draft.tensors[index].0 = "blk.0.ffn_wup.weight".to_owned();
    };
    found("tiny/qwen2", None, rename, &[name, "not there"]);
    let widen = |draft: &mut Draft| {
        let stored = draft.tensor_mut(name).unwrap();
        let shape = stored.shape().clone();
        *stored = vector(&stored.to_f32().unwrap()).with_shape(shape).unwrap();
    };
    found("tiny/qwen2", Some(Recipe::F16), widen, &[name, "type"]);
}

#[test]
fn another_value_of_a_key_and_a_lost_merge_are_found() {
    let set = |key: &'static str, value: Value| {
        move |draft: &mut Draft| {
            draft.metadata.insert(key, value);
        }
    };
    let key = "qwen2.rope.freq_base";
    found("tiny/qwen2", None, set(key, 9999.0f32.into()), &[key]);
    let key = "tokenizer.ggml.merges";
    let lose = |draft: &mut Draft| {
        let Some(Value::Array(merges)) = draft.metadata.get(key) else { panic!("no merges") };
        let mut merges: Vec<_> = merges.iter().collect();
        merges.pop();
        draft.metadata.insert(key, merges);
    };
    found("tiny/qwen2", None, lose, &[key]);
}

#[test]
fn damage_to_files_of_a_directory_is_found() {
    let scratch = tempfile::tempdir().unwrap();
    let source = fixture("tiny/qwen3");
    let path = scratch.path().join("model");
    converted(&source, path.clone(), None);
    let plan = plan(&source, Target::Safetensors, None);
    verified(&plan, &path).unwrap();
    for name in ["tokenizer.json", "config.json"] {
        let file = path.join(name);
        let whole = fs::read_to_string(&file).unwrap();
        fs::write(&file, whole.replacen('1', "2", 1)).unwrap();
        let message = verified(&plan, &path).unwrap_err().to_string();
        assert!(message.contains(name), "{message}");
        fs::write(&file, whole).unwrap();
    }
}

#[test]
fn a_wrong_checksum_of_an_apr_file_is_found() {
    let scratch = tempfile::tempdir().unwrap();
    let source = fixture("tiny/qwen2");
    let path = scratch.path().join("model.apr");
    converted(&source, path.clone(), None);
    let plan = plan(&source, Target::Apr, None);
    verified(&plan, &path).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let message = verified(&plan, &path).unwrap_err().to_string();
    assert!(message.contains("checksum"), "{message}");
}

#[test]
fn what_was_lost_by_consent_is_no_damage() {
    let scratch = tempfile::tempdir().unwrap();
    let mut draft = Draft::of(&fixture("tiny/llama3-rope/llama3-rope-F16.gguf"));
    let factors = draft.tensor_mut("rope_freqs.weight").unwrap();
    let mut values = factors.to_f32().unwrap();
    values[3] *= 1.01;
    *factors = vector(&values);
    let source = draft.to_gguf("odd.gguf").unwrap();
    let path = scratch.path().join("model");
    let message = try_convert(&source, &path, Options::default()).unwrap_err().to_string();
    assert!(message.contains("rope_freqs.weight"), "{message}");
    try_convert(&source, &path, Options { lossy: true, ..Options::default() }).unwrap();
    assert_eq!(open(&path).tensors().len(), draft.tensors.len() - 1);
}
