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
//! multiplies those by signed ones; where `q = byte - zero`, the integer sum has `zero * sum(a)` taken off. Bytes of 8 bits keep their
//! sign where that is faster.
//!
//! Integer sums may be made in any order. Rows of activations meet each word of weights at once, so many rows as many registers of weights ([`Simd::PARTS`]) that the sums
//! stay in registers, for blocks of [32](blocks) weights and of [256](superblocks). Where there are registers enough ([`Simd::IS_WIDE`])
//!
//! - the numbers of words are constants, because so are shifts by constants cheap;
//! - a row alone meets words in the order in which they lie in memory, each once. It waits for memory, which is fastest so.
//!
//! Hardware that sums two products and not four adds such sums in 16 bits ([`Simd::NARROW`]), as many as can not overflow. Scales are multiplied into them
//! when they are widened.

/// Runs code for each number below eight, which is a constant in it. That code stands there eight times, or 64 times: `while` and conditions in `const`
/// blocks leave compilers much less to do than iterators and conditions that are decided later.
macro_rules! for_eight {
    ($i:ident, $body:block) => {
        for_eight!(@each $i, $body, 0 1 2 3 4 5 6 7)
    };
    (@each $i:ident, $body:block, $($value:literal)*) => {$({
        const $i: usize = $value;
        $body
    })*};
}

#[cfg(target_arch = "x86_64")]
pub(crate) use for_eight;

mod blocks;
pub(crate) mod superblocks;

use super::{
    Simd,
    unpack::{Tiled, Tiled32, Tiled256},
};
use crate::{
    activation::{Block8, Q8, Q8K, TOGETHER},
    memory::{Fetch, fetched_for_one},
    tile::{Line, ROWS},
};

/// The products of a tile of one stored type with activations.
pub(crate) trait Multiply {
    type Activations: Block8;

    /// Those with one row.
    fn one<S: Simd>(tile: &[Line], x: &[Self::Activations]) -> [f32; ROWS];

    /// Those with the first `N` of rows that are packed, `P` parts of the tile at a time. With `fetch` the tile is read for the first time.
    fn several<S: Simd, const N: usize, const P: usize>(
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
        let fetch = fetched_for_one(S::IS_WIDE);
        let [out] = match S::PARTS {
            1 => blocks::products_with_one::<S, T, 2>(tile, x, fetch),
            2 => blocks::products_with_one::<S, T, 4>(tile, x, fetch),
            _ => blocks::products_with_one::<S, T, 8>(tile, x, fetch),
        };
        out
    }

    #[inline(always)]
    fn several<S: Simd, const N: usize, const P: usize>(
        tile: &[Line],
        x: &[Q8<TOGETHER>],
        fetch: bool,
    ) -> [[f32; ROWS]; N] {
        blocks::products_with_several::<S, T, N, P>(tile, x, fetched_for_several(fetch))
    }
}

/// Types with blocks of 256.
pub(crate) struct Superblocks<T>(T);

impl<T: Tiled256> Multiply for Superblocks<T> {
    type Activations = Q8K;

    #[inline(always)]
    fn one<S: Simd>(tile: &[Line], x: &[Q8K]) -> [f32; ROWS] {
        let fetch = fetched_for_one(S::IS_WIDE);
        let [out] = match S::PARTS {
            1 => superblocks::products_with_one::<S, T, 2>(tile, x, fetch),
            2 => superblocks::products_with_one::<S, T, 4>(tile, x, fetch),
            _ => superblocks::products_with_one::<S, T, 8>(tile, x, fetch),
        };
        out
    }

    #[inline(always)]
    fn several<S: Simd, const N: usize, const P: usize>(
        tile: &[Line],
        x: &[Q8K<TOGETHER>],
        fetch: bool,
    ) -> [[f32; ROWS]; N] {
        superblocks::products_with_several::<S, T, N, P>(tile, x, fetched_for_several(fetch))
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
            // There is no third part.
            1 | 2 if S::PARTS == 1 => put(M::several::<S, 2, 2>(tile, x, i == 0), out),
            1 | 2 => put(M::several::<S, 2, 4>(tile, x, i == 0), out),
            3 | 4 => put(M::several::<S, 4, 2>(tile, x, i == 0), out),
            _ => put(M::several::<S, TOGETHER, 1>(tile, x, i == 0), out),
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

/// How weights are asked for that several rows meet, if they are read for the first time.
#[inline(always)]
fn fetched_for_several(first: bool) -> Fetch {
    if first { Fetch::AtOnce } else { Fetch::No }
}

/// The most parts that a tile has.
const MOST_PARTS: usize = 8;

/// How many parts a tile has.
#[inline(always)]
fn parts<S: Simd>() -> usize {
    2 * S::PARTS
}

/// The products of all parts of a tile with `N` rows. Those beyond the last part are not used.
type Products<S, const N: usize> = [[<S as Simd>::Part; N]; MOST_PARTS];

#[inline(always)]
fn no_products<S: Simd, const N: usize>() -> Products<S, N> {
    [[S::part(S::splat(0.0), 0); N]; MOST_PARTS]
}

#[inline(always)]
fn stored<S: Simd, const N: usize>(products: Products<S, N>) -> [[f32; ROWS]; N] {
    let mut out = [[0.0; ROWS]; N];
    for (n, out) in out.iter_mut().enumerate() {
        let (halves, _) = out.as_chunks_mut();
        for (half, products) in halves.iter_mut().zip(products.chunks_exact(S::PARTS)) {
            let mut lanes = S::splat(0.0);
            for (i, products) in products.iter().enumerate() {
                S::set_part(&mut lanes, i, products[n]);
            }
            *half = S::store(lanes);
        }
    }
    out
}

/// `acc + scale * d * sum`, where the product of the scales is rounded.
#[inline(always)]
pub(crate) fn plus<S: Simd>(acc: S::Part, scale: S::Part, d: f32, sum: S::Words) -> S::Part {
    S::fma_part(S::mul_part(scale, S::part(S::splat(d), 0)), S::to_part(sum), acc)
}

/// So many words of a `T` can be multiplied before their sums have to be widened, of eight.
const fn words_in_dots<S: Simd, T: Tiled>() -> usize {
    if !S::NARROW {
        return 8;
    }
    // With a sign the largest magnitude of 8 bits is 128.
    let largest = if T::BITS == 8 { 128 } else { (1 << T::BITS) - 1 };
    // A number is the sum of two products for each word.
    let most = i16::MAX as usize / (2 * 127 * largest);
    if most < 8 { most } else { 8 }
}
