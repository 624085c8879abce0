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
    if x.first().is_none_or(|x| x.is_empty()) {
        out.fill([0.0; ROWS]);
    } else if S::REGISTERS >= 16 {
        groups::<S, F, 4, 6>(w, x, out);
    } else {
        groups::<S, F, 2, 3>(w, x, out);
    }
}

/// `N` rows of `x` at a time, then one by one. All rows of weights meet them before the next ones come: activations are twice
/// as wide as most weights, so it is them that should stay in the first-level cache.
#[inline(always)]
fn groups<S: Simd, F: Float, const R: usize, const N: usize>(
    w: &[u8],
    x: &[&[f32]],
    out: &mut [[f32; ROWS]],
) {
    let (groups, rest) = x.as_chunks::<N>();
    let (outs, out) = out.as_chunks_mut::<N>();
    for (x, out) in groups.iter().zip(outs) {
        all_rows::<S, F, R, N>(w, *x, out);
    }
    for (&x, out) in rest.iter().zip(out) {
        all_rows::<S, F, R, 1>(w, [x], std::array::from_mut(out));
    }
}

/// All rows of weights, `R` at a time and then one by one, against `N` rows of activations.
#[inline(always)]
fn all_rows<S: Simd, F: Float, const R: usize, const N: usize>(
    w: &[u8],
    x: [&[f32]; N],
    out: &mut [[f32; ROWS]; N],
) {
    let row_bytes = x[0].len() * F::BYTES;
    let row = |r: usize| &w[r * row_bytes..][..row_bytes];
    let rows = w.len() / row_bytes;
    let mut r = 0;
    while r + R <= rows {
        let mut some: [&[u8]; R] = [&[]; R];
        for (i, some) in some.iter_mut().enumerate() {
            *some = row(r + i);
        }
        block::<S, F, R, N>(some, x, r, out);
        r += R;
    }
    while r < rows {
        block::<S, F, 1, N>([row(r)], x, r, out);
        r += 1;
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
