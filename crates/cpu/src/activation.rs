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

/// Activations that share a scale.
pub(crate) trait Block8: Plain {
    /// Activations per block.
    const LEN: usize;
}

/// 32 activations: `d * qs[i]`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(crate) struct Q8 {
    /// The scale, rounded to f16.
    pub(crate) d: f32,
    /// The sum of `qs`, exactly: what ggml's Q8_1 has rounded.
    pub(crate) sum: i32,
    pub(crate) qs: [i8; 32],
}

impl Block8 for Q8 {
    const LEN: usize = 32;
}

/// 256 activations: `d * qs[i]`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(crate) struct Q8K {
    pub(crate) d: f32,
    /// The sums of each 16 of `qs`: of four of them those of the first and the third, then those of the others.
    /// Weights have their scales in bytes, and every other byte of a word makes a pair of 16-bit numbers.
    pub(crate) sums_16: [[i16; 2]; 8],
    /// The sums of each 32 of `qs`, in the same order.
    pub(crate) sums_32: [[i16; 2]; 4],
    pub(crate) qs: [i8; 256],
}

impl Block8 for Q8K {
    const LEN: usize = 256;
}

/// The rounded forms of a tensor, made when first asked for. Row after row of blocks.
#[derive(Debug, Default)]
pub(crate) struct Rounded {
    pub(crate) q8_0: OnceLock<Buffer<Q8>>,
    pub(crate) q8_k: OnceLock<Buffer<Q8K>>,
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
