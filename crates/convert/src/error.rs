//! What can keep a checkpoint from being converted.

use std::{io, path::PathBuf};

use apr_tensor::DType;

use crate::{Loss, Recipe, Target};

/// An error of a conversion. A message is whole: it contains its reason, which is not chained as well.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file is damaged, contradicts itself, or cannot hold what it should.
    #[error(transparent)]
    Format(Box<apr_format::Error>),
    /// The checkpoint is no model that is known here.
    #[error(transparent)]
    Model(Box<apr_model::Error>),
    /// A tensor's numbers cannot be read.
    #[error(transparent)]
    Tensor(#[from] apr_tensor::Error),
    /// The tokenizer or the chat template cannot be read.
    #[error(transparent)]
    Tokenizer(#[from] apr_tokenizer::Error),
    /// The operating system refused.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Its reason.
        reason: io::Error,
    },
    /// The target cannot express all that the source has.
    #[error("{}; `--lossy` converts without", listed(losses))]
    Lossy {
        /// What would be lost.
        losses: Vec<Loss>,
    },
    /// The container has no such types.
    #[error("{target} files have no {} weights, which {recipe} is made of; they can be made of: {supported}", recipe.dtype())]
    Recipe {
        /// The container.
        target: Target,
        /// The recipe asked for.
        recipe: Recipe,
        /// Those that it has.
        supported: String,
    },
    /// Weights that were rounded once would be rounded again.
    #[error(
        "tensor `{tensor}` is {from} already: to make {to} of it adds one error to the other; convert the original \
         checkpoint, or accept that with `--requantize`"
    )]
    Requantize {
        /// The tensor, as the target calls it.
        tensor: String,
        /// Its type.
        from: DType,
        /// The type that the recipe asks for.
        to: DType,
    },
    /// Weights that would have to be read as numbers, and cannot.
    #[error("tensor `{tensor}` cannot be written as {to}: {reason}")]
    Unreadable {
        /// The tensor, as the target calls it.
        tensor: String,
        /// The type that it should get.
        to: DType,
        /// Why not.
        reason: apr_tensor::Error,
    },
    /// The target would mean another model.
    #[error("{target} cannot express {what}: {why}")]
    Inexpressible {
        /// The container.
        target: Target,
        /// What the source has.
        what: String,
        /// Why not.
        why: &'static str,
    },
    /// The file holds the importance of nothing.
    #[error(
        "{}: this is no importance matrix: none of its tensors is called `NAME.in_sum2`, as `llama-imatrix` calls them",
        file.display()
    )]
    NoImportance {
        /// The file.
        file: PathBuf,
    },
    /// The importance matrix is of another model, or damaged.
    #[error("{}, tensor `{tensor}`: {why}; give the importance matrix of this very model", file.display())]
    Importance {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        why: String,
    },
    /// A number cannot be written in the type asked for.
    #[error("tensor `{tensor}`, row {row}: {reason}")]
    Row {
        /// The tensor, as the target calls it.
        tensor: String,
        /// The row.
        row: usize,
        /// Why not.
        reason: apr_tensor::Error,
    },
    /// There is something already.
    #[error("{}: there is {what} already; give another name, or --force to replace it", path.display())]
    Exists {
        /// Where it was to be written.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// Something is there that is neither a file nor a directory, such as a device.
    #[error("{}: this is neither a file nor a directory; give another name", path.display())]
    NoFile {
        /// Where it was to be written.
        path: PathBuf,
    },
    /// The target would replace what it is made from.
    #[error("{}: this is what is being converted; give another name", path.display())]
    OntoItself {
        /// Where it was to be written.
        path: PathBuf,
    },
    /// A directory that holds other things than a model.
    #[error("{}: not replaced, for it is no directory of a model; give another name, or remove it", path.display())]
    ForeignDirectory {
        /// Where it was to be written.
        path: PathBuf,
    },
    /// The file system is too full.
    #[error(
        "{}: {needed} bytes are to be written, {available} are free; make room or write elsewhere",
        path.display()
    )]
    Full {
        /// Where it was to be written.
        path: PathBuf,
        /// Bytes to be written.
        needed: u64,
        /// Bytes free.
        available: u64,
    },
    /// An `.apr` file's copy of another container's words is not whole.
    #[error("{}, key `{copy}`, `{key}`: expected {expected}; remove `{copy}` to convert without it", file.display())]
    Carried {
        /// The file.
        file: PathBuf,
        /// The key of the copy.
        copy: &'static str,
        /// The entry.
        key: String,
        /// What it should be.
        expected: &'static str,
    },
    /// An `.apr` file's copy of another container's words contradicts the file's own keys.
    #[error(
        "{}: key `{copy}` does not say what the file's own keys say, they differ in {what}: correct one of them, or remove `{copy}`",
        file.display()
    )]
    Contradiction {
        /// The file.
        file: PathBuf,
        /// The key of the copy.
        copy: &'static str,
        /// What they disagree in.
        what: String,
    },
    /// What was written is not what should have been.
    #[error("verification failed, {what}: {why} (is the disk or the memory faulty?)")]
    Verification {
        /// The tensor or key.
        what: String,
        /// What is wrong with it.
        why: String,
    },
}

impl From<apr_format::Error> for Error {
    fn from(error: apr_format::Error) -> Self {
        Self::Format(Box::new(error))
    }
}

impl From<apr_model::Error> for Error {
    fn from(error: apr_model::Error) -> Self {
        Self::Model(Box::new(error))
    }
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What would be lost, and why: once for all that has the same reason.
fn listed(losses: &[Loss]) -> String {
    let same = losses.chunk_by(|a, b| a.why == b.why);
    let texts: Vec<_> = same
        .map(|losses| {
            let what: Vec<_> = losses.iter().map(|loss| loss.what.as_str()).collect();
            format!("{}: {}", what.join(", "), losses[0].why)
        })
        .collect();
    format!("this would be lost: {}", texts.join("; "))
}
