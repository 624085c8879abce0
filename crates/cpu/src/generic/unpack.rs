//! Tiles of each stored type as the integer dot products want them: one byte per weight, integer scales.
//!
//! The layouts are documented on the block types of [`apr_tensor::block`]. Here each word stands once for each row of a part of a
//! [tile](crate::tile), so what is written for one word happens to all of them.

use std::ops::Range;

use apr_tensor::{
    DType,
    block::{
        IQ4_NL, IQ4_VALUES, IQ4_XS, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0,
    },
};

use super::Simd;
use crate::{
    memory::{Fetch, fetch_after, fetch_share},
    tile::{Layout, Line},
};

/// A block of each row of one part of a tile: of as many rows as a register has lanes.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    lines: &'a [Line],
    layout: &'static Layout,
    part: usize,
}

impl<'a> Block<'a> {
    /// The blocks of a tile, of its first part each.
    #[inline(always)]
    pub(crate) fn all(tile: &'a [Line], layout: &'static Layout) -> impl Iterator<Item = Self> {
        tile.chunks_exact(layout.lines()).map(move |lines| Self { lines, layout, part: 0 })
    }

    /// The same of the `N` parts from `first` on.
    #[inline(always)]
    pub(crate) fn parts<const N: usize>(self, first: usize) -> [Self; N] {
        let mut parts = [self; N];
        for (i, part) in parts.iter_mut().enumerate() {
            part.part = first + i;
        }
        parts
    }

    /// Asks for what will be read some blocks later: share `i` of `shares` of what falls to `P` parts, of which this is the first.
    #[inline(always)]
    pub(crate) fn fetch_ahead<S: Simd, T: Tiled, const P: usize>(
        &self,
        i: usize,
        shares: usize,
        fetch: Fetch,
    ) {
        if matches!(fetch, Fetch::No) {
            return;
        }
        let (i, shares) = (shares * self.part / P + i, shares * (2 * S::PARTS) / P);
        fetch_share(&self.lines[..const { T::LAYOUT.lines() }], i, shares, fetch);
    }

    /// The same for what all parts read of the words from number `i` on, which hold weights one next to the other; with the first of them for those that hold no
    /// weights. Words that are read twice (IQ4_XS) are asked for twice.
    #[inline(always)]
    pub(crate) fn fetch_words_ahead<T: Tiled256>(&self, i: usize, fetch: Fetch) {
        if matches!(fetch, Fetch::No) {
            return;
        }
        let (words, start) = (T::weight_lines(), T::LAYOUT.lead + 2 * i);
        for line in start..start + 2 * T::WORDS {
            fetch_after(self.lines.as_ptr().wrapping_add(line), fetch);
        }
        if start == words.start {
            for line in (0..words.start).chain(words.end..T::LAYOUT.lines()) {
                fetch_after(self.lines.as_ptr().wrapping_add(line), fetch);
            }
        }
    }

    /// Word `i`, in the [order](Layout) of tiles.
    #[inline(always)]
    pub(crate) fn word<S: Simd>(&self, i: usize) -> S::Words {
        let lines = &self.lines[self.layout.lead + 2 * i..][..2];
        S::load_words(&lines[self.half::<S>()], self.part % S::PARTS)
    }

    /// The words of a `T` that hold the weights `32j .. 32j + 32`.
    #[inline(always)]
    pub(crate) fn run<T: Tiled256>(&self, j: usize) -> Lazy<'a> {
        let lines = &self.lines[self.layout.lead + 2 * T::at(j, 0)..][..2 * T::RUN];
        Lazy { lines, part: self.part, at: 0 }
    }

    /// Which half of the tile it is in: compilers see that there are two.
    #[inline(always)]
    fn half<S: Simd>(&self) -> usize {
        self.part / S::PARTS % 2
    }

    /// 16-bit number `i`, as a half-precision number.
    #[inline(always)]
    pub(crate) fn load_halves<S: Simd>(&self, i: usize) -> S::Part {
        S::load_halves(self.halves::<S>(i), self.part % S::PARTS)
    }

    /// The same as a number without a sign.
    #[inline(always)]
    fn widen_halves<S: Simd>(&self, i: usize) -> S::Words {
        S::widen_halves(self.halves::<S>(i), self.part % S::PARTS)
    }

    #[inline(always)]
    fn halves<S: Simd>(&self, i: usize) -> &'a [u8; 32] {
        &self.lines[self.layout.half_line(i)].0.as_chunks().0[self.half::<S>()]
    }
}

/// Some words of a block of each row, one after the other.
pub(crate) trait Run<S: Simd>: Copy {
    fn get(self, i: usize) -> S::Words;
}

/// Those from a place on, loaded when they are wanted.
#[derive(Clone, Copy)]
pub(crate) struct Lazy<'a> {
    lines: &'a [Line],
    part: usize,
    at: usize,
}

impl Lazy<'_> {
    /// Those that hold the weights `4g .. 4g + 4` of 32 of a `T`.
    #[inline(always)]
    pub(crate) fn group<T: Tiled256>(self, g: usize) -> Self {
        Self { at: T::at(0, g) - T::at(0, 0), ..self }
    }
}

impl<S: Simd> Run<S> for Lazy<'_> {
    #[inline(always)]
    fn get(self, i: usize) -> S::Words {
        let line = 2 * (self.at + i) + self.part / S::PARTS % 2;
        S::load_words(&self.lines[line], self.part % S::PARTS)
    }
}

/// Those that have been loaded.
#[derive(Clone, Copy)]
pub(crate) struct Loaded<W>(pub(crate) [W; LONGEST_RUN]);

/// The most [words](Tiled256::WORDS) that weights are unpacked from.
pub(crate) const LONGEST_RUN: usize = 5;

impl<S: Simd> Run<S> for Loaded<S::Words> {
    #[inline(always)]
    fn get(self, i: usize) -> S::Words {
        self.0[i]
    }
}

/// What all types of tiles have.
pub(crate) trait Tiled {
    const LAYOUT: Layout;
    /// Unpacked bytes are less than two to the power of this.
    const BITS: u32;
    /// What a byte without a sign is for the weight 0.
    const ZERO: i32;
    /// Whether the second half of a block is the (scale of the) minimum.
    const MIN: bool;
}

/// What a byte of a `T` is for the weight 0.
pub(crate) const fn zero<S: Simd, T: Tiled>() -> i32 {
    if S::SIGNED && T::BITS == 8 { 0 } else { T::ZERO }
}

/// Types of 32 weights that share a scale: weight `i` is `scale * (byte[i] - zero) + min`.
pub(crate) trait Tiled32: Tiled {
    /// The weights `4g .. 4g + 4`.
    fn quants<S: Simd>(block: Block<'_>, g: usize) -> S::Words;
}

/// Types of 256 weights, in sub-blocks: weight `i` is `d * scale * (byte[i] - zero) - dmin * min`.
pub(crate) trait Tiled256: Tiled + Sized {
    /// 16 or 32.
    const SUB_BLOCK: usize;
    /// Whether scales are signed bytes.
    const SIGNED_SCALES: bool = false;
    /// So many times 32 weights, one after the other, are in the same words.
    const TOGETHER: usize;
    /// So many words hold four of each of those 32.
    const WORDS: usize;
    /// So many hold all of them.
    const RUN: usize = 8 * Self::WORDS;

    /// The first of the words that hold the weights `32j + 4g .. 32j + 4g + 4`.
    fn at(j: usize, g: usize) -> usize;
    /// The lines of all words that hold weights.
    #[inline(always)]
    fn weight_lines() -> Range<usize> {
        let start = Self::LAYOUT.lead + 2 * Self::at(0, 0);
        start..start + 2 * Self::RUN * (8 / Self::TOGETHER)
    }
    /// Those weights, from the words there.
    fn quants<S: Simd>(words: impl Run<S>, j: usize, g: usize) -> S::Words;

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

/// The bits `from ..` of each byte, as far as `mask` goes, moved to `to ..`.
#[inline(always)]
fn bits<S: Simd>(word: S::Words, from: usize, to: usize, mask: u32) -> S::Words {
    S::shl(S::and(S::shr(word, from as u32), mask), to as u32)
}

/// The low nibbles of four words, then the high ones: those of word `g % 4`.
#[inline(always)]
fn nibbles<S: Simd>(word: S::Words, g: usize) -> S::Words {
    bits::<S>(word, 4 * (g / 4), 0, NIBBLES)
}

/// The same, with a fifth bit each: bit `i` of `high` is that of weight `i`.
#[inline(always)]
fn five_bits<S: Simd>(high: S::Words, word: S::Words, g: usize) -> S::Words {
    S::or(nibbles::<S>(word, g), S::spread_bits(high, g, 4))
}

/// The same looked up.
#[inline(always)]
fn lookup<S: Simd>(word: S::Words, g: usize) -> S::Words {
    S::lookup(
        nibbles::<S>(word, g),
        if S::SIGNED { &const { iq4_bytes(0) } } else { &const { iq4_bytes(IQ4_ZERO) } },
    )
}

/// Bytes below 64 with 32 taken off. With the top bit set no byte borrows from the next.
#[inline(always)]
fn less_32<S: Simd>(words: S::Words) -> S::Words {
    const TOP: u32 = 0x8080_8080;
    let lowered = S::add_word(S::xor(words, TOP), S::splat_word(-0x2020_2020));
    S::xor(lowered, TOP)
}

macro_rules! tiled {
    ($($type:ident: $bits:literal bits, zero $zero:expr, min $min:literal;)*) => {$(
        impl Tiled for $type {
            const LAYOUT: Layout = Layout::of(DType::$type).expect("a type of blocks");
            const BITS: u32 = $bits;
            const ZERO: i32 = $zero;
            const MIN: bool = $min;
        }
    )*};
}

tiled! {
    Q4_0: 4 bits, zero 8, min false;
    Q4_1: 4 bits, zero 0, min true;
    Q5_0: 5 bits, zero 16, min false;
    Q5_1: 5 bits, zero 0, min true;
    Q8_0: 8 bits, zero 128, min false;
    IQ4_NL: 8 bits, zero IQ4_ZERO, min false;
    Q2_K: 2 bits, zero 0, min true;
    Q3_K: 3 bits, zero 4, min false;
    Q4_K: 4 bits, zero 0, min true;
    Q5_K: 5 bits, zero 0, min true;
    Q6_K: 6 bits, zero 32, min false;
    IQ4_XS: 8 bits, zero IQ4_ZERO, min false;
}

impl Tiled32 for Q4_0 {
    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>, g: usize) -> S::Words {
        nibbles::<S>(block.word::<S>(g % 4), g)
    }
}

impl Tiled32 for Q4_1 {
    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>, g: usize) -> S::Words {
        nibbles::<S>(block.word::<S>(g % 4), g)
    }
}

impl Tiled32 for Q5_0 {
    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>, g: usize) -> S::Words {
        five_bits::<S>(block.word::<S>(0), block.word::<S>(1 + g % 4), g)
    }
}

impl Tiled32 for Q5_1 {
    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>, g: usize) -> S::Words {
        five_bits::<S>(block.word::<S>(0), block.word::<S>(1 + g % 4), g)
    }
}

impl Tiled32 for Q8_0 {
    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>, g: usize) -> S::Words {
        let word = block.word::<S>(g);
        if S::SIGNED { word } else { S::xor(word, 0x8080_8080) }
    }
}

impl Tiled32 for IQ4_NL {
    #[inline(always)]
    fn quants<S: Simd>(block: Block<'_>, g: usize) -> S::Words {
        lookup::<S>(block.word::<S>(g % 4), g)
    }
}

// Words: 4 of scales (low nibbles) and minima (high ones), twice 8 of quants.
impl Tiled256 for Q2_K {
    const SUB_BLOCK: usize = 16;
    const TOGETHER: usize = 4;
    const WORDS: usize = 1;

    #[inline(always)]
    fn at(j: usize, g: usize) -> usize {
        4 + 8 * (j / 4) + g
    }

    #[inline(always)]
    fn quants<S: Simd>(words: impl Run<S>, j: usize, _: usize) -> S::Words {
        bits::<S>(words.get(0), 2 * (j % 4), 0, CRUMBS)
    }

    #[inline(always)]
    fn scales<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        let mut out = [S::splat_word(0); 4];
        for (i, out) in out.iter_mut().enumerate() {
            *out = bits::<S>(block.word::<S>(i), 0, 0, NIBBLES);
        }
        out
    }

    #[inline(always)]
    fn mins<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        let mut out = [S::splat_word(0); 4];
        for (i, out) in out.iter_mut().enumerate() {
            *out = bits::<S>(block.word::<S>(i), 4, 0, NIBBLES);
        }
        out
    }
}

// Words: 3 of scales, 8 times one of third bits and two of the lower two.
impl Tiled256 for Q3_K {
    const SUB_BLOCK: usize = 16;
    const SIGNED_SCALES: bool = true;
    const TOGETHER: usize = 8;
    const WORDS: usize = 3;

    #[inline(always)]
    fn at(_: usize, g: usize) -> usize {
        3 + 3 * g
    }

    #[inline(always)]
    fn quants<S: Simd>(words: impl Run<S>, j: usize, _: usize) -> S::Words {
        let low = bits::<S>(words.get(1 + j / 4), 2 * (j % 4), 0, CRUMBS);
        S::or(low, bits::<S>(words.get(0), j, 2, BITS))
    }

    #[inline(always)]
    fn scales<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        let (low, high) = ([block.word::<S>(0), block.word::<S>(1)], block.word::<S>(2));
        let mut out = [S::splat_word(0); 4];
        for (i, out) in out.iter_mut().enumerate() {
            let low = bits::<S>(low[i % 2], 4 * (i / 2), 0, NIBBLES);
            *out = less_32::<S>(S::or(low, bits::<S>(high, 2 * i, 4, CRUMBS)));
        }
        out
    }
}

// Words: 2 of scales and of the rest of minima, 4 times 8 of quants, 1 of minima.
impl Tiled256 for Q4_K {
    const SUB_BLOCK: usize = 32;
    const TOGETHER: usize = 2;
    const WORDS: usize = 1;

    #[inline(always)]
    fn at(j: usize, g: usize) -> usize {
        2 + 8 * (j / 2) + g
    }

    #[inline(always)]
    fn quants<S: Simd>(words: impl Run<S>, j: usize, _: usize) -> S::Words {
        bits::<S>(words.get(0), 4 * (j % 2), 0, NIBBLES)
    }

    #[inline(always)]
    fn scales<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        six_bits::<S>(block, 0, 0)
    }

    #[inline(always)]
    fn mins<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        six_bits::<S>(block, 34, 4)
    }
}

// Words: 2 of scales and of the rest of minima, 8 times one of fifth bits and four of the lower four, 1 of minima.
impl Tiled256 for Q5_K {
    const SUB_BLOCK: usize = 32;
    const TOGETHER: usize = 8;
    const WORDS: usize = 5;

    #[inline(always)]
    fn at(_: usize, g: usize) -> usize {
        2 + 5 * g
    }

    #[inline(always)]
    fn quants<S: Simd>(words: impl Run<S>, j: usize, _: usize) -> S::Words {
        let low = bits::<S>(words.get(1 + j / 2), 4 * (j % 2), 0, NIBBLES);
        S::or(low, bits::<S>(words.get(0), j, 4, BITS))
    }

    #[inline(always)]
    fn scales<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        six_bits::<S>(block, 0, 0)
    }

    #[inline(always)]
    fn mins<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        six_bits::<S>(block, 42, 4)
    }
}

/// Eight 6-bit numbers of Q4_K or Q5_K, from word `at` and the bits `from ..` of word 1; see [`apr_tensor::block::scale_min`].
#[inline(always)]
fn six_bits<S: Simd>(block: Block<'_>, at: usize, from: usize) -> [S::Words; 4] {
    let (word, rest) = (block.word::<S>(at), block.word::<S>(1));
    let low = bits::<S>(rest, from, 0, NIBBLES);
    let none = S::splat_word(0);
    [S::and(word, 0x3f3f_3f3f), S::or(low, bits::<S>(word, 6, 4, CRUMBS)), none, none]
}

// Words: 4 of scales; in either half 8 times two of the lower four bits and one of the upper two.
impl Tiled256 for Q6_K {
    const SUB_BLOCK: usize = 16;
    const SIGNED_SCALES: bool = true;
    const TOGETHER: usize = 4;
    const WORDS: usize = 3;

    #[inline(always)]
    fn at(j: usize, g: usize) -> usize {
        4 + 24 * (j / 4) + 3 * g
    }

    #[inline(always)]
    fn quants<S: Simd>(words: impl Run<S>, j: usize, _: usize) -> S::Words {
        let low = bits::<S>(words.get(j % 2), 4 * (j % 4 / 2), 0, NIBBLES);
        S::or(low, bits::<S>(words.get(2), 2 * (j % 4), 4, CRUMBS))
    }

    #[inline(always)]
    fn scales<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        let mut out = [S::splat_word(0); 4];
        for (i, out) in out.iter_mut().enumerate() {
            *out = block.word::<S>(i);
        }
        out
    }
}

// Words: 1 of the lower four bits of scales, 32 of quants. Before them is the second half, the upper two bits of scales.
impl Tiled256 for IQ4_XS {
    const SUB_BLOCK: usize = 32;
    const SIGNED_SCALES: bool = true;
    const TOGETHER: usize = 1;
    const WORDS: usize = 1;
    const RUN: usize = 4;

    #[inline(always)]
    fn at(j: usize, g: usize) -> usize {
        1 + 4 * j + g % 4
    }

    #[inline(always)]
    fn quants<S: Simd>(words: impl Run<S>, _: usize, g: usize) -> S::Words {
        lookup::<S>(words.get(0), g)
    }

    #[inline(always)]
    fn scales<S: Simd>(block: Block<'_>) -> [S::Words; 4] {
        let low = block.word::<S>(0);
        let high = block.widen_halves::<S>(1);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn is_read_in_order<T: Tiled256>(from: usize) {
        let mut next = from;
        for first in (0..8).step_by(T::TOGETHER) {
            for g in 0..8 {
                assert_eq!(T::at(first, g), next);
                let same = |j| T::at(j, g) == next;
                assert!((first..first + T::TOGETHER).all(same), "{first} {g}");
                next += T::WORDS;
            }
        }
        assert!(T::WORDS <= LONGEST_RUN && next <= T::LAYOUT.words);
        let lead = T::LAYOUT.lead;
        assert_eq!(T::weight_lines(), lead + 2 * from..lead + 2 * next);
    }

    #[test]
    fn words_of_quants_lie_in_the_order_in_which_they_are_read() {
        is_read_in_order::<Q2_K>(4);
        is_read_in_order::<Q3_K>(3);
        is_read_in_order::<Q4_K>(2);
        is_read_in_order::<Q5_K>(2);
        is_read_in_order::<Q6_K>(4);
        // Here each word is read for its low nibbles and then for its high ones.
        assert_eq!(IQ4_XS::weight_lines().len(), 256 / 8 * 2);
    }
}
