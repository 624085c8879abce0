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
//! That is one chain of sums per output element, and a lane holds a row's. Bytes are unpacked without a sign, because hardware
//! multiplies those by signed ones: where `q = byte - zero`, `zero * sum(a)` is taken off the integer sum. Bytes of 8 bits keep their
//! sign where that is faster.
//!
//! Integer sums may be made in any order, and there are two. Several rows of activations share what is unpacked: 32 weights at a time stay in
//! registers and meet up to eight rows. A single row waits for memory, which is fastest for who reads one line after the other and each once:
//! so each word meets the row at once, in the order in which words lie there, as far as there are registers for all the sums of its weights.

use std::slice;

use super::{
    Simd,
    unpack::{Block, Fetch, LONGEST_RUN, Loaded, Tiled32, Tiled256},
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
        let fetch = fetches(fetch, N);
        let mut acc = [[S::splat(0.0); 2]; N];
        for (b, block) in Block::all(tile, &T::LAYOUT).enumerate() {
            let one_by_one = N == 1 && S::IS_WIDE;
            let (mut q, mut sums) = ([[S::splat_word(0); 8]; 2], [S::splat_word(0); 2]);
            if one_by_one {
                sums = blocks_word_by_word::<S, T>(block, &x[0][b]);
            } else {
                block[0].fetch_ahead(0, 1, 0, fetch);
                q[0] = T::unpacked::<S>(block[0]);
                block[0].fetch_ahead(0, 1, 1, fetch);
                q[1] = T::unpacked::<S>(block[1]);
                block[0].fetch_ahead(0, 1, 2, fetch);
            }
            let d = [block[0].load_halves::<S>(0), block[1].load_halves::<S>(0)];
            for n in 0..N {
                let x = &x[n][b];
                let zero = S::splat_word(-T::zero::<S>() * x.sum);
                for h in 0..2 {
                    if !one_by_one {
                        if n == 0 && h == 1 {
                            block[0].fetch_ahead(0, 1, 3, fetch);
                        }
                        sums[h] = S::dot::<T>(zero, &q[h], x.qs.as_chunks().0);
                    }
                    let d = S::mul(d[h], S::splat(x.d));
                    acc[n][h] = S::fma(d, S::to_lanes(sums[h]), acc[n][h]);
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
        let fetch = fetches(fetch, N);
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
            if N == 1 && S::IS_WIDE {
                sums[0] = superblocks_word_by_word::<S, T>(block, scales, &x[0][b].qs, sums[0]);
            } else {
                for j in 0..8 {
                    block[0].fetch_ahead(j, 8, 0, fetch);
                    let first = T::unpacked::<S>(block[0], j);
                    block[0].fetch_ahead(j, 8, 1, fetch);
                    let q = [first, T::unpacked::<S>(block[1], j)];
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
            }
            // Before `d`, as they lie in memory.
            let mins = [T::mins::<S>(block[0]), T::mins::<S>(block[1])];
            let d = [block[0].load_halves::<S>(0), block[1].load_halves::<S>(0)];
            for n in 0..N {
                for h in 0..2 {
                    let d = S::mul(d[h], S::splat(x[n][b].d));
                    acc[n][h] = S::fma(d, S::to_lanes(sums[n][h]), acc[n][h]);
                }
            }
            if T::MIN {
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

/// The sums of the products of a block with one row of activations.
#[inline(always)]
fn blocks_word_by_word<S: Simd, T: Tiled32>(block: [Block<'_>; 2], x: &Q8) -> [S::Words; 2] {
    let a = x.qs.as_chunks::<4>().0;
    let mut sums = [S::splat_word(-T::zero::<S>() * x.sum); 2];
    for (g, a) in a.iter().enumerate() {
        for h in 0..2 {
            let q = T::quants::<S>(block[h], g);
            sums[h] = S::now(S::dot::<T>(sums[h], &[q], slice::from_ref(a)));
        }
    }
    sums
}

/// Adds the products of a block with one row of activations to `sums`.
#[inline(always)]
fn superblocks_word_by_word<S: Simd, T: Tiled256>(
    block: [Block<'_>; 2],
    scales: [[S::Words; 4]; 2],
    x: &[i8; 256],
    mut sums: [S::Words; 2],
) -> [S::Words; 2] {
    let a = x.as_chunks::<4>().0.as_chunks::<8>().0;
    // Of sub-blocks of 16 there are two in 32 weights.
    let parts = 32 / T::SUB_BLOCK;
    for step in 0..8 / T::TOGETHER * parts {
        let (first, part) = (step / parts * T::TOGETHER, step % parts);
        let mut dots = [[S::splat_word(0); 2]; 8];
        for g in 0..8 / parts {
            let g = 8 / parts * part + g;
            let mut words = [Loaded([S::splat_word(0); LONGEST_RUN]); 2];
            for i in 0..T::WORDS {
                for h in 0..2 {
                    words[h].0[i] = block[h].word::<S>(T::at(first, g) + i);
                }
            }
            for j in 0..T::TOGETHER {
                for h in 0..2 {
                    let q = T::quants::<S>(words[h], first + j, g);
                    dots[j][h] = S::dot::<T>(dots[j][h], &[q], &[a[first + j][g]]);
                }
            }
        }
        for (j, dots) in dots.iter().enumerate().take(T::TOGETHER) {
            let i = parts * (first + j) + part;
            for h in 0..2 {
                let scale = byte::<S>(scales[h][i / 4], i % 4, T::SIGNED_SCALES);
                sums[h] = S::add_word(sums[h], S::mul_word(dots[h], scale));
            }
        }
    }
    sums
}

/// How weights are asked for that `n` rows of activations meet, if they are read for the first time. Who reads them word by word does not ask:
/// a core knows what is next, and asking takes its place.
#[inline(always)]
fn fetches(is_first: bool, n: usize) -> Fetch {
    match is_first {
        true if n == 1 && is_fetched_in_steps() => Fetch::InSteps,
        true => Fetch::AtOnce,
        false => Fetch::No,
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
