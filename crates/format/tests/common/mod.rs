//! One small file of each container, with every kind of value and several types of tensors.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;

use apr_format::{Checkpoint, Map, Result, Value, apr, gguf, safetensors, write::Body};
use apr_tensor::{Bytes, DType, Shape};

/// Name, type, shape: a model that all containers can hold, apart from the types they lack.
pub(crate) type Tensor = (&'static str, DType, &'static [usize]);

pub(crate) const PLAIN: &[Tensor] = &[
    ("blk.0.attn_q.weight", DType::F32, &[4, 6]),
    ("blk.0.attn_q.bias", DType::F16, &[7]),
    ("output.weight", DType::BF16, &[2, 3, 5]),
    ("scalar", DType::F64, &[]),
    ("empty", DType::F32, &[0, 4]),
    ("ids", DType::I32, &[9]),
];

pub(crate) const QUANTIZED: &[Tensor] = &[
    ("blk.0.ffn_up.weight", DType::Q4_K, &[2, 256]),
    ("blk.0.ffn_down.weight", DType::Q6_K, &[1, 256]),
];

/// Bytes that differ between tensors and positions.
pub(crate) fn body(tensor: &Tensor) -> Vec<u8> {
    let len = tensor.1.tensor_bytes(&Shape::new(tensor.2)).unwrap();
    (0..len).map(|i| (i * 7 + tensor.0.len() * 31) as u8).collect()
}

fn fill(mut body_of_file: Body<Vec<u8>>, tensors: &[&Tensor]) -> Vec<u8> {
    let by_name: BTreeMap<_, _> = tensors.iter().map(|tensor| (tensor.0, tensor)).collect();
    while let Some((name, _)) = body_of_file.next_tensor() {
        let name = name.to_owned();
        body_of_file.tensor(&name, &body(by_name[name.as_str()])).unwrap();
    }
    body_of_file.finish().unwrap()
}

pub(crate) fn metadata() -> Vec<(&'static str, Value)> {
    vec![
        ("general.architecture", "llama".into()),
        ("general.name", "ein Name, été, 名前".into()),
        ("llama.block_count", 1u32.into()),
        ("llama.rope.freq_base", 10_000.5f64.into()),
        ("negative", (-5).into()),
        ("large", u64::MAX.into()),
        ("tokenizer.add_bos", true.into()),
        ("tokenizer.tokens", vec!["a", "b", "", "\u{2581}\"\\\n"].into()),
        ("tokenizer.types", vec![1, -1, 3].into()),
        ("tokenizer.scores", vec![0.5f64, -1.25].into()),
        ("no tokens", Vec::<Value>::new().into()),
    ]
}

pub(crate) fn gguf() -> Vec<u8> {
    let mut writer = gguf::Writer::new();
    for (key, value) in metadata() {
        writer.set(key, value);
    }
    writer.set("general.alignment", 64u32).set("single", 1e-6f32);
    writer.set("nested", vec![vec![1u32, 2], vec![3]]);
    let tensors: Vec<_> = PLAIN.iter().chain(QUANTIZED).collect();
    for (name, dtype, dims) in &tensors {
        writer.tensor(name, *dtype, Shape::new(*dims)).unwrap();
    }
    fill(writer.begin(Vec::new()).unwrap(), &tensors)
}

pub(crate) fn safetensors() -> Vec<u8> {
    let mut writer = safetensors::Writer::new();
    writer.set("format", "pt").set("quoted", "a \"text\"\n");
    let tensors: Vec<_> = PLAIN.iter().collect();
    for (name, dtype, dims) in &tensors {
        writer.tensor(name, *dtype, Shape::new(*dims)).unwrap();
    }
    fill(writer.begin(Vec::new()).unwrap(), &tensors)
}

pub(crate) fn apr() -> Vec<u8> {
    let mut writer = apr::Writer::new();
    for (key, value) in metadata() {
        writer.set(key, value);
    }
    writer.set("num_layers", 1u32);
    writer.set("rope_scaling", [("factor", 8.0f64)].into_iter().collect::<Map>());
    let own =
        [("blk.0.apr_q4", DType::AprQ4, &[2, 32][..]), ("blk.0.apr_q8", DType::AprQ8, &[3, 5])];
    let tensors: Vec<_> = PLAIN.iter().chain(QUANTIZED).chain(&own).collect();
    for (name, dtype, dims) in &tensors {
        writer.tensor(name, *dtype, Shape::new(*dims)).unwrap();
    }
    fill(writer.begin(Vec::new()).unwrap(), &tensors)
}

/// Puts the checksums right that a change to an `.apr` file has made wrong.
pub(crate) fn fix_apr_checksums(file: &mut [u8]) {
    if file.len() < 68 {
        return;
    }
    let mut header = crc32fast::Hasher::new();
    header.update(&file[..40]);
    header.update(&file[44..64]);
    file[40..44].copy_from_slice(&header.finalize().to_le_bytes());
    let end = file.len() - 4;
    let footer = crc32fast::hash(&file[..end]);
    file[end..].copy_from_slice(&footer.to_le_bytes());
}

pub(crate) fn open(name: &str, bytes: &[u8]) -> Result<Checkpoint> {
    Checkpoint::from_bytes(name, Bytes::from(bytes.to_vec()))
}
