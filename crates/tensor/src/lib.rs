//! The vocabulary of numbers: data types, ggml block layouts, exact dequantisation, quantisation,
//! statistics.
//!
//! Start at [`DType`] (what a file can hold) and [`Stored`] (a tensor as its file holds it). This
//! crate defines what a stored byte *means*, in scalar code that is meant to be read; it does no
//! I/O beyond keeping a memory map alive, and has no fast paths: those belong to the backends,
//! which are tested against it.

pub mod activation;
pub mod block;
mod bytes;
mod dtype;
mod error;
pub mod quantize;
mod shape;
mod stored;
mod summary;

pub use block::dequantize;
pub use bytes::Bytes;
pub use dtype::DType;
pub use error::{Error, Result};
pub use quantize::quantize_row;
pub use shape::Shape;
pub use stored::Stored;
pub use summary::Summary;
