//! `x W^T`: rows of weights against rows of activations.
//!
//! The loops go over batches of token rows, then weight rows, then the token rows of the batch, so that a weight row is
//! read from memory once per batch, and a batch of activations stays in the cache. Decode is the same code with one row. No sum
//! crosses a batch, so no bit depends on it. Quantised weights come in [tiles](crate::tile) of rows.
//!
//! Experts are the same code with one [`Group`] of rows for each, so that weights are read once for all rows that chose them.

use std::ops::Range;

use crate::{
    Cpu, Tensor, Weight,
    activation::{Block8, GROUP, Q8, Q8K, pack, packed_len},
    generic::tile,
    kernels::IntegerKernel,
    memory::Buffer,
    pool::{Columns, Strip},
    tile::ROWS,
    weight::{Part, Product},
};

/// The most token rows in a batch: a number of whole groups for all kernels.
const BATCH_ROWS: usize = 120;

/// The most bytes of activations in a batch: half of a second-level cache of 1 MiB.
const BATCH_BYTES: usize = 512 << 10;

/// Rows of activations that meet the same rows of weights.
#[derive(Clone, Copy)]
struct Group<'a> {
    /// Where the rows of weights begin; there are as many as the output has columns.
    first: usize,
    /// Which rows of the activations these are.
    x: &'a [usize],
    /// Which rows of the output they make.
    out: &'a [usize],
}

impl Cpu {
    pub(crate) fn multiply(&self, x: &Tensor, w: &Weight) -> Tensor {
        let rows = self.indices(0..x.rows());
        let all = Group { first: 0, x: &rows, out: &rows };
        self.products(x, w, self.tensor([rows.len(), w.rows]), [all].into_iter())
    }

    /// See [`Backend::expert_linear`](apr_model::Backend::expert_linear).
    pub(crate) fn multiply_experts(
        &self,
        x: &Tensor,
        w: &Weight,
        experts: usize,
        ids: &Tensor,
    ) -> Tensor {
        let [n, k] = *ids.shape() else { panic!("ids are of rows and slots") };
        let width = w.rows / experts;
        // Row `i` of the output is slot `i % k` of token row `i / k`.
        let mut rows = self.indices(0..n * k);
        let expert = |row: usize| ids.values()[row] as usize;
        rows.sort_unstable_by_key(|&row| (expert(row), row));
        let slots = if x.shape().len() == 3 { 1 } else { k };
        let sources = self.indices(rows.iter().map(|row| row / slots));
        let same = |a: &usize, b: &usize| expert(*a) == expert(*b);
        let groups = rows.chunk_by(same).scan(0, |start, out| {
            let x = &sources[*start..][..out.len()];
            *start += out.len();
            Some(Group { first: expert(out[0]) * width, x, out })
        });
        self.products(x, w, self.tensor([n, k, width]), groups)
    }

    fn indices(&self, all: impl ExactSizeIterator<Item = usize>) -> Buffer<usize> {
        let mut indices = self.memory.buffer(all.len());
        indices.iter_mut().zip(all).for_each(|(index, i)| *index = i);
        indices
    }

    /// The products of each group, in the rows of `out`.
    fn products<'g>(
        &self,
        x: &Tensor,
        w: &Weight,
        mut out: Tensor,
        groups: impl Iterator<Item = Group<'g>> + Clone + Sync,
    ) -> Tensor {
        assert_eq!(x.shape().last(), Some(&w.cols), "activations are as wide as the matrix");
        let [.., width] = *out.shape() else { panic!("an output has rows") };
        for group in groups.clone() {
            for part in w.parts_of(group.first..group.first + width) {
                self.round_for(part, x);
            }
        }
        let n = out.values().len() / width.max(1);
        let columns = Columns { count: width, granule: ROWS, cost: n * w.cols * ROWS };
        self.pool.fill(out.values_mut(), columns, |mut strip| {
            for group in groups.clone() {
                let columns = strip.columns();
                let rows = group.first + columns.start..group.first + columns.end;
                for part in w.parts_of(rows.clone()) {
                    let rows = part.rows.start.max(rows.start)..part.rows.end.min(rows.end);
                    self.multiply_part(x, &group, part, rows, &mut strip);
                }
            }
        });
        out
    }

    /// Rounds `x` as `part` wants it, unless another weight already did.
    fn round_for(&self, part: &Part, x: &Tensor) {
        match part.product {
            Product::Integer(IntegerKernel::Blocks(_)) => {
                x.rounded.q8_0.get_or_init(|| self.round(x, self.kernels.quantize_q8_0));
            }
            Product::Integer(IntegerKernel::Superblocks(_)) => {
                x.rounded.q8_k.get_or_init(|| self.round(x, self.kernels.quantize_q8_k));
            }
            Product::Float(_) => {}
        }
    }

    fn round<A: Block8>(&self, x: &Tensor, kernel: fn(&[f32], &mut [A])) -> Buffer<A> {
        let mut out = self.memory.buffer(x.values().len() / A::LEN);
        let columns = Columns { count: out.len(), granule: 1, cost: A::LEN };
        self.pool.fill(&mut out, columns, |mut strip| {
            let blocks = strip.columns();
            kernel(&x.values()[blocks.start * A::LEN..blocks.end * A::LEN], strip.row(0));
        });
        out
    }

    /// Rows `rows` of `part` with the activations of `group`.
    fn multiply_part(
        &self,
        x: &Tensor,
        group: &Group<'_>,
        part: &Part,
        rows: Range<usize>,
        strip: &mut Strip<'_, f32>,
    ) {
        let cols = x.shape()[x.shape().len() - 1];
        match part.product {
            Product::Integer(IntegerKernel::Blocks(kernel)) => {
                let x = x.rounded.q8_0.get().expect("rounded before");
                let x = Rows { values: x, len: cols / Q8::LEN, together: tile::TOGETHER };
                tiles(x, group, part, rows, strip, |batch| {
                    move |tile, out| part.with_tile(tile, |tile| kernel(tile, batch.rows(), out))
                });
            }
            Product::Integer(IntegerKernel::Superblocks(kernel)) => {
                let x = x.rounded.q8_k.get().expect("rounded before");
                let x = Rows { values: x, len: cols / Q8K::LEN, together: tile::TOGETHER };
                tiles(x, group, part, rows, strip, |batch| {
                    move |tile, out| part.with_tile(tile, |tile| kernel(tile, batch.rows(), out))
                });
            }
            Product::Float(kernel) => {
                let x = Rows { values: x.values(), len: cols, together: GROUP };
                tiles(x, group, part, rows, strip, |batch| {
                    let rows = batch.rows();
                    let mut packed = self.memory.buffer(packed_len(rows.len(), cols));
                    pack(rows, &mut packed);
                    move |tile, out| {
                        part.with_floats(tile, self.kernels, |w| kernel(w, cols, &packed, out))
                    }
                });
            }
        }
    }
}

/// Rows of activations.
#[derive(Clone, Copy)]
struct Rows<'a, A> {
    values: &'a [A],
    /// What a row takes.
    len: usize,
    /// How many of them a kernel takes at a time.
    together: usize,
}

/// Rows of activations that meet a tile before the next tile comes.
struct Batch<'a, A> {
    rows: [&'a [A]; BATCH_ROWS],
    count: usize,
}

impl<'a, A> Rows<'a, A> {
    /// How many rows make a batch, if there are `count`: batches of about the same size.
    fn batch(&self, count: usize) -> usize {
        let most = (BATCH_BYTES / (self.len * size_of::<A>()).max(1)).min(BATCH_ROWS);
        let most = (most / self.together).max(1) * self.together;
        count.div_ceil(count.div_ceil(most).max(1)).max(1).next_multiple_of(self.together).min(most)
    }

    fn select(&self, indices: &[usize]) -> Batch<'a, A> {
        let mut rows: [&[A]; BATCH_ROWS] = [&[]; BATCH_ROWS];
        for (row, index) in rows.iter_mut().zip(indices) {
            *row = &self.values[index * self.len..][..self.len];
        }
        Batch { rows, count: indices.len() }
    }
}

impl<'a, A> Batch<'a, A> {
    fn rows(&self) -> &[&'a [A]] {
        &self.rows[..self.count]
    }
}

/// Multiplies the rows `rows` of the matrix, which are in `part`, with the activations of `group`: batch by batch, and in
/// each batch tile by tile.
///
/// What `multiplier` makes of a batch gets the number of a tile, and room for the products of each row of the batch with the tile's
/// rows. Of a tile at an edge some are not wanted.
fn tiles<'x, A, M: FnMut(usize, &mut [[f32; ROWS]])>(
    x: Rows<'x, A>,
    group: &Group<'_>,
    part: &Part,
    rows: Range<usize>,
    strip: &mut Strip<'_, f32>,
    multiplier: impl Fn(Batch<'x, A>) -> M,
) {
    let first = group.first + strip.columns().start;
    let batch = x.batch(group.x.len());
    let mut products = [[0.0; ROWS]; BATCH_ROWS];
    for (of, outs) in group.x.chunks(batch).zip(group.out.chunks(batch)) {
        let products = &mut products[..of.len()];
        let mut multiply = multiplier(x.select(of));
        let mut row = rows.start;
        while row < rows.end {
            let (tile, r) = ((row - part.rows.start) / ROWS, (row - part.rows.start) % ROWS);
            let count = (ROWS - r).min(rows.end - row);
            multiply(tile, products);
            for (&out, products) in outs.iter().zip(&*products) {
                let out = &mut strip.row(out)[row - first..][..count];
                match out.as_mut_array() {
                    Some(out) => *out = *products,
                    None => out.copy_from_slice(&products[r..r + count]),
                }
            }
            row += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_whole_groups_of_about_the_same_size_and_fit_into_the_cache() {
        for (len, together) in [(896, GROUP), (4864, GROUP), (1 << 20, GROUP), (896, 8), (0, 8)] {
            let rows = Rows::<f32> { values: &[], len, together };
            for count in 0..1000 {
                let batch = rows.batch(count);
                assert!(batch.is_multiple_of(together) && batch > 0);
                assert!(batch == together || batch * len * size_of::<f32>() <= BATCH_BYTES);
                assert!(batch <= BATCH_ROWS);
                // None is left with few rows while others are full.
                let batches = count.div_ceil(batch);
                assert!(batches * batch < count + batches * together + 1, "{count} by {batch}");
            }
        }
        let rows = Rows::<f32> { values: &[], len: 896, together: GROUP };
        assert_eq!(rows.batch(256), 90);
    }
}
