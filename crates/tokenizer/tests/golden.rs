//! What Hugging Face's own tokenizers and templates make of the fixtures' texts, and the same from
//! the GGUF files of the same models.

mod common;

use std::path::{Path, PathBuf};

use apr_format::Checkpoint;
use apr_tokenizer::{Error, Message, Specials, Tokenizer};
use common::CORPUS;
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn open(path: &str) -> Tokenizer {
    let checkpoint = Checkpoint::open(fixtures().join(path)).unwrap();
    Tokenizer::from_checkpoint(&checkpoint).unwrap()
}

/// The recorded model of this name, from its directory and from its GGUF file.
fn both(name: &str) -> [(&'static str, Tokenizer); 2] {
    let gguf = match name {
        "pycoder-3m" => "pycoder-3m/pycoder-3m-Q8_0.gguf",
        "tiny/llama" => "tiny/llama/llama-F16.gguf",
        _ => panic!("no GGUF file is known for {name}"),
    };
    [("directory", open(name)), ("GGUF", open(gguf))]
}

fn golden() -> Vec<Value> {
    let path = fixtures().join("golden/tokenization.json");
    let golden: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(golden.len() >= 2);
    golden
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn texts_have_the_ids_of_the_reference_whatever_the_container() {
    for record in golden() {
        let name = record["tokenizer"].as_str().unwrap();
        for (container, tokenizer) in both(name) {
            for case in record["texts"].as_array().unwrap() {
                let text = case["text"].as_str().unwrap();
                let plain = tokenizer.encode_fragment(text, Specials::Parse).unwrap();
                assert_eq!(plain, ids(&case["ids"]), "{name} {container} {text:?}");
                let whole = tokenizer.encode(text, Specials::Parse).unwrap();
                assert_eq!(whole, ids(&case["ids_with_special"]), "{name} {container} {text:?}");
                assert_eq!(tokenizer.decode(&plain), case["decoded"].as_str().unwrap());
            }
        }
    }
}

#[test]
fn conversations_render_as_the_reference_renders_them() {
    for record in golden() {
        let name = record["tokenizer"].as_str().unwrap();
        for (container, tokenizer) in both(name) {
            let template = tokenizer.chat_template().expect("both models have one");
            for case in record["conversations"].as_array().unwrap() {
                let messages: Vec<Message> = case["messages"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|m| {
                        Message::new(m["role"].as_str().unwrap(), m["content"].as_str().unwrap())
                    })
                    .collect();
                let prompted = case["add_generation_prompt"].as_bool().unwrap();
                let rendered = template.render(&messages, prompted).unwrap();
                assert_eq!(rendered, case["rendered"].as_str().unwrap(), "{name} {container}");
            }
        }
    }
}

#[test]
fn containers_agree_on_the_special_tokens() {
    let [(_, directory), (_, gguf)] = both("tiny/llama");
    for tokenizer in [&directory, &gguf] {
        assert_eq!((tokenizer.bos_id(), tokenizer.add_bos()), (Some(315), true));
        assert_eq!(tokenizer.eos_ids(), [316, 319], "end of text and the template's end of turn");
        assert_eq!(tokenizer.vocab_size(), 320);
        assert!(
            tokenizer.is_special(319) && !tokenizer.is_special(0) && !tokenizer.is_special(999)
        );
        assert_eq!(tokenizer.token_text(319), "<|eot_id|>");
        assert_eq!(tokenizer.token_id("<|eot_id|>"), Some(319));
        assert_eq!(tokenizer.token_bytes(999), b"");
    }
    let [(_, directory), (_, gguf)] = both("pycoder-3m");
    for tokenizer in [&directory, &gguf] {
        assert!(!tokenizer.add_bos());
        assert_eq!(tokenizer.eos_ids(), [2045, 2047]);
    }
}

#[test]
fn streamed_text_is_the_decoded_text() {
    for (container, tokenizer) in both("pycoder-3m") {
        for text in CORPUS {
            let ids = tokenizer.encode(text, Specials::Parse).unwrap();
            let mut stream = tokenizer.stream();
            let mut streamed: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
            streamed.extend(stream.finish());
            assert_eq!(streamed, tokenizer.decode(&ids), "{container}");
        }
        let mut stream = tokenizer.stream();
        let crab = tokenizer.encode("🦀", Specials::Parse).unwrap();
        assert!(crab.len() > 1, "a crab takes several tokens");
        assert_eq!(stream.push(crab[0]), None);
        assert_eq!(stream.finish().as_deref(), Some("\u{fffd}"));
    }
}

#[test]
fn control_tokens_of_a_user_can_stay_text() {
    for (container, tokenizer) in both("pycoder-3m") {
        let text = "a<|im_end|>b";
        let parsed = tokenizer.encode(text, Specials::Parse).unwrap();
        let literal = tokenizer.encode(text, Specials::Literal).unwrap();
        assert!(parsed.contains(&2047) && !literal.contains(&2047), "{container}");
        assert_eq!(
            (tokenizer.decode(&parsed), tokenizer.decode(&literal)),
            (text.into(), text.into())
        );
    }
}

#[test]
fn a_run_of_spaces_is_split_right_up_to_the_limit_and_refused_beyond() {
    let [(_, tokenizer), _] = both("pycoder-3m");
    let limit = 500_000;
    let ids = tokenizer.encode(&(" ".repeat(limit) + "x"), Specials::Parse).unwrap();
    let joined = tokenizer.encode(" x", Specials::Parse).unwrap();
    assert!(ids.ends_with(&joined), "the last space belongs to the word");
    let beyond = tokenizer.encode(&" ".repeat(limit + 1), Specials::Parse);
    assert!(matches!(beyond, Err(Error::TooMuchSpace { limit: l }) if l == limit));
}
