//! What can be wrong with a model file.

use std::{fmt, io, path::PathBuf};

/// Where in a file something is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A byte offset from the start of the file.
    Offset(u64),
    /// A metadata key.
    Key(String),
    /// A tensor, by name.
    Tensor(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Offset(at) => write!(f, "offset {at}"),
            Self::Key(key) => write!(f, "key `{}`", Shortened(key)),
            Self::Tensor(name) => write!(f, "tensor `{}`", Shortened(name)),
        }
    }
}

/// A name out of a file, which may be a megabyte of anything, as a message can show it.
pub(crate) struct Shortened<'a>(pub(crate) &'a str);

impl fmt::Display for Shortened<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 120;
        let mut chars = self.0.chars();
        for c in chars.by_ref().take(SHOWN) {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { write!(f, "{c}")? }
        }
        if chars.next().is_some() { f.write_str("...") } else { Ok(()) }
    }
}

/// An error about a model file. A message is whole: it contains its reason, which is not chained as well.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: {reason}", file.display())]
    Io {
        /// The file or directory.
        file: PathBuf,
        /// Its reason.
        reason: io::Error,
    },
    /// The file is something else than a model.
    #[error("{}, offset 0: expected a GGUF, safetensors or .apr file, found {found}; {help}", file.display())]
    NotAModel {
        /// The file.
        file: PathBuf,
        /// What it looks like.
        found: &'static str,
        /// What to do.
        help: &'static str,
    },
    /// A directory is no complete Hugging Face model.
    #[error("{}: expected {expected}, found {found}; {help}", directory.display())]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// What a model directory has there.
        expected: String,
        /// What this one has.
        found: String,
        /// What to do.
        help: &'static str,
    },
    /// Something reaches beyond the end of the file.
    #[error(
        "{}, {at}: {what} needs bytes {start}..{end}, the file has {len}: it is truncated ({} bytes are missing) \
         or damaged; copy or download it again",
        file.display(), end.saturating_sub(*len)
    )]
    Truncated {
        /// The file.
        file: PathBuf,
        /// The field or tensor.
        at: Place,
        /// What was to be read.
        what: String,
        /// Its first byte.
        start: u64,
        /// One past its last byte.
        end: u64,
        /// The bytes there are.
        len: u64,
    },
    /// A field does not hold what its format asks for.
    #[error("{}, {at}: expected {expected}, found {found}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// The field.
        at: Place,
        /// What the format asks for.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// A JSON text does not parse, or repeats a key.
    #[error("{}, offset {offset}: the JSON cannot be read: {reason}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// The offset where parsing stopped.
        offset: u64,
        /// The parser's reason; lines and columns count from the start of the JSON text.
        reason: serde_json::Error,
    },
    /// A valid file of a kind that is not read.
    #[error("{}, {at}: {what} is not supported; {help}", file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// Where it says so.
        at: Place,
        /// What it uses.
        what: String,
        /// What to do.
        help: &'static str,
    },
    /// A size or count is beyond what any real model has.
    #[error("{}, {at}: {what} is {found}, the limit is {limit}; the file is damaged or hostile", file.display())]
    Limit {
        /// The file.
        file: PathBuf,
        /// The field.
        at: Place,
        /// What is counted.
        what: &'static str,
        /// What the file asks for.
        found: u64,
        /// The most that is accepted.
        limit: u64,
    },
    /// A name occurs twice.
    #[error("{}, {at}: occurs twice, which one is meant is not known", file.display())]
    Duplicate {
        /// The file.
        file: PathBuf,
        /// The key or tensor.
        at: Place,
    },
    /// The bytes of two tensors overlap.
    #[error("{}, tensor `{}`: its bytes begin at {start}, but tensor `{}` ends at {end}", file.display(), Shortened(second), Shortened(first))]
    Overlap {
        /// The file.
        file: PathBuf,
        /// The tensor that comes first.
        first: String,
        /// One past the last byte of `first`.
        end: u64,
        /// The tensor that begins within it.
        second: String,
        /// The first byte of `second`.
        start: u64,
    },
    /// Type, shape and size of a tensor do not agree.
    #[error("{}, tensor `{}`: {reason}", file.display(), Shortened(name))]
    Tensor {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// How they disagree.
        reason: apr_tensor::Error,
    },
    /// Two spellings of one metadata key have different values.
    #[error("{}: keys `{first}` ({first_value}) and `{second}` ({second_value}) mean the same and differ; correct one of them", file.display())]
    Conflict {
        /// The file.
        file: PathBuf,
        /// One spelling.
        first: String,
        /// Its value.
        first_value: String,
        /// The other spelling.
        second: String,
        /// Its value.
        second_value: String,
    },
    /// A metadata value has another type than the one asked for.
    #[error("{}, key `{}`: expected {expected}, found {found}", file.display(), Shortened(key))]
    WrongType {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// The type asked for.
        expected: &'static str,
        /// The value found.
        found: String,
    },
    /// There is no tensor of this name.
    #[error("{}: no tensor `{name}` among {count}{}", file.display(), nearest(near))]
    MissingTensor {
        /// The checkpoint.
        file: PathBuf,
        /// The name asked for.
        name: String,
        /// How many tensors there are.
        count: usize,
        /// Names like it.
        near: Vec<String>,
    },
    /// The tensor is there, in a type that nothing here can read.
    #[error("{}, tensor `{}`: stored as {dtype}, which is not supported", file.display(), Shortened(name))]
    UnreadableTensor {
        /// The checkpoint.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// The container's name of its type.
        dtype: String,
    },
    /// What was to be written cannot be said in this container.
    #[error("{container} cannot hold {what}")]
    Unwritable {
        /// The container.
        container: &'static str,
        /// The key or tensor, and why not.
        what: String,
    },
    /// Tensors were given to a writer in another order than declared.
    #[error("expected {} next, got {found}", expected.as_deref().map_or("the end".into(), |name| format!("tensor `{name}`")))]
    WriteOrder {
        /// The tensor whose turn it was; `None` after the last.
        expected: Option<String>,
        /// What came instead.
        found: String,
    },
    /// Writing failed.
    #[error("cannot write the model: {0}")]
    Write(io::Error),
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn nearest(near: &[String]) -> String {
    if near.is_empty() {
        return "; `apr inspect` lists them".to_owned();
    }
    let names: Vec<_> = near.iter().map(|name| format!("`{}`", Shortened(name))).collect();
    format!("; the nearest names are {}", names.join(", "))
}
