//! A SentencePiece vocabulary as a GGUF file has it (scores) and as Hugging Face converts it (merge
//! rules, merged by another program): the same ids and the same text.

mod common;

use apr_tokenizer::{Specials, Tokenizer};
use common::{CORPUS, from_metadata};
use proptest::prelude::*;
use serde_json::json;

/// From the best to the worst score.
const WORDS: &[&str] = &[
    "▁▁",
    "▁▁▁▁",
    "he",
    "th",
    "▁the",
    "▁he",
    "▁t",
    "▁a",
    "er",
    "ll",
    "llo",
    "▁hello",
    "el",
    "lo",
    "ello",
    "re",
    "▁th",
    "se",
    "ab",
    "bc",
    "abc",
    "▁ab",
    "12",
    "日日",
    "es",
    "▁s",
    "▁se",
    "▁",
    "a",
    "b",
    "c",
    "e",
    "h",
    "l",
    "o",
    "t",
    "r",
    "s",
    "1",
    "2",
    ".",
    "é",
    "日",
    "\n",
];

/// Text, score and GGUF type of each token: specials, bytes, then words from best to worst.
fn pieces() -> Vec<(String, f32, i32)> {
    let specials = [("<unk>", 2), ("<s>", 3), ("</s>", 3)];
    let specials = specials.map(|(token, kind)| (token.to_owned(), 0.0, kind));
    let bytes = (0..=255).map(|b| (format!("<0x{b:02X}>"), 0.0, 6));
    let words = WORDS.iter().zip(1u16..).map(|(w, rank)| (w.to_string(), -f32::from(rank), 1));
    specials.into_iter().chain(bytes).chain(words).collect()
}

fn from_gguf() -> Tokenizer {
    let pieces = pieces();
    from_metadata(vec![
        ("tokenizer.ggml.model", "llama".into()),
        ("tokenizer.ggml.tokens", pieces.iter().map(|p| p.0.as_str()).collect::<Vec<_>>().into()),
        ("tokenizer.ggml.scores", pieces.iter().map(|p| p.1).collect::<Vec<_>>().into()),
        ("tokenizer.ggml.token_type", pieces.iter().map(|p| p.2).collect::<Vec<_>>().into()),
        ("tokenizer.ggml.bos_token_id", 1u32.into()),
        ("tokenizer.ggml.eos_token_id", 2u32.into()),
        ("tokenizer.ggml.unknown_token_id", 0u32.into()),
    ])
    .unwrap()
}

/// The same vocabulary after Hugging Face's conversion: every split of a word into two tokens is a
/// merge, in the order of the words' scores.
fn from_json() -> Tokenizer {
    let pieces = pieces();
    let id = |token: &str| pieces.iter().position(|p| p.0 == token);
    let mut merges = Vec::new();
    for (word, ..) in pieces.iter().filter(|p| p.2 == 1) {
        for (cut, _) in word.char_indices().skip(1) {
            let (left, right) = word.split_at(cut);
            if id(left).is_some() && id(right).is_some() {
                merges.push([left, right]);
            }
        }
    }
    let vocab: serde_json::Map<_, _> =
        pieces.iter().enumerate().map(|(id, p)| (p.0.clone(), id.into())).collect();
    let added = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        })
    };
    let json = json!({
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        ]},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        ]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": vocab, "merges": merges
        }
    });
    Tokenizer::from_json("tokenizer.json", json.to_string().as_bytes()).unwrap()
}

fn agree(gguf: &Tokenizer, json: &Tokenizer, text: &str) {
    for specials in [Specials::Parse, Specials::Literal] {
        let ids = json.encode(text, specials).unwrap();
        assert_eq!(gguf.encode(text, specials).unwrap(), ids, "{text:?}");
    }
    let ids = json.encode_fragment(text, Specials::Literal).unwrap();
    assert_eq!((gguf.decode(&ids), json.decode(&ids)), (text.to_owned(), text.to_owned()));
}

#[test]
fn scores_and_their_merge_rules_give_the_same_ids() {
    let (gguf, json) = (from_gguf(), from_json());
    assert!(gguf.add_bos() && json.add_bos());
    let hello = gguf.encode_fragment("hello the日", Specials::Parse).unwrap();
    let texts: Vec<_> = hello.iter().map(|&id| gguf.token_text(id)).collect();
    assert_eq!(texts, [" hello", " the", "日"]);
    for text in CORPUS {
        agree(&gguf, &json, text);
    }
    let texts = prop_oneof!["[abcehlotrs12.é日 \n]{0,40}", ".{0,20}", "( |he|llo|the|<s>|▁){0,12}"];
    proptest!(|(text in texts)| {
        // A written `▁` decodes as the space that it stands for.
        agree(&gguf, &json, &text.replace('▁', " "));
    });
}
