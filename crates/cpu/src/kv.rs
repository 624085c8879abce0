//! The cached keys and values of one layer.

use apr_model::{KvShape, LayerKv};
use half::{f16, slice::HalfFloatSliceExt};

use crate::{
    KvType, Tensor,
    generic::lanes::Element,
    kernels::{AttentionKernels, Kernels},
};

/// The keys and values of one layer. Each head's rows are contiguous: a query reads one stream of memory.
#[derive(Clone, Debug)]
pub struct Kv {
    pub(crate) shape: KvShape,
    capacity: usize,
    len: usize,
    cells: Cells,
}

#[derive(Clone, Debug)]
enum Cells {
    F16(KeysAndValues<f16>),
    F32(KeysAndValues<f32>),
}

/// `[heads, capacity, head_dim]` each.
#[derive(Clone, Debug)]
struct KeysAndValues<E> {
    keys: Vec<E>,
    values: Vec<E>,
}

/// One head's keys and values, with the kernels for their type.
pub(crate) enum Head<'a> {
    F16(HeadOf<'a, f16>),
    F32(HeadOf<'a, f32>),
}

pub(crate) struct HeadOf<'a, E> {
    keys: &'a [E],
    values: &'a [E],
    kernels: AttentionKernels<E>,
}

impl Kv {
    pub(crate) fn new(shape: KvShape, capacity: usize, kind: KvType) -> Self {
        let cells = match kind {
            KvType::F16 => Cells::F16(KeysAndValues::new(shape, capacity)),
            KvType::F32 => Cells::F32(KeysAndValues::new(shape, capacity)),
        };
        Self { shape, capacity, len: 0, cells }
    }

    /// Cached positions.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Appends rows `[n, heads, head_dim]`.
    pub(crate) fn append(&mut self, k: &Tensor, v: &Tensor) {
        let n = k.rows();
        assert!(self.len + n <= self.capacity, "the model checks the capacity before a step");
        for head in 0..self.shape.heads {
            for row in 0..n {
                let from = (row * self.shape.heads + head) * self.shape.head_dim;
                let from = from..from + self.shape.head_dim;
                let to = (head * self.capacity + self.len + row) * self.shape.head_dim;
                let to = to..to + self.shape.head_dim;
                let (k, v) = (&k.values()[from.clone()], &v.values()[from]);
                match &mut self.cells {
                    Cells::F16(cells) => {
                        cells.keys[to.clone()].convert_from_f32_slice(k);
                        cells.values[to].convert_from_f32_slice(v);
                    }
                    Cells::F32(cells) => {
                        cells.keys[to.clone()].copy_from_slice(k);
                        cells.values[to].copy_from_slice(v);
                    }
                }
            }
        }
        self.len += n;
    }

    /// The keys and values of one head.
    pub(crate) fn head(&self, head: usize, kernels: &Kernels) -> Head<'_> {
        let start = head * self.capacity * self.shape.head_dim;
        let range = start..start + self.len * self.shape.head_dim;
        match &self.cells {
            Cells::F16(cells) => Head::F16(cells.head(range, kernels.attention_f16)),
            Cells::F32(cells) => Head::F32(cells.head(range, kernels.attention_f32)),
        }
    }
}

impl LayerKv for Kv {
    fn truncate(&mut self, len: usize) {
        assert!(len <= self.len, "a cache forgets, it does not grow");
        self.len = len;
    }
}

impl<E: Element> KeysAndValues<E> {
    fn new(shape: KvShape, capacity: usize) -> Self {
        let zeros = || E::zeros(shape.heads * capacity * shape.head_dim);
        Self { keys: zeros(), values: zeros() }
    }

    fn head(&self, range: std::ops::Range<usize>, kernels: AttentionKernels<E>) -> HeadOf<'_, E> {
        HeadOf { keys: &self.keys[range.clone()], values: &self.values[range], kernels }
    }
}

impl Head<'_> {
    /// The scaled scores of `query` and the first `out.len()` keys.
    pub(crate) fn scores(&self, query: &[f32], scale: f32, out: &mut [f32]) {
        match self {
            Self::F16(head) => (head.kernels.scores)(query, head.keys, scale, out),
            Self::F32(head) => (head.kernels.scores)(query, head.keys, scale, out),
        }
    }

    /// The sum of the first `weights.len()` values, weighted.
    pub(crate) fn weighted_sum(&self, weights: &[f32], out: &mut [f32]) {
        match self {
            Self::F16(head) => (head.kernels.weighted_sum)(weights, head.values, out),
            Self::F32(head) => (head.kernels.weighted_sum)(weights, head.values, out),
        }
    }
}
