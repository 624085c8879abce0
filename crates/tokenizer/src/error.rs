//! What can be wrong with a tokenizer or a chat template.

use std::fmt;

/// Where a tokenizer's file says what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: String,
    /// The metadata key or JSON path in it.
    pub key: String,
}

impl Place {
    pub(crate) fn new(file: &str, key: &str) -> Self {
        Self { file: file.to_owned(), key: key.to_owned() }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file, self.key)
    }
}

/// An error about a tokenizer or a chat template.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The checkpoint has no tokenizer at all.
    #[error(
        "{file}: no tokenizer: expected tokenizer.json beside it, or tokenizer.ggml.* or \
         tokenizer.vocabulary metadata in it"
    )]
    NoTokenizer {
        /// The checkpoint.
        file: String,
    },
    /// The metadata of the checkpoint cannot be read.
    #[error(transparent)]
    Metadata(#[from] apr_format::Error),
    /// A companion file is no JSON, or JSON of another shape.
    #[error("{file}: {source}")]
    Json {
        /// The file.
        file: String,
        /// What the parser says, with line and column.
        source: serde_json::Error,
    },
    /// Something that every tokenizer of this kind has is missing.
    #[error("{place} is missing: expected {expected}")]
    Missing {
        /// Where it should be.
        place: Place,
        /// What should be there.
        expected: &'static str,
    },
    /// A value has the wrong type.
    #[error("{place} is not {expected}")]
    WrongType {
        /// Where.
        place: Place,
        /// The type or shape expected.
        expected: &'static str,
    },
    /// A kind of tokenizer, pre-tokenizer or decoder that this crate does not implement.
    #[error("{place} is {found:?}, which is not supported; supported: {supported}")]
    Unsupported {
        /// Where.
        place: Place,
        /// What the file asks for.
        found: String,
        /// What it could be instead.
        supported: String,
    },
    /// A list that goes with the vocabulary has another length.
    #[error("{place} has {found} entries, expected {expected}, one per token")]
    Length {
        /// The list.
        place: Place,
        /// The size of the vocabulary.
        expected: usize,
        /// The length of the list.
        found: usize,
    },
    /// Two ids have the same text, so the text has no single id.
    #[error("{place} has the token {token:?} twice: ids {first} and {second}")]
    DuplicateToken {
        /// The vocabulary.
        place: Place,
        /// The text.
        token: String,
        /// One id.
        first: u32,
        /// The other id.
        second: u32,
    },
    /// Two texts have the same id.
    #[error("{place} gives the id {id} to both {first:?} and {second:?}")]
    DuplicateId {
        /// The vocabulary.
        place: Place,
        /// The id.
        id: u32,
        /// One text.
        first: String,
        /// The other text.
        second: String,
    },
    /// An id that no vocabulary of this size has.
    #[error("{place} is {id}, but ids must be below {limit}")]
    IdOutOfRange {
        /// Where the id is.
        place: Place,
        /// The id.
        id: u64,
        /// The first id that is out of range.
        limit: u64,
    },
    /// A merge rule that does not read as two tokens.
    #[error("{place}[{index}] is {merge:?}: expected two tokens with a space between them")]
    MalformedMerge {
        /// The list of merges.
        place: Place,
        /// Its position.
        index: usize,
        /// The rule.
        merge: String,
    },
    /// A merge rule about a token that the vocabulary does not have.
    #[error("{place}[{index}] needs {unknown:?}, which is not in the vocabulary")]
    UnknownMergeToken {
        /// The list of merges.
        place: Place,
        /// Its position.
        index: usize,
        /// The part or product that is not in the vocabulary.
        unknown: String,
    },
    /// A score that cannot be ordered.
    #[error("{place}[{index}] is {score}: expected a finite number")]
    Score {
        /// The list of scores.
        place: Place,
        /// Its position.
        index: usize,
        /// The score.
        score: f64,
    },
    /// The tokenizer library refuses a part of the file.
    #[error("{place}: {source}")]
    Library {
        /// The part.
        place: Place,
        /// What the library says.
        source: tokenizers::Error,
    },
    /// The vocabulary cannot spell a text, and has no token for the unknown.
    #[error(
        "the vocabulary has no tokens for {text:?} and no unknown token: encoding it would lose text"
    )]
    Unspellable {
        /// The piece of text.
        text: String,
    },
    /// The word splitter would give up in the middle of the text without saying so.
    #[error("the text has more than {limit} white-space characters in a row: shorten that run")]
    TooMuchSpace {
        /// The longest run that is split as it should be.
        limit: usize,
    },
    /// A chat template does not parse, fails, or refuses the messages.
    #[error("{file}{}: {detail}", line.map(|l| format!(" line {l}")).unwrap_or_default())]
    Template {
        /// Where the template comes from.
        file: String,
        /// The line of the template.
        line: Option<usize>,
        /// What is wrong with it.
        detail: String,
    },
}

impl Error {
    /// Out of the library's error, which may be one of ours on its way through a callback.
    pub(crate) fn while_encoding(source: tokenizers::Error) -> Self {
        match source.downcast::<Self>() {
            Ok(ours) => *ours,
            Err(source) => Self::Library { place: Place::new("the text", "encoding"), source },
        }
    }
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
