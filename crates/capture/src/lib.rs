//! Captures: what a forward pass computed, on disk, self-describing.
//!
//! [`Recorder`] is the observer that writes one, [`Capture`] reads it back, stage by stage and row by row, so that a
//! capture may be larger than memory. [`Capture`] also reads what other programs write: APRT trees, `.npy`
//! files, `.npz` and foreign safetensors. [`Telemetry`] is the observer that keeps statistics instead of values.
//! `docs/capture.md` is the format. This crate compares nothing and prints nothing.

pub mod manifest;

mod aprt;
mod capture;
mod dims;
mod error;
mod import;
mod names;
mod npy;
mod npz;
mod output;
mod recorder;
mod rows;
mod safetensors;
mod source;
mod space;
mod step_file;
mod telemetry;
mod tensor;

pub use aprt::Aprt;
pub use capture::{Capture, CaptureStep, OpenOptions, RowRef, TensorInfo};
pub use dims::Dims;
pub use error::{Error, Result};
pub use manifest::{Layout, Manifest, Provenance};
pub use names::{FOREIGN_NAMES, ForeignNames, NameMap};
pub use recorder::{Precision, Recorder, RecorderOptions};
pub use rows::{Rows, UnknownRows};
pub use space::{StepSize, check_space, estimate};
pub use telemetry::{SiteStatistics, StepStatistics, Telemetry};
pub use tensor::CaptureTensor;
