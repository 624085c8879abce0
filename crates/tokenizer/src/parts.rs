//! A tokenizer taken apart, to be said again in another container's words.
//!
//! [`Parts`] hold what GGUF and `.apr` can say of a tokenizer, which is less than a `tokenizer.json` can: what of one
//! they cannot hold is listed as an [`Omission`]. Nothing is encoded here: see [`crate::Tokenizer`].

use apr_format::{Checkpoint, Map};

use crate::error::Result;
use crate::vocabulary::Kind;
use crate::{embedded, hugging_face};

mod sentencepiece;

pub(crate) use sentencepiece::{merges_of_scores, scores_of_merges, tie};

/// What a checkpoint says about its tokenizer, in no container's words.
#[derive(Debug, Clone, PartialEq)]
pub struct Parts {
    /// Text and kind of each token, by id. Padding at the end, up to the rows of an embedding, is not among them.
    pub tokens: Vec<(String, Kind)>,
    /// How text becomes tokens.
    pub algorithm: Algorithm,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// The token that ends a text.
    pub eos: Option<u32>,
    /// The token that ends a turn, where the file states it beside `eos`.
    pub eot: Option<u32>,
    /// The token that ends a message that is to be continued.
    pub eom: Option<u32>,
    /// What stands for text without a token.
    pub unknown: Option<u32>,
    /// What batches are filled up with.
    pub padding: Option<u32>,
    /// Whether every text begins with `bos`.
    pub adds_bos: bool,
    /// Whether every text ends with `eos`.
    pub adds_eos: bool,
    /// The chat template, verbatim.
    pub template: Option<String>,
    /// Further chat templates by name, verbatim.
    pub named_templates: Vec<(String, String)>,
}

/// The two ways of merging, each with what it goes by.
#[derive(Debug, Clone, PartialEq)]
pub enum Algorithm {
    /// Byte-level byte-pair encoding.
    Bpe {
        /// The name in `tokenizer.ggml.pre` of how text is cut into words.
        pre: String,
        /// Pairs of tokens that become one, the first first.
        merges: Vec<(String, String)>,
    },
    /// SentencePiece's byte-pair encoding.
    SentencePiece {
        /// One for each token; the best pair is merged first.
        scores: Vec<f32>,
        /// Whether a space goes before every text.
        adds_space: bool,
    },
}

/// Something that a `tokenizer.json`, or a file beside it, says and [`Parts`] cannot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Omission {
    /// Where it is said.
    pub key: String,
    /// What will be different without it.
    pub why: String,
}

impl Parts {
    /// Those of the tokenizer of `checkpoint`; `None` if it has none.
    pub fn of(checkpoint: &Checkpoint) -> Result<Option<(Self, Vec<Omission>)>> {
        let metadata = checkpoint.metadata();
        if let Some(keys) = embedded::keys_in(metadata) {
            return Ok(Some((embedded::parts(metadata, keys)?, Vec::new())));
        }
        match &checkpoint.companions().tokenizer {
            Some(_) => hugging_face::parts(checkpoint).map(Some),
            None => Ok(None),
        }
    }

    /// GGUF's keys, with padding up to `vocab_size` ids, for llama.cpp wants one token for each row of the embedding.
    pub fn gguf_metadata(&self, vocab_size: usize) -> Result<Map> {
        embedded::write(self, &embedded::GGUF, vocab_size)
    }

    /// The keys of `.apr`.
    pub fn apr_metadata(&self) -> Result<Map> {
        embedded::write(self, &embedded::APR, self.tokens.len())
    }

    /// A `tokenizer.json` for Hugging Face's library.
    pub fn tokenizer_json(&self) -> Result<serde_json::Value> {
        hugging_face::write(self)
    }

    /// The merge rules that say what scores of these tokens say.
    pub fn merges_of_scores(&self, scores: &[f32]) -> Vec<(String, String)> {
        merges_of_scores(&self.tokens, scores)
    }

    /// The text of a token.
    pub fn text(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(|(text, _)| text.as_str())
    }

    /// The kind that a token is used as: what begins and ends texts is structure, whatever the file calls it.
    pub fn kind_in_use(&self, id: u32) -> Kind {
        match [self.bos, self.eos, self.eot, self.eom].contains(&Some(id)) {
            true => Kind::Control,
            false => self.tokens[id as usize].1,
        }
    }

    /// The first part that two descriptions of one tokenizer disagree in, by name. Scores only need to
    /// order the merges alike. Templates by name and further ends do not count: what ends a generation also follows
    /// from the template, see [`crate::Tokenizer::eos_ids`].
    pub fn difference(&self, other: &Self) -> Option<&'static str> {
        let kinds = |parts: &Self| -> Vec<_> {
            (0u32..).zip(&parts.tokens).map(|(id, _)| parts.kind_in_use(id)).collect()
        };
        let texts = |parts: &Self| -> Vec<_> {
            parts
                .tokens
                .iter()
                .map(|(text, kind)| (*kind != Kind::Unused).then(|| text.clone()))
                .collect()
        };
        [
            ("the texts of the tokens", texts(self) == texts(other)),
            ("how text becomes tokens", self.algorithm.is_as(&other.algorithm, self, other)),
            ("bos", self.bos == other.bos),
            ("eos", self.eos == other.eos),
            ("the unknown token", self.unknown == other.unknown),
            ("the padding token", self.padding == other.padding),
            ("the kinds of the tokens", kinds(self) == kinds(other)),
            ("whether texts begin with bos", self.adds_bos == other.adds_bos),
            ("whether texts end with eos", self.adds_eos == other.adds_eos),
            ("the chat template", self.template == other.template),
        ]
        .into_iter()
        .find_map(|(name, same)| (!same).then_some(name))
    }
}

impl Algorithm {
    fn is_as(&self, other: &Self, parts: &Parts, others: &Parts) -> bool {
        match (self, other) {
            (Self::Bpe { pre: a, merges: first }, Self::Bpe { pre: b, merges: second }) => {
                crate::family::are_one(a, b) && first == second
            }
            (
                Self::SentencePiece { scores: first, adds_space: a },
                Self::SentencePiece { scores: second, adds_space: b },
            ) => {
                a == b
                    && (first == second
                        || merges_of_scores(&parts.tokens, first)
                            == merges_of_scores(&others.tokens, second))
            }
            _ => false,
        }
    }
}

/// The text of the token that fills a hole at `id`, as llama.cpp's converter writes it.
pub(crate) fn hole(id: usize) -> String {
    format!("[PAD{id}]")
}

/// Whether the token at `id` is there to fill a hole only.
pub(crate) fn is_hole(id: usize, (text, kind): &(String, Kind)) -> bool {
    *kind == Kind::Unused && (text.is_empty() || *text == hole(id))
}
