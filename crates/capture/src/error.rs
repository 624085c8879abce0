//! What can go wrong when captures are written and read.

use std::{
    io,
    path::{Path, PathBuf},
};

use apr_model::Site;

use crate::Rows;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file or directory cannot be written.
    #[error("{}: cannot be written: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The output exists and would be overwritten.
    #[error("{}: {problem}", path.display())]
    Output {
        /// The output.
        path: PathBuf,
        /// What is in the way, and what to do.
        problem: &'static str,
    },
    /// The disk is too small for the capture.
    #[error("{}: the capture needs {needed} bytes and {available} are available; choose fewer stages, layers or rows", path.display())]
    NoSpace {
        /// Where the capture was to go.
        path: PathBuf,
        /// What it needs.
        needed: u64,
        /// What there is.
        available: u64,
    },
    /// A stage was asked for that the model does not have.
    #[error("the model has no {site}; it has {layers} layers (from 0) with the stages {stages}")]
    NoSuchSite {
        /// What was asked for.
        site: Site,
        /// The model's layers.
        layers: usize,
        /// The model's stages.
        stages: String,
    },
    /// Nothing was asked for.
    #[error("no stage to record: a capture of nothing would look like a success")]
    NothingToRecord,
    /// No step was recorded.
    #[error("{}: not a single step was recorded, so there is no capture", path.display())]
    NoSteps {
        /// The capture.
        path: PathBuf,
    },
    /// Of some values, no row that was asked for occurred.
    #[error("no step had rows `{rows}` of {missing}; the other values are in {} (--allow-partial reads them)", path.display())]
    NoRows {
        /// The unfinished capture.
        path: PathBuf,
        /// The rows asked for.
        rows: Rows,
        /// The sites, separated by commas.
        missing: String,
    },
    /// The step ended and values that were asked for never came.
    #[error("step {step}: the model did not show {missing}")]
    NotShown {
        /// The step.
        step: usize,
        /// The sites, separated by commas.
        missing: String,
    },
    /// The engine showed a value where it should not.
    #[error("step {step}: {site} {problem}")]
    Unexpected {
        /// The step.
        step: usize,
        /// The value.
        site: Site,
        /// What is wrong.
        problem: String,
    },
    /// A directory is no capture, in none of the forms that are understood.
    #[error("{}: not a capture: {problem}", path.display())]
    NotACapture {
        /// What was opened.
        path: PathBuf,
        /// Why it is none, and what would be.
        problem: &'static str,
    },
    /// The manifest is of another schema.
    #[error("{}: schema `{found}` is not understood; this version reads `{}`", path.display(), crate::manifest::SCHEMA)]
    Schema {
        /// The manifest.
        path: PathBuf,
        /// The schema it names.
        found: String,
    },
    /// The manifest is no JSON of the right form.
    #[error("{}: not a readable manifest: {source}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// The capture was interrupted.
    #[error("{}: the capture is incomplete: its writer was interrupted; record it again, or read what is whole with --allow-partial", path.display())]
    Incomplete {
        /// The capture.
        path: PathBuf,
    },
    /// A file contradicts its own format, or the manifest.
    #[error("{}: {what}: expected {expected}, found {found}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The part of the file, or the tensor, that is wrong.
        what: String,
        /// What should be there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A tensor's bytes are not those that were written.
    #[error("{}: the bytes of `{name}` were changed after they were written (blake3 differs)", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// The capture does not hold what was asked for.
    #[error("{}: step {step} holds no {site}", path.display())]
    NotCaptured {
        /// The capture.
        path: PathBuf,
        /// The step.
        step: usize,
        /// What was asked for.
        site: Site,
    },
    /// The file has no shapes, and nothing else tells them.
    #[error("{}: APRT files hold no shapes; give the model's dimensions (--model) to read this tree", path.display())]
    NeedsDims {
        /// The tree.
        path: PathBuf,
    },
    /// A map of names cannot be used.
    #[error("{}: {problem}", path.display())]
    NameMap {
        /// The map.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Read { path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Write { path: path.to_owned(), source }
    }

    pub(crate) fn malformed(
        path: &Path,
        what: impl Into<String>,
        expected: impl ToString,
        found: impl ToString,
    ) -> Self {
        Self::Malformed {
            path: path.to_owned(),
            what: what.into(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }
}
