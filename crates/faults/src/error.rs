//! What can go wrong while planting a fault.

use std::{io, path::PathBuf};

/// An error of the bench.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model of the bench could not be made.
    #[error(transparent)]
    Format(#[from] apr_format::Error),
    /// A tensor of a model of the bench could not be made or read.
    #[error(transparent)]
    Tensor(#[from] apr_tensor::Error),
    /// A run failed.
    #[error(transparent)]
    Model(#[from] apr_model::Error),
    /// The CPU backend could not be started.
    #[error(transparent)]
    Cpu(#[from] apr_cpu::Error),
    /// A capture could not be written or read.
    #[error(transparent)]
    Capture(#[from] apr_capture::Error),
    /// A capture could not be changed.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: io::Error,
    },
    /// The model has no such tensor, so the fault cannot be planted in it.
    #[error("`{fault}` cannot be planted: the model has no tensor `{tensor}`")]
    NoTensor {
        /// The fault.
        fault: &'static str,
        /// The tensor.
        tensor: String,
    },
    /// The model has no such site, so the fault cannot be planted there.
    #[error("`{fault}` cannot be planted at {site}: the run has no such site")]
    NoSite {
        /// The fault.
        fault: &'static str,
        /// The site.
        site: String,
    },
    /// A case of the trained model, without the model.
    #[error("cases of the trained model need its file; give it to the bench")]
    NoTrainedModel,
    /// A name that no fault has.
    #[error(
        "no kind or family of faults is called `{name}`; the families are {}, runs without a fault are `{}`, and \
         `faultbench --list` lists the kinds",
        families.join(", "),
        crate::CONTROL
    )]
    UnknownFault {
        /// The name.
        name: String,
        /// The families that there are.
        families: Vec<String>,
    },
    /// A name that no model of the bench has.
    #[error(
        "no model of the bench is called `{name}`; the models are {}, and a name without its format stands for all \
         formats",
        models.join(", ")
    )]
    UnknownModel {
        /// The name.
        name: String,
        /// The models that there are.
        models: Vec<String>,
    },
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
