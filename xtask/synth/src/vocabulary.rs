//! A byte-level vocabulary that stands for nothing: all strings of one byte, of two, of three, until there are enough.

use std::iter;

use serde_json::{Value, json};

/// What ends a text and a turn, and what begins a turn: as in the models whose shapes are known.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Qwen2's way to cut text into words.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A `tokenizer.json` of `size` tokens, and its `tokenizer_config.json`; `None` if there is no room for all bytes.
pub(crate) fn files(size: usize) -> Option<[(&'static str, Value); 2]> {
    let plain = size.checked_sub(SPECIAL.len()).filter(|&plain| plain >= BYTES)?;
    let mut tokens: Vec<String> = alphabet().map(String::from).collect();
    let mut merges = Vec::new();
    // Each token and one byte more: what has been made longer is in the list before it.
    for (left, right) in
        (0..plain).flat_map(|left| (0..BYTES).map(move |right| (left, right))).take(plain - BYTES)
    {
        merges.push(json!([tokens[left], tokens[right]]));
        tokens.push(format!("{}{}", tokens[left], tokens[right]));
    }
    let vocab: serde_json::Map<_, _> = tokens.into_iter().zip((0..).map(|id| json!(id))).collect();
    let added: Vec<_> = iter::zip(plain.., SPECIAL).map(|(id, content)| {
        json!({ "id": id, "content": content, "special": true, "normalized": false, "single_word": false, "lstrip": false, "rstrip": false })
    }).collect();
    let split = json!({ "type": "Split", "pattern": { "Regex": WORDS }, "behavior": "Isolated", "invert": false });
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false });
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": { "type": "NFC" },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [split, bytes] },
        "post_processor": null,
        "decoder": bytes,
        "model": { "type": "BPE", "vocab": vocab, "merges": merges },
    });
    let config =
        json!({ "add_prefix_space": false, "eos_token": SPECIAL[2], "pad_token": SPECIAL[0] });
    Some([("tokenizer.json", tokenizer), ("tokenizer_config.json", config)])
}

const BYTES: usize = 256;

/// The characters that spell the bytes, as GPT-2 has them: Latin-1 as far as it can be seen, and others for the rest.
fn alphabet() -> impl Iterator<Item = char> {
    ('\x21'..='\x7e').chain('\u{a1}'..='\u{ac}').chain('\u{ae}'..='\u{143}')
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_byte_has_one_character_and_every_token_is_another() {
        assert_eq!(alphabet().count(), BYTES);
        let [(_, tokenizer), _] = files(70_000).unwrap();
        let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
        let ids: HashSet<_> = vocab.values().map(|id| id.as_u64().unwrap()).collect();
        assert_eq!((vocab.len(), ids.len()), (69_997, 69_997));
        assert_eq!(tokenizer["added_tokens"][2]["id"], 69_999);
        assert!(files(258).is_none() && files(259).is_some());
    }
}
