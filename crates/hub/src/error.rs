//! What can go wrong between here and the hub.

use std::{
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::select::Candidate;

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate. None of them holds a token, nor the query of an address, which may be signed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The name of a model, a revision or an endpoint is none.
    #[error("`{given}` is no {what}; expected {expected}")]
    Name {
        /// What it was given as.
        what: &'static str,
        /// What was given.
        given: String,
        /// How such names look.
        expected: &'static str,
    },
    /// A token cannot be one. It is not shown.
    #[error("the token has characters that no token has; expected one line such as hf_...")]
    Token,
    /// There is no such model, or it is private: the hub does not tell which.
    #[error("{host} has no model `{model}` that {}", if *.with_token { "this token may see: check the spelling, and that the token may read it" } else { "anybody may see: check the spelling; a private model needs a token, in HF_TOKEN or by `hf auth login`" })]
    NoModel {
        /// The model.
        model: String,
        /// The hub's address.
        host: String,
        /// Whether a token was sent.
        with_token: bool,
    },
    /// The model's owner wants its terms accepted first.
    #[error("`{model}` is gated: accept its terms at {page}{}", if *.with_token { ", with the account that the token is of" } else { ", make a token at the hub's settings/tokens, and give it in HF_TOKEN or by `hf auth login`" })]
    Gated {
        /// The model.
        model: String,
        /// Where its terms are.
        page: String,
        /// Whether a token was sent.
        with_token: bool,
    },
    /// The hub does not know the token.
    #[error(
        "{host} does not accept the token: it was revoked, has expired or is mistyped; make another at the hub's settings/tokens, or unset HF_TOKEN for a public model"
    )]
    TokenRefused {
        /// The hub's address.
        host: String,
    },
    /// The hub knows who asks, and refuses.
    #[error("{url}: forbidden{}; a fine-grained token needs the permission to read this model", said(.message))]
    Forbidden {
        /// What was asked for.
        url: String,
        /// What the hub says.
        message: String,
    },
    /// The model has no such branch, tag or commit.
    #[error(
        "`{model}` has no revision `{revision}`: give a branch, a tag or a full commit hash; `main` is the default"
    )]
    NoRevision {
        /// The model.
        model: String,
        /// The revision.
        revision: String,
    },
    /// A file that the hub listed is not there.
    #[error(
        "`{model}` has no file {file} at this revision; it may have been changed just now: try again"
    )]
    NoFile {
        /// The model.
        model: String,
        /// The file.
        file: String,
    },
    /// Too many requests.
    #[error("{host} limits how often it may be asked: try again {}{}", after(.retry_after), if *.with_token { "" } else { "; with a token, in HF_TOKEN, the limit is higher" })]
    RateLimited {
        /// The hub's address.
        host: String,
        /// When the hub wants to be asked again.
        retry_after: Option<Duration>,
        /// Whether a token was sent.
        with_token: bool,
    },
    /// Another refusal.
    #[error("{url}: status {status}{}{}", said(.message), if *.status >= 500 { "; the hub has a problem: try again later" } else { "" })]
    Status {
        /// What was asked for.
        url: String,
        /// The status.
        status: u16,
        /// What the hub says.
        message: String,
    },
    /// Nobody answers.
    #[error(
        "{host} cannot be reached ({source}): check the network, or the proxy in HTTPS_PROXY; --offline uses what the cache has, and HF_ENDPOINT names a mirror"
    )]
    Unreachable {
        /// Who was asked.
        host: String,
        /// What the client says.
        source: Box<ureq::Error>,
    },
    /// The connection ended within a file.
    #[error(
        "{file}: the connection ended after {received} of {size} bytes ({source}); pull again to go on from there"
    )]
    Interrupted {
        /// The file.
        file: String,
        /// How much of it is in the cache.
        received: u64,
        /// How much there is.
        size: u64,
        /// What the system says.
        source: io::Error,
    },
    /// An answer makes no sense.
    #[error("{url}: {problem}; is this a hub, or a proxy that answers in its place?")]
    Answer {
        /// What was asked for.
        url: String,
        /// What is wrong with the answer.
        problem: String,
    },
    /// The bytes are not those that the hub has.
    #[error("{file}: its checksum is {found} and the hub says {expected}; the bytes are kept in {}, which may be deleted; pull again to fetch it anew", kept.display())]
    Corrupt {
        /// The file.
        file: String,
        /// Where its bytes are now.
        kept: PathBuf,
        /// The hub's checksum.
        expected: String,
        /// That of the bytes.
        found: String,
    },
    /// Nothing in the repository is a model that can be read.
    #[error("`{model}` has no weights in safetensors, GGUF or .apr; it has {}", some_of(.files))]
    NoWeights {
        /// The model.
        model: String,
        /// The files that it has.
        files: Vec<String>,
    },
    /// Several models are in the repository.
    #[error("`{model}` holds several models: choose by `{model}:LABEL`, or --file; there are {}", labels(.candidates))]
    Choose {
        /// The model.
        model: String,
        /// What there is.
        candidates: Vec<Candidate>,
    },
    /// What was chosen is not there.
    #[error("`{model}` has no `{label}`; there are {}", labels(.candidates))]
    NoCandidate {
        /// The model.
        model: String,
        /// What was asked for.
        label: String,
        /// What there is.
        candidates: Vec<Candidate>,
    },
    /// A pattern matches nothing.
    #[error("no file of `{model}` matches `{pattern}`; it has {}", some_of(.files))]
    NoMatch {
        /// The model.
        model: String,
        /// The pattern.
        pattern: String,
        /// The files that there are.
        files: Vec<String>,
    },
    /// Of the parts of a model, some are not there.
    #[error("{place}: of {name}, part {part} of {parts} is missing")]
    MissingPart {
        /// Where it should be.
        place: String,
        /// One of the parts that are there.
        name: String,
        /// The first that is not, from 1.
        part: u32,
        /// How many there should be.
        parts: u32,
    },
    /// The cache does not have it, and the hub may not be asked.
    #[error("{}: `{model}` at revision `{revision}` is not in the cache; pull it once without --offline", cache.display())]
    NotCached {
        /// The cache.
        cache: PathBuf,
        /// The model.
        model: String,
        /// The revision.
        revision: String,
    },
    /// The disk is too small for what is to be fetched.
    #[error("{}: {needed} bytes are to be fetched and {available} are free; free some, or give another --cache-dir", path.display())]
    NoSpace {
        /// Where it was to go.
        path: PathBuf,
        /// What is needed.
        needed: u64,
        /// What there is.
        available: u64,
    },
    /// The disk became full.
    #[error("{}: the disk is full; free some space and pull again to go on from there", path.display())]
    DiskFull {
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("{}: cannot be written: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        |source| Self::Read { path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { path: path.to_owned() }
            }
            _ => Self::Write { path: path.to_owned(), source },
        }
    }

    /// Whether the same may succeed in a moment.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Interrupted { .. } | Self::Unreachable { .. } | Self::RateLimited { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }
}

/// What a server says, as a part of a sentence.
fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}

fn after(wait: &Option<Duration>) -> String {
    match wait {
        Some(wait) => format!("in {} s", wait.as_secs()),
        None => "in some minutes".to_owned(),
    }
}

fn labels(candidates: &[Candidate]) -> String {
    candidates.iter().map(|c| c.label.as_str()).collect::<Vec<_>>().join(", ")
}

/// The names of files, not all of them if they are many.
fn some_of(files: &[String]) -> String {
    const SHOWN: usize = 12;
    let mut text = files[..files.len().min(SHOWN)].join(", ");
    match files.len().saturating_sub(SHOWN) {
        0 if files.is_empty() => text.push_str("no files"),
        0 => {}
        more => {
            let _ = write!(text, " and {more} more");
        }
    }
    text
}
