//! Tokenizers, and the templates that come with them.

use apr_format::{Checkpoint, gguf};
use apr_tensor::Bytes;
use apr_tokenizer::{Message, Specials, Tokenizer};

const NAME: &str = "fuzzed";
const TEXT: &str = "def f(x):\n\treturn  x + 1  # \u{e4}\u{1f600}<|im_end|>\r\n";

/// Builds a tokenizer from `file` as a `tokenizer.json`. Returns whether it is one.
pub fn json(file: &[u8]) -> bool {
    used(Tokenizer::from_json(NAME, file))
}

/// Builds a tokenizer from the metadata of `file` as a GGUF file. Returns whether it has one.
pub fn gguf(file: &[u8]) -> bool {
    let checkpoint = Checkpoint::from_bytes(NAME, Bytes::from(file.to_vec()));
    checkpoint.is_ok_and(|checkpoint| used(Tokenizer::from_checkpoint(&checkpoint)))
}

/// Renders `file` as the chat template of a model that has hardly anything else. Returns whether it rendered.
pub fn template(file: &[u8]) -> bool {
    let Ok(source) = std::str::from_utf8(file) else { return false };
    let model = vocabulary(source);
    let checkpoint = Checkpoint::from_bytes(NAME, Bytes::from(model)).expect("a valid file");
    let tokenizer = Tokenizer::from_checkpoint(&checkpoint).expect("a valid tokenizer");
    let template = tokenizer.chat_template().expect("a model with a template");
    let messages = [Message::new("system", "short"), Message::new("user", "hi")];
    template.render(&messages, true).is_ok()
}

/// A GGUF file with the smallest byte-level vocabulary and this chat template.
pub fn vocabulary(template: &str) -> Vec<u8> {
    let mut writer = gguf::Writer::new();
    writer
        .set("general.architecture", "qwen2")
        .set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", "qwen2")
        .set("tokenizer.ggml.tokens", vec!["a", "b", "ab", "<|end|>"])
        .set("tokenizer.ggml.token_type", vec![1, 1, 1, 3])
        .set("tokenizer.ggml.merges", vec!["a b"])
        .set("tokenizer.ggml.eos_token_id", 3u32)
        .set("tokenizer.chat_template", template);
    let body = writer.begin(Vec::new()).expect("memory is written to");
    body.finish().expect("memory is written to")
}

/// Encodes and decodes. What comes of it must hold together.
fn used(tokenizer: apr_tokenizer::Result<Tokenizer>) -> bool {
    let tokenizer = match tokenizer {
        Ok(tokenizer) => tokenizer,
        Err(error) => {
            assert!(error.to_string().contains(NAME), "which file? {error}");
            return false;
        }
    };
    if let Ok(ids) = tokenizer.encode(TEXT, Specials::Parse) {
        let mut stream = tokenizer.stream();
        for &id in &ids {
            assert!((id as usize) < tokenizer.vocab_size(), "{id} is no token");
            stream.push(id);
        }
        stream.finish();
        tokenizer.decode(&ids);
    }
    true
}
