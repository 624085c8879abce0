//! Blocks of 256 weights, in sub-blocks of 16 or 32 that have a scale each.

use std::hint::black_box;

use super::{no_products, parts, plus, stored, words_in_dots};
use crate::{
    activation::{Q8K, Sums, TOGETHER},
    generic::{
        Simd,
        unpack::{Block, LONGEST_RUN, Loaded, Tiled256, zero},
    },
    memory::Fetch,
    tile::{Line, ROWS},
};

/// The products of a tile with a row alone, in all `P` parts at a time.
#[inline(always)]
pub(super) fn products_with_one<S: Simd, T: Tiled256, const P: usize>(
    tile: &[Line],
    x: &[Q8K],
    fetch: Fetch,
) -> [[f32; ROWS]; 1] {
    let mut acc = no_products::<S, 1>();
    for (block, x) in Block::all(tile, &T::LAYOUT).zip(x) {
        let sums = if S::IS_WIDE {
            sums_in_order::<S, T, P>(block.parts(0), x, fetch)
        } else {
            sums_word_by_word::<S, T, 1, 1, P>(block, 0, x, fetch)
        };
        for (i, block) in block.parts::<P>(0).iter().enumerate() {
            add::<S, T, 1, 1>(*block, x, sums[i], &mut acc[i]);
        }
    }
    stored::<S, 1>(acc)
}

/// The same with the first `N` of several rows, in `P` parts at a time.
#[inline(always)]
pub(super) fn products_with_several<S: Simd, T: Tiled256, const N: usize, const P: usize>(
    tile: &[Line],
    x: &[Q8K<TOGETHER>],
    fetch: Fetch,
) -> [[f32; ROWS]; N] {
    let mut acc = no_products::<S, N>();
    for (block, x) in Block::all(tile, &T::LAYOUT).zip(x) {
        for first in (0..parts::<S>()).step_by(P) {
            let x = if S::IS_WIDE { x } else { black_box(x) };
            let sums = sums_word_by_word::<S, T, N, TOGETHER, P>(block, first, x, fetch);
            for (i, block) in block.parts::<P>(first).iter().enumerate() {
                add::<S, T, N, TOGETHER>(*block, x, sums[i], &mut acc[first + i]);
            }
        }
    }
    stored::<S, N>(acc)
}

/// The integer sums of a single row, word by word in the order of memory.
#[inline(always)]
fn sums_in_order<S: Simd, T: Tiled256, const P: usize>(
    block: [Block<'_>; P],
    x: &Q8K,
    fetch: Fetch,
) -> [[S::Words; 1]; P] {
    let mut scales = [[S::splat_word(0); 4]; P];
    for (scales, block) in scales.iter_mut().zip(block) {
        *scales = T::scales::<S>(block);
    }
    let mut sums = [[S::splat_word(0); 1]; P];
    let parts = 32 / T::SUB_BLOCK;
    for step in 0..8 / T::TOGETHER * parts {
        let (first, part) = (step / parts * T::TOGETHER, step % parts);
        let mut dots = [[S::dots(0); P]; 8];
        for (j, dots) in dots.iter_mut().take(T::TOGETHER).enumerate() {
            *dots = [S::dots(start_of::<S, T, 1>(x, parts * (first + j) + part, 0)); P];
        }
        for g in 8 / parts * part..8 / parts * (part + 1) {
            block[0].fetch_words_ahead::<T>(T::at(first, g), fetch);
            let mut words = [Loaded([S::splat_word(0); LONGEST_RUN]); P];
            for i in 0..T::WORDS {
                for p in 0..P {
                    words[p].0[i] = block[p].word::<S>(T::at(first, g) + i);
                }
            }
            for (j, dots) in dots.iter_mut().take(T::TOGETHER).enumerate() {
                let [a] = &x.qs[8 * (first + j) + g];
                for p in 0..P {
                    let q = T::quants::<S>(words[p], first + j, g);
                    dots[p] = S::dot::<T>(dots[p], q, a);
                }
            }
        }
        for (j, dots) in dots.iter().take(T::TOGETHER).enumerate() {
            for p in 0..P {
                let scale = scale_of::<S, T>(&scales[p], parts * (first + j) + part);
                sums[p][0] = S::add_dots(sums[p][0], dots[p], scale);
            }
        }
    }
    sums
}

/// The integer sums of `N` rows in the `P` parts of a tile from `first` on, word by word.
#[inline(always)]
fn sums_word_by_word<S: Simd, T: Tiled256, const N: usize, const W: usize, const P: usize>(
    block: Block<'_>,
    first: usize,
    x: &Q8K<W>,
    fetch: Fetch,
) -> [[S::Words; N]; P] {
    let blocks = block.parts::<P>(first);
    let mut scales = [[S::splat_word(0); 4]; P];
    for (scales, block) in scales.iter_mut().zip(blocks) {
        *scales = T::scales::<S>(block);
    }
    let mut sums = [[S::splat_word(0); N]; P];
    if S::IS_WIDE {
        for_eight!(J, {
            add_32::<S, T, N, W, P>(&blocks, &scales, x, J, fetch, &mut sums);
        });
    } else {
        for j in 0..8 {
            add_32::<S, T, N, W, P>(&blocks, &scales, x, j, fetch, &mut sums);
        }
    }
    if const { S::NARROW && zero::<S, T>() != 0 } {
        for (sums, scales) in sums.iter_mut().zip(&scales) {
            subtract_zeros::<S, T, N, W>(scales, x, sums);
        }
    }
    sums
}

/// Adds the products of the weights `32j .. 32j + 32`.
#[inline(always)]
fn add_32<S: Simd, T: Tiled256, const N: usize, const W: usize, const P: usize>(
    blocks: &[Block<'_>; P],
    scales: &[[S::Words; 4]; P],
    x: &Q8K<W>,
    j: usize,
    fetch: Fetch,
    sums: &mut [[S::Words; N]; P],
) {
    let mut words = [blocks[0].run::<T>(j); P];
    for (words, block) in words.iter_mut().zip(blocks) {
        *words = block.run::<T>(j);
    }
    let mut dots = [[S::dots(0); N]; P];
    for_eight!(G, {
        let i = (32 * j + 4 * G) / T::SUB_BLOCK;
        let (mut p, mut n) = (0, 0);
        if const { G.is_multiple_of(2) } {
            blocks[0].fetch_ahead::<S, T, P>(4 * j + G / 2, 32, fetch);
        }
        if const { G.is_multiple_of(run::<S, T>()) } {
            while n < N {
                let start = S::dots(start_of::<S, T, W>(x, i, n));
                while p < P {
                    dots[p][n] = start;
                    p += 1;
                }
                (p, n) = (0, n + 1);
            }
            n = 0;
        }
        while p < P {
            let q = T::quants::<S>(words[p].group::<T>(G), j, G);
            while n < N {
                dots[p][n] = S::dots_now(S::dot::<T>(dots[p][n], q, &x.qs[8 * j + G][n]));
                n += 1;
            }
            (p, n) = (p + 1, 0);
        }
        if const { (G + 1).is_multiple_of(run::<S, T>()) } {
            p = 0;
            while p < P {
                let scale = scale_of::<S, T>(&scales[p], i);
                while n < N {
                    sums[p][n] = S::now(S::add_dots(sums[p][n], dots[p][n], scale));
                    n += 1;
                }
                (p, n) = (p + 1, 0);
            }
        }
    });
}

/// So many words are multiplied until their sums are scaled.
const fn run<S: Simd, T: Tiled256>() -> usize {
    let (most, of_scale) = (words_in_dots::<S, T>(), T::SUB_BLOCK / 4);
    if most < of_scale { most } else { of_scale }
}

/// What the sum of sub-block `i` of row `n` begins with: the zero points of all weights, if it has room for them.
#[inline(always)]
fn start_of<S: Simd, T: Tiled256, const W: usize>(x: &Q8K<W>, i: usize, n: usize) -> i32 {
    if const { S::NARROW || zero::<S, T>() == 0 } {
        return 0;
    }
    let (pair, element) = (i / 4 * 2 + i % 2, i % 4 / 2);
    let sums = if T::SUB_BLOCK == 32 { x.sums.of_32[pair][n] } else { x.sums.of_16[pair][n] };
    -zero::<S, T>() * i32::from(sums[element])
}

/// Takes the zero points of all weights off sums that did not begin with them.
#[inline(always)]
fn subtract_zeros<S: Simd, T: Tiled256, const N: usize, const W: usize>(
    scales: &[S::Words; 4],
    x: &Q8K<W>,
    sums: &mut [S::Words; N],
) {
    let minus_zero = S::splat_word(-zero::<S, T>());
    let pairs = pairs::<S, T>(*scales, T::SIGNED_SCALES);
    let mut n = 0;
    while n < N {
        let weighted = weighted::<S, T, W>(&pairs, &x.sums, n);
        sums[n] = S::add_word(sums[n], S::mul_word(weighted, minus_zero));
        n += 1;
    }
}

/// The scale of sub-block `i`: byte `i % 4` of word `i / 4`.
#[inline(always)]
fn scale_of<S: Simd, T: Tiled256>(scales: &[S::Words; 4], i: usize) -> S::Words {
    S::scale(scales[i / 4], i as u32 % 4, T::SIGNED_SCALES)
}

/// Adds the products of a block, of which `sums` are the integers.
#[inline(always)]
fn add<S: Simd, T: Tiled256, const N: usize, const W: usize>(
    block: Block<'_>,
    x: &Q8K<W>,
    sums: [S::Words; N],
    acc: &mut [S::Part; N],
) {
    // Before `d`, as they lie in memory.
    let mins = T::mins::<S>(block);
    let d = block.load_halves::<S>(0);
    let mut n = 0;
    while n < N {
        acc[n] = plus::<S>(acc[n], d, x.d[n], sums[n]);
        n += 1;
    }
    if T::MIN {
        let pairs = pairs::<S, T>(mins, false);
        let minus_one = S::part(S::splat(-1.0), 0);
        let negative = S::mul_part(block.load_halves::<S>(1), minus_one);
        n = 0;
        while n < N {
            let sum = weighted::<S, T, W>(&pairs, &x.sums, n);
            acc[n] = plus::<S>(acc[n], negative, x.d[n], sum);
            n += 1;
        }
    }
}

/// The bytes of sub-blocks, two to a word as 16-bit numbers: of each four, the first and the third, then the others.
/// That is the order of the sums of [`Q8K`].
pub(crate) type Pairs<S> = [<S as Simd>::Words; 8];

#[inline(always)]
pub(crate) fn pairs<S: Simd, T: Tiled256>(bytes: [S::Words; 4], signed: bool) -> Pairs<S> {
    let mut pairs = [S::splat_word(0); 8];
    let mut i = 0;
    while i < const { 64 / T::SUB_BLOCK } {
        pairs[2 * i] = pair::<S>(bytes[i], signed);
        pairs[2 * i + 1] = pair::<S>(S::shr(bytes[i], 8), signed);
        i += 1;
    }
    pairs
}

/// The bytes 0 and 2 of each word as 16-bit numbers.
#[inline(always)]
fn pair<S: Simd>(words: S::Words, signed: bool) -> S::Words {
    let bytes = S::and(words, 0x00ff_00ff);
    if !signed {
        return bytes;
    }
    // Where the top bit of a byte is set, those above it are, too: 255 times that bit, one byte up.
    let sign = S::and(S::shr(bytes, 7), 0x0001_0001);
    S::or(bytes, S::mul_word(sign, S::splat_word(0xff00)))
}

/// The sum over all sub-blocks of its number times the sum of the activations of row `n`.
#[inline(always)]
pub(crate) fn weighted<S: Simd, T: Tiled256, const W: usize>(
    pairs: &Pairs<S>,
    sums: &Sums<W>,
    n: usize,
) -> S::Words {
    let (mut sum, mut i) = (S::splat_word(0), 0);
    if const { T::SUB_BLOCK == 32 } {
        while i < 4 {
            sum = S::dot_pairs(sum, pairs[i], sums.of_32[i][n]);
            i += 1;
        }
    } else {
        while i < 8 {
            sum = S::dot_pairs(sum, pairs[i], sums.of_16[i][n]);
            i += 1;
        }
    }
    sum
}
