//! Model files: GGUF, safetensors (also as Hugging Face directories) and `.apr`, as one [`Checkpoint`].
//!
//! Start at [`Checkpoint::open`]. Files are mapped and validated as a whole on open: whatever a file says
//! about itself (offsets, sizes, counts, names) is checked before it is believed, memory is bounded by the size
//! of the file, and an error names the file, the place in it, what was expected and what was found.
//!
//! This crate knows containers and no models: names of tensors and keys stay as they are, no number is
//! computed from a weight, and nothing is guessed: a tensor of unknown type is listed as [`Unreadable`].
//! To write files, see the `Writer` of each container, and [`Draft`] for whole ones made in memory.

pub mod apr;
pub mod gguf;
pub mod safetensors;

mod budget;
mod checkpoint;
mod cursor;
mod draft;
mod error;
mod file;
mod huggingface;
mod integrity;
mod json;
mod metadata;
mod sniff;
mod tensors;
pub mod write;

pub use checkpoint::{Checkpoint, Container};
pub use draft::Draft;
pub use error::{Error, Place, Result};
pub use file::File;
pub use huggingface::Companions;
pub use integrity::{Checksum, Gap};
pub use metadata::{Array, Map, Metadata, Value};
pub use tensors::Unreadable;
