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

/// Activations of a row that share a scale.
pub(crate) trait Block8: Plain + Sync {
    /// Activations per block.
    const LEN: usize;

    /// The same blocks of [`TOGETHER`] rows, side by side: what kernels read next then lies next.
    type Packed: Plain + Sync;

    /// Makes this the block of row `n`.
    fn put(&self, n: usize, packed: &mut Self::Packed);
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

    fn put(&self, n: usize, packed: &mut Self::Packed) {
        packed.d[n] = self.d[0];
        packed.sum[n] = self.sum[0];
        put(&self.qs, n, &mut packed.qs);
    }
}

/// 256 activations of each of `N` rows, as in [`Q8`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(crate) struct Q8K<const N: usize = 1> {
    pub(crate) d: [f32; N],
    /// The sums of each 16 bytes: of four of them those of the first and the third, then those of the others.
    /// Weights have the numbers of their sub-blocks in bytes, and every other byte of a word makes a pair of 16-bit numbers.
    pub(crate) sums_16: [[[i16; 2]; N]; 8],
    /// The sums of each 32 bytes, in the same order.
    pub(crate) sums_32: [[[i16; 2]; N]; 4],
    pub(crate) qs: [[[i8; 4]; N]; 64],
}

impl Block8 for Q8K {
    const LEN: usize = 256;

    type Packed = Q8K<TOGETHER>;

    fn put(&self, n: usize, packed: &mut Self::Packed) {
        packed.d[n] = self.d[0];
        put(&self.sums_16, n, &mut packed.sums_16);
        put(&self.sums_32, n, &mut packed.sums_32);
        put(&self.qs, n, &mut packed.qs);
    }
}

fn put<T: Copy, const N: usize>(row: &[[T; 1]], n: usize, packed: &mut [[T; N]]) {
    for (packed, [x]) in packed.iter_mut().zip(row) {
        packed[n] = *x;
    }
}

/// The rounded forms of a tensor, made when first asked for.
#[derive(Debug, Default)]
pub(crate) struct Rounded {
    pub(crate) q8_0: Forms<Q8>,
    pub(crate) q8_k: Forms<Q8K>,
}

#[derive(Debug)]
pub(crate) struct Forms<A: Block8> {
    /// Row after row of blocks.
    pub(crate) rows: OnceLock<Buffer<A>>,
    /// [`TOGETHER`] rows of blocks after as many; after the last row it again.
    pub(crate) packed: OnceLock<Buffer<A::Packed>>,
}

impl<A: Block8> Default for Forms<A> {
    fn default() -> Self {
        Self { rows: OnceLock::new(), packed: OnceLock::new() }
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
