//! Directories as Hugging Face publishes them, whole and broken.

use std::{fs, path::Path};

use apr_format::{Checkpoint, Container, safetensors};
use apr_tensor::DType;
use tempfile::TempDir;

/// A safetensors file with these one-byte tensors.
fn weights(names: &[&str]) -> Vec<u8> {
    let mut writer = safetensors::Writer::new();
    for name in names {
        writer.tensor(name, DType::U8, [1]).unwrap();
    }
    let mut body = writer.begin(Vec::new()).unwrap();
    for name in names {
        body.tensor(name, &name.as_bytes()[..1]).unwrap();
    }
    body.finish().unwrap()
}

fn directory(files: &[(&str, &[u8])]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        fs::write(directory.path().join(name), contents).unwrap();
    }
    directory
}

const INDEX: &str = "model.safetensors.index.json";
const ONE: &str = "model-00001-of-00002.safetensors";
const TWO: &str = "model-00002-of-00002.safetensors";

fn index(entries: &[(&str, &str)]) -> String {
    let map: serde_json::Map<_, _> =
        entries.iter().map(|&(tensor, file)| (tensor.to_owned(), file.into())).collect();
    serde_json::json!({ "metadata": { "total_size": 3 }, "weight_map": map }).to_string()
}

fn sharded(index: &str) -> TempDir {
    directory(&[
        ("config.json", br#"{"model_type": "llama", "rope_scaling": null}"#),
        (INDEX, index.as_bytes()),
        (ONE, &weights(&["b", "a"])),
        (TWO, &weights(&["c"])),
    ])
}

#[track_caller]
fn assert_refused(path: &Path, parts: &[&str]) {
    let text = Checkpoint::open(path).expect_err("it was accepted").to_string();
    assert!(parts.iter().all(|part| text.contains(part)), "{parts:?} are not all in: {text}");
}

#[test]
fn shards_are_one_checkpoint_in_the_order_of_their_names() {
    let directory = sharded(&index(&[("c", TWO), ("a", ONE), ("b", ONE)]));
    for path in [directory.path().to_owned(), directory.path().join(INDEX)] {
        let model = Checkpoint::open(&path).unwrap();
        assert_eq!(model.path(), path);
        assert_eq!(model.container(), Container::Safetensors);
        assert_eq!(model.tensors().map(|(name, _)| name).collect::<Vec<_>>(), ["b", "a", "c"]);
        assert_eq!(&model.require("c").unwrap().bytes()[..], b"c");
        let files: Vec<_> =
            model.files().iter().map(|file| file.path().file_name().unwrap()).collect();
        assert_eq!(files, [ONE, TWO]);
        assert_eq!(model.metadata().str("model_type").unwrap(), Some("llama"));
        assert_eq!(model.metadata().get("rope_scaling"), None, "null counts as absent");
    }
}

#[test]
fn an_index_that_disagrees_with_its_shards_is_refused() {
    let refused = |entries: &[(&str, &str)], parts: &[&str]| {
        let directory = sharded(&index(entries));
        assert_refused(directory.path(), &[&[INDEX], parts].concat());
    };
    refused(&[("a", TWO), ("b", ONE), ("c", TWO)], &["tensor `a`", ONE, TWO]);
    refused(&[("a", ONE), ("c", TWO)], &["tensor `b`", "weight_map", ONE]);
    refused(
        &[("a", ONE), ("b", ONE), ("c", TWO), ("d", TWO)],
        &["tensor `d`", TWO, "no such tensor"],
    );
    for name in ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b"] {
        refused(&[("a", name)], &["key `a`", "same directory"]);
    }
}

#[test]
fn an_index_without_a_map_of_names_is_refused() {
    assert_refused(sharded("{}").path(), &[INDEX, "key `weight_map`", "no such key"]);
    assert_refused(sharded(r#"{"weight_map": []}"#).path(), &[INDEX, "key `weight_map`", "a list"]);
    assert_refused(sharded(r#"{"weight_map": {"a": 1}}"#).path(), &[INDEX, "key `a`", "integer 1"]);
    let twice = format!(r#"{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}"#);
    assert_refused(sharded(&twice).path(), &[INDEX, "offset", "`a` occurs twice"]);
}

#[test]
fn missing_shards_are_counted_and_named() {
    let directory = sharded(&index(&[("a", ONE), ("b", ONE), ("c", TWO)]));
    fs::remove_file(directory.path().join(TWO)).unwrap();
    assert_refused(
        directory.path(),
        &["2 shards", "1 of them missing", TWO, "complete the download"],
    );
}

#[test]
fn a_shard_that_is_a_git_lfs_pointer_says_so() {
    let directory = sharded(&index(&[("a", ONE), ("b", ONE), ("c", TWO)]));
    fs::write(directory.path().join(TWO), "version https://git-lfs.github.com/spec/v1\n").unwrap();
    assert_refused(directory.path(), &[TWO, "git-lfs pointer", "git lfs pull"]);
}

#[test]
fn a_directory_that_is_no_model_is_refused_with_what_it_holds() {
    assert_refused(directory(&[]).path(), &["config.json", "an empty directory"]);
    let other = directory(&[("model.gguf", b"GGUF")]);
    assert_refused(other.path(), &["config.json", "model.gguf", "give"]);
    let torch = directory(&[("config.json", b"{}"), ("pytorch_model.bin", b"PK\x03\x04")]);
    assert_refused(torch.path(), &["model.safetensors", "pytorch_model.bin", "converted"]);
    assert_refused(Path::new("/no/such/model"), &["/no/such/model"]);
}

#[test]
fn a_config_that_is_broken_is_refused_with_the_place() {
    let weights = weights(&["a"]);
    let with_config =
        |config: &[u8]| directory(&[("config.json", config), ("model.safetensors", &weights)]);
    assert_refused(with_config(b"").path(), &["config.json", "offset 0", "EOF"]);
    assert_refused(with_config(b"[]").path(), &["config.json", "offset", "expected a JSON object"]);
    assert_refused(
        with_config(b"{\n \"a\": 1,\n \"a\": 2}").path(),
        &["config.json", "offset", "`a` occurs twice"],
    );
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    assert_refused(
        with_config(deep.as_bytes()).path(),
        &["config.json", "offset", "recursion limit"],
    );
}

#[test]
fn a_single_file_takes_the_config_and_the_tokenizer_beside_it() {
    let weights = weights(&["a"]);
    let whole = directory(&[
        ("config.json", br#"{"hidden_size": 1}"#),
        ("odd.name", &weights),
        ("tokenizer.json", b"{}"),
        ("chat_template.jinja", "{{ 'ä' }}".as_bytes()),
    ]);
    let model = Checkpoint::open(whole.path().join("odd.name")).unwrap();
    assert_eq!(model.metadata().u64("hidden_size").unwrap(), Some(1));
    let companions = model.companions();
    assert_eq!(companions.chat_template.as_ref().unwrap().text().unwrap(), "{{ 'ä' }}");
    assert!(companions.tokenizer.is_some() && companions.generation_config.is_none());

    let alone = directory(&[("model.safetensors", &weights), ("tokenizer.json", b"{}")]);
    let model = Checkpoint::open(alone.path().join("model.safetensors")).unwrap();
    assert_eq!(model.metadata().iter().len(), 0);
    assert!(
        model.companions().tokenizer.is_none(),
        "without a config nothing belongs to the model"
    );
}

#[test]
fn one_file_of_weights_goes_before_an_index() {
    let directory = sharded(&index(&[("a", ONE), ("b", ONE), ("c", TWO)]));
    fs::write(directory.path().join("model.safetensors"), weights(&["single"])).unwrap();
    let model = Checkpoint::open(directory.path()).unwrap();
    assert!(model.tensor("single").is_some() && model.tensor("a").is_none());
}

#[test]
fn a_checkpoint_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>(_: &T) {}
    let directory = directory(&[("model.safetensors", &weights(&["a"]))]);
    shared(&Checkpoint::open(directory.path().join("model.safetensors")).unwrap());
}
