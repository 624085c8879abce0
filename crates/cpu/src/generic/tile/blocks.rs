//! Blocks of 32 weights that share a scale.

use std::hint::black_box;

use super::{Products, no_products, parts, plus, stored, words_in_dots};
use crate::{
    activation::{Q8, TOGETHER},
    generic::{
        Simd,
        unpack::{Block, Tiled32, zero},
    },
    memory::Fetch,
    tile::{Line, ROWS},
};

/// The products of a tile with a row alone, in all `P` parts at a time.
#[inline(always)]
pub(super) fn products_with_one<S: Simd, T: Tiled32, const P: usize>(
    tile: &[Line],
    x: &[Q8],
    fetch: Fetch,
) -> [[f32; ROWS]; 1] {
    let mut acc = no_products::<S, 1>();
    for (block, x) in Block::all(tile, &T::LAYOUT).zip(x) {
        add::<S, T, 1, 1, P>(block, 0, x, fetch, &mut acc);
    }
    stored::<S, 1>(acc)
}

/// The same with the first `N` of several rows, in `P` parts at a time.
#[inline(always)]
pub(super) fn products_with_several<S: Simd, T: Tiled32, const N: usize, const P: usize>(
    tile: &[Line],
    x: &[Q8<TOGETHER>],
    fetch: Fetch,
) -> [[f32; ROWS]; N] {
    let mut acc = no_products::<S, N>();
    for (block, x) in Block::all(tile, &T::LAYOUT).zip(x) {
        for first in (0..parts::<S>()).step_by(P) {
            let x = if S::IS_WIDE { x } else { black_box(x) };
            add::<S, T, N, TOGETHER, P>(block, first, x, fetch, &mut acc);
        }
    }
    stored::<S, N>(acc)
}

/// Adds the products of a block in the `P` parts from `first` on.
#[inline(always)]
fn add<S: Simd, T: Tiled32, const N: usize, const W: usize, const P: usize>(
    block: Block<'_>,
    first: usize,
    x: &Q8<W>,
    fetch: Fetch,
    acc: &mut Products<S, N>,
) {
    let blocks = block.parts::<P>(first);
    let sums = sums::<S, T, N, W, P>(&blocks, x, fetch);
    for (p, block) in blocks.iter().enumerate() {
        let (d, acc) = (block.load_halves::<S>(0), &mut acc[first + p]);
        let mut n = 0;
        while n < N {
            acc[n] = plus::<S>(acc[n], d, x.d[n], sums[p][n]);
            n += 1;
        }
        if T::MIN {
            let m = block.load_halves::<S>(1);
            n = 0;
            while n < N {
                acc[n] = plus::<S>(acc[n], m, x.d[n], S::splat_word(x.sum[n]));
                n += 1;
            }
        }
    }
}

/// The integer sums, word by word.
#[inline(always)]
fn sums<S: Simd, T: Tiled32, const N: usize, const W: usize, const P: usize>(
    blocks: &[Block<'_>; P],
    x: &Q8<W>,
    fetch: Fetch,
) -> [[S::Words; N]; P] {
    let (mut sums, mut dots) = ([[S::splat_word(0); N]; P], [[S::dots(0); N]; P]);
    let (mut p, mut n) = (0, 0);
    while n < N {
        // The zero points of all weights.
        let start = if const { zero::<S, T>() == 0 } { 0 } else { -zero::<S, T>() * x.sum[n] };
        while p < P {
            sums[p][n] = S::splat_word(start);
            dots[p][n] = S::dots(if S::NARROW { 0 } else { start });
            p += 1;
        }
        (p, n) = (0, n + 1);
    }
    for_eight!(G, {
        if const { G.is_multiple_of(2) } {
            blocks[0].fetch_ahead::<S, T, P>(G / 2, 4, fetch);
        }
        (p, n) = (0, 0);
        while p < P {
            let q = T::quants::<S>(blocks[p], G);
            while n < N {
                dots[p][n] = S::dots_now(S::dot::<T>(dots[p][n], q, &x.qs[G][n]));
                if const { S::NARROW && (G + 1).is_multiple_of(words_in_dots::<S, T>()) } {
                    sums[p][n] = S::add_word(sums[p][n], S::to_words(dots[p][n]));
                    dots[p][n] = S::dots(0);
                }
                n += 1;
            }
            (p, n) = (p + 1, 0);
        }
    });
    (p, n) = (0, 0);
    while !S::NARROW && p < P {
        while n < N {
            sums[p][n] = S::to_words(dots[p][n]);
            n += 1;
        }
        (p, n) = (p + 1, 0);
    }
    sums
}
