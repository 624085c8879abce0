//! Activations in memory.

use std::ops::{Deref, DerefMut};

use apr_model::{HostTensor, Values, View};

use crate::{Cpu, activation::Rounded, memory::Buffer};

/// A row-major f32 tensor, with its 8-bit forms once somebody has multiplied it with a quantised weight.
#[derive(Debug)]
pub struct Tensor {
    shape: Shape,
    values: Buffer<f32>,
    pub(crate) rounded: Rounded,
}

impl Tensor {
    /// A tensor of values that lie in memory from elsewhere: of an observer's. Ops have [`Cpu::tensor`].
    pub(crate) fn new(shape: impl Into<Shape>, values: Vec<f32>) -> Self {
        Self::of(shape.into(), values.into())
    }

    fn of(shape: Shape, values: Buffer<f32>) -> Self {
        debug_assert_eq!(shape.iter().product::<usize>(), values.len());
        Self { shape, values, rounded: Rounded::default() }
    }

    pub(crate) fn from_host(value: HostTensor) -> Self {
        let values: Vec<f32> = value.values.into_iter().map(|x| x as f32).collect();
        Self::new(&*value.shape, values)
    }

    /// The dimensions, row-major.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// All values.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Part number `index` of `len` values each: a row, or a head, or a slot.
    pub(crate) fn part(&self, index: usize, len: usize) -> &[f32] {
        &self.values[index * len..][..len]
    }

    /// The values, to be written. They have no 8-bit forms any more.
    pub(crate) fn values_mut(&mut self) -> &mut [f32] {
        self.rounded = Rounded::default();
        &mut self.values
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

impl Cpu {
    /// A tensor for the result of an op. It holds anything: the op writes every element.
    pub(crate) fn tensor(&self, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        Tensor::of(shape, self.memory.buffer(shape.iter().product()))
    }

    /// A tensor of zeros, for ops that add to them or leave some.
    pub(crate) fn zeros(&self, shape: impl Into<Shape>) -> Tensor {
        let mut tensor = self.tensor(shape);
        tensor.values_mut().fill(0.0);
        tensor
    }
}

/// Dimensions, row-major, of which there are at most [`Shape::MOST`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    dims: [usize; Self::MOST],
    rank: usize,
}

impl Shape {
    const MOST: usize = 4;
}

impl Deref for Shape {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.dims[..self.rank]
    }
}

impl DerefMut for Shape {
    fn deref_mut(&mut self) -> &mut [usize] {
        &mut self.dims[..self.rank]
    }
}

impl From<&[usize]> for Shape {
    fn from(shape: &[usize]) -> Self {
        assert!(shape.len() <= Self::MOST, "no op makes a tensor of the shape {shape:?}");
        let mut dims = [1; Self::MOST];
        dims[..shape.len()].copy_from_slice(shape);
        Self { dims, rank: shape.len() }
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(shape: [usize; N]) -> Self {
        shape[..].into()
    }
}
