//! Activations as dot products read them: rounded to 8 bits by those of integers, packed by those of floats.
//!
//! Rounded numbers are those of [`apr_tensor::activation`], which defines them; the layout is ours: scales are widened to
//! f32, and sums stand beside the quants for the weight types that have minima. A tensor is rounded once
//! per kind, however many weights it is multiplied with.

use std::sync::OnceLock;

use crate::{
    generic::{LANES, lanes::padded},
    memory::{Buffer, Plain},
};

/// Rows of activations that integer kernels take at a time, if there are several.
pub(crate) const TOGETHER: usize = 8;

/// The same where matrices are multiplied with matrices.
pub(crate) const MATRIX: usize = 16;

/// Activations of a row that share a scale.
pub(crate) trait Block8: Plain + Sync {
    /// Activations per block.
    const LEN: usize;

    /// The same blocks of [`TOGETHER`] rows, side by side: what kernels read next then lies next.
    type Packed: Rows<Self>;

    /// The same blocks of [`MATRIX`] rows.
    type Matrix: Rows<Self>;
}

/// The same block of several rows.
pub(crate) trait Rows<A>: Plain + Sync {
    /// How many.
    const COUNT: usize;

    /// Makes `block` that of row `n`.
    fn put(&mut self, n: usize, block: &A);
}

/// 32 activations of each of `N` rows: those of row `n` are `d[n]` times the bytes of `qs[0][n]`, `qs[1][n]` and so on.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(crate) struct Q8<const N: usize = 1> {
    /// The scale, rounded to f16.
    pub(crate) d: [f32; N],
    /// The sum of the bytes, exactly: what ggml's Q8_1 has rounded.
    pub(crate) sum: [i32; N],
    pub(crate) qs: [[[i8; 4]; N]; 8],
}

impl Block8 for Q8 {
    const LEN: usize = 32;

    type Packed = Q8<TOGETHER>;
    type Matrix = Q8Matrix;
}

impl Rows<Q8> for Q8<TOGETHER> {
    const COUNT: usize = TOGETHER;

    fn put(&mut self, n: usize, block: &Q8) {
        self.d[n] = block.d[0];
        self.sum[n] = block.sum[0];
        put(n, &block.qs, &mut self.qs);
    }
}

/// 32 activations of each of [`MATRIX`] rows, one row after the other.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Q8Matrix {
    pub(crate) qs: [[i8; 32]; MATRIX],
    pub(crate) d: [f32; MATRIX],
    pub(crate) sum: [i32; MATRIX],
}

impl Rows<Q8> for Q8Matrix {
    const COUNT: usize = MATRIX;

    fn put(&mut self, n: usize, block: &Q8) {
        self.qs[n].copy_from_slice(block.qs.as_flattened().as_flattened());
        self.d[n] = block.d[0];
        self.sum[n] = block.sum[0];
    }
}

/// 256 activations of each of `N` rows, as in [`Q8`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(crate) struct Q8K<const N: usize = 1> {
    pub(crate) d: [f32; N],
    pub(crate) sums: Sums<N>,
    pub(crate) qs: [[[i8; 4]; N]; 64],
}

/// The sums of sub-blocks of [`Q8K`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(crate) struct Sums<const N: usize> {
    /// Of each 16 bytes: of four of them those of the first and the third, then those of the others.
    /// Weights have the numbers of their sub-blocks in bytes, and every other byte of a word makes a pair of 16-bit numbers.
    pub(crate) of_16: [[[i16; 2]; N]; 8],
    /// Of each 32 bytes, in the same order.
    pub(crate) of_32: [[[i16; 2]; N]; 4],
}

impl<const N: usize> Sums<N> {
    fn put(&mut self, n: usize, sums: &Sums<1>) {
        put(n, &sums.of_16, &mut self.of_16);
        put(n, &sums.of_32, &mut self.of_32);
    }
}

impl Block8 for Q8K {
    const LEN: usize = 256;

    type Packed = Q8K<TOGETHER>;
    type Matrix = Q8KMatrix;
}

impl Rows<Q8K> for Q8K<TOGETHER> {
    const COUNT: usize = TOGETHER;

    fn put(&mut self, n: usize, block: &Q8K) {
        self.d[n] = block.d[0];
        self.sums.put(n, &block.sums);
        put(n, &block.qs, &mut self.qs);
    }
}

/// 256 activations of each of [`MATRIX`] rows, one row after the other.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Q8KMatrix {
    pub(crate) qs: [[i8; 256]; MATRIX],
    pub(crate) d: [f32; MATRIX],
    pub(crate) sums: Sums<MATRIX>,
}

impl Rows<Q8K> for Q8KMatrix {
    const COUNT: usize = MATRIX;

    fn put(&mut self, n: usize, block: &Q8K) {
        self.qs[n].copy_from_slice(block.qs.as_flattened().as_flattened());
        self.d[n] = block.d[0];
        self.sums.put(n, &block.sums);
    }
}

/// Makes what a row has the elements `n`.
fn put<T: Copy, const N: usize>(n: usize, row: &[[T; 1]], rows: &mut [[T; N]]) {
    for (element, [x]) in rows.iter_mut().zip(row) {
        element[n] = *x;
    }
}

/// The rounded forms of a tensor, made when first asked for.
#[derive(Debug, Default)]
pub(crate) struct Rounded {
    pub(crate) q8_0: Forms<Q8>,
    pub(crate) q8_k: Forms<Q8K>,
}

/// Those of several rows hold whole numbers of [`Rows`]; after the last row it stands again.
#[derive(Debug)]
pub(crate) struct Forms<A: Block8> {
    /// Row after row of blocks.
    pub(crate) rows: OnceLock<Buffer<A>>,
    pub(crate) packed: OnceLock<Buffer<A::Packed>>,
    pub(crate) matrices: OnceLock<Buffer<A::Matrix>>,
}

impl<A: Block8> Default for Forms<A> {
    fn default() -> Self {
        Self { rows: OnceLock::new(), packed: OnceLock::new(), matrices: OnceLock::new() }
    }
}

/// [`LANES`] activations of one row, zeros after the last one.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Floats(pub(crate) [f32; LANES]);

/// Rows of activations that float kernels take at a time.
pub(crate) const GROUP: usize = 6;

/// How many [`Floats`] so many rows of `cols` activations take when they are [packed](pack).
pub(crate) fn packed_len(rows: usize, cols: usize) -> usize {
    let rows = if rows > 1 { rows.next_multiple_of(GROUP) } else { rows };
    rows * cols.div_ceil(LANES)
}

/// Lays rows out as float kernels read them: [`LANES`] columns of one after those of the other, [`GROUP`] rows together, and rows of
/// zeros if there are not as many; a row alone as it is. Rows as they come may lie so far apart that they throw each other
/// out of the cache.
pub(crate) fn pack(rows: &[&[f32]], out: &mut [Floats]) {
    let together = if rows.len() > 1 { GROUP } else { 1 };
    let len = packed_len(together, rows.first().map_or(0, |row| row.len()));
    for (rows, out) in rows.chunks(together).zip(out.chunks_mut(len.max(1))) {
        for n in 0..together {
            let (whole, tail) = rows.get(n).copied().unwrap_or_default().as_chunks();
            let mut outs = out.chunks_exact_mut(together);
            for (x, out) in whole.iter().zip(&mut outs) {
                out[n].0 = *x;
            }
            outs.for_each(|out| out[n].0 = padded(tail));
        }
    }
}
