//! Vocabularies and test vectors of llama.cpp (`models/ggml-vocab-NAME.gguf{,.inp,.out}`), which are
//! not part of this repository: set `APR_VOCAB_VECTORS` to the folder that has them.
#![allow(clippy::print_stdout, reason = "a skipped test says so")]

use std::path::Path;

use apr_format::Checkpoint;
use apr_tokenizer::{Specials, Tokenizer};

/// Between two texts of an `.inp` file.
const SEPARATOR: &str = "\n__ggml_vocab_test__\n";

/// The vocabularies of the pre-tokenizer families that are supported, and `llama-spm`.
const SUPPORTED: &[&str] =
    &["deepseek-coder", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "refact", "starcoder"];

fn tokenizer(folder: &Path, name: &str) -> apr_tokenizer::Result<Tokenizer> {
    let path = folder.join(format!("ggml-vocab-{name}.gguf"));
    Tokenizer::from_checkpoint(&Checkpoint::open(path).unwrap())
}

#[test]
fn all_published_vectors_of_the_supported_families_agree() {
    let Some(folder) = std::env::var_os("APR_VOCAB_VECTORS") else {
        println!("skipped: APR_VOCAB_VECTORS is not set");
        return;
    };
    let folder = Path::new(&folder);
    let mut wrong = Vec::new();
    for name in SUPPORTED {
        let tokenizer = match tokenizer(folder, name) {
            Ok(tokenizer) => tokenizer,
            Err(e) => {
                wrong.push(format!("{name}: {e}"));
                continue;
            }
        };
        let read = |suffix: &str| {
            std::fs::read_to_string(folder.join(format!("ggml-vocab-{name}.gguf.{suffix}")))
                .unwrap()
        };
        let (texts, ids) = (read("inp"), read("out"));
        // The generator writes texts with a separator between and after them.
        let texts: Vec<&str> = texts.split(SEPARATOR).collect();
        let ids: Vec<Vec<u32>> = ids
            .lines()
            .map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect())
            .collect();
        println!("{name}: {} texts, {} lists of ids", texts.len(), ids.len());
        assert!(ids.len() > 20, "{name} has vectors");
        for (text, ids) in texts.iter().zip(&ids) {
            let ours = tokenizer.encode_fragment(text, Specials::Literal).unwrap();
            if ours != *ids {
                wrong.push(format!("{name}: {text:?}\n  expected {ids:?}\n  found    {ours:?}"));
            }
            if *name != "phi-3" && tokenizer.decode(ids) != *text {
                wrong.push(format!("{name}: {text:?} decodes as {:?}", tokenizer.decode(ids)));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}
