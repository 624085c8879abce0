//! What can be wrong with stored numbers.

use crate::{DType, Shape};

/// An error about stored numbers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes of a tensor do not have the length that its type and shape ask for.
    #[error("a {dtype} tensor of shape {shape} does not fit in {found} bytes{}", match expected {
        Some(n) => format!(" (expected {n})"),
        None => format!(": a row of {} is no whole number of blocks of {}", shape.cols(), dtype.block_len()),
    })]
    Length {
        /// The declared type.
        dtype: DType,
        /// The declared shape.
        shape: Shape,
        /// The length that type and shape ask for; `None` if a row is no whole number of blocks.
        expected: Option<usize>,
        /// The length found.
        found: usize,
    },
    /// There is no dequantisation for this type.
    #[error("{0} weights cannot be read as numbers; supported: {supported}", supported = Error::dequantizable())]
    NotNumeric(DType),
    /// A row of `AprQ8` without the scale of its tensor.
    #[error("a row of APR_Q8 has no scale; read it with `Stored::dequantize_row`, which finds it")]
    NoScale,
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    fn dequantizable() -> String {
        let names: Vec<_> = DType::all().filter(|d| d.can_dequantize()).map(DType::name).collect();
        names.join(", ")
    }
}
