//! Files that other programs wrote: the tiny models of `fixtures/`, made by transformers and gguf-py.

use std::path::{Path, PathBuf};

use apr_format::{Checkpoint, Container};
use apr_tensor::DType;
use half::{bf16, f16};

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny").join(name)
}

const MODELS: [&str; 5] = ["llama", "llama3-rope", "qwen2", "qwen3", "qwen3-moe"];

#[test]
fn a_hugging_face_directory_has_its_config_its_tensors_and_its_tokenizer() {
    let model = Checkpoint::open(tiny("qwen2")).unwrap();
    assert_eq!(model.container(), Container::Safetensors);
    assert_eq!(model.metadata().str("model_type").unwrap(), Some("qwen2"));
    assert!(model.metadata().file().ends_with("config.json"));
    let hidden = model.metadata().u64("hidden_size").unwrap().unwrap() as usize;
    let vocab = model.metadata().u64("vocab_size").unwrap().unwrap() as usize;
    let embedding = model.require("model.embed_tokens.weight").unwrap();
    assert_eq!(embedding.shape().dims(), [vocab, hidden]);
    let tokenizer = model.companions().tokenizer.as_ref().unwrap();
    assert!(tokenizer.json().unwrap().get("model.vocab").is_some());
    assert!(model.companions().chat_template.is_none());
    assert_eq!(model.metadata().str("__metadata__.format").unwrap(), Some("pt"));
}

#[test]
fn a_gguf_has_its_keys_and_row_major_shapes() {
    let model = Checkpoint::open(tiny("qwen2/qwen2-F16.gguf")).unwrap();
    assert_eq!(model.container(), Container::Gguf { version: 3 });
    let metadata = model.metadata();
    assert_eq!(metadata.str("general.architecture").unwrap(), Some("qwen2"));
    let tokens = metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap();
    let hidden = metadata.u64("qwen2.embedding_length").unwrap().unwrap() as usize;
    let embedding = model.require("token_embd.weight").unwrap();
    assert_eq!(embedding.shape().dims(), [tokens.len(), hidden]);
    assert_eq!(embedding.dtype(), DType::F16);
}

#[test]
fn the_same_model_has_the_same_embedding_in_both_containers() {
    for name in MODELS {
        let directory = Checkpoint::open(tiny(name)).unwrap();
        let gguf = Checkpoint::open(tiny(&format!("{name}/{name}-F16.gguf"))).unwrap();
        let ours = gguf.require("token_embd.weight").unwrap();
        let theirs = directory.require("model.embed_tokens.weight").unwrap();
        assert_eq!(ours.shape(), theirs.shape(), "{name}");
        assert_eq!(theirs.dtype(), DType::BF16);
        let pairs = |bytes: &[u8]| -> Vec<u16> {
            bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
        };
        let rounded: Vec<u16> = pairs(theirs.bytes())
            .into_iter()
            .map(|bits| f16::from_f32(bf16::from_bits(bits).to_f32()).to_bits())
            .collect();
        assert_eq!(pairs(ours.bytes()), rounded, "{name}");
    }
}

#[test]
fn a_dotted_path_reaches_into_the_objects_of_config_json() {
    let model = Checkpoint::open(tiny("llama3-rope")).unwrap();
    assert_eq!(model.metadata().f64("rope_scaling.factor").unwrap(), Some(8.0));
    assert_eq!(model.metadata().str("rope_scaling.rope_type").unwrap(), Some("llama3"));
    assert_eq!(model.metadata().f64("rope_scaling.no_such_key").unwrap(), None);
    let error = model.metadata().u64("rope_scaling.rope_type").unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("llama3"), "{error}");
}

#[test]
fn the_index_hash_is_that_of_the_index_as_gguf_py_and_safetensors_list_it() {
    // aprt.oracle.index_sha256, over what `gguf.GGUFReader` and `safetensors.safe_open` say.
    let hash = |path: &str| Checkpoint::open(tiny(path)).unwrap().index_sha256();
    let gguf = "c9380f60d23c3df1a3be6ce514ef19443acdabe0bb10435530fa8f54e326958a";
    assert_eq!(hash("qwen2/qwen2-F16.gguf"), gguf);
    let directory = "65c95aa9628b67d39dec7c184249e242fac5e883b6b4157d317191095c13c34a";
    assert_eq!(hash("qwen2"), directory);
}
