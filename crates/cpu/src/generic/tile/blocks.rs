//! Blocks of 32 weights that share a scale.

use std::{array, slice::from_ref};

use super::{Halves, MOST_OF_BOTH, plus, stored};
use crate::{
    activation::Q8,
    generic::{
        Simd,
        unpack::{Block, Fetch, Tiled32},
    },
    tile::{Line, ROWS},
};

/// The products of a tile with the first `N` of `W` rows.
#[inline(always)]
pub(super) fn products<S: Simd, T: Tiled32, const N: usize, const W: usize>(
    tile: &[Line],
    x: &[Q8<W>],
    fetch: Fetch,
) -> [[f32; ROWS]; N] {
    let mut acc = [[S::splat(0.0); N]; 2];
    for (block, x) in Block::all(tile, &T::LAYOUT).zip(x) {
        if !S::IS_WIDE {
            add_at_once::<S, T, N, W>(block, x, fetch, &mut acc);
            continue;
        }
        if N > 1 {
            for quarter in 0..4 {
                block[0].fetch_ahead(0, 1, quarter, fetch);
            }
        }
        if N > MOST_OF_BOTH {
            for (block, acc) in block.iter().zip(&mut acc) {
                add_word_by_word::<S, T, N, W, 1>([*block], x, array::from_mut(acc));
            }
        } else {
            add_word_by_word::<S, T, N, W, 2>(block, x, &mut acc);
        }
    }
    stored::<S, N>(acc)
}

#[expect(clippy::needless_range_loop, reason = "halves come first, then rows")]
#[inline(always)]
fn add_at_once<S: Simd, T: Tiled32, const N: usize, const W: usize>(
    block: [Block<'_>; 2],
    x: &Q8<W>,
    fetch: Fetch,
    acc: &mut Halves<S, N>,
) {
    block[0].fetch_ahead(0, 1, 0, fetch);
    let first = T::unpacked::<S>(block[0]);
    block[0].fetch_ahead(0, 1, 1, fetch);
    let q = [first, T::unpacked::<S>(block[1])];
    block[0].fetch_ahead(0, 1, 2, fetch);
    let d = [block[0].load_halves::<S>(0), block[1].load_halves::<S>(0)];
    for n in 0..N {
        let start = start::<S, T, W>(x, n);
        for h in 0..2 {
            if n == 0 && h == 1 {
                block[0].fetch_ahead(0, 1, 3, fetch);
            }
            let sum = S::dot::<T, W>(start, &q[h], &x.qs, n);
            acc[h][n] = plus::<S>(acc[h][n], S::mul(d[h], S::splat(x.d[n])), sum);
        }
    }
    for (block, acc) in block.iter().zip(acc) {
        add_minimum::<S, T, N, W>(*block, x, acc);
    }
}

/// In `H` halves of a tile.
#[inline(always)]
fn add_word_by_word<S: Simd, T: Tiled32, const N: usize, const W: usize, const H: usize>(
    block: [Block<'_>; H],
    x: &Q8<W>,
    acc: &mut [[S::Lanes; N]; H],
) {
    let mut sums = [[S::splat_word(0); N]; H];
    for n in 0..N {
        let start = start::<S, T, W>(x, n);
        for sums in &mut sums {
            sums[n] = start;
        }
    }
    for_eight!(G, {
        for (block, sums) in block.iter().zip(&mut sums) {
            let q = T::quants::<S>(*block, G);
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = S::now(S::dot::<T, W>(*sum, &[q], from_ref(&x.qs[G]), n));
            }
        }
    });
    for h in 0..H {
        let d = block[h].load_halves::<S>(0);
        for (n, acc) in acc[h].iter_mut().enumerate() {
            *acc = plus::<S>(*acc, S::mul(d, S::splat(x.d[n])), sums[h][n]);
        }
    }
    for (block, acc) in block.iter().zip(acc) {
        add_minimum::<S, T, N, W>(*block, x, acc);
    }
}

/// What the sum of row `n` begins with: the zero points of all weights.
#[inline(always)]
fn start<S: Simd, T: Tiled32, const W: usize>(x: &Q8<W>, n: usize) -> S::Words {
    match T::zero::<S>() {
        0 => S::splat_word(0),
        zero => S::splat_word(-zero * x.sum[n]),
    }
}

/// The minimum of a block, if there is one.
#[inline(always)]
fn add_minimum<S: Simd, T: Tiled32, const N: usize, const W: usize>(
    block: Block<'_>,
    x: &Q8<W>,
    acc: &mut [S::Lanes; N],
) {
    if T::MIN {
        let m = block.load_halves::<S>(1);
        for (n, acc) in acc.iter_mut().enumerate() {
            *acc = plus::<S>(*acc, S::mul(m, S::splat(x.d[n])), S::splat_word(x.sum[n]));
        }
    }
}
