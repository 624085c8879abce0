//! What can go wrong when the backend is made.

use std::io;

use crate::Isa;

/// An error of the CPU backend's own; those of its ops are [`apr_model::Error`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The machine cannot run the kernels asked for.
    #[error("this machine cannot run `{isa}` kernels; it can run: {}", Isa::available().map(Isa::name).collect::<Vec<_>>().join(", "))]
    IsaUnavailable {
        /// The instruction set asked for.
        isa: Isa,
    },
    /// No threads, or more than anybody could want.
    #[error("{threads} threads asked for; possible are 1 to {max}")]
    Threads {
        /// The number asked for.
        threads: usize,
        /// The largest number accepted.
        max: usize,
    },
    /// The operating system did not give us a thread.
    #[error("cannot start a worker thread: {source}; ask for fewer threads")]
    Spawn {
        /// What it says.
        #[from]
        source: io::Error,
    },
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
