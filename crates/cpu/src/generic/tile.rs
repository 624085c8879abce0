//! Dot products of quantised weights, a [tile](crate::tile) of rows at a time, with activations rounded to 8 bits.
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
//! where `q = byte - zero`, `zero * sum(a)` is taken off the integer sum. Bytes of 8 bits keep their sign where that is faster.

use super::{
    Simd,
    unpack::{Block, Fetch, Tiled, Tiled32, Tiled256},
};
use crate::{
    activation::{Q8, Q8K},
    memory::is_fetched_in_steps,
    tile::{Line, ROWS},
};

/// The products of a tile with rows of activations, one with each of its rows.
pub(crate) trait Multiply<A> {
    /// Those of `N` rows of activations. With `fetch` the tile is read for the first time, and what comes is asked for.
    fn multiply<S: Simd, const N: usize>(
        tile: &[Line],
        x: [&[A]; N],
        fetch: bool,
    ) -> [[f32; ROWS]; N];
}

/// Types with blocks of 32.
pub(crate) struct Blocks<T>(T);

/// Types with blocks of 256.
pub(crate) struct Superblocks<T>(T);

/// The most rows of activations that a block of weights is unpacked for.
pub(crate) const TOGETHER: usize = 8;

/// [`TOGETHER`] rows of `x` at a time, as long as there are; then four, two, one.
#[inline(always)]
pub(crate) fn products<S: Simd, M: Multiply<A>, A>(
    tile: &[Line],
    x: &[&[A]],
    out: &mut [[f32; ROWS]],
) {
    let mut fetch = true;
    let (x, out) = groups_of::<S, M, A, TOGETHER>(tile, x, out, &mut fetch);
    let (x, out) = groups_of::<S, M, A, 4>(tile, x, out, &mut fetch);
    let (x, out) = groups_of::<S, M, A, 2>(tile, x, out, &mut fetch);
    groups_of::<S, M, A, 1>(tile, x, out, &mut fetch);
}

/// `N` rows at a time. Returns what is left.
#[inline(always)]
fn groups_of<'x, 'o, S: Simd, M: Multiply<A>, A, const N: usize>(
    tile: &[Line],
    x: &'x [&'x [A]],
    out: &'o mut [[f32; ROWS]],
    fetch: &mut bool,
) -> (&'x [&'x [A]], &'o mut [[f32; ROWS]]) {
    let (groups, x) = x.as_chunks::<N>();
    let (outs, out) = out.as_chunks_mut::<N>();
    for (group, out) in groups.iter().zip(outs) {
        *out = M::multiply::<S, N>(tile, *group, std::mem::take(fetch));
    }
    (x, out)
}

impl<T: Tiled32> Multiply<Q8> for Blocks<T> {
    #[inline(always)]
    fn multiply<S: Simd, const N: usize>(
        tile: &[Line],
        x: [&[Q8]; N],
        fetch: bool,
    ) -> [[f32; ROWS]; N] {
        let fetch = fetches::<S, T>(fetch, N);
        let mut acc = [[S::splat(0.0); 2]; N];
        for (b, block) in Block::all(tile, &T::LAYOUT).enumerate() {
            block[0].fetch_ahead(0, 1, 0, fetch);
            let first = T::quants::<S>(block[0]);
            block[0].fetch_ahead(0, 1, 1, fetch);
            let q = [first, T::quants::<S>(block[1])];
            block[0].fetch_ahead(0, 1, 2, fetch);
            let d = [block[0].load_halves::<S>(0), block[1].load_halves::<S>(0)];
            for n in 0..N {
                let x = &x[n][b];
                let zero = S::splat_word(-T::zero::<S>() * x.sum);
                for h in 0..2 {
                    if n == 0 && h == 1 {
                        block[0].fetch_ahead(0, 1, 3, fetch);
                    }
                    let sum = S::to_lanes(S::dot::<T>(zero, &q[h], x.qs.as_chunks().0));
                    acc[n][h] = S::fma(S::mul(d[h], S::splat(x.d)), sum, acc[n][h]);
                }
            }
            if T::MIN {
                let m = [block[0].load_halves::<S>(1), block[1].load_halves::<S>(1)];
                for n in 0..N {
                    let x = &x[n][b];
                    let sum = S::splat(x.sum as f32);
                    for h in 0..2 {
                        acc[n][h] = S::fma(S::mul(m[h], S::splat(x.d)), sum, acc[n][h]);
                    }
                }
            }
        }
        stored::<S, N>(acc)
    }
}

impl<T: Tiled256> Multiply<Q8K> for Superblocks<T> {
    #[inline(always)]
    fn multiply<S: Simd, const N: usize>(
        tile: &[Line],
        x: [&[Q8K]; N],
        fetch: bool,
    ) -> [[f32; ROWS]; N] {
        let fetch = fetches::<S, T>(fetch, N);
        let mut acc = [[S::splat(0.0); 2]; N];
        for (b, block) in Block::all(tile, &T::LAYOUT).enumerate() {
            let scales = [T::scales::<S>(block[0]), T::scales::<S>(block[1])];
            let mut sums = [[S::splat_word(0); 2]; N];
            if T::zero::<S>() != 0 {
                let pairs = [scale_pairs::<S, T>(scales[0]), scale_pairs::<S, T>(scales[1])];
                for n in 0..N {
                    for h in 0..2 {
                        let sum = weighted::<S, T>(&pairs[h], &x[n][b]);
                        sums[n][h] = S::mul_word(sum, S::splat_word(-T::zero::<S>()));
                    }
                }
            }
            for j in 0..8 {
                block[0].fetch_ahead(j, 8, 0, fetch);
                let first = T::quants::<S>(block[0], j);
                block[0].fetch_ahead(j, 8, 1, fetch);
                let q = [first, T::quants::<S>(block[1], j)];
                block[0].fetch_ahead(j, 8, 2, fetch);
                // Of sub-blocks of 16 there are two.
                let part = 32 / T::SUB_BLOCK;
                let mut scale = [[S::splat_word(0); 2]; 2];
                for (scale, scales) in scale.iter_mut().zip(&scales) {
                    for (p, scale) in scale.iter_mut().take(part).enumerate() {
                        let i = j * part + p;
                        *scale = byte::<S>(scales[i / 4], i % 4, T::SIGNED_SCALES);
                    }
                }
                for n in 0..N {
                    let a: &[[i8; 4]] = x[n][b].qs.as_chunks::<32>().0[j].as_chunks().0;
                    for h in 0..2 {
                        if n == 0 && h == 1 {
                            block[0].fetch_ahead(j, 8, 3, fetch);
                        }
                        let groups = q[h].chunks_exact(8 / part).zip(a.chunks_exact(8 / part));
                        for (p, (q, a)) in groups.enumerate() {
                            let sum = S::dot::<T>(S::splat_word(0), q, a);
                            sums[n][h] = S::add_word(sums[n][h], S::mul_word(sum, scale[h][p]));
                        }
                    }
                }
            }
            let d = [block[0].load_halves::<S>(0), block[1].load_halves::<S>(0)];
            for n in 0..N {
                for h in 0..2 {
                    let d = S::mul(d[h], S::splat(x[n][b].d));
                    acc[n][h] = S::fma(d, S::to_lanes(sums[n][h]), acc[n][h]);
                }
            }
            if T::MIN {
                let mins = [T::mins::<S>(block[0]), T::mins::<S>(block[1])];
                let pairs = [unsigned_pairs::<S, T>(mins[0]), unsigned_pairs::<S, T>(mins[1])];
                let dmin = [block[0].load_halves::<S>(1), block[1].load_halves::<S>(1)];
                for n in 0..N {
                    let x = &x[n][b];
                    for h in 0..2 {
                        let sum = S::to_lanes(weighted::<S, T>(&pairs[h], x));
                        acc[n][h] = S::fma(S::mul(dmin[h], S::splat(-x.d)), sum, acc[n][h]);
                    }
                }
            }
        }
        stored::<S, N>(acc)
    }
}

/// How weights are asked for that `n` rows of activations meet, if they are read for the first time.
#[inline(always)]
fn fetches<S: Simd, T: Tiled>(is_first: bool, n: usize) -> Fetch {
    match (is_first, T::IS_FETCHED) {
        (true, true) if is_fetched_in_steps() => Fetch::InSteps,
        (true, true) => Fetch::AtOnce,
        (true, false) if n > 1 || S::IS_FETCHED => Fetch::AtOnce,
        _ => Fetch::No,
    }
}

#[inline(always)]
fn stored<S: Simd, const N: usize>(acc: [[S::Lanes; 2]; N]) -> [[f32; ROWS]; N] {
    let mut out = [[0.0; ROWS]; N];
    for (out, [first, second]) in out.iter_mut().zip(acc) {
        let (halves, _) = out.as_chunks_mut();
        (halves[0], halves[1]) = (S::store(first), S::store(second));
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
        for (&pair, &sums) in pairs.iter().zip(&x.sums_32) {
            sum = S::dot_pairs(sum, pair, sums);
        }
    } else {
        for (&pair, &sums) in pairs.iter().zip(&x.sums_16) {
            sum = S::dot_pairs(sum, pair, sums);
        }
    }
    sum
}
