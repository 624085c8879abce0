//! What keeps a check-up from beginning. What goes wrong in a check is its outcome.

/// An error of a check-up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name that no check has.
    #[error("no check is called `{name}`; there are: {known}")]
    UnknownCheck {
        /// The name as given.
        name: String,
        /// All names.
        known: String,
    },
    /// The file cannot be read at all.
    #[error(transparent)]
    File(apr_format::Error),
    /// A prompt without tokens.
    #[error("no tokens: the checks of runs need a prompt of at least one token")]
    NoTokens,
    /// A token id that the model has no embedding for.
    #[error("token id {id} is outside the model's vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// The number of ids.
        vocab_size: usize,
    },
    /// A prompt that does not fit.
    #[error("the prompt has {tokens} tokens, but the model's context holds {context}; shorten it")]
    ContextFull {
        /// Tokens of the prompt.
        tokens: usize,
        /// Positions that there are.
        context: usize,
    },
    /// The backend that was asked for cannot be had.
    #[error("{source}")]
    Backend {
        /// What it says.
        source: crate::FactoryError,
    },
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
