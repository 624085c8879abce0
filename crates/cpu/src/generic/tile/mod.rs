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
//! multiplies those by signed ones: where `q = byte - zero`, the integer sum begins with `-zero * sum(a)`. Bytes of 8 bits keep their
//! sign where that is faster.
//!
//! Integer sums may be made in any order, and there are three, for blocks of [32](blocks) weights and of [256](superblocks):
//!
//! - Where there are registers enough ([`Simd::IS_WIDE`]) a single row of activations meets each word at once, in the order in which words lie in
//!   memory. It waits for memory, which is fastest for who reads one line after the other and each once.
//! - Several rows, too, meet each word at once, but eight of them first in one half of the tile, then in the other: so all sums stay in registers,
//!   and nothing but products takes the place of products. Numbers of words are constants there, because so are shifts by constants cheap.
//! - Elsewhere 32 weights at a time are unpacked into registers, and meet one row after the other.

/// Runs code for each number below eight, which is a constant in it.
macro_rules! for_eight {
    ($i:ident, $body:block) => {
        for_eight!(@each $i, $body, 0 1 2 3 4 5 6 7)
    };
    (@each $i:ident, $body:block, $($value:literal)*) => {$({
        const $i: usize = $value;
        $body
    })*};
}

mod blocks;
mod superblocks;

use super::{
    Simd,
    unpack::{Fetch, Tiled32, Tiled256},
};
use crate::{
    activation::{Block8, Q8, Q8K, TOGETHER},
    memory::is_fetched_in_steps,
    tile::{Line, ROWS},
};

/// The products of a tile of one stored type with activations.
pub(crate) trait Multiply {
    type Activations: Block8;

    /// Those with one row.
    fn one<S: Simd>(tile: &[Line], x: &[Self::Activations]) -> [f32; ROWS];

    /// Those with the first `N` of rows that are packed. With `fetch` the tile is read for the first time.
    fn several<S: Simd, const N: usize>(
        tile: &[Line],
        x: &[Packed<Self>],
        fetch: bool,
    ) -> [[f32; ROWS]; N];
}

type Packed<M> = <<M as Multiply>::Activations as Block8>::Packed;

/// Types with blocks of 32.
pub(crate) struct Blocks<T>(T);

impl<T: Tiled32> Multiply for Blocks<T> {
    type Activations = Q8;

    #[inline(always)]
    fn one<S: Simd>(tile: &[Line], x: &[Q8]) -> [f32; ROWS] {
        let [out] = blocks::products::<S, T, 1, 1>(tile, x, fetched_for_one());
        out
    }

    #[inline(always)]
    fn several<S: Simd, const N: usize>(
        tile: &[Line],
        x: &[Q8<TOGETHER>],
        fetch: bool,
    ) -> [[f32; ROWS]; N] {
        blocks::products::<S, T, N, TOGETHER>(tile, x, fetched_for_several(fetch))
    }
}

/// Types with blocks of 256.
pub(crate) struct Superblocks<T>(T);

impl<T: Tiled256> Multiply for Superblocks<T> {
    type Activations = Q8K;

    #[inline(always)]
    fn one<S: Simd>(tile: &[Line], x: &[Q8K]) -> [f32; ROWS] {
        let [out] = superblocks::products::<S, T, 1, 1>(tile, x, fetched_for_one());
        out
    }

    #[inline(always)]
    fn several<S: Simd, const N: usize>(
        tile: &[Line],
        x: &[Q8K<TOGETHER>],
        fetch: bool,
    ) -> [[f32; ROWS]; N] {
        superblocks::products::<S, T, N, TOGETHER>(tile, x, fetched_for_several(fetch))
    }
}

/// [`TileKernel::one`](crate::kernels::TileKernel::one).
#[inline(always)]
pub(crate) fn products_with_one<S: Simd, M: Multiply>(
    tile: &[Line],
    x: &[M::Activations],
    out: &mut [f32; ROWS],
) {
    *out = M::one::<S>(tile, x);
}

/// [`TileKernel::several`](crate::kernels::TileKernel::several): eight rows at a time; of the last ones eight, four or two, of which not all may
/// be wanted.
#[inline(always)]
pub(crate) fn products_with_several<S: Simd, M: Multiply>(
    tile: &[Line],
    x: &[Packed<M>],
    out: &mut [[f32; ROWS]],
) {
    let blocks = x.len() / out.len().div_ceil(TOGETHER);
    for (i, out) in out.chunks_mut(TOGETHER).enumerate() {
        let x = &x[i * blocks..][..blocks];
        match out.len() {
            1 | 2 => put::<2>(M::several::<S, 2>(tile, x, i == 0), out),
            3 | 4 => put::<4>(M::several::<S, 4>(tile, x, i == 0), out),
            _ => put::<TOGETHER>(M::several::<S, TOGETHER>(tile, x, i == 0), out),
        }
    }
}

/// As many as are wanted.
#[inline(always)]
fn put<const N: usize>(products: [[f32; ROWS]; N], out: &mut [[f32; ROWS]]) {
    for (out, products) in out.iter_mut().zip(products) {
        *out = products;
    }
}

/// How weights are asked for that one row meets. Who reads them word by word does not ask: a core knows what is next, and asking takes its
/// place.
#[inline(always)]
fn fetched_for_one() -> Fetch {
    if is_fetched_in_steps() { Fetch::InSteps } else { Fetch::AtOnce }
}

/// The same for several rows, if they are read for the first time.
#[inline(always)]
fn fetched_for_several(first: bool) -> Fetch {
    if first { Fetch::AtOnce } else { Fetch::No }
}

/// The most rows that both halves of a tile meet at a time where there are [registers](Simd::IS_WIDE) enough. Sums of more are as many in one half.
const MOST_OF_BOTH: usize = 4;

/// The products of the two halves of a tile with `N` rows: 16 rows of weights side by side.
type Halves<S, const N: usize> = [[<S as Simd>::Lanes; N]; 2];

/// `acc + scale * sum`.
#[inline(always)]
fn plus<S: Simd>(acc: S::Lanes, scale: S::Lanes, sum: S::Words) -> S::Lanes {
    S::fma(scale, S::to_lanes(sum), acc)
}

#[inline(always)]
fn stored<S: Simd, const N: usize>([first, second]: Halves<S, N>) -> [[f32; ROWS]; N] {
    let mut out = [[0.0; ROWS]; N];
    for (n, out) in out.iter_mut().enumerate() {
        let (halves, _) = out.as_chunks_mut();
        (halves[0], halves[1]) = (S::store(first[n]), S::store(second[n]));
    }
    out
}
