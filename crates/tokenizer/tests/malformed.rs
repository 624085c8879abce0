//! Malformed tokenizers are refused with the file, the key and the fault, and never panic.

mod common;

use apr_format::{Checkpoint, Value, apr};
use apr_tokenizer::{Error, Result, Specials, Tokenizer};
use common::{from_metadata, gguf_metadata};
use proptest::prelude::*;

/// A byte-level vocabulary of a few letters.
fn small_bpe() -> Vec<(&'static str, Value)> {
    vec![
        ("tokenizer.ggml.model", "gpt2".into()),
        ("tokenizer.ggml.pre", "qwen2".into()),
        ("tokenizer.ggml.tokens", vec!["a", "b", "ab", "Ġ", "Ġab", "<|im_end|>"].into()),
        ("tokenizer.ggml.token_type", vec![1, 1, 1, 1, 1, 3].into()),
        ("tokenizer.ggml.merges", vec!["a b", "Ġ ab"].into()),
        ("tokenizer.ggml.eos_token_id", 5u32.into()),
    ]
}

/// A SentencePiece vocabulary of a few letters.
fn small_spm() -> Vec<(&'static str, Value)> {
    vec![
        ("tokenizer.ggml.model", "llama".into()),
        ("tokenizer.ggml.tokens", vec!["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a"].into()),
        ("tokenizer.ggml.token_type", vec![2, 3, 3, 1, 1, 1, 1].into()),
        ("tokenizer.ggml.scores", vec![0f32, 0., 0., -3., -4., -5., -1.].into()),
        ("tokenizer.ggml.bos_token_id", 1u32.into()),
        ("tokenizer.ggml.eos_token_id", 2u32.into()),
        ("tokenizer.ggml.unknown_token_id", 0u32.into()),
    ]
}

fn with(
    mut metadata: Vec<(&'static str, Value)>,
    key: &'static str,
    value: impl Into<Value>,
) -> Vec<(&'static str, Value)> {
    metadata.retain(|(k, _)| *k != key);
    metadata.push((key, value.into()));
    metadata
}

fn without(mut metadata: Vec<(&'static str, Value)>, key: &str) -> Vec<(&'static str, Value)> {
    metadata.retain(|(k, _)| *k != key);
    metadata
}

#[track_caller]
fn refuses(metadata: Vec<(&'static str, Value)>, message: &str) {
    assert_eq!(from_metadata(metadata).unwrap_err().to_string(), message);
}

#[test]
fn the_small_vocabularies_are_sound() {
    let bpe = from_metadata(small_bpe()).unwrap();
    assert_eq!(bpe.encode("ab ab<|im_end|>", Specials::Parse).unwrap(), [2, 4, 5]);
    assert_eq!((bpe.eos_ids(), bpe.bos_id(), bpe.add_bos()), (&[5][..], None, false));
    assert_eq!(bpe.decode(&[2, 4]), "ab ab");
    let spm = from_metadata(small_spm()).unwrap();
    assert_eq!(spm.encode("ab a", Specials::Parse).unwrap(), [1, 6, 5, 6]);
    assert_eq!(spm.encode_fragment("é", Specials::Parse).unwrap(), [3, 0, 0]);
    assert_eq!(spm.decode(&[6, 5, 6]), "ab a");
    assert_eq!((spm.eos_ids(), spm.bos_id(), spm.add_bos()), (&[2][..], Some(1), true));
}

#[test]
fn faults_of_metadata_are_named() {
    const PRE: &str = "test.gguf: tokenizer.ggml.";
    let bpe = |key, value: Value, fault: &str| {
        refuses(with(small_bpe(), key, value), &format!("{PRE}{fault}"));
    };
    let spm = |key, value: Value, fault: &str| {
        refuses(with(small_spm(), key, value), &format!("{PRE}{fault}"));
    };
    bpe(
        "tokenizer.ggml.merges",
        vec!["a b", "ab x"].into(),
        "merges[1] needs \"x\", which is not in the vocabulary",
    );
    bpe(
        "tokenizer.ggml.merges",
        vec!["b a"].into(),
        "merges[0] needs \"ba\", which is not in the vocabulary",
    );
    bpe(
        "tokenizer.ggml.merges",
        vec!["a b", "Ġab <|im_end|>"].into(),
        "merges[1] needs \"Ġab<|im_end|>\", which is not in the vocabulary",
    );
    bpe(
        "tokenizer.ggml.merges",
        vec!["a b", "a longer_than_any_token"].into(),
        "merges[1] needs \"longer_than_any_token\", which is not in the vocabulary",
    );
    bpe(
        "tokenizer.ggml.merges",
        vec!["ab"].into(),
        "merges[0] is \"ab\": expected two tokens with a space between them",
    );
    bpe(
        "tokenizer.ggml.tokens",
        vec!["a", "b", "ab", "Ġ", "Ġab", "a"].into(),
        "tokens has the token \"a\" twice: ids 0 and 5",
    );
    bpe(
        "tokenizer.ggml.token_type",
        vec![1, 1].into(),
        "token_type has 2 entries, expected 6, one per token",
    );
    bpe(
        "tokenizer.ggml.token_type",
        vec![1, 1, 1, 1, 1, 9].into(),
        "token_type is not a list of token types, 0 to 6",
    );
    bpe("tokenizer.ggml.eos_token_id", 6u32.into(), "eos_token_id is 6, but ids must be below 6");
    bpe(
        "tokenizer.ggml.add_bos_token",
        true.into(),
        "bos_token_id is missing: expected an id, because texts begin or end with this token",
    );
    bpe(
        "tokenizer.ggml.model",
        "t5".into(),
        "model is \"t5\", which is not supported; supported: gpt2 (byte-level BPE), \
         llama (SentencePiece BPE)",
    );
    spm(
        "tokenizer.ggml.scores",
        vec![0f32, 1.].into(),
        "scores has 2 entries, expected 7, one per token",
    );
    spm(
        "tokenizer.ggml.scores",
        vec![0f32, 0., 0., f32::NAN, 0., 0., 0.].into(),
        "scores[3] is NaN: expected a finite number",
    );
}

#[test]
fn what_is_missing_is_named() {
    let missing = |metadata, key: &'static str, message: &str| {
        refuses(
            without(metadata, key),
            &format!("test.gguf: {key} is missing: expected {message}"),
        );
    };
    missing(small_bpe(), "tokenizer.ggml.merges", "a list of merge rules, each \"left right\"");
    missing(
        small_bpe(),
        "tokenizer.ggml.pre",
        "the name of a pre-tokenizer, such as \"llama-bpe\"",
    );
    missing(small_spm(), "tokenizer.ggml.scores", "one score per token");
    refuses(
        without(small_bpe(), "tokenizer.ggml.tokens"),
        "test.gguf: no tokenizer: expected tokenizer.json beside it, or tokenizer.ggml.* or \
         tokenizer.vocabulary metadata in it",
    );
}

#[test]
fn an_unknown_way_to_cut_words_is_refused_with_the_known_ones() {
    let error = from_metadata(with(small_bpe(), "tokenizer.ggml.pre", "tekken")).unwrap_err();
    let Error::Unsupported { found, supported, .. } = &error else { panic!("{error}") };
    assert_eq!(found, "tekken");
    for name in ["qwen2", "llama-bpe", "llama-v3", "gpt-2", "default"] {
        assert!(supported.split(", ").any(|known| known == name), "{supported}");
    }
}

#[test]
fn a_file_that_does_not_say_is_read_as_its_architecture_is() {
    let unsaid = without(small_bpe(), "tokenizer.ggml.pre");
    let qwen = from_metadata(with(unsaid, "general.architecture", "qwen3moe")).unwrap();
    assert_eq!(qwen.encode("ab ab", Specials::Parse).unwrap(), [2, 4]);
}

#[test]
fn end_tokens_are_control_tokens_whatever_the_file_calls_them() {
    for kinds in [vec![1, 1, 1, 1, 1, 1], vec![1, 1, 1, 1, 1, 4]] {
        let metadata = with(small_bpe(), "tokenizer.ggml.token_type", kinds);
        let tokenizer = from_metadata(without(metadata, "tokenizer.ggml.eos_token_id")).unwrap();
        assert!(tokenizer.is_special(5));
        assert_eq!(tokenizer.encode("a<|im_end|>", Specials::Parse).unwrap(), [0, 5]);
        let literal = tokenizer.encode("a<|im_end|>", Specials::Literal);
        assert!(matches!(literal, Err(Error::Unspellable { .. })), "no token for '<'");
    }
}

fn apr_tokenizer(metadata: Vec<(&str, Value)>) -> Result<Tokenizer> {
    let mut writer = apr::Writer::new();
    for (key, value) in metadata {
        writer.set(key, value);
    }
    let mut bytes = Vec::new();
    writer.begin(&mut bytes).unwrap().finish().unwrap();
    let checkpoint = Checkpoint::from_bytes("test.apr", bytes.into()).unwrap();
    Tokenizer::from_checkpoint(&checkpoint)
}

#[test]
fn an_apr_file_carries_the_same_tokenizer_under_other_keys() {
    let metadata = || {
        vec![
            ("architecture", "qwen2".into()),
            ("tokenizer.vocabulary", vec!["a", "b", "ab", "Ġ", "Ġab", "<|im_end|>", "<x>"].into()),
            ("tokenizer.merges", vec!["a b", "Ġ ab"].into()),
            ("tokenizer.eos_token_id", 5u32.into()),
            ("chat_template", "{{ messages[0].content }}{{ eos_token }}".into()),
        ]
    };
    let tokenizer = apr_tokenizer(metadata()).unwrap();
    assert_eq!(tokenizer.encode("ab ab<|im_end|><x>", Specials::Parse).unwrap(), [2, 4, 5, 6]);
    assert_eq!(tokenizer.eos_ids(), [5]);
    let messages = [apr_tokenizer::Message::new("user", "ab")];
    assert_eq!(tokenizer.chat_template().unwrap().render(&messages, true).unwrap(), "ab<|im_end|>");

    let mut broken = metadata();
    broken[2].1 = vec!["a c"].into();
    assert_eq!(
        apr_tokenizer(broken).unwrap_err().to_string(),
        "test.apr: tokenizer.merges[0] needs \"c\", which is not in the vocabulary"
    );
    let mut unknown = metadata();
    unknown[0].1 = "mystery".into();
    assert!(
        matches!(apr_tokenizer(unknown), Err(Error::Missing { place, .. }) if place.key == "tokenizer.pre_type")
    );
}

/// A `tokenizer.json` with the same vocabulary, as a value to break.
fn small_json() -> serde_json::Value {
    serde_json::json!({
        "version": "1.0",
        "added_tokens": [{
            "id": 5, "content": "<|im_end|>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true
        }],
        "normalizer": null,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}}
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                "<|im_end|>": {"id": "<|im_end|>", "ids": [5], "tokens": ["<|im_end|>"]}
            }
        },
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true
        },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false,
            "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġab": 4},
            "merges": [["a", "b"], ["Ġ", "ab"]]
        }
    })
}

fn parse(json: &serde_json::Value) -> Result<Tokenizer> {
    Tokenizer::from_json("tokenizer.json", json.to_string().as_bytes())
}

#[test]
fn faults_of_a_tokenizer_json_are_named() {
    let sound = parse(&small_json()).unwrap();
    assert_eq!(sound.encode("ab ab<|im_end|>", Specials::Parse).unwrap(), [5, 2, 4, 5]);
    let cases: &[(&str, serde_json::Value, &str)] = &[
        (
            "/model/merges",
            serde_json::json!([["a", "b"], ["ab", "ab"]]),
            "model.merges[1] needs \"abab\", which is not in the vocabulary",
        ),
        (
            "/model/merges",
            serde_json::json!(["a b", "a x"]),
            "model.merges[1] needs \"x\", which is not in the vocabulary",
        ),
        (
            "/model/vocab/b",
            serde_json::json!(0),
            "model.vocab gives the id 0 to both \"a\" and \"b\"",
        ),
        (
            "/model/vocab/b",
            serde_json::json!(4_000_000_000u32),
            "model.vocab is 4000000000, but ids must be below 4194304",
        ),
        (
            "/added_tokens/0/id",
            serde_json::json!(3),
            "added_tokens gives the id 3 to both \"Ġ\" and \"<|im_end|>\"",
        ),
        (
            "/added_tokens/0/content",
            serde_json::json!("ab"),
            "added_tokens has the token \"ab\" twice: ids 2 and 5",
        ),
        (
            "/post_processor/special_tokens/<|im_end|>/ids",
            serde_json::json!([77]),
            "post_processor is 77, but ids must be below 6",
        ),
        (
            "/decoder",
            serde_json::Value::Null,
            "decoder is missing: expected ByteLevel, Metaspace or Replace, which say how tokens \
             spell text",
        ),
        (
            "/model/unk_token",
            serde_json::json!("<unk>"),
            "model.vocab[\"<unk>\"] is missing: expected the id of the unknown token",
        ),
        (
            "/model/continuing_subword_prefix",
            serde_json::json!("##"),
            "model.continuing_subword_prefix is \"##\", which is not supported; supported: none",
        ),
        (
            "/model",
            serde_json::json!({"type": "Unigram", "vocab": [["a", 0.5]], "unk_id": 0}),
            "model.type is \"Unigram\", which is not supported; supported: BPE",
        ),
    ];
    let mut unnamed = small_json();
    unnamed["model"]["unk_token"] = "".into();
    assert!(parse(&unnamed).is_ok(), "GPT-2's own file names its unknown token so");
    for (path, value, message) in cases {
        let mut json = small_json();
        *json.pointer_mut(path).unwrap() = value.clone();
        let error = parse(&json).unwrap_err().to_string();
        assert_eq!(error, format!("tokenizer.json: {message}"), "{path}");
    }
    let text = small_json().to_string().replace("\"b\":1", "\"b\":1,\"b\":3");
    assert!(matches!(
        Tokenizer::from_json("x", text.as_bytes()),
        Err(Error::DuplicateToken { .. } | Error::DuplicateId { .. })
    ));
}

#[test]
fn a_tokenizer_json_cut_short_is_an_error_that_names_it() {
    let text = small_json().to_string();
    for length in 0..text.len() {
        let Some(part) = text.get(..length) else { continue };
        let error = Tokenizer::from_json("cut.json", part.as_bytes()).unwrap_err();
        assert!(error.to_string().starts_with("cut.json: "), "{error}");
    }
}

/// Anything that a metadata value can be.
fn value() -> impl Strategy<Value = Value> {
    let token = prop_oneof!["[ab Ġ▁<>|]{0,3}", Just("<0x0A>".to_owned()), ".{0,3}"];
    prop_oneof![
        any::<bool>().prop_map(Value::from),
        (0u32..12).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f32>().prop_map(Value::from),
        prop_oneof![Just("gpt2"), Just("llama"), Just("qwen2"), Just("default"), Just("")]
            .prop_map(Value::from),
        prop::collection::vec(token, 0..8).prop_map(Value::from),
        prop::collection::vec(-2i32..9, 0..8).prop_map(Value::from),
        prop::collection::vec(any::<f32>(), 0..8).prop_map(Value::from),
    ]
}

/// What a tokenizer that was accepted must be able to do.
fn exercise(tokenizer: &Tokenizer, text: &str) {
    for specials in [Specials::Parse, Specials::Literal] {
        if let Ok(ids) = tokenizer.encode(text, specials) {
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
            tokenizer.decode(&ids);
        }
    }
    let messages = [apr_tokenizer::Message::new("user", text)];
    let _ = tokenizer.chat_template().map(|template| template.render(&messages, true));
}

proptest! {
    #[test]
    fn random_metadata_is_read_or_refused(
        is_bpe: bool,
        changes in prop::collection::vec((0usize..12, value()), 1..4),
        text in "[ab <>|Ġ▁é\n]{0,12}",
    ) {
        const KEYS: [&str; 12] = [
            "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens",
            "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.scores",
            "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
            "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix",
            "tokenizer.chat_template", "general.architecture",
        ];
        let mut metadata = if is_bpe { small_bpe() } else { small_spm() };
        for (key, value) in changes {
            metadata = with(metadata, KEYS[key], value);
        }
        match from_metadata(metadata) {
            Ok(tokenizer) => exercise(&tokenizer, &text),
            Err(error) => prop_assert!(error.to_string().contains("test.gguf"), "{}", error),
        }
    }

    #[test]
    fn a_tokenizer_json_with_one_part_replaced_is_read_or_refused(
        at in any::<prop::sample::Index>(),
        part in prop_oneof![
            Just(serde_json::Value::Null),
            any::<i32>().prop_map(serde_json::Value::from),
            "[abĠ<>]{0,3}".prop_map(serde_json::Value::from),
            Just(serde_json::json!([])),
            Just(serde_json::json!({})),
            Just(serde_json::json!(true)),
        ],
        text in "[ab <>|é\n]{0,12}",
    ) {
        let mut json = small_json();
        let mut paths = Vec::new();
        collect_paths(&json, String::new(), &mut paths);
        *json.pointer_mut(&paths[at.index(paths.len())]).unwrap() = part;
        match parse(&json) {
            Ok(tokenizer) => exercise(&tokenizer, &text),
            Err(error) => prop_assert!(error.to_string().contains("tokenizer.json"), "{}", error),
        }
    }
}

/// The JSON pointers of all parts of a value.
fn collect_paths(value: &serde_json::Value, path: String, paths: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(parts) => {
            for (key, part) in parts {
                collect_paths(part, format!("{path}/{key}"), paths);
            }
        }
        serde_json::Value::Array(parts) => {
            for (i, part) in parts.iter().enumerate() {
                collect_paths(part, format!("{path}/{i}"), paths);
            }
        }
        _ => {}
    }
    paths.push(path);
}

#[test]
fn the_gguf_of_a_tokenizer_json_is_the_same_tokenizer() {
    let mut json = small_json();
    json["post_processor"] = serde_json::Value::Null;
    let gguf = from_metadata(gguf_metadata(json.to_string().as_bytes(), "gpt-2")).unwrap();
    for text in ["ab", "ab ab", "<|im_end|>", "a<|im_end|>b ab", ""] {
        let ids = parse(&json).unwrap().encode(text, Specials::Parse).unwrap();
        assert_eq!(gguf.encode(text, Specials::Parse).unwrap(), ids);
    }
}
