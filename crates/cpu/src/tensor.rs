//! Activations in memory.

use apr_model::{HostTensor, Values, View};

use crate::activation::Rounded;

/// A row-major f32 tensor, with its 8-bit forms once somebody has multiplied it with a quantised weight.
#[derive(Debug)]
pub struct Tensor {
    shape: Vec<usize>,
    values: Vec<f32>,
    pub(crate) rounded: Rounded,
}

impl Tensor {
    pub(crate) fn new(shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Self {
        let shape = shape.into();
        debug_assert_eq!(shape.iter().product::<usize>(), values.len());
        Self { shape, values, rounded: Rounded::default() }
    }

    pub(crate) fn from_host(value: HostTensor) -> Self {
        Self::new(value.shape, value.values.into_iter().map(|x| x as f32).collect())
    }

    /// The dimensions, row-major.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// All values.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Token rows: the first dimension.
    pub(crate) fn rows(&self) -> usize {
        self.shape[0]
    }

    /// Elements per token row.
    pub(crate) fn width(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// The values where they lie.
    pub(crate) fn view(&self) -> View<'_> {
        View { shape: &self.shape, values: Values::F32(&self.values) }
    }
}
