//! Why a comparison could not even be begun.

use std::path::{Path, PathBuf};

/// An error of this crate. What could not be compared is no error but part of the result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A capture cannot be read.
    #[error(transparent)]
    Capture(#[from] apr_capture::Error),
    /// A model file's tensors cannot be brought into the order of rows that they are compared in.
    #[error("{}: {source}", file.display())]
    Model {
        /// The model file.
        file: PathBuf,
        /// What is wrong with it.
        source: Box<apr_model::Error>,
    },
    /// The files hold different numbers of values, so no value of one belongs to one of the other.
    #[error("{} holds {a} values and {} holds {b}: they are not of the same stage and rows", file_a.display(), file_b.display())]
    Lengths {
        /// One file.
        file_a: PathBuf,
        /// The other.
        file_b: PathBuf,
        /// Values in the first.
        a: usize,
        /// Values in the second.
        b: usize,
    },
    /// The files are of different stages or layers.
    #[error("{} is of {a} and {} is of {b}: there is no point in comparing them", file_a.display(), file_b.display())]
    Stages {
        /// One file.
        file_a: PathBuf,
        /// The other.
        file_b: PathBuf,
        /// The layer and stage of the first.
        a: String,
        /// Those of the second.
        b: String,
    },
    /// A filter left nothing to compare.
    #[error("no tensor of either file has `{filter}` in its name; the names are like {examples}")]
    NothingMatches {
        /// The filter.
        filter: String,
        /// Some names that there are.
        examples: String,
    },
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn model(file: &Path, source: apr_model::Error) -> Self {
        Self::Model { file: file.to_owned(), source: Box::new(source) }
    }
}
