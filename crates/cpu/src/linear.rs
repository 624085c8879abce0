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
    activation::{Block8, Forms, GROUP, MATRIX, Rounded, Rows, TOGETHER, pack, packed_len},
    kernels::{IntegerKernel, TileKernel},
    memory::Buffer,
    pool::{Columns, Strip},
    tile::ROWS,
    weight::{Part, Product},
};

/// How much meets a tile before the next one comes.
#[derive(Clone, Copy, Debug)]
struct Batch {
    /// The most token rows: a number of whole groups for all kernels.
    rows: usize,
    /// The most bytes of activations.
    bytes: usize,
}

/// Half of a second-level cache of 1 MiB.
const BATCH: Batch = Batch { rows: 120, bytes: 512 << 10 };

/// The same for matrices, which weights are unpacked for at greater length. That counts more than that activations are near: they may fill all of a second-level
/// cache of 2 MiB, since kernels ask for them ahead of time.
const MATRIX_BATCH: Batch = Batch { rows: 512, bytes: 2 << 20 };

/// Rows of activations that meet the same rows of weights.
#[derive(Clone, Copy)]
struct Group<'a> {
    /// Where the rows of weights begin; there are as many as the output has columns.
    first: usize,
    /// Which rows of the activations these are.
    x: &'a [usize],
    /// Which rows of the output they make.
    out: &'a [usize],
    /// How many of those a kernel takes at a time: [`MATRIX`], [`TOGETHER`] or, if it is one row, 1.
    together: usize,
    /// Where those rows of the activations begin among the packed ones of which so many go together.
    packed: usize,
}

impl Group<'_> {
    /// How many packed rows it has.
    fn packed_len(&self) -> usize {
        self.x.len().next_multiple_of(self.together)
    }
}

impl Cpu {
    pub(crate) fn multiply(&self, x: &Tensor, w: &Weight) -> Tensor {
        let rows = self.indices(0..x.rows());
        let together = self.together(rows.len());
        let all = Group { first: 0, x: &rows, out: &rows, together, packed: 0 };
        if rows.len() == 1 {
            w.parts.iter().for_each(|part| self.round_for(part, x));
        }
        let out = self.tensor([rows.len(), w.rows]);
        self.products(x, &x.rounded, w, out, [all].into_iter())
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
        let groups = rows.chunk_by(same).scan((0, [0; MATRIX + 1]), |(start, packed), out| {
            let x = &sources[*start..][..out.len()];
            let (first, together) = (expert(out[0]) * width, self.together(out.len()));
            let group = Group { first, x, out, together, packed: packed[together] };
            *start += out.len();
            packed[together] += group.packed_len();
            Some(group)
        });
        w.parts.iter().for_each(|part| self.round_for(part, x));
        self.products(x, &Rounded::default(), w, self.tensor([n, k, width]), groups)
    }

    /// How many of so many rows a kernel takes at a time.
    fn together(&self, rows: usize) -> usize {
        match rows {
            0 | 1 => 1,
            // Half a matrix takes as long as a whole one.
            _ if rows <= TOGETHER || !self.kernels.multiply_matrices() => TOGETHER,
            _ => MATRIX,
        }
    }

    fn indices(&self, all: impl ExactSizeIterator<Item = usize>) -> Buffer<usize> {
        let mut indices = self.memory.buffer(all.len());
        indices.iter_mut().zip(all).for_each(|(index, i)| *index = i);
        indices
    }

    /// The products of each group, in the rows of `out`. Activations that are packed go to `packed`.
    fn products<'g>(
        &self,
        x: &Tensor,
        packed: &Rounded,
        w: &Weight,
        mut out: Tensor,
        groups: impl Iterator<Item = Group<'g>> + Clone + Sync,
    ) -> Tensor {
        assert_eq!(x.shape().last(), Some(&w.cols), "activations are as wide as the matrix");
        let [.., width] = *out.shape() else { panic!("an output has rows") };
        for group in groups.clone() {
            for part in w.parts_of(group.first..group.first + width) {
                self.pack_for(part, x, packed, group.together, groups.clone());
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
                    self.multiply_part(x, packed, &group, part, rows, &mut strip);
                }
            }
        });
        out
    }

    /// Rounds the rows of `x` as `part` wants a single one, unless another weight already did.
    fn round_for(&self, part: &Part, x: &Tensor) {
        let Rounded { q8_0, q8_k } = &x.rounded;
        match part.product {
            Product::Integer(IntegerKernel::Blocks(_)) => {
                q8_0.rows.get_or_init(|| self.round(x, self.kernels.quantize_q8_0));
            }
            Product::Integer(IntegerKernel::Superblocks(_)) => {
                q8_k.rows.get_or_init(|| self.round(x, self.kernels.quantize_q8_k));
            }
            Product::Float(_) => {}
        }
    }

    /// Packs the rows of the groups of which `together` are taken at a time as `part` wants them, unless another one already did.
    fn pack_for<'g>(
        &self,
        part: &Part,
        x: &Tensor,
        packed: &Rounded,
        together: usize,
        groups: impl Iterator<Item = Group<'g>>,
    ) {
        match part.product {
            Product::Integer(IntegerKernel::Blocks(_)) => {
                let forms = (&x.rounded.q8_0, &packed.q8_0);
                self.pack_rounded(x, forms, self.kernels.quantize_q8_0, together, groups);
            }
            Product::Integer(IntegerKernel::Superblocks(_)) => {
                let forms = (&x.rounded.q8_k, &packed.q8_k);
                self.pack_rounded(x, forms, self.kernels.quantize_q8_k, together, groups);
            }
            Product::Float(_) => {}
        }
    }

    /// Packs into the second of `forms`, where the first may have the rows.
    fn pack_rounded<'g, A: Block8>(
        &self,
        x: &Tensor,
        (rounded, packed): (&Forms<A>, &Forms<A>),
        kernel: fn(&[f32], &mut [A]),
        together: usize,
        groups: impl Iterator<Item = Group<'g>>,
    ) {
        match together {
            MATRIX => {
                packed.matrices.get_or_init(|| self.pack(x, rounded, kernel, groups));
            }
            TOGETHER => {
                packed.packed.get_or_init(|| self.pack(x, rounded, kernel, groups));
            }
            _ => {}
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

    /// The rows of all groups that an `R` is made for: as `rounded` if they are there, or rounded on the way.
    fn pack<'g, A: Block8, R: Rows<A>>(
        &self,
        x: &Tensor,
        rounded: &Forms<A>,
        kernel: fn(&[f32], &mut [A]),
        groups: impl Iterator<Item = Group<'g>>,
    ) -> Buffer<R> {
        let mut sources = Vec::new();
        for group in groups.filter(|group| group.together == R::COUNT) {
            sources.extend(group.x);
            sources.resize(group.packed + group.packed_len(), group.x[group.x.len() - 1]);
        }
        let blocks = x.shape()[x.shape().len() - 1] / A::LEN;
        let mut out = self.memory.buffer::<R>(sources.len() / R::COUNT * blocks);
        let columns = Columns { count: out.len(), granule: 1, cost: R::COUNT * A::LEN };
        self.pool.fill(&mut out, columns, |mut strip| {
            for (i, packed) in strip.columns().zip(strip.row(0)) {
                for (n, row) in sources[i / blocks * R::COUNT..][..R::COUNT].iter().enumerate() {
                    let b = row * blocks + i % blocks;
                    match rounded.rows.get() {
                        Some(rows) => packed.put(n, &rows[b]),
                        None => {
                            let mut block = [A::UNWRITTEN];
                            kernel(&x.values()[b * A::LEN..][..A::LEN], &mut block);
                            packed.put(n, &block[0]);
                        }
                    }
                }
            }
        });
        out
    }

    /// Rows `rows` of `part` with the activations of `group`.
    fn multiply_part(
        &self,
        x: &Tensor,
        packed: &Rounded,
        group: &Group<'_>,
        part: &Part,
        rows: Range<usize>,
        strip: &mut Strip<'_, f32>,
    ) {
        let cols = x.shape()[x.shape().len() - 1];
        match part.product {
            Product::Integer(IntegerKernel::Blocks(kernel)) => {
                let forms = (&x.rounded.q8_0, &packed.q8_0);
                integer_products(kernel, forms, cols, group, part, rows, strip);
            }
            Product::Integer(IntegerKernel::Superblocks(kernel)) => {
                let forms = (&x.rounded.q8_k, &packed.q8_k);
                integer_products(kernel, forms, cols, group, part, rows, strip);
            }
            Product::Float(kernel) => {
                let batch = batch_len(BATCH, group.x.len(), cols * size_of::<f32>(), GROUP);
                let products = &mut [[0.0; ROWS]; BATCH.rows];
                tiles(batch, products, group, part, rows, strip, |batch| {
                    let mut rows: [&[f32]; BATCH.rows] = [&[]; BATCH.rows];
                    let rows = &mut rows[..batch.len()];
                    for (row, index) in rows.iter_mut().zip(&group.x[batch]) {
                        *row = &x.values()[index * cols..][..cols];
                    }
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

/// Rows `rows` of `part` with the activations of `group`, which are in the first of `forms` if it is one row, in the second if there are several.
fn integer_products<A: Block8>(
    kernel: TileKernel<A>,
    forms: (&Forms<A>, &Forms<A>),
    cols: usize,
    group: &Group<'_>,
    part: &Part,
    rows: Range<usize>,
    strip: &mut Strip<'_, f32>,
) {
    let blocks = cols / A::LEN;
    let (count, row_bytes) = (group.x.len(), blocks * size_of::<A>());
    if let [row] = *group.x {
        let x = &forms.0.rows.get().expect("rounded before")[row * blocks..][..blocks];
        tiles(1, &mut [[0.0; ROWS]], group, part, rows, strip, |_| {
            move |tile, out| part.with_tile(tile, |tile| (kernel.one)(tile, x, &mut out[0]))
        });
    } else if let (MATRIX, Some(many)) = (group.together, kernel.many) {
        let x = forms.1.matrices.get().expect("packed before");
        let batch = batch_len(MATRIX_BATCH, count, row_bytes, MATRIX);
        let products = &mut [[0.0; ROWS]; MATRIX_BATCH.rows];
        tiles(batch, products, group, part, rows, strip, |batch| {
            let x = packed_batch::<A, _>(x, group, blocks, batch);
            move |tile, out| part.with_tile(tile, |tile| many(tile, x, out))
        });
    } else {
        let x = forms.1.packed.get().expect("packed before");
        let batch = batch_len(BATCH, count, row_bytes, TOGETHER);
        let products = &mut [[0.0; ROWS]; BATCH.rows];
        tiles(batch, products, group, part, rows, strip, |batch| {
            let x = packed_batch::<A, _>(x, group, blocks, batch);
            move |tile, out| part.with_tile(tile, |tile| (kernel.several)(tile, x, out))
        });
    }
}

/// The rows `batch` of `group`, of `blocks` blocks each, among those that are packed.
fn packed_batch<'x, A, R: Rows<A>>(
    packed: &'x [R],
    group: &Group<'_>,
    blocks: usize,
    batch: Range<usize>,
) -> &'x [R] {
    let first = group.packed / R::COUNT;
    let packed_rows = first + batch.start / R::COUNT..first + batch.end.div_ceil(R::COUNT);
    &packed[packed_rows.start * blocks..packed_rows.end * blocks]
}

/// How many rows of activations meet a tile before the next tile comes, if there are `count` of so many bytes and a kernel takes so many at a time:
/// batches of about the same size.
fn batch_len(most: Batch, count: usize, row_bytes: usize, together: usize) -> usize {
    let most = (most.bytes / row_bytes.max(1)).min(most.rows);
    let most = (most / together).max(1) * together;
    count.div_ceil(count.div_ceil(most).max(1)).max(1).next_multiple_of(together).min(most)
}

/// Multiplies the rows `rows` of the matrix, which are in `part`, with the activations of `group`: `batch` of them at a time, and each batch
/// tile by tile.
///
/// What `multiplier` makes of a batch, which is a range of the group's rows, gets the number of a tile, and room in `products` for those of each row of the
/// batch with the tile's rows. Of a tile at an edge some are not wanted.
fn tiles<M: FnMut(usize, &mut [[f32; ROWS]])>(
    batch: usize,
    products: &mut [[f32; ROWS]],
    group: &Group<'_>,
    part: &Part,
    rows: Range<usize>,
    strip: &mut Strip<'_, f32>,
    multiplier: impl Fn(Range<usize>) -> M,
) {
    let first = group.first + strip.columns().start;
    for (i, outs) in group.out.chunks(batch).enumerate() {
        let products = &mut products[..outs.len()];
        let mut multiply = multiplier(i * batch..i * batch + outs.len());
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
        let lengths = [896, 4864, 1 << 20, 0];
        let kinds = [(BATCH, GROUP), (BATCH, TOGETHER), (MATRIX_BATCH, MATRIX)];
        for (len, (most, together)) in lengths.iter().flat_map(|len| kinds.map(|kind| (len, kind)))
        {
            let row_bytes = len * size_of::<f32>();
            for count in 0..1000 {
                let batch = batch_len(most, count, row_bytes, together);
                assert!(batch.is_multiple_of(together) && batch > 0);
                assert!(batch == together || batch * row_bytes <= most.bytes);
                assert!(batch <= most.rows);
                // None is left with few rows while others are full.
                let batches = count.div_ceil(batch);
                assert!(batches * batch < count + batches * together + 1, "{count} by {batch}");
            }
        }
        assert_eq!(batch_len(BATCH, 256, 896 * size_of::<f32>(), GROUP), 90);
    }
}
