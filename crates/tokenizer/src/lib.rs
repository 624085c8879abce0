//! Text to token ids and back, and chat templates, from any checkpoint.
//!
//! [`Tokenizer::from_checkpoint`] reads Hugging Face's `tokenizer.json` and its companions, GGUF
//! metadata or `.apr` metadata. Whatever the container, the same text gives the same ids. [`Parts`] are for those
//! who bring a tokenizer from one container to another.
//!
//! What it refuses to do: apply a chat template by itself ([`ChatTemplate::render`] is a separate
//! step that the caller sees), guess how an unknown vocabulary cuts text into words, or lose text
//! that the vocabulary cannot spell.

mod added;
mod bpe;
mod embedded;
mod error;
mod family;
mod hugging_face;
mod parts;
mod spm;
mod stop;
mod stream;
mod template;
mod vocabulary;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use apr_format::Checkpoint;

pub use added::Specials;
pub use error::{Error, Place, Result};
pub use parts::{Algorithm, Omission, Parts};
pub use stream::TextStream;
pub use template::{ChatTemplate, Message};
pub use vocabulary::{Kind, Vocabulary};

/// The tokenizer of one model.
///
/// ```no_run
/// use apr_tokenizer::{Message, Specials, Tokenizer};
///
/// let checkpoint = apr_format::Checkpoint::open("model.gguf")?;
/// let tokenizer = Tokenizer::from_checkpoint(&checkpoint)?;
/// let prompt = match tokenizer.chat_template() {
///     Some(template) => {
///         let text = template.render(&[Message::new("user", "What is 2+2?")], true)?;
///         tokenizer.encode_fragment(&text, Specials::Parse)?
///     }
///     None => tokenizer.encode("What is 2+2?", Specials::Literal)?,
/// };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Tokenizer {
    vocabulary: Arc<Vocabulary>,
    model: Model,
    /// Ids that every text begins with.
    prefix: Vec<u32>,
    /// Ids that every text ends with.
    suffix: Vec<u32>,
    /// Whether encoding puts a space before a text that decoding takes away again.
    strips_space: bool,
    bos: Option<u32>,
    stops: Vec<u32>,
    template: Option<ChatTemplate>,
}

/// The vocabulary itself would fill a screen a hundred times.
impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("prefix", &self.prefix)
            .field("suffix", &self.suffix)
            .field("bos", &self.bos)
            .field("stops", &self.stops)
            .finish_non_exhaustive()
    }
}

/// The ways from text to ids.
enum Model {
    Bpe(Box<bpe::Bpe>),
    Spm(Box<spm::Spm>),
}

impl Model {
    fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>> {
        match self {
            Self::Bpe(bpe) => bpe.encode(text, specials),
            Self::Spm(spm) => spm.encode(text, specials),
        }
    }

    fn id_of(&self, token: &str) -> Option<u32> {
        match self {
            Self::Bpe(bpe) => bpe.id_of(token),
            Self::Spm(spm) => spm.id_of(token),
        }
    }
}

impl Tokenizer {
    /// The tokenizer of a checkpoint: its own metadata if that has one, else the files beside it.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        let metadata = checkpoint.metadata();
        if let Some(keys) = embedded::keys_in(metadata) {
            return embedded::read(metadata, keys);
        }
        hugging_face::read(checkpoint)
    }

    /// A tokenizer from the bytes of a `tokenizer.json`, called `name` in messages.
    pub fn from_json(name: &str, tokenizer_json: &[u8]) -> Result<Self> {
        hugging_face::read_json(name, tokenizer_json)
    }

    /// The ids of a whole text, with BOS (or EOS) where the model's own metadata asks for it.
    ///
    /// No template is applied. For text that continues other text, or that a chat template wrote,
    /// use [`Tokenizer::encode_fragment`].
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>> {
        let ids = self.encode_fragment(text, specials)?;
        Ok([self.prefix.as_slice(), &ids, &self.suffix].concat())
    }

    /// The ids of a text and nothing else: no BOS, no EOS.
    ///
    /// This is what a rendered chat template needs: templates write BOS themselves.
    pub fn encode_fragment(&self, text: &str, specials: Specials) -> Result<Vec<u32>> {
        self.model.encode(text, specials)
    }

    /// Whether [`Tokenizer::encode`] begins every text with BOS.
    pub fn add_bos(&self) -> bool {
        self.bos.is_some_and(|bos| self.prefix.contains(&bos))
    }

    /// The text of ids, control tokens written out. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect();
        let starts_with_text = ids.first().is_some_and(|&id| !self.is_special(id));
        let text = match bytes.strip_prefix(b" ") {
            Some(rest) if self.strips_space && starts_with_text => rest,
            _ => &bytes,
        };
        String::from_utf8_lossy(text).into_owned()
    }

    /// A decoder for ids that come one by one. It leaves a leading space in place: generated text
    /// continues a prompt.
    pub fn stream(&self) -> TextStream {
        TextStream::new(Arc::clone(&self.vocabulary))
    }

    /// What ids stand for, to be kept when nothing is left to encode: a tokenizer takes many times the memory of its vocabulary.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// The text of one token, for tables: ` is`. Part of a character reads as U+FFFD.
    pub fn token_text(&self, id: u32) -> Cow<'_, str> {
        self.vocabulary.text(id)
    }

    /// The bytes that a token stands for; none for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.vocabulary.bytes(id)
    }

    /// The id of a token by its text in the vocabulary's own spelling: `Ġis`, `<|im_end|>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.model.id_of(token)
    }

    /// The number of ids. A model's embedding may have more rows, as padding.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// All tokens that end the generation, the one that the model states first.
    pub fn eos_ids(&self) -> &[u32] {
        &self.stops
    }

    /// The token that begins a text, whether or not texts must begin with it.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// Whether a token is structure rather than text.
    pub fn is_special(&self, id: u32) -> bool {
        matches!(self.vocabulary.kind(id), Some(Kind::Control | Kind::Unknown))
    }

    /// The model's chat template.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_can_share_a_tokenizer() {
        fn shared<T: Send + Sync>() {}
        shared::<Tokenizer>();
        shared::<ChatTemplate>();
    }
}
