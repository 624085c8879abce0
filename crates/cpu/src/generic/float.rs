//! Dot products of float weights with activations as they are.
//!
//! The contract: element `i` goes to lane `i % LANES`, in each lane `fma` in ascending order from 0, then the tree of
//! [`sum`](super::lanes::sum). A last group of fewer than [`LANES`] elements is filled up with zeros on both sides.
//!
//! Some rows of weights meet some rows of activations at a time, so that each number is loaded once for several products.

use super::{LANES, Simd, lanes::padded};
use crate::tile::ROWS;

/// A stored type of floats, little-endian, widened exactly.
pub(crate) trait Float {
    const BYTES: usize;

    /// The first [`LANES`] elements of `bytes`.
    fn load<S: Simd>(bytes: &[u8]) -> S::Lanes;
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct BF16;

impl Float for F32 {
    const BYTES: usize = 4;

    #[inline(always)]
    fn load<S: Simd>(bytes: &[u8]) -> S::Lanes {
        S::load_f32(bytes.first_chunk().expect("16 elements"))
    }
}

impl Float for F16 {
    const BYTES: usize = 2;

    #[inline(always)]
    fn load<S: Simd>(bytes: &[u8]) -> S::Lanes {
        S::load_halves(bytes.first_chunk().expect("16 elements"))
    }
}

impl Float for BF16 {
    const BYTES: usize = 2;

    #[inline(always)]
    fn load<S: Simd>(bytes: &[u8]) -> S::Lanes {
        S::load_bf16(bytes.first_chunk().expect("16 elements"))
    }
}

/// At most [`ROWS`] rows of weights, one after the other, against each row of `x`.
#[inline(always)]
pub(crate) fn products<S: Simd, F: Float>(w: &[u8], x: &[&[f32]], out: &mut [[f32; ROWS]]) {
    let Some(cols) = x.first().map(|x| x.len()).filter(|&cols| cols > 0) else {
        out.fill([0.0; ROWS]);
        return;
    };
    let rows = w.len() / (cols * F::BYTES);
    let mut r = 0;
    if S::HAS_24_SUMS {
        while r + 4 <= rows {
            rows_from::<S, F, 4, 6>(w, x, r, out);
            r += 4;
        }
    } else {
        while r + 2 <= rows {
            rows_from::<S, F, 2, 3>(w, x, r, out);
            r += 2;
        }
    }
    while r < rows {
        rows_from::<S, F, 1, 3>(w, x, r, out);
        r += 1;
    }
}

/// `R` rows of weights, from number `r` on, against all rows of `x`: `N` at a time, then one by one.
#[inline(always)]
fn rows_from<S: Simd, F: Float, const R: usize, const N: usize>(
    w: &[u8],
    x: &[&[f32]],
    r: usize,
    out: &mut [[f32; ROWS]],
) {
    let row_bytes = x[0].len() * F::BYTES;
    let mut rows: [&[u8]; R] = [&[]; R];
    for (i, row) in rows.iter_mut().enumerate() {
        *row = &w[(r + i) * row_bytes..][..row_bytes];
    }
    let (groups, rest) = x.as_chunks::<N>();
    let (outs, out) = out.as_chunks_mut::<N>();
    for (x, out) in groups.iter().zip(outs) {
        block::<S, F, R, N>(rows, *x, r, out);
    }
    for (&x, out) in rest.iter().zip(out) {
        block::<S, F, R, 1>(rows, [x], r, std::array::from_mut(out));
    }
}

/// `R` rows of weights against `N` rows of activations.
#[inline(always)]
fn block<S: Simd, F: Float, const R: usize, const N: usize>(
    w: [&[u8]; R],
    x: [&[f32]; N],
    r: usize,
    out: &mut [[f32; ROWS]; N],
) {
    let cols = x[0].len();
    let (whole, tail) = (cols / LANES * LANES, cols % LANES);
    let mut acc = [[S::splat(0.0); N]; R];
    for i in (0..whole).step_by(LANES) {
        let mut lanes = [S::splat(0.0); R];
        for r in 0..R {
            let at = &w[r][i * F::BYTES..][..LANES * F::BYTES];
            lanes[r] = F::load::<S>(at);
            if N == 1 {
                // The rows after these are next, and memory is read faster when it is told early.
                S::prefetch(at.as_ptr().wrapping_add(R * w[r].len()));
            }
        }
        for n in 0..N {
            let x = S::load(x[n][i..].first_chunk().expect("rows are of one length"));
            for r in 0..R {
                acc[r][n] = S::fma(lanes[r], x, acc[r][n]);
            }
        }
    }
    if tail > 0 {
        for r in 0..R {
            let mut bytes = [0; 4 * LANES];
            bytes[..tail * F::BYTES].copy_from_slice(&w[r][whole * F::BYTES..]);
            let lanes = F::load::<S>(&bytes);
            for n in 0..N {
                let x = S::load(&padded(&x[n][whole..][..tail]));
                acc[r][n] = S::fma(lanes, x, acc[r][n]);
            }
        }
    }
    for n in 0..N {
        for i in 0..R {
            out[n][r + i] = S::sum(acc[i][n]);
        }
    }
}
