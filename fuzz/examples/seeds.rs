//! Writes one small valid file per target into `corpus/TARGET/seed`.

use std::{fs, path::Path};

use apr_format::{Error, Map, apr, gguf, safetensors, write::Body};
use apr_fuzz::{
    capture::{Form, STEP},
    tokenizer::{self, vocabulary},
};
use apr_tensor::DType;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (target, file) in [
        ("gguf", a_gguf()?),
        ("safetensors", a_safetensors()?),
        ("apr", an_apr()?),
        ("aprt", of_capture(Form::Aprt, an_aprt())),
        ("npy", of_capture(Form::Npy, an_npy())),
        ("npz", of_capture(Form::Npz, an_npz(&an_npy()))),
        ("capture_safetensors", of_capture(Form::Safetensors, STEP.to_vec())),
        ("tokenizer_json", TOKENIZER_JSON.as_bytes().to_vec()),
        ("tokenizer_gguf", vocabulary(TEMPLATE)),
        ("chat_template", TEMPLATE.as_bytes().to_vec()),
        ("capture_manifest", of_capture(Form::Manifest, MANIFEST.as_bytes().to_vec())),
    ] {
        let valid = match target {
            "tokenizer_json" => tokenizer::json(&file),
            "tokenizer_gguf" => tokenizer::gguf(&file),
            "chat_template" => tokenizer::template(&file),
            _ => true,
        };
        assert!(valid, "the seed for {target} is refused");
        let directory = directory.join(target);
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("seed"), file)?;
    }
    Ok(())
}

fn a_gguf() -> Result<Vec<u8>, Error> {
    let mut writer = gguf::Writer::new();
    writer
        .set("general.architecture", "llama")
        .set("general.alignment", 32u32)
        .set("tokens", vec!["a", "b"])
        .set("scores", vec![0.5f32])
        .set("nested", vec![vec![1u32], vec![2]])
        .set("bos", true)
        .set("types", vec![-1, 2])
        .set("eps", 1e-6f64);
    writer.tensor("a", DType::Q4_K, [1, 256])?.tensor("b", DType::F32, [2, 3])?;
    fill(writer.begin(Vec::new())?)
}

fn a_safetensors() -> Result<Vec<u8>, Error> {
    let mut writer = safetensors::Writer::new();
    writer.set("format", "pt");
    writer.tensor("a", DType::BF16, [2, 3])?.tensor("b", DType::F32, [])?;
    fill(writer.begin(Vec::new())?)
}

fn an_apr() -> Result<Vec<u8>, Error> {
    let mut writer = apr::Writer::new();
    writer.set("num_layers", 1u32).set("rope_theta", 1e4);
    writer.set("rope_scaling", [("factor", 8.0)].into_iter().collect::<Map>());
    writer.tensor("a", DType::AprQ4, [32])?.tensor("b", DType::AprQ8, [3])?;
    fill(writer.begin(Vec::new())?)
}

/// Ends a file with zeros for every tensor; all of them are small.
fn fill(mut body: Body<Vec<u8>>) -> Result<Vec<u8>, Error> {
    while let Some((name, len)) = body.next_tensor().map(|(name, len)| (name.to_owned(), len)) {
        body.tensor(&name, &vec![0; len as usize])?;
    }
    body.finish()
}

/// A seed that is no capture would teach the fuzzer nothing.
fn of_capture(form: Form, file: Vec<u8>) -> Vec<u8> {
    assert!(apr_fuzz::capture::open(form, &file), "the seed for {form:?} is refused");
    file
}

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% endfor %}";

const TOKENIZER_JSON: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "normalizer": {"type": "NFC"},
"added_tokens": [{"id": 3, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
"normalized": false, "special": true}], "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false,
"trim_offsets": false, "use_regex": true}, "post_processor": null, "decoder": {"type": "ByteLevel",
"add_prefix_space": true, "trim_offsets": true, "use_regex": true}, "model": {"type": "BPE",
"vocab": {"a": 0, "b": 1, "ab": 2, "<|end|>": 3}, "merges": ["a b"]}}"#;

/// The manifest of `apr_fuzz::capture::STEP`.
const MANIFEST: &str = r#"{"schema": "apr-capture/1", "tool": {"name": "apr", "version": "0"},
"model": {"path": "m", "format": "gguf"}, "steps": [{"file": "step-0000.safetensors", "phase": "prefill",
"token_ids": [1, 2], "positions": [0, 1], "tensors": [{"name": "embedding", "stage": "embedding", "layer": null,
"shape": [2, 8], "axes": ["row", "channel"], "dtype": "F32", "positions": [0, 1]}]}], "complete": true}"#;

/// Two rows of `attn_norm` of layer 0.
fn an_aprt() -> Vec<u8> {
    let mut file = b"APRT".to_vec();
    file.extend([0, 0, 0, 0, 16, 0, 0, 0]);
    file.resize(file.len() + 64, b'.');
    file
}

/// Two rows of the embedding.
fn an_npy() -> Vec<u8> {
    let dict = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 8), }\n";
    let mut file = b"\x93NUMPY\x01\0".to_vec();
    file.extend((dict.len() as u16).to_le_bytes());
    file.extend(dict);
    file.resize(file.len() + 64, b'.');
    file
}

/// An archive that stores `npy` as the embedding.
fn an_npz(npy: &[u8]) -> Vec<u8> {
    const NAME: &[u8] = b"embedding.npy";
    let size = (npy.len() as u32).to_le_bytes();
    let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    common.extend(crc32fast::hash(npy).to_le_bytes());
    common.extend([size, size].concat());
    common.extend((NAME.len() as u16).to_le_bytes());
    common.extend([0, 0]);
    let local = [b"PK\x03\x04", &common[..], NAME, npy].concat();
    let central = [b"PK\x01\x02\x14\0", &common[..], &[0; 14], NAME].concat();
    let mut end = b"PK\x05\x06\0\0\0\0\x01\0\x01\0".to_vec();
    end.extend((central.len() as u32).to_le_bytes());
    end.extend((local.len() as u32).to_le_bytes());
    end.extend([0, 0]);
    [local, central, end].concat()
}
