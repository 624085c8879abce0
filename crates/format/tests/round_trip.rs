//! What a writer writes, the reader reads: metadata, names, types, shapes, bytes.

mod common;

use apr_format::{Checkpoint, Container, Error, Map, Value, apr, gguf, safetensors};
use apr_tensor::{DType, Shape};
use common::{PLAIN, QUANTIZED, Tensor, open};
use proptest::prelude::*;

fn assert_tensors(model: &Checkpoint, expected: &[Tensor]) {
    for tensor in expected {
        let stored = model.require(tensor.0).unwrap();
        assert_eq!(stored.dtype(), tensor.1, "{}", tensor.0);
        assert_eq!(stored.shape().dims(), tensor.2, "{}", tensor.0);
        assert_eq!(&stored.bytes()[..], common::body(tensor), "{}", tensor.0);
    }
}

#[test]
fn a_gguf_comes_back_as_it_was_written() {
    let model = open("a.gguf", &common::gguf()).unwrap();
    assert_eq!(model.container(), Container::Gguf { version: 3 });
    assert_tensors(&model, PLAIN);
    assert_tensors(&model, QUANTIZED);
    for (key, value) in common::metadata() {
        assert_eq!(model.metadata().get(key), Some(&value), "{key}");
    }
    assert_eq!(model.metadata().get("single"), Some(&Value::F32(1e-6)));
    let names: Vec<_> = model.tensors().map(|(name, _)| name).collect();
    let written: Vec<_> = PLAIN.iter().chain(QUANTIZED).map(|tensor| tensor.0).collect();
    assert_eq!(names, written);
}

#[test]
fn safetensors_come_back_as_they_were_written() {
    let model = open("a.safetensors", &common::safetensors()).unwrap();
    assert_eq!(model.container(), Container::Safetensors);
    assert_tensors(&model, PLAIN);
    assert_eq!(model.metadata().str("__metadata__.quoted").unwrap(), Some("a \"text\"\n"));
}

#[test]
fn an_apr_file_comes_back_as_it_was_written_sorted_by_name() {
    let model = open("a.apr", &common::apr()).unwrap();
    assert_eq!(model.container(), Container::Apr);
    assert_tensors(&model, PLAIN);
    assert_tensors(&model, QUANTIZED);
    for (key, value) in common::metadata() {
        // As JSON, which does not say whether a 1 is signed.
        let found = model.metadata().get(key).map(serde_json::Value::from);
        assert_eq!(found, Some(serde_json::Value::from(&value)), "{key}");
    }
    assert_eq!(model.metadata().f64("rope_scaling.factor").unwrap(), Some(8.0));
    assert!(model.tensors().map(|(name, _)| name).is_sorted());
    assert_eq!(model.require("blk.0.apr_q8").unwrap().bytes().len(), 4 + 15);
}

#[test]
fn every_type_of_every_container_can_be_written_and_read() {
    for dtype in DType::all() {
        let shape = Shape::new([2, 256]);
        let bytes = vec![1; dtype.tensor_bytes(&shape).unwrap()];
        let mut files = Vec::new();
        let mut gguf = gguf::Writer::new();
        if gguf.tensor("w", dtype, shape.clone()).is_ok() {
            files.push(gguf.begin(Vec::new()).unwrap());
        }
        let mut safetensors = safetensors::Writer::new();
        if safetensors.tensor("w", dtype, shape.clone()).is_ok() {
            files.push(safetensors.begin(Vec::new()).unwrap());
        }
        let mut apr = apr::Writer::new();
        if apr.tensor("w", dtype, shape.clone()).is_ok() {
            files.push(apr.begin(Vec::new()).unwrap());
        }
        assert!(!files.is_empty(), "no container holds {dtype}");
        for mut body in files {
            body.tensor("w", &bytes).unwrap();
            let model = open("w", &body.finish().unwrap()).unwrap();
            assert_eq!(model.require("w").unwrap().dtype(), dtype);
        }
    }
}

#[test]
fn the_index_hash_covers_name_type_and_shape_in_the_order_of_names() {
    let mut writer = gguf::Writer::new();
    writer.tensor("b", DType::F16, [4]).unwrap().tensor("a", DType::F32, [2, 3]).unwrap();
    let mut body = writer.begin(Vec::new()).unwrap();
    body.tensor("b", &[0; 8]).unwrap();
    body.tensor("a", &[0; 24]).unwrap();
    let file = body.finish().unwrap();
    let model = open("a.gguf", &file).unwrap();
    // printf 'a F32 2,3\nb F16 4\n' | sha256sum
    assert_eq!(
        model.index_sha256(),
        "43fcc8d6dbbf092e424ed5cf0de42bad250243c863a08d051b3ebe353bb8b6b0"
    );
    assert_eq!(model.files()[0].size(), file.len() as u64);
}

#[test]
fn the_file_hash_is_that_of_sha256sum() {
    let mut writer = safetensors::Writer::new();
    writer.tensor("a", DType::U8, [3]).unwrap();
    let mut body = writer.begin(Vec::new()).unwrap();
    body.tensor("a", b"abc").unwrap();
    let model = open("a.safetensors", &body.finish().unwrap()).unwrap();
    // printf '\x38\0\0\0\0\0\0\0{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}   abc' | sha256sum
    assert_eq!(
        model.file_sha256(),
        "d2f8ee49ae3085c129024b6479da0c1c4be24d22868cbc2aaae4a07c5ba83b47"
    );
}

#[track_caller]
fn refused(result: Result<(), Error>, parts: &[&str]) {
    let text = result.unwrap_err().to_string();
    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
}

#[test]
fn a_writer_refuses_what_its_container_cannot_hold() {
    refused(
        gguf::Writer::new().tensor("w", DType::AprQ4, [32]).map(drop),
        &["GGUF", "`w`", "APR_Q4"],
    );
    refused(safetensors::Writer::new().tensor("w", DType::Q4_0, [32]).map(drop), &["`w`", "Q4_0"]);
    refused(apr::Writer::new().tensor("w", DType::Q5_K, [256]).map(drop), &[".apr", "`w`", "Q5_K"]);
    refused(gguf::Writer::new().tensor("w", DType::Q4_K, [100]).map(drop), &["`w`", "[100]"]);
    let null = gguf::Writer::new().set("k", Value::Null).begin(Vec::new()).map(drop);
    refused(null, &["`k`", "null"]);
    let mixed = Value::from(vec![Value::from(1u32), "a".into()]);
    refused(gguf::Writer::new().set("k", mixed).begin(Vec::new()).map(drop), &["`k`", "several"]);
    let mut twice = apr::Writer::new();
    twice.tensor("w", DType::F32, [1]).unwrap().tensor("w", DType::F32, [1]).unwrap();
    refused(twice.begin(Vec::new()).map(drop), &["two tensors `w`"]);
}

#[test]
fn a_body_takes_each_tensor_once_in_order_and_in_its_size() {
    let mut writer = gguf::Writer::new();
    writer.tensor("a", DType::F32, [1]).unwrap().tensor("b", DType::F32, [1]).unwrap();
    let mut body = writer.begin(Vec::new()).unwrap();
    assert!(matches!(body.tensor("b", &[0; 4]), Err(Error::WriteOrder { .. })));
    assert!(matches!(body.tensor("a", &[0; 5]), Err(Error::Tensor { .. })));
    body.tensor("a", &[0; 4]).unwrap();
    let text = body.finish().unwrap_err().to_string();
    assert!(text.contains("expected tensor `b` next"), "{text}");
}

/// Any value that a GGUF can hold; lists are of one type.
fn gguf_value() -> impl Strategy<Value = Value> {
    let scalar = prop_oneof![
        any::<bool>().prop_map(Value::Bool),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f32>().prop_map(Value::F32),
        any::<f64>().prop_map(Value::F64),
        ".*".prop_map(Value::String),
    ];
    let list = prop_oneof![
        proptest::collection::vec(any::<u64>(), 0..9).prop_map(Value::from),
        proptest::collection::vec(any::<i64>(), 0..9).prop_map(Value::from),
        proptest::collection::vec(any::<f32>(), 0..9).prop_map(Value::from),
        proptest::collection::vec(any::<bool>(), 0..9).prop_map(Value::from),
        proptest::collection::vec(".*", 0..9).prop_map(Value::from),
    ];
    prop_oneof![scalar, list]
}

proptest! {
    #[test]
    fn any_gguf_metadata_comes_back(map in proptest::collection::hash_map("[a-z.]{1,20}", gguf_value(), 0..12)) {
        let mut writer = gguf::Writer::new();
        for (key, value) in &map {
            writer.set(key, value.clone());
        }
        writer.set("general.alignment", 32u32);
        let model = open("any.gguf", &writer.begin(Vec::new()).unwrap().finish().unwrap()).unwrap();
        for (key, value) in &map {
            if key != "general.alignment" {
                prop_assert_eq!(model.metadata().get(key), Some(value));
            }
        }
    }

    #[test]
    fn any_apr_metadata_comes_back(texts in proptest::collection::hash_map(".*", ".*", 0..12), x: f64) {
        let x = if x.is_finite() { x } else { 0.1 };
        let mut writer = apr::Writer::new();
        let texts: Map = texts.into_iter().collect();
        writer.set("texts", texts.clone()).set("x", x);
        let model = open("any.apr", &writer.begin(Vec::new()).unwrap().finish().unwrap()).unwrap();
        prop_assert_eq!(model.metadata().get("texts"), Some(&Value::Object(texts)));
        prop_assert_eq!(model.metadata().f64("x").unwrap(), Some(x));
    }
}

#[test]
fn a_tensor_in_parts_is_the_same_file() {
    let mut writer = apr::Writer::new();
    writer.tensor("a", DType::U8, [5]).unwrap();
    writer.tensor("empty", DType::F32, [0, 4]).unwrap();
    let mut whole = writer.begin(Vec::new()).unwrap();
    whole.tensor("a", &[1, 2, 3, 4, 5]).unwrap();
    whole.tensor("empty", &[]).unwrap();
    let mut parts = writer.begin(Vec::new()).unwrap();
    for part in [&[1, 2][..], &[], &[3, 4, 5]] {
        parts.part("a", part).unwrap();
    }
    parts.part("empty", &[]).unwrap();
    assert_eq!(parts.finish().unwrap(), whole.finish().unwrap());
}

#[test]
fn parts_that_are_too_long_or_too_few_or_out_of_turn_are_refused() {
    let mut writer = gguf::Writer::new();
    writer.tensor("a", DType::F32, [2]).unwrap().tensor("b", DType::F32, [1]).unwrap();
    let begun = || {
        let mut body = writer.begin(Vec::new()).unwrap();
        body.part("a", &[0; 3]).unwrap();
        body
    };
    refused(begun().part("a", &[0; 6]), &["`a`", "8", "9"]);
    refused(begun().part("b", &[0; 4]), &["`a` next", "`b`"]);
    refused(begun().tensor("a", &[0; 8]), &["`a` next"]);
    refused(begun().finish().map(drop), &["`a` next", "the end"]);
}

#[test]
fn an_apr_file_says_whether_it_is_quantised_and_has_a_vocabulary() {
    let flags = |dtype, key: &str| {
        let mut writer = apr::Writer::new();
        writer.set(key, vec!["a"]).tensor("w", dtype, [256]).unwrap();
        let len = dtype.row_bytes(256).unwrap();
        let mut body = writer.begin(Vec::new()).unwrap();
        body.tensor("w", &vec![0; len]).unwrap();
        let file = body.finish().unwrap();
        u16::from_le_bytes([file[6], file[7]])
    };
    assert_eq!(flags(DType::F16, "k"), 0x400);
    assert_eq!(flags(DType::Q4_K, "k"), 0x420);
    assert_eq!(flags(DType::F32, "tokenizer.vocabulary"), 0x600);
}
