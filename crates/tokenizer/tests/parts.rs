//! A tokenizer taken apart and put together in another container gives the same ids.
#![allow(clippy::print_stdout, reason = "a skipped test says so")]

mod common;

use std::path::{Path, PathBuf};

use apr_format::{Checkpoint, Draft, Map};
use apr_tensor::Bytes;
use apr_tokenizer::{Algorithm, Kind, Parts, Specials, Tokenizer};
use common::CORPUS;
use serde_json::json;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// A Hugging Face directory in memory, with these files and no tensors.
fn directory(files: impl IntoIterator<Item = (&'static str, serde_json::Value)>) -> Checkpoint {
    let tensors = Draft::default().safetensors().unwrap();
    let mut all = vec![("model.safetensors".to_owned(), Bytes::from(tensors))];
    let text = |json: serde_json::Value| Bytes::from(json.to_string().into_bytes());
    all.extend(files.into_iter().map(|(name, json)| (name.to_owned(), text(json))));
    all.push(("config.json".to_owned(), text(json!({}))));
    Checkpoint::from_files("memory", &all).unwrap()
}

fn gguf(metadata: Map) -> Checkpoint {
    Draft { metadata, tensors: Vec::new() }.to_gguf("memory.gguf").unwrap()
}

fn apr(metadata: Map) -> Checkpoint {
    Draft { metadata, tensors: Vec::new() }.to_apr("memory.apr").unwrap()
}

fn take_apart(checkpoint: &Checkpoint) -> Parts {
    let (parts, omissions) = Parts::of(checkpoint).unwrap().expect("it has a tokenizer");
    assert_eq!(omissions, []);
    parts
}

/// All containers say of `source` what it says itself, and encode as it does.
fn is_the_same_in_all_containers(source: &Checkpoint) {
    let parts = take_apart(source);
    let original = Tokenizer::from_checkpoint(source).unwrap();
    let size = parts.tokens.len();
    let texts = |id: &str| parts.text(id.parse().unwrap()).map(str::to_owned);
    let special = |id: Option<u32>| id.and_then(|id| texts(&id.to_string()));
    let config = json!({
        "bos_token": special(parts.bos), "eos_token": special(parts.eos),
        "unk_token": special(parts.unknown), "pad_token": special(parts.padding),
        "chat_template": parts.template,
    });
    let generation = json!({ "eos_token_id": original.eos_ids() });
    let others = [
        gguf(parts.gguf_metadata(size + 3).unwrap()),
        apr(parts.apr_metadata().unwrap()),
        directory([
            ("tokenizer.json", parts.tokenizer_json().unwrap()),
            ("tokenizer_config.json", config),
            ("generation_config.json", generation),
        ]),
    ];
    for other in others {
        let name = other.path().display();
        assert_eq!(parts.difference(&take_apart(&other)), None, "{name}");
        let tokenizer = Tokenizer::from_checkpoint(&other).unwrap();
        let is_gguf = name.to_string().ends_with(".gguf");
        assert_eq!(tokenizer.vocab_size(), size + if is_gguf { 3 } else { 0 }, "{name}");
        let mut texts: Vec<String> = CORPUS.iter().map(|&text| text.to_owned()).collect();
        // All of a small vocabulary, and every few of a large one.
        let ids = (0..size as u32).step_by(1 + size / 10_000);
        texts.extend(ids.map(|id| original.token_text(id).into_owned()));
        for text in &texts {
            for specials in [Specials::Parse, Specials::Literal] {
                let expected = original.encode(text, specials).unwrap();
                assert_eq!(tokenizer.encode(text, specials).unwrap(), expected, "{name} {text:?}");
            }
        }
        for id in 0..size as u32 {
            assert_eq!(tokenizer.token_bytes(id), original.token_bytes(id), "{name} {id}");
            assert_eq!(tokenizer.is_special(id), original.is_special(id), "{name} {id}");
        }
        let sorted = |tokenizer: &Tokenizer| {
            let mut ids = tokenizer.eos_ids().to_vec();
            ids.sort_unstable();
            ids
        };
        assert_eq!(sorted(&tokenizer), sorted(&original), "{name}");
        assert_eq!(tokenizer.bos_id(), original.bos_id(), "{name}");
        let source = |t: &Tokenizer| t.chat_template().map(|t| t.source().to_owned());
        assert_eq!(source(&tokenizer), source(&original), "{name}");
    }
}

#[test]
fn fixtures_are_the_same_in_all_containers() {
    for name in ["pycoder-3m", "tiny/llama", "tiny/qwen2", "tiny/qwen3"] {
        let folder = fixtures().join(name);
        is_the_same_in_all_containers(&Checkpoint::open(&folder).unwrap());
    }
    for name in ["pycoder-3m/pycoder-3m-Q8_0.gguf", "tiny/llama/llama-F16.gguf"] {
        is_the_same_in_all_containers(&Checkpoint::open(fixtures().join(name)).unwrap());
    }
}

#[test]
fn a_tokenizer_of_151_thousand_tokens_is_the_same_in_all_containers() {
    let folder = fixtures().join("../../shared/data/qwen2-tokenizer");
    let read = |name: &str| serde_json::from_slice(&std::fs::read(folder.join(name)).ok()?).ok();
    let (Some(tokenizer), Some(config)) = (read("tokenizer.json"), read("tokenizer_config.json"))
    else {
        println!("skipped: there is no tokenizer in {}", folder.display());
        return;
    };
    is_the_same_in_all_containers(&directory([
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config),
    ]));
}

/// From the best to the worst score.
const WORDS: &[&str] = &[
    "▁▁", "he", "th", "▁the", "▁he", "▁t", "er", "ll", "llo", "▁hello", "el", "lo", "ello", "▁th",
    "ab", "bc", "abc", "日日", "▁", "a", "b", "c", "e", "h", "l", "o", "t", "r", ".", "é", "日",
    "\n",
];

fn sentencepiece(adds_space: bool) -> Parts {
    let specials = [("<unk>", Kind::Unknown), ("<s>", Kind::Control), ("</s>", Kind::Control)];
    let specials = specials.map(|(text, kind)| (text.to_owned(), kind));
    let bytes = (0..=255).map(|b| (format!("<0x{b:02X}>"), Kind::Byte));
    let words = WORDS.iter().map(|word| (word.to_string(), Kind::Normal));
    let tokens: Vec<_> = specials.into_iter().chain(bytes).chain(words).collect();
    let scores =
        (0..tokens.len()).map(|id| if id < 259 { 0.0 } else { 259.0 - id as f32 }).collect();
    Parts {
        tokens,
        algorithm: Algorithm::SentencePiece { scores, adds_space },
        bos: Some(1),
        eos: Some(2),
        eot: None,
        eom: None,
        unknown: Some(0),
        padding: None,
        adds_bos: true,
        adds_eos: false,
        template: Some("{{ bos_token }}{{ messages[0]['content'] }}".to_owned()),
        named_templates: Vec::new(),
    }
}

#[test]
fn sentencepiece_is_the_same_in_all_containers() {
    for adds_space in [true, false] {
        let parts = sentencepiece(adds_space);
        is_the_same_in_all_containers(&gguf(parts.gguf_metadata(0).unwrap()));
        is_the_same_in_all_containers(&apr(parts.apr_metadata().unwrap()));
    }
}

#[test]
fn scores_come_back_from_merge_rules() {
    let parts = sentencepiece(true);
    let again = take_apart(&directory([
        ("tokenizer.json", parts.tokenizer_json().unwrap()),
        (
            "tokenizer_config.json",
            json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
        ),
    ]));
    assert_eq!(again.algorithm, parts.algorithm);
}

#[test]
fn holes_are_filled_for_gguf_and_left_out_elsewhere() {
    let mut parts = take_apart(&Checkpoint::open(fixtures().join("tiny/llama")).unwrap());
    let size = parts.tokens.len();
    parts.tokens.push((format!("[PAD{size}]"), Kind::Unused));
    parts.tokens.push(("<extra>".to_owned(), Kind::UserDefined));
    let file = gguf(parts.gguf_metadata(size + 4).unwrap());
    let tokens = file.metadata().strings("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!(tokens[size..], [&format!("[PAD{size}]"), "<extra>", "[PAD322]", "[PAD323]"]);
    assert_eq!(take_apart(&file).tokens, parts.tokens);
    let json = parts.tokenizer_json().unwrap();
    assert_eq!(json["model"]["vocab"].get(format!("[PAD{size}]")), None);
    let tokenizer = Tokenizer::from_json("x", json.to_string().as_bytes()).unwrap();
    assert_eq!(tokenizer.token_id("<extra>"), Some(size as u32 + 1));
    assert_eq!(tokenizer.encode_fragment("<extra>", Specials::Literal).unwrap(), [321]);
}

fn altered(change: impl FnOnce(&mut serde_json::Value)) -> Checkpoint {
    let file = std::fs::read(fixtures().join("tiny/qwen2/tokenizer.json")).unwrap();
    let mut json = serde_json::from_slice(&file).unwrap();
    change(&mut json);
    directory([("tokenizer.json", json)])
}

#[test]
fn what_parts_cannot_hold_is_listed() {
    let source = altered(|json| {
        json["normalizer"] = serde_json::Value::Null;
        json["model"]["ignore_merges"] = true.into();
        json["added_tokens"][1]["lstrip"] = true.into();
        json["truncation"] = json!({"max_length": 8});
        json["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "X"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "X"}}],
            "special_tokens": {"X": {"ids": [318]}}
        });
    });
    let (_, omissions) = Parts::of(&source).unwrap().unwrap();
    let keys: Vec<_> = omissions.iter().map(|omission| omission.key.as_str()).collect();
    let expected = [
        "tokenizer.json: truncation",
        "tokenizer.json: added_tokens[\"<|im_start|>\"].lstrip",
        "tokenizer.json: normalizer NFC",
        "tokenizer.json: model.ignore_merges",
        "tokenizer.json: post_processor",
    ];
    assert_eq!(keys, expected);
}

#[test]
fn an_unknown_way_to_cut_words_is_refused_with_those_that_are_known() {
    let source = altered(|json| {
        json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+".into();
    });
    let error = Parts::of(&source).unwrap_err().to_string();
    assert!(error.contains(r"\\w+") && error.contains("llama-bpe"), "{error}");
}

#[test]
fn templates_by_name_are_kept() {
    let templates =
        json!([{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]);
    let json = std::fs::read(fixtures().join("tiny/qwen2/tokenizer.json")).unwrap();
    let parts = take_apart(&directory([
        ("tokenizer.json", serde_json::from_slice(&json).unwrap()),
        ("tokenizer_config.json", json!({ "chat_template": templates })),
    ]));
    let named = vec![("tool_use".to_owned(), "B".to_owned())];
    assert_eq!((parts.template.as_deref(), &parts.named_templates), (Some("A"), &named));
    for other in [gguf(parts.gguf_metadata(0).unwrap()), apr(parts.apr_metadata().unwrap())] {
        assert_eq!(take_apart(&other).named_templates, named);
    }
}
