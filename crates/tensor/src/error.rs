//! What can be wrong with stored numbers.

use crate::{DType, Shape, quantize::can_quantize};

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
    /// There is no quantisation to this type, or none row by row.
    #[error("rows cannot be quantised to {0}; supported: {supported}", supported = Error::quantizable())]
    NotQuantizable(DType),
    /// A NaN or an infinity among the values to quantise.
    #[error("element {index} is {value}: a block of weights can only hold finite numbers")]
    NotFinite {
        /// Where in the row.
        index: usize,
        /// The value found.
        value: f32,
    },
    /// A value to quantise is so large that its scale is infinite in the type.
    #[error(
        "element {index} is {value:e}, which is too large for {dtype}; use a type of wider range, such as F32"
    )]
    TooLarge {
        /// The type asked for.
        dtype: DType,
        /// Where in the row.
        index: usize,
        /// The value found.
        value: f32,
    },
    /// There is not one importance for each column.
    #[error(
        "{found} importances were given for a row of {expected}; an importance matrix must be of the same model"
    )]
    ImportanceLength {
        /// The columns of the row.
        expected: usize,
        /// The importances found.
        found: usize,
    },
    /// An importance is no weight.
    #[error("the importance of column {index} is {value}; it must be finite and not negative")]
    Importance {
        /// The column.
        index: usize,
        /// The value found.
        value: f32,
    },
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    fn dequantizable() -> String {
        names(DType::can_dequantize)
    }

    fn quantizable() -> String {
        names(can_quantize)
    }
}

fn names(of: impl Fn(DType) -> bool) -> String {
    let names: Vec<_> = DType::all().filter(|&dtype| of(dtype)).map(DType::name).collect();
    names.join(", ")
}
