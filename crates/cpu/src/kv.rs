//! The cached keys and values of one layer.
//!
//! A head's keys are kept in blocks of [`LANES`] positions, channel by channel, so that the scores of a block are the lanes of a
//! vector; its values are kept position by position, in whole vectors of channels.

use apr_model::{KvShape, LayerKv};
use half::f16;

use crate::{
    KvType, Tensor,
    generic::{LANES, lanes::Element},
    kernels::{AttentionKernels, Kernels},
};

/// The keys and values of one layer. Those of a head are contiguous: a tile of queries reads two streams of memory.
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

#[derive(Clone, Debug)]
struct KeysAndValues<E> {
    /// `[heads, blocks, head_dim, LANES]`
    keys: Vec<E>,
    /// `[heads, blocks * LANES, width]`
    values: Vec<E>,
    blocks: usize,
    head_dim: usize,
    /// `head_dim`, filled up to whole vectors with zeros.
    width: usize,
}

/// One head's keys and values, with the kernels for their type.
pub(crate) enum Head<'a> {
    F16(HeadOf<'a, f16>),
    F32(HeadOf<'a, f32>),
}

pub(crate) struct HeadOf<'a, E> {
    keys: &'a [E],
    values: &'a [E],
    cells: &'a KeysAndValues<E>,
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

    /// Channels of a value as it is kept.
    pub(crate) fn width(&self) -> usize {
        width(self.shape)
    }

    /// Appends rows `[n, heads, head_dim]`.
    pub(crate) fn append(&mut self, k: &Tensor, v: &Tensor) {
        let n = k.rows();
        assert!(self.len + n <= self.capacity, "the model checks the capacity before a step");
        let KvShape { heads, head_dim } = self.shape;
        let rows = k.values().chunks_exact(head_dim).zip(v.values().chunks_exact(head_dim));
        for (i, (k, v)) in rows.enumerate() {
            let (position, head) = (self.len + i / heads, i % heads);
            match &mut self.cells {
                Cells::F16(cells) => cells.put(head, position, k, v),
                Cells::F32(cells) => cells.put(head, position, k, v),
            }
        }
        self.len += n;
    }

    /// The keys and values of one head.
    pub(crate) fn head(&self, head: usize, kernels: &Kernels) -> Head<'_> {
        match &self.cells {
            Cells::F16(cells) => Head::F16(cells.head(head, kernels.attention_f16)),
            Cells::F32(cells) => Head::F32(cells.head(head, kernels.attention_f32)),
        }
    }
}

impl LayerKv for Kv {
    fn truncate(&mut self, len: usize) {
        assert!(len <= self.len, "a cache forgets, it does not grow");
        self.len = len;
    }

    fn bytes(&self) -> usize {
        match &self.cells {
            Cells::F16(cells) => cells.bytes(),
            Cells::F32(cells) => cells.bytes(),
        }
    }
}

fn width(shape: KvShape) -> usize {
    shape.head_dim.next_multiple_of(LANES)
}

impl<E: Element> KeysAndValues<E> {
    fn new(shape: KvShape, capacity: usize) -> Self {
        let KvShape { heads, head_dim } = shape;
        let (blocks, width) = (capacity.div_ceil(LANES), width(shape));
        Self {
            keys: E::zeros(heads * blocks * LANES * head_dim),
            values: E::zeros(heads * blocks * LANES * width),
            blocks,
            head_dim,
            width,
        }
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.keys) + size_of_val(&*self.values)
    }

    fn put(&mut self, head: usize, position: usize, k: &[f32], v: &[f32]) {
        let start = (head * self.blocks * LANES + position) * self.width;
        E::narrow(v, &mut self.values[start..][..v.len()]);

        let block = head * self.blocks + position / LANES;
        let block = &mut self.keys.as_chunks_mut::<LANES>().0[block * self.head_dim..];
        for (k, channels) in k.chunks(LANES).zip(block.chunks_mut(LANES)) {
            let mut narrow = [E::default(); LANES];
            E::narrow(k, &mut narrow[..k.len()]);
            for (channel, &k) in channels.iter_mut().zip(&narrow[..k.len()]) {
                channel[position % LANES] = k;
            }
        }
    }

    fn head(&self, head: usize, kernels: AttentionKernels<E>) -> HeadOf<'_, E> {
        let positions = self.blocks * LANES;
        HeadOf {
            keys: &self.keys[head * positions * self.head_dim..][..positions * self.head_dim],
            values: &self.values[head * positions * self.width..][..positions * self.width],
            cells: self,
            kernels,
        }
    }
}

impl Head<'_> {
    /// The scaled scores of `rows` queries, `[head_dim, rows]`, and as many positions as fit in `out`, `[rows, positions]`: whole blocks.
    pub(crate) fn scores(&self, queries: &[f32], rows: usize, scale: f32, out: &mut [f32]) {
        match self {
            Self::F16(head) => head.scores(queries, rows, scale, out),
            Self::F32(head) => head.scores(queries, rows, scale, out),
        }
    }

    /// The weighted sums of values, `[rows, width]`, of which row `r` sees the first `seen[r]`. Weights are `[rows, positions]`.
    pub(crate) fn weighted_sums(&self, weights: &[f32], seen: &[usize], out: &mut [f32]) {
        match self {
            Self::F16(head) => head.weighted_sums(weights, seen, out),
            Self::F32(head) => head.weighted_sums(weights, seen, out),
        }
    }
}

impl<E: Element> HeadOf<'_, E> {
    fn scores(&self, queries: &[f32], rows: usize, scale: f32, out: &mut [f32]) {
        let keys = &self.keys[..out.len() / rows * self.cells.head_dim];
        (self.kernels.scores)(queries, rows, keys, scale, out);
    }

    fn weighted_sums(&self, weights: &[f32], seen: &[usize], out: &mut [f32]) {
        let longest = seen.iter().copied().max().unwrap_or_default();
        let values = &self.values[..longest * self.cells.width];
        (self.kernels.weighted_sums)(weights, seen, values, out);
    }
}
