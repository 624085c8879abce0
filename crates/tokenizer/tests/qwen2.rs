//! The Qwen2 tokenizer as its `tokenizer.json` and as the metadata of a GGUF file.
#![allow(clippy::print_stdout, reason = "a skipped test says so")]

mod common;

use std::path::PathBuf;

use apr_tokenizer::{Specials, Tokenizer};
use common::{CORPUS, gguf_of_json};
use proptest::prelude::*;

/// The file lies outside the repository; without it there is nothing to test here.
fn tokenizer_json() -> Option<Vec<u8>> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../..");
    let path = root.join("shared/data/qwen2-tokenizer/tokenizer.json");
    let json = std::fs::read(&path).ok();
    if json.is_none() {
        println!("skipped: {} is not there", path.display());
    }
    json
}

#[test]
fn a_question_has_the_ids_that_the_model_was_trained_on() {
    let Some(json) = tokenizer_json() else { return };
    let tokenizer = Tokenizer::from_json("tokenizer.json", &json).unwrap();
    let question = [3838, 374, 220, 17, 10, 17, 30];
    assert_eq!(tokenizer.encode("What is 2+2?", Specials::Parse).unwrap(), question);
    assert_eq!(tokenizer.token_text(374), " is");
    assert_eq!(tokenizer.decode(&question), "What is 2+2?");
    assert_eq!(tokenizer.encode("<|im_end|>", Specials::Parse).unwrap(), [151645]);
    assert_eq!(tokenizer.encode("<|im_end|>", Specials::Literal).unwrap().len(), 6);
    assert_eq!(tokenizer.eos_ids(), [151643]);
}

#[test]
fn the_container_does_not_change_the_ids() {
    let Some(json) = tokenizer_json() else { return };
    let from_json = Tokenizer::from_json("tokenizer.json", &json).unwrap();
    let from_gguf = gguf_of_json(&json, "qwen2");
    for text in CORPUS {
        for specials in [Specials::Parse, Specials::Literal] {
            let ids = from_json.encode(text, specials).unwrap();
            assert_eq!(from_gguf.encode(text, specials).unwrap(), ids, "{text:?}");
            assert_eq!(from_gguf.decode(&ids), from_json.decode(&ids));
        }
    }
    let texts = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..80)
            .prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        ".{0,40}",
        "[ \t\r\n]{0,6}[a-z'A-Z]{0,6}[0-9]{0,5}[ \u{300}\u{301}\u{1f3fd}]{0,5}[!-/]{0,4}\r?\n?",
    ];
    proptest!(|(text in texts)| {
        let ids = from_json.encode(&text, Specials::Parse).unwrap();
        prop_assert_eq!(&from_gguf.encode(&text, Specials::Parse).unwrap(), &ids);
    });
}
