//! Blocks of 256 weights, in sub-blocks of 16 or 32 that have a scale each.

use std::slice::from_ref;

use super::{MOST_OF_BOTH, plus, stored};
use crate::{
    activation::Q8K,
    generic::{
        Simd,
        unpack::{Block, Fetch, LONGEST_RUN, Lazy, Loaded, Tiled256},
    },
    tile::{Line, ROWS},
};

/// The products of a tile with the first `N` of `W` rows.
#[inline(always)]
pub(super) fn products<S: Simd, T: Tiled256, const N: usize, const W: usize>(
    tile: &[Line],
    x: &[Q8K<W>],
    fetch: Fetch,
) -> [[f32; ROWS]; N] {
    let mut acc = [[S::splat(0.0); N]; 2];
    for (block, x) in Block::all(tile, &T::LAYOUT).zip(x) {
        if S::IS_WIDE && N > MOST_OF_BOTH {
            for (block, acc) in block.iter().zip(&mut acc) {
                let [sums] = sums_of_several::<S, T, N, W, 1>([*block], x, fetch);
                add::<S, T, N, W>(*block, x, sums, acc);
            }
            continue;
        }
        let sums = match (S::IS_WIDE, N) {
            (true, 1) => sums_of_one::<S, T, N, W>(block, x),
            (true, _) => sums_of_several::<S, T, N, W, 2>(block, x, fetch),
            (false, _) => sums_by_32::<S, T, N, W>(block, x, fetch),
        };
        for h in 0..2 {
            add::<S, T, N, W>(block[h], x, sums[h], &mut acc[h]);
        }
    }
    stored::<S, N>(acc)
}

/// The integer sums, 32 weights at a time.
#[expect(clippy::needless_range_loop, reason = "halves come first, then rows")]
#[inline(always)]
fn sums_by_32<S: Simd, T: Tiled256, const N: usize, const W: usize>(
    block: [Block<'_>; 2],
    x: &Q8K<W>,
    fetch: Fetch,
) -> [[S::Words; N]; 2] {
    let scales = [T::scales::<S>(block[0]), T::scales::<S>(block[1])];
    let mut sums = [[S::splat_word(0); N]; 2];
    // Of sub-blocks of 16 there are two in 32 weights.
    let parts = 32 / T::SUB_BLOCK;
    for (j, a) in x.qs.as_chunks::<8>().0.iter().enumerate() {
        block[0].fetch_ahead(j, 8, 0, fetch);
        let first = T::unpacked::<S>(block[0], j);
        block[0].fetch_ahead(j, 8, 1, fetch);
        let q = [first, T::unpacked::<S>(block[1], j)];
        block[0].fetch_ahead(j, 8, 2, fetch);
        let mut scale = [[S::splat_word(0); 2]; 2];
        for (scale, scales) in scale.iter_mut().zip(&scales) {
            for (p, scale) in scale.iter_mut().take(parts).enumerate() {
                *scale = scale_of::<S, T>(scales, j * parts + p);
            }
        }
        for n in 0..N {
            let mut starts = [S::splat_word(0); 2];
            for (p, start) in starts.iter_mut().take(parts).enumerate() {
                *start = start_of::<S, T, W>(x, j * parts + p, n);
            }
            for h in 0..2 {
                if n == 0 && h == 1 {
                    block[0].fetch_ahead(j, 8, 3, fetch);
                }
                let groups = q[h].chunks_exact(8 / parts).zip(a.chunks_exact(8 / parts));
                for (p, (q, a)) in groups.enumerate() {
                    let sum = S::dot::<T, W>(starts[p], q, a, n);
                    sums[h][n] = S::add_word(sums[h][n], S::mul_word(sum, scale[h][p]));
                }
            }
        }
    }
    sums
}

/// The integer sums of a single row, word by word in the order of memory.
#[inline(always)]
fn sums_of_one<S: Simd, T: Tiled256, const N: usize, const W: usize>(
    block: [Block<'_>; 2],
    x: &Q8K<W>,
) -> [[S::Words; N]; 2] {
    let scales = [T::scales::<S>(block[0]), T::scales::<S>(block[1])];
    let mut sums = [[S::splat_word(0); N]; 2];
    let parts = 32 / T::SUB_BLOCK;
    for step in 0..8 / T::TOGETHER * parts {
        let (first, part) = (step / parts * T::TOGETHER, step % parts);
        let mut dots = [[S::splat_word(0); 2]; 8];
        for (j, dots) in dots.iter_mut().take(T::TOGETHER).enumerate() {
            *dots = [start_of::<S, T, W>(x, parts * (first + j) + part, 0); 2];
        }
        for g in 8 / parts * part..8 / parts * (part + 1) {
            let mut words = [Loaded([S::splat_word(0); LONGEST_RUN]); 2];
            for i in 0..T::WORDS {
                for h in 0..2 {
                    words[h].0[i] = block[h].word::<S>(T::at(first, g) + i);
                }
            }
            for (j, dots) in dots.iter_mut().take(T::TOGETHER).enumerate() {
                let a = from_ref(&x.qs[8 * (first + j) + g]);
                for h in 0..2 {
                    let q = T::quants::<S>(words[h], first + j, g);
                    dots[h] = S::dot::<T, W>(dots[h], &[q], a, 0);
                }
            }
        }
        for (j, dots) in dots.iter().take(T::TOGETHER).enumerate() {
            for h in 0..2 {
                let scale = scale_of::<S, T>(&scales[h], parts * (first + j) + part);
                sums[h][0] = S::add_word(sums[h][0], S::mul_word(dots[h], scale));
            }
        }
    }
    sums
}

/// The integer sums of several rows in `H` halves of a tile, word by word.
#[inline(always)]
fn sums_of_several<S: Simd, T: Tiled256, const N: usize, const W: usize, const H: usize>(
    block: [Block<'_>; H],
    x: &Q8K<W>,
    fetch: Fetch,
) -> [[S::Words; N]; H] {
    let mut scales = [[S::splat_word(0); 4]; H];
    for (scales, block) in scales.iter_mut().zip(block) {
        *scales = T::scales::<S>(block);
    }
    let mut sums = [[S::splat_word(0); N]; H];
    for_eight!(J, {
        for block in block {
            // Either half asks for a half of what lies ahead.
            let eighth = 4 * block.half() + J / 2;
            block.fetch_ahead(eighth, 8, J % 2 * 2, fetch);
            block.fetch_ahead(eighth, 8, J % 2 * 2 + 1, fetch);
        }
        let mut dots = [[S::splat_word(0); N]; H];
        for_eight!(G, {
            let i = (32 * J + 4 * G) / T::SUB_BLOCK;
            if (4 * G).is_multiple_of(T::SUB_BLOCK) {
                for n in 0..N {
                    let start = start_of::<S, T, W>(x, i, n);
                    for dots in &mut dots {
                        dots[n] = start;
                    }
                }
            }
            for h in 0..H {
                let q = T::quants::<S>(Lazy { block: block[h], at: T::at(J, G) }, J, G);
                for (n, dot) in dots[h].iter_mut().enumerate() {
                    *dot = S::now(S::dot::<T, W>(*dot, &[q], from_ref(&x.qs[8 * J + G]), n));
                }
            }
            if (4 * G + 4).is_multiple_of(T::SUB_BLOCK) {
                for h in 0..H {
                    let scale = scale_of::<S, T>(&scales[h], i);
                    for (sum, dot) in sums[h].iter_mut().zip(dots[h]) {
                        *sum = S::now(S::add_word(*sum, S::mul_word(dot, scale)));
                    }
                }
            }
        });
    });
    sums
}

/// What the sum of sub-block `i` of row `n` begins with: the zero points of all weights.
#[inline(always)]
fn start_of<S: Simd, T: Tiled256, const W: usize>(x: &Q8K<W>, i: usize, n: usize) -> S::Words {
    if T::zero::<S>() == 0 {
        return S::splat_word(0);
    }
    let (pair, element) = (i / 4 * 2 + i % 2, i % 4 / 2);
    let sums = if T::SUB_BLOCK == 32 { x.sums_32[pair][n] } else { x.sums_16[pair][n] };
    S::splat_word(-T::zero::<S>() * i32::from(sums[element]))
}

/// The scale of sub-block `i`: byte `i % 4` of word `i / 4`.
#[inline(always)]
fn scale_of<S: Simd, T: Tiled256>(scales: &[S::Words; 4], i: usize) -> S::Words {
    let top = S::shl(scales[i / 4], 24 - 8 * (i as u32 % 4));
    if T::SIGNED_SCALES { S::sar(top, 24) } else { S::shr(top, 24) }
}

/// Adds the products of one half of a block, of which `sums` are the integers.
#[inline(always)]
fn add<S: Simd, T: Tiled256, const N: usize, const W: usize>(
    block: Block<'_>,
    x: &Q8K<W>,
    sums: [S::Words; N],
    acc: &mut [S::Lanes; N],
) {
    // Before `d`, as they lie in memory.
    let mins = T::mins::<S>(block);
    let d = block.load_halves::<S>(0);
    for (n, acc) in acc.iter_mut().enumerate() {
        *acc = plus::<S>(*acc, S::mul(d, S::splat(x.d[n])), sums[n]);
    }
    if T::MIN {
        let pairs = pairs::<S, T>(mins);
        let negative = S::mul(block.load_halves::<S>(1), S::splat(-1.0));
        for (n, acc) in acc.iter_mut().enumerate() {
            let sum = weighted::<S, T, W>(&pairs, x, n);
            *acc = plus::<S>(*acc, S::mul(negative, S::splat(x.d[n])), sum);
        }
    }
}

/// The minima of sub-blocks, two to a word as 16-bit numbers: of each four, the first and the third, then the others.
/// That is the order of the sums of [`Q8K`].
type Pairs<S> = [<S as Simd>::Words; 8];

#[inline(always)]
fn pairs<S: Simd, T: Tiled256>(bytes: [S::Words; 4]) -> Pairs<S> {
    let mut pairs = [S::splat_word(0); 8];
    for i in 0..64 / T::SUB_BLOCK {
        pairs[2 * i] = S::and(bytes[i], 0x00ff_00ff);
        pairs[2 * i + 1] = S::and(S::shr(bytes[i], 8), 0x00ff_00ff);
    }
    pairs
}

/// The sum over all sub-blocks of its minimum times the sum of the activations of row `n`.
#[inline(always)]
fn weighted<S: Simd, T: Tiled256, const W: usize>(
    pairs: &Pairs<S>,
    x: &Q8K<W>,
    n: usize,
) -> S::Words {
    let mut sum = S::splat_word(0);
    if T::SUB_BLOCK == 32 {
        for (&pair, sums) in pairs.iter().zip(&x.sums_32) {
            sum = S::dot_pairs(sum, pair, sums[n]);
        }
    } else {
        for (&pair, sums) in pairs.iter().zip(&x.sums_16) {
            sum = S::dot_pairs(sum, pair, sums[n]);
        }
    }
    sum
}
