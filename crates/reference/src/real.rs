//! The two number types that the reference computes in.

use std::{fmt::Debug, iter::Sum, ops};

use apr_model::Values;
use apr_tensor::DType;

/// `f64`, or `f32` for seeing what single precision alone does to a result.
pub trait Real:
    Copy
    + Debug
    + PartialOrd
    + Sum
    + ops::Add<Output = Self>
    + ops::Sub<Output = Self>
    + ops::Mul<Output = Self>
    + ops::Div<Output = Self>
    + Send
    + Sync
    + 'static
{
    /// This type, as plans name it.
    const DTYPE: DType;

    /// The nearest value of this type.
    fn of(x: f64) -> Self;

    /// This value, widened.
    fn wide(self) -> f64;

    /// `e^x`, with the same bits on every machine.
    fn exp(self) -> Self;

    /// The square root.
    fn sqrt(self) -> Self;

    /// A slice, as observers see it.
    fn values(slice: &[Self]) -> Values<'_>;
}

impl Real for f64 {
    const DTYPE: DType = DType::F64;

    fn of(x: f64) -> Self {
        x
    }

    fn wide(self) -> f64 {
        self
    }

    fn exp(self) -> Self {
        libm::exp(self)
    }

    fn sqrt(self) -> Self {
        self.sqrt()
    }

    fn values(slice: &[Self]) -> Values<'_> {
        Values::F64(slice)
    }
}

impl Real for f32 {
    const DTYPE: DType = DType::F32;

    fn of(x: f64) -> Self {
        x as Self
    }

    fn wide(self) -> f64 {
        self.into()
    }

    fn exp(self) -> Self {
        libm::expf(self)
    }

    fn sqrt(self) -> Self {
        self.sqrt()
    }

    fn values(slice: &[Self]) -> Values<'_> {
        Values::F32(slice)
    }
}
