//! Why an audit could not even be begun.

use apr_model::{Error as ModelError, Site};

/// An error of this crate. What could not be measured is no error but part of the result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A capture cannot be read.
    #[error(transparent)]
    Capture(#[from] apr_capture::Error),
    /// The model cannot be bound, or a step of the replay failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The capture is of another model than the file.
    #[error(
        "the capture is of a model with {key} = {captured}, {file} has {found}; give the model file that the capture was made of"
    )]
    OtherModel {
        /// The model file.
        file: String,
        /// What differs.
        key: &'static str,
        /// The capture's.
        captured: String,
        /// The file's.
        found: String,
    },
    /// The model has no such site.
    #[error("the model has no {site}")]
    NoSuchSite {
        /// The site.
        site: Site,
    },
    /// An engine cannot be had, or cannot load a model.
    #[error(transparent)]
    Engine(Box<dyn std::error::Error + Send + Sync>),
    /// Model files cannot be compared.
    #[error(transparent)]
    Diff(#[from] apr_diff::Error),
    /// A name that is no arithmetic.
    #[error("unknown arithmetic `{name}`; there are: {known}")]
    UnknownArithmetic {
        /// The name.
        name: String,
        /// The names there are.
        known: String,
    },
}

impl From<apr_tensor::Error> for Error {
    fn from(error: apr_tensor::Error) -> Self {
        Self::Model(error.into())
    }
}

/// `Result` with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;
