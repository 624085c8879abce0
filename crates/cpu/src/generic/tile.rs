//! Dot products of quantised weights, 16 rows at a time, with activations rounded to 8 bits.
//!
//! The contract, for every stored type: within a block all sums are integers, hence exact. Block after block, in
//! ascending order and from 0, each product of two scales rounded to f32:
//!
//! ```text
//! acc = fma(d * d_activation, sum(scale * q * a) as f32, acc)
//! acc = fma(m * d_activation, sum(a) as f32, acc)              Q4_1, Q5_1
//! acc = fma(-dmin * d_activation, sum(min * a) as f32, acc)    Q2_K, Q4_K, Q5_K
//! ```
//!
//! That is one chain of sums per output element, and a lane holds a row's. Each block of weights is unpacked once for up
//! to eight rows of activations. Bytes are unpacked without a sign, because hardware multiplies those by signed ones:
//! where `q = byte - zero`, `zero * sum(a)` is taken off the integer sum.

use super::{
    LANES, Simd,
    unpack::{Block, Tiled32, Tiled256},
};
use crate::{
    activation::{Q8, Q8K},
    tile::Line,
};

/// The products of a tile with each row of `x`, 16 for each.
pub(crate) trait Multiply<A> {
    /// Those of `N` rows of activations.
    fn multiply<S: Simd, const N: usize>(tile: &[Line], x: [&[A]; N]) -> [[f32; LANES]; N];
}

/// Types with blocks of 32.
pub(crate) struct Blocks<T>(T);

/// Types with blocks of 256.
pub(crate) struct Superblocks<T>(T);

/// Eight rows of `x` at a time, as long as there are; then four, two, one.
#[inline(always)]
pub(crate) fn products<S: Simd, M: Multiply<A>, A>(
    tile: &[Line],
    mut x: &[A],
    mut out: &mut [[f32; LANES]],
) {
    let Some(len) = x.len().checked_div(out.len()) else { return };
    while out.len() >= 8 {
        (x, out) = some::<S, M, A, 8>(tile, x, out, len);
    }
    if out.len() >= 4 {
        (x, out) = some::<S, M, A, 4>(tile, x, out, len);
    }
    if out.len() >= 2 {
        (x, out) = some::<S, M, A, 2>(tile, x, out, len);
    }
    if !out.is_empty() {
        some::<S, M, A, 1>(tile, x, out, len);
    }
}

/// The first `N` rows, of `len` blocks each. Returns what is left.
#[inline(always)]
fn some<'x, 'o, S: Simd, M: Multiply<A>, A, const N: usize>(
    tile: &[Line],
    x: &'x [A],
    out: &'o mut [[f32; LANES]],
    len: usize,
) -> (&'x [A], &'o mut [[f32; LANES]]) {
    let mut rows: [&[A]; N] = [&[]; N];
    for (n, row) in rows.iter_mut().enumerate() {
        *row = &x[n * len..][..len];
    }
    let (now, left) = out.split_at_mut(N);
    now.copy_from_slice(&M::multiply::<S, N>(tile, rows));
    (&x[N * len..], left)
}

impl<T: Tiled32> Multiply<Q8> for Blocks<T> {
    #[inline(always)]
    fn multiply<S: Simd, const N: usize>(tile: &[Line], x: [&[Q8]; N]) -> [[f32; LANES]; N] {
        let mut acc = [S::splat(0.0); N];
        for (b, block) in Block::all(tile, x[0].len(), &T::LAYOUT).enumerate() {
            let q = T::quants::<S>(block);
            let d = S::load_halves(&block.halves[0]);
            for n in 0..N {
                let x = &x[n][b];
                let sum = S::splat_word(-T::ZERO * x.sum);
                let sum = S::dot::<T>(sum, &q, x.qs.as_chunks().0);
                acc[n] = S::fma(S::mul(d, S::splat(x.d)), S::to_lanes(sum), acc[n]);
            }
            if T::MIN {
                let m = S::load_halves(&block.halves[1]);
                for n in 0..N {
                    let x = &x[n][b];
                    acc[n] = S::fma(S::mul(m, S::splat(x.d)), S::splat(x.sum as f32), acc[n]);
                }
            }
        }
        stored::<S, N>(acc)
    }
}

impl<T: Tiled256> Multiply<Q8K> for Superblocks<T> {
    #[inline(always)]
    fn multiply<S: Simd, const N: usize>(tile: &[Line], x: [&[Q8K]; N]) -> [[f32; LANES]; N] {
        let mut acc = [S::splat(0.0); N];
        for (b, block) in Block::all(tile, x[0].len(), &T::LAYOUT).enumerate() {
            let scales = T::scales::<S>(block);
            let mut sums = [S::splat_word(0); N];
            if T::ZERO != 0 {
                let pairs = scale_pairs::<S, T>(scales);
                for n in 0..N {
                    let sum = weighted::<S, T>(&pairs, &x[n][b]);
                    sums[n] = S::mul_word(sum, S::splat_word(-T::ZERO));
                }
            }
            for j in 0..8 {
                let q = T::quants::<S>(block, j);
                if T::SUB_BLOCK == 32 {
                    let scale = byte::<S>(scales[j / 4], j % 4, T::SIGNED_SCALES);
                    for n in 0..N {
                        let a = x[n][b].qs.as_chunks::<32>().0[j].as_chunks().0;
                        let sum = S::dot::<T>(S::splat_word(0), &q, a);
                        sums[n] = S::add_word(sums[n], S::mul_word(sum, scale));
                    }
                } else {
                    let word = scales[j / 2];
                    let first = byte::<S>(word, 2 * j % 4, T::SIGNED_SCALES);
                    let second = byte::<S>(word, 2 * j % 4 + 1, T::SIGNED_SCALES);
                    for n in 0..N {
                        let a = x[n][b].qs.as_chunks::<32>().0[j].as_chunks().0;
                        let sum = S::dot::<T>(S::splat_word(0), &q[..4], &a[..4]);
                        sums[n] = S::add_word(sums[n], S::mul_word(sum, first));
                        let sum = S::dot::<T>(S::splat_word(0), &q[4..], &a[4..]);
                        sums[n] = S::add_word(sums[n], S::mul_word(sum, second));
                    }
                }
            }
            let d = S::load_halves(&block.halves[0]);
            for n in 0..N {
                let d = S::mul(d, S::splat(x[n][b].d));
                acc[n] = S::fma(d, S::to_lanes(sums[n]), acc[n]);
            }
            if T::MIN {
                let pairs = unsigned_pairs::<S, T>(T::mins::<S>(block));
                let dmin = S::load_halves(&block.halves[1]);
                for n in 0..N {
                    let x = &x[n][b];
                    let sum = S::to_lanes(weighted::<S, T>(&pairs, x));
                    acc[n] = S::fma(S::mul(dmin, S::splat(-x.d)), sum, acc[n]);
                }
            }
        }
        stored::<S, N>(acc)
    }
}

#[inline(always)]
fn stored<S: Simd, const N: usize>(acc: [S::Lanes; N]) -> [[f32; LANES]; N] {
    let mut out = [[0.0; LANES]; N];
    for n in 0..N {
        out[n] = S::store(acc[n]);
    }
    out
}

/// Byte `i` of each word.
#[inline(always)]
fn byte<S: Simd>(words: S::Words, i: usize, signed: bool) -> S::Words {
    let top = S::shl(words, 24 - 8 * i as u32);
    if signed { S::sar(top, 24) } else { S::shr(top, 24) }
}

/// The numbers of sub-blocks, two to a word as 16-bit numbers: of each four, the first and the third, then the others.
/// That is the order of the sums of [`Q8K`].
type Pairs<S> = [<S as Simd>::Words; 8];

#[inline(always)]
fn unsigned_pairs<S: Simd, T: Tiled256>(bytes: [S::Words; 4]) -> Pairs<S> {
    let mut pairs = [S::splat_word(0); 8];
    for i in 0..64 / T::SUB_BLOCK {
        pairs[2 * i] = S::and(bytes[i], 0x00ff_00ff);
        pairs[2 * i + 1] = S::and(S::shr(bytes[i], 8), 0x00ff_00ff);
    }
    pairs
}

#[inline(always)]
fn scale_pairs<S: Simd, T: Tiled256>(bytes: [S::Words; 4]) -> Pairs<S> {
    if !T::SIGNED_SCALES {
        return unsigned_pairs::<S, T>(bytes);
    }
    let mut pairs = [S::splat_word(0); 8];
    for i in 0..64 / T::SUB_BLOCK {
        (pairs[2 * i], pairs[2 * i + 1]) = S::signed_pairs(bytes[i]);
    }
    pairs
}

/// The sum over all sub-blocks of its number times the sum of its activations.
#[inline(always)]
fn weighted<S: Simd, T: Tiled256>(pairs: &Pairs<S>, x: &Q8K) -> S::Words {
    let mut sum = S::splat_word(0);
    if T::SUB_BLOCK == 32 {
        for i in 0..4 {
            sum = S::dot_pairs(sum, pairs[i], x.sums_32[i]);
        }
    } else {
        for i in 0..8 {
            sum = S::dot_pairs(sum, pairs[i], x.sums_16[i]);
        }
    }
    sum
}
