//! What can keep a checkpoint from being converted.

/// An error of a conversion.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file is damaged, contradicts itself, or cannot hold what it should.
    #[error(transparent)]
    Format(#[from] apr_format::Error),
    /// The checkpoint is no model that is known here.
    #[error(transparent)]
    Model(#[from] apr_model::Error),
    /// A tensor's numbers cannot be read or stored.
    #[error(transparent)]
    Tensor(#[from] apr_tensor::Error),
    /// The tokenizer or the chat template cannot be read.
    #[error(transparent)]
    Tokenizer(#[from] apr_tokenizer::Error),
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
