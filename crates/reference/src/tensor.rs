//! A dense tensor, and nothing else.

use apr_model::HostTensor;

use crate::Real;

/// Row-major numbers with their dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor<F> {
    /// The dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Vec<F>,
}

impl<F: Real> Tensor<F> {
    /// A tensor of zeros.
    pub fn zeros(shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        let data = vec![F::of(0.0); shape.iter().product()];
        Self { shape, data }
    }

    /// The length of the last axis.
    pub fn cols(&self) -> usize {
        self.shape[self.shape.len() - 1]
    }

    /// Slices along the last axis, one after the other.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[F]> {
        self.data.chunks_exact(self.cols())
    }

    /// The same elements in a tensor of the same shape, each through `f` with its partner in `other`.
    pub fn zip(&self, other: &Self, f: impl Fn(F, F) -> F) -> Self {
        assert_eq!(self.shape, other.shape, "elementwise ops take equal shapes");
        let data = self.data.iter().zip(&other.data).map(|(&a, &b)| f(a, b)).collect();
        Self { shape: self.shape.clone(), data }
    }
}

impl<F: Real> From<HostTensor> for Tensor<F> {
    fn from(host: HostTensor) -> Self {
        Self { shape: host.shape, data: host.values.into_iter().map(F::of).collect() }
    }
}
