//! Texts, and the way from a `tokenizer.json` to the same tokenizer in a GGUF file.
#![allow(dead_code, reason = "each test file uses its own part")]

use apr_format::{Checkpoint, Value, gguf};
use apr_tokenizer::{Result, Tokenizer};

/// Everything that has ever tripped a tokenizer.
pub(crate) const CORPUS: &[&str] = &[
    "",
    " ",
    "   ",
    "\n",
    "\r\n\r\n",
    " \t \n  \n\n x",
    "Hello, world!",
    "  leading and trailing  ",
    "I'm you're WE'LL they'D it'S",
    "fn main() {\n\tlet x: u32 = 0xFF_u32;\n    println!(\"{x:?}\");\n}\n",
    "def f(x):\r\n    return x ** 2  # square\r\n",
    "1 12 123 1234 12345 3.14159 1e-9 １２３ ½ ²",
    "naïve café — “quotes” … №5",
    "e\u{301}cole A\u{30a} \u{1112}\u{1161}\u{11ab} \u{928}\u{93c}",
    "日本語のテキスト、中文文本。한국어 텍스트",
    "مرحبا بالعالم שלום",
    "🦀 👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 ❤️",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_en d|> <|endoftext|><|endoftext|> </s><s>",
    "\u{0}\u{1}\u{7f}\u{80}\u{ad}\u{a0}\u{2028}\u{3000}\u{feff}\u{fffd}\u{10ffff}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "================================================================ ###",
];

/// The tokenizer of a GGUF file with this metadata.
pub(crate) fn from_metadata(metadata: Vec<(&str, Value)>) -> Result<Tokenizer> {
    let mut writer = gguf::Writer::new();
    for (key, value) in metadata {
        writer.set(key, value);
    }
    let mut bytes = Vec::new();
    writer.begin(&mut bytes).unwrap().finish().unwrap();
    let checkpoint = Checkpoint::from_bytes("test.gguf", bytes.into()).unwrap();
    Tokenizer::from_checkpoint(&checkpoint)
}

/// What a converter to GGUF makes of a byte-level `tokenizer.json`.
pub(crate) fn gguf_metadata(json: &[u8], pre: &str) -> Vec<(&'static str, Value)> {
    let json: serde_json::Value = serde_json::from_slice(json).unwrap();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let added = json["added_tokens"].as_array().unwrap();
    let mut tokens: Vec<(u64, &str, i32)> =
        vocab.iter().map(|(token, id)| (id.as_u64().unwrap(), token.as_str(), 1)).collect();
    for token in added {
        let kind = if token["special"] == true { 3 } else { 4 };
        tokens.push((token["id"].as_u64().unwrap(), token["content"].as_str().unwrap(), kind));
    }
    tokens.sort_unstable();
    assert!(tokens.iter().zip(0..).all(|(token, id)| token.0 == id), "ids without holes");
    let merges = json["model"]["merges"].as_array().unwrap().iter();
    let merges: Vec<String> = merges
        .map(|m| match m.as_str() {
            Some(m) => m.to_owned(),
            None => format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap()),
        })
        .collect();
    vec![
        ("tokenizer.ggml.model", "gpt2".into()),
        ("tokenizer.ggml.pre", pre.into()),
        ("tokenizer.ggml.tokens", tokens.iter().map(|t| t.1).collect::<Vec<_>>().into()),
        ("tokenizer.ggml.token_type", tokens.iter().map(|t| t.2).collect::<Vec<_>>().into()),
        ("tokenizer.ggml.merges", merges.into()),
    ]
}

/// The same tokenizer, by way of GGUF.
pub(crate) fn gguf_of_json(json: &[u8], pre: &str) -> Tokenizer {
    from_metadata(gguf_metadata(json, pre)).unwrap()
}
