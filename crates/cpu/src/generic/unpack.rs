//! Tiles of each stored type as the integer dot products want them: one byte per weight, integer scales.
//!
//! The layouts are documented on the block types of [`apr_tensor::block`]. Here each word stands 16 times, once for each
//! row of half a [tile](crate::tile), so what is written for one word happens to 16 rows.

use apr_tensor::{
    DType,
    block::{
        IQ4_NL, IQ4_VALUES, IQ4_XS, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0,
    },
};

use super::Simd;
use crate::{
    memory::{prefetch, prefetch_early},
    tile::{FETCH_AHEAD, FETCH_EARLY, FETCH_SOON, Layout, Line},
};

/// How weights are asked for before they are used.
#[derive(Clone, Copy)]
pub(crate) enum Fetch {
    /// Not at all: they have been read before, or come in time on their own.
    No,
    AtOnce,
    /// First into the second-level cache, then into the first one.
    InSteps,
}

/// A block of each of the 16 rows of one half of a tile.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    lines: &'a [Line],
    layout: &'static Layout,
    half: usize,
}

impl<'a> Block<'a> {
    /// The blocks of a tile, in both of its halves.
    #[inline(always)]
    pub(crate) fn all(
        tile: &'a [Line],
        layout: &'static Layout,
    ) -> impl Iterator<Item = [Self; 2]> {
        let blocks = tile.chunks_exact(layout.lines());
        blocks.map(move |lines| [Self { lines, layout, half: 0 }, Self { lines, layout, half: 1 }])
    }

    /// Asks for what will be read some blocks later: share `i` of `shares`, of which quarter `quarter`. A core that is asked for too much at a time
    /// has none of it in time.
    #[inline(always)]
    pub(crate) fn fetch_ahead(&self, i: usize, shares: usize, quarter: usize, fetch: Fetch) {
        let len = self.layout.lines().div_ceil(shares);
        for line in i * len + len * quarter / 4..i * len + len * (quarter + 1) / 4 {
            let ahead = |bytes| self.lines.as_ptr().wrapping_add(line).wrapping_byte_add(bytes);
            match fetch {
                Fetch::No => {}
                Fetch::AtOnce => prefetch(ahead(FETCH_AHEAD)),
                Fetch::InSteps => {
                    prefetch_early(ahead(FETCH_EARLY));
                    prefetch(ahead(FETCH_SOON));
                }
            }
        }
    }

    /// The words from number `from` on.
    #[inline(always)]
    fn load<S: Simd, const N: usize>(&self, from: usize) -> [S::Words; N] {
        let mut out = [S::splat_word(0); N];
        let words = self.lines[..2 * self.layout.words].as_chunks::<2>().0;
        for (out, lines) in out.iter_mut().zip(&words[from..from + N]) {
            *out = S::load_line(&lines[self.half]);
        }
        out
    }

    /// 16-bit number `i`, as a half-precision number.
    #[inline(always)]
    pub(crate) fn load_halves<S: Simd>(&self, i: usize) -> S::Lanes {
        S::load_halves(self.half(i))
    }

    #[inline(always)]
    fn half(&self, i: usize) -> &'a [u8; 32] {
        &self.lines[2 * self.layout.words + i].0.as_chunks().0[self.half]
    }
}

/// What all types of tiles have.
pub(crate) trait Tiled {
    const LAYOUT: Layout;
    /// Unpacked bytes are less than two to the power of this.
    const BITS: u32;
    /// What a byte without a sign is for the weight 0.
    const ZERO: i32;
    /// Whether unpacking takes so long that hardware reads memory too late on its own.
    const IS_FETCHED: bool;
    /// Whether the second half of a block is the (scale of the) minimum.
    const MIN: bool;

    /// What a byte is for the weight 0.
    #[inline(always)]
    fn zero<S: Simd>() -> i32 {
        if S::SIGNED && Self::BITS == 8 { 0 } else { Self::ZERO }
    }
}

/// Types of 32 weights that share a scale: weight `i` is `scale * (byte[i] - zero) + min`.
pub(crate) trait Tiled32: Tiled {
    /// Word `g` holds the weights `4g .. 4g + 4`.
    fn quants<S: Simd>(block: Block<'_>) -> [S::Words; 8];
}

/// Types of 256 weights, in sub-blocks: weight `i` is `d * scale * (byte[i] - zero) - dmin * min`.
pub(crate) trait Tiled256: Tiled {
    /// 16 or 32.
    const SUB_BLOCK: usize;
    /// Whether scales are signed bytes.
    const SIGNED_SCALES: bool = false;

    /// The weights `32j .. 32j + 32`; word `g` holds four.
    fn quants<S: Simd>(block: Block<'_>, j: usize) -> [S::Words; 8];
    /// Byte `i % 4` of word `i / 4` is the scale of sub-block `i`.
    fn scales<S: Simd>(block: Block<'_>) -> [S::Words; 4];
    /// The same of the minima.
    #[inline(always)]
    fn mins<S: Simd>(_: Block<'_>) -> [S::Words; 4] {
        [S::splat_word(0); 4]
    }
}

const NIBBLES: u32 = 0x0f0f_0f0f;
const CRUMBS: u32 = 0x0303_0303;
const BITS: u32 = 0x0101_0101;
/// What is added to the entries of [`IQ4_VALUES`] to make bytes without a sign of them.
const IQ4_ZERO: i32 = 128;

/// The values with `zero` added, as bytes.
const fn iq4_bytes(zero: i32) -> [u8; 16] {
    let mut bytes = [0; 16];
    let mut i = 0;
    while i < 16 {
        bytes[i] = (IQ4_VALUES[i] as i32 + zero) as u8;
        i += 1;
    }
    bytes
}

/// The low nibbles of four words, then the high ones.
#[inline(always)]
fn nibbles<S: Simd>(words: [S::Words; 4]) -> [S::Words; 8] {
    let mut out = [S::splat_word(0); 8];
    for g in 0..4 {
        out[g] = S::and(words[g], NIBBLES);
        out[4 + g] = S::and(S::shr(words[g], 4), NIBBLES);
    }
    out
}

/// The same, with a fifth bit each: bit `i` of `high` is that of weight `i`.
#[inline(always)]
fn five_bits<S: Simd>(high: S::Words, words: [S::Words; 4]) -> [S::Words; 8] {
    let mut out = nibbles::<S>(words);
    for (g, out) in out.iter_mut().enumerate() {
        *out = S::or(*out, S::shl(S::spread_bits(high, g), 4));
    }
    out
}

/// The same looked up.
#[inline(always)]
fn lookup<S: Simd>(words: [S::Words; 4]) -> [S::Words; 8] {
    let mut out = nibbles::<S>(words);
    for out in &mut out {
        *out = S::lookup(
            *out,
            if S::SIGNED { &const { iq4_bytes(0) } } else { &const { iq4_bytes(IQ4_ZERO) } },
        );
    }
    out
}

/// Bits `shift ..` of each byte of `N` words, as far as `mask` goes.
#[inline(always)]
fn bits<S: Simd, const N: usize>(mut words: [S::Words; N], shift: u32, mask: u32) -> [S::Words; N] {
    for word in &mut words {
        *word = S::and(S::shr(*word, shift), mask);
    }
    words
}

/// `low[g] | high[g] << shift`.
#[inline(always)]
fn joined<S: Simd, const N: usize>(
    mut low: [S::Words; N],
    high: [S::Words; N],
    shift: u32,
) -> [S::Words; N] {
    for g in 0..N {
        low[g] = S::or(low[g], S::shl(high[g], shift));
    }
    low
}

/// Bytes below 64 with 32 taken off. With the top bit set no byte borrows from the next.
#[inline(always)]
fn less_32<S: Simd>(words: S::Words) -> S::Words {
    const TOP: u32 = 0x8080_8080;
    let lowered = S::add_word(S::xor(words, TOP), S::splat_word(-0x2020_2020));
    S::xor(lowered, TOP)
}

macro_rules! tiled {
    ($($type:ident: $bits:literal bits, zero $zero:expr, min $min:literal, fetched $fetched:literal;)*) => {$(
        impl Tiled for $type {
            const LAYOUT: Layout = Layout::of(DType::$type).expect("a type of blocks");
            const BITS: u32 = $bits;
            const ZERO: i32 = $zero;
            const MIN: bool = $min;
            const IS_FETCHED: bool = $fetched;
        }
    )*};
}

tiled! {
    Q4_0: 4 bits, zero 8, min false, fetched false;
    Q4_1: 4 bits, zero 0, min true, fetched false;
    Q5_0: 5 bits, zero 16, min false, fetched true;
    Q5_1: 5 bits, zero 0, min true, fetched true;
    Q8_0: 8 bits, zero 128, min false, fetched false;
    IQ4_NL: 8 bits, zero IQ4_ZERO, min false, fetched true;
    Q2_K: 2 bits, zero 0, min true, fetched true;
    Q3_K: 3 bits, zero 4, min false, fetched true;
    Q4_K: 4 bits, zero 0, min true, fetched true;
    Q5_K: 5 bits, zero 0, min true, fetched true;
    Q6_K: 6 bits, zero 32, min false, fetched true;
    IQ4_XS: 8 bits, zero IQ4_ZERO, min false, fetched true;
}

impl Tiled32 for Q4_0 {
    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>) -> [S::Words; 8] {
        nibbles::<S>(block.load::<S, 4>(0))
    }
}

impl Tiled32 for Q4_1 {
    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>) -> [S::Words; 8] {
        nibbles::<S>(block.load::<S, 4>(0))
    }
}

impl Tiled32 for Q5_0 {
    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>) -> [S::Words; 8] {
        let [high] = block.load::<S, 1>(0);
        five_bits::<S>(high, block.load::<S, 4>(1))
    }
}

impl Tiled32 for Q5_1 {
    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>) -> [S::Words; 8] {
        let [high] = block.load::<S, 1>(0);
        five_bits::<S>(high, block.load::<S, 4>(1))
    }
}

impl Tiled32 for Q8_0 {
    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>) -> [S::Words; 8] {
        let mut out = block.load::<S, 8>(0);
        if !S::SIGNED {
            for word in &mut out {
                *word = S::xor(*word, 0x8080_8080);
            }
        }
        out
    }
}

impl Tiled32 for IQ4_NL {
    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>) -> [S::Words; 8] {
        lookup::<S>(block.load::<S, 4>(0))
    }
}

// Words: 4 of scales (low nibbles) and minima (high ones), 16 of quants.
impl Tiled256 for Q2_K {
    const SUB_BLOCK: usize = 16;

    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>, j: usize) -> [S::Words; 8] {
        bits::<S, 8>(block.load::<S, 8>(4 + 8 * (j / 4)), 2 * (j % 4) as u32, CRUMBS)
    }

    #[inline(always)]
    fn scales<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        bits::<S, 4>(block.load::<S, 4>(0), 0, NIBBLES)
    }

    #[inline(always)]
    fn mins<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        bits::<S, 4>(block.load::<S, 4>(0), 4, NIBBLES)
    }
}

// Words: 8 of third bits, 16 of the lower two, 3 of scales.
impl Tiled256 for Q3_K {
    const SUB_BLOCK: usize = 16;
    const SIGNED_SCALES: bool = true;

    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>, j: usize) -> [S::Words; 8] {
        let low = block.load::<S, 8>(8 + 8 * (j / 4));
        let low = bits::<S, 8>(low, 2 * (j % 4) as u32, CRUMBS);
        let high = bits::<S, 8>(block.load::<S, 8>(0), j as u32, BITS);
        joined::<S, 8>(low, high, 2)
    }

    #[inline(always)]
    fn scales<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        let [a, b, high] = block.load::<S, 3>(24);
        let low = [a, b, S::shr(a, 4), S::shr(b, 4)];
        let mut out = [S::splat_word(0); 4];
        for i in 0..4 {
            let high = S::shl(S::and(S::shr(high, 2 * i as u32), CRUMBS), 4);
            out[i] = less_32::<S>(S::or(S::and(low[i], NIBBLES), high));
        }
        out
    }
}

// Words: 3 of scales and minima, 32 of quants.
impl Tiled256 for Q4_K {
    const SUB_BLOCK: usize = 32;

    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>, j: usize) -> [S::Words; 8] {
        bits::<S, 8>(block.load::<S, 8>(3 + 8 * (j / 2)), 4 * (j % 2) as u32, NIBBLES)
    }

    #[inline(always)]
    fn scales<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        six_bits::<S>(block, 0)
    }

    #[inline(always)]
    fn mins<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        six_bits::<S>(block, 1)
    }
}

// Words: 3 of scales and minima, 8 of fifth bits, 32 of the lower four.
impl Tiled256 for Q5_K {
    const SUB_BLOCK: usize = 32;

    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>, j: usize) -> [S::Words; 8] {
        let low = block.load::<S, 8>(11 + 8 * (j / 2));
        let low = bits::<S, 8>(low, 4 * (j % 2) as u32, NIBBLES);
        let high = bits::<S, 8>(block.load::<S, 8>(3), j as u32, BITS);
        joined::<S, 8>(low, high, 4)
    }

    #[inline(always)]
    fn scales<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        six_bits::<S>(block, 0)
    }

    #[inline(always)]
    fn mins<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        six_bits::<S>(block, 1)
    }
}

/// The eight 6-bit scales (`which` 0) or minima (1) of Q4_K and Q5_K; see [`apr_tensor::block::scale_min`].
#[inline(always)]
fn six_bits<S: Simd>(block: Block<'_>, which: usize) -> [S::Words; 4] {
    let [word] = block.load::<S, 1>(which);
    let [rest] = block.load::<S, 1>(2);
    let low = S::and(S::shr(rest, 4 * which as u32), NIBBLES);
    let high = S::shl(S::and(S::shr(word, 6), CRUMBS), 4);
    let none = S::splat_word(0);
    [S::and(word, 0x3f3f_3f3f), S::or(low, high), none, none]
}

// Words: twice 16 of the lower four bits, twice 8 of the upper two, 4 of scales.
impl Tiled256 for Q6_K {
    const SUB_BLOCK: usize = 16;
    const SIGNED_SCALES: bool = true;

    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>, j: usize) -> [S::Words; 8] {
        let (half, part) = (j / 4, j % 4);
        let low = block.load::<S, 8>(16 * half + 8 * (part % 2));
        let low = bits::<S, 8>(low, 4 * (part / 2) as u32, NIBBLES);
        let high = block.load::<S, 8>(32 + 8 * half);
        joined::<S, 8>(low, bits::<S, 8>(high, 2 * part as u32, CRUMBS), 4)
    }

    #[inline(always)]
    fn scales<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        block.load::<S, 4>(48)
    }
}

// Words: 1 of the lower four bits of scales, 32 of quants. The second half is the upper two bits of scales.
impl Tiled256 for IQ4_XS {
    const SUB_BLOCK: usize = 32;
    const SIGNED_SCALES: bool = true;

    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>, j: usize) -> [S::Words; 8] {
        lookup::<S>(block.load::<S, 4>(1 + 4 * j))
    }

    #[inline(always)]
    fn scales<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        let [low] = block.load::<S, 1>(0);
        let high = S::widen_halves(block.half(1));
        let mut out = [S::splat_word(0); 4];
        for (i, out) in out.iter_mut().take(2).enumerate() {
            // Four nibbles to four bytes, and four crumbs.
            let low = S::and(S::shr(low, 16 * i as u32), 0xffff);
            let low = S::and(S::or(low, S::shl(low, 8)), 0x00ff_00ff);
            let low = S::and(S::or(low, S::shl(low, 4)), NIBBLES);
            let high = S::and(S::shr(high, 8 * i as u32), 0xff);
            let high = S::and(S::or(high, S::shl(high, 12)), 0x000f_000f);
            let high = S::and(S::or(high, S::shl(high, 6)), CRUMBS);
            *out = less_32::<S>(S::or(low, S::shl(high, 4)));
        }
        out
    }
}
