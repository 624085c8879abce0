//! Some rows of a quantised matrix side by side, so that each lane of a vector is a row.
//!
//! A block of a stored type is a run of 32-bit words and one or two 16-bit numbers. In a tile the same words of the
//! blocks of 32 rows stand one after the other, in two [`Line`]s. Then come their next words, and so on, and the 16-bit
//! numbers, a line for each; then the next blocks of the rows. Nothing is recoded, so a row can be had back.
//!
//! Which words are next is up to the type: what is unpacked together stands together, so that a tile is read from one end to the other and each line once.
//! Memory is fastest so: what a core asks for on its own is what follows.
//!
//! Sums over columns thereby become sums of lines: no lane ever needs its neighbour, and 16 results are ready at once. Two lines
//! side by side share what is loaded of the activations.

use std::{array, io};

use apr_tensor::{DType, Stored};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Cpu, generic::LANES, pages::Piece, pool::Columns};

/// Rows of a tile.
pub(crate) const ROWS: usize = 2 * LANES;

/// The same word of each of 16 rows, or a 16-bit number of each of 32.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; 64]);

impl Line {
    pub(crate) const ZERO: Self = Self([0; 64]);
}

/// Where a stored type has its words and its 16-bit numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Bytes of a block.
    pub(crate) bytes: usize,
    /// Where the words begin.
    words_at: usize,
    pub(crate) words: usize,
    /// Where the 16-bit numbers begin.
    halves_at: usize,
    pub(crate) halves: usize,
    /// Which word of a block comes when.
    order: [u8; MOST_WORDS],
    /// How many 16-bit numbers come before the words, a line each: the last ones of them.
    pub(crate) lead: usize,
}

/// The words of the longest block, that of Q6_K.
const MOST_WORDS: usize = 52;

const AS_STORED: [u8; MOST_WORDS] = {
    let mut order = [0; MOST_WORDS];
    let mut i = 0;
    while i < MOST_WORDS {
        order[i] = i as u8;
        i += 1;
    }
    order
};

impl Layout {
    /// A block that is its 16-bit numbers, then its words.
    const fn after(halves: usize, words: usize) -> Self {
        let bytes = 2 * halves + 4 * words;
        Self { bytes, words_at: 2 * halves, words, halves_at: 0, halves, order: AS_STORED, lead: 0 }
    }

    /// A block that is its words, then its 16-bit numbers.
    const fn before(halves: usize, words: usize) -> Self {
        let bytes = 2 * halves + 4 * words;
        Self { bytes, words_at: 0, words, halves_at: 4 * words, halves, order: AS_STORED, lead: 0 }
    }

    const fn ordered(self, order: [u8; MOST_WORDS]) -> Self {
        Self { order, ..self }
    }

    /// Of the block types of [`apr_tensor::block`].
    pub(crate) const fn of(dtype: DType) -> Option<Self> {
        Some(match dtype {
            DType::Q4_0 | DType::IQ4_NL => Self::after(1, 4),
            DType::Q4_1 => Self::after(2, 4),
            DType::Q5_0 => Self::after(1, 5),
            DType::Q5_1 => Self::after(2, 5),
            DType::Q8_0 => Self::after(1, 8),
            DType::Q2_K => Self::before(2, 20),
            DType::Q3_K => Self::before(1, 27).ordered(order(&[24, 25, 26], &[&[0, 8, 16]], &[])),
            DType::Q4_K => {
                Self::after(2, 35).ordered(order(&[0, 2], &[&[3], &[11], &[19], &[27]], &[1]))
            }
            DType::Q5_K => {
                Self::after(2, 43).ordered(order(&[0, 2], &[&[3, 11, 19, 27, 35]], &[1]))
            }
            DType::Q6_K => {
                let runs: &[&[u8]] = &[&[0, 8, 32], &[16, 24, 40]];
                Self::before(1, 52).ordered(order(&[48, 49, 50, 51], runs, &[]))
            }
            DType::IQ4_XS => Self { lead: 1, ..Self::after(2, 33) },
            _ => return None,
        })
    }

    /// The lines of a block of each row of a tile.
    pub(crate) const fn lines(&self) -> usize {
        2 * self.words + self.halves
    }

    /// The line of the 16-bit number `i`.
    pub(crate) const fn half_line(&self, i: usize) -> usize {
        match i + self.lead {
            last if last >= self.halves => last - self.halves,
            other => 2 * self.words + other,
        }
    }

    /// Puts rows side by side.
    pub(crate) fn interleave(&self, rows: [&[u8]; ROWS], out: &mut [Line]) {
        // Block by block, so that the lines of one block are in the cache for all rows.
        for (b, lines) in out.chunks_exact_mut(self.lines()).enumerate() {
            for (r, row) in rows.iter().enumerate() {
                let block = &row[b * self.bytes..][..self.bytes];
                let row = block[self.words_at..].as_chunks::<4>().0;
                let words = lines[self.lead..].as_chunks_mut::<2>().0;
                for (lines, &word) in words.iter_mut().zip(&self.order[..self.words]) {
                    lines[r / LANES].0.as_chunks_mut::<4>().0[r % LANES] = row[usize::from(word)];
                }
                let row = block[self.halves_at..].as_chunks::<2>().0;
                for (i, half) in row[..self.halves].iter().enumerate() {
                    lines[self.half_line(i)].0.as_chunks_mut::<2>().0[r] = *half;
                }
            }
        }
    }

    /// One of the rows that were interleaved, as it was.
    fn row(&self, tile: &[Line], r: usize, out: &mut [u8]) {
        let blocks = tile.chunks_exact(self.lines());
        for (out, lines) in out.chunks_exact_mut(self.bytes).zip(blocks) {
            let row = out[self.words_at..].as_chunks_mut::<4>().0;
            let words = lines[self.lead..].as_chunks::<2>().0;
            for (lines, &word) in words.iter().zip(&self.order[..self.words]) {
                row[usize::from(word)] = lines[r / LANES].0.as_chunks::<4>().0[r % LANES];
            }
            let row = out[self.halves_at..].as_chunks_mut::<2>().0;
            for (i, half) in row[..self.halves].iter_mut().enumerate() {
                *half = lines[self.half_line(i)].0.as_chunks::<2>().0[r];
            }
        }
    }
}

/// The words `first`, then for each of `runs` the eight words from each of its places on (the first ones of all, then the second ones, and so on),
/// then `last`.
const fn order(first: &[u8], runs: &[&[u8]], last: &[u8]) -> [u8; MOST_WORDS] {
    let mut order = [0; MOST_WORDS];
    let mut next = 0;
    while next < first.len() {
        order[next] = first[next];
        next += 1;
    }
    let mut run = 0;
    while run < runs.len() {
        let (mut i, places) = (0, runs[run]);
        while i < 8 * places.len() {
            order[next] = places[i % places.len()] + (i / places.len()) as u8;
            (i, next) = (i + 1, next + 1);
        }
        run += 1;
    }
    let mut i = 0;
    while i < last.len() {
        order[next] = last[i];
        (i, next) = (i + 1, next + 1);
    }
    order
}

/// A whole matrix in tiles. The last row is repeated to fill the last tile.
#[derive(Debug)]
pub(crate) struct Tiles {
    lines: Piece,
    layout: Layout,
    /// Bytes of a row.
    row_bytes: usize,
}

impl Tiles {
    /// Reorders the rows of `stored`, on all threads, and gives the file's pages back to the system.
    pub(crate) fn of(stored: &Stored, layout: Layout, cpu: &Cpu) -> io::Result<Self> {
        /// How much of a file is read before its pages are given back.
        const SLICE_BYTES: usize = 16 << 20;

        let rows = stored.shape().rows();
        let row_bytes = stored.bytes().len() / rows.max(1);
        let tile = row_bytes / layout.bytes * layout.lines();
        let tiles = rows.div_ceil(ROWS);
        let mut lines = cpu.pages.lines(tiles * tile)?;

        let step = (SLICE_BYTES / (ROWS * row_bytes).max(1)).max(1);
        for first in (0..tiles).step_by(step) {
            let here = step.min(tiles - first);
            let slice = stored.slice_rows(first * ROWS..((first + here) * ROWS).min(rows));
            let last = slice.shape().rows() - 1;
            let columns = Columns { count: here * tile, granule: tile, cost: tile * ROWS };
            let out = &mut lines.lines_mut()[first * tile..][..here * tile];
            cpu.pool.fill(out, columns, |mut strip| {
                let first = strip.columns().start / tile;
                for (i, out) in strip.row(0).chunks_exact_mut(tile).enumerate() {
                    let row = |r: usize| slice.row_bytes(((first + i) * ROWS + r).min(last));
                    layout.interleave(array::from_fn(row), out);
                }
            });
            slice.bytes().release();
        }
        Ok(Self { lines, layout, row_bytes })
    }

    /// Lines of a tile.
    fn tile_len(&self) -> usize {
        self.row_bytes / self.layout.bytes * self.layout.lines()
    }

    /// All tiles.
    pub(crate) fn lines(&self) -> &[Line] {
        self.lines.lines()
    }

    /// Tile number `index`.
    pub(crate) fn tile(&self, index: usize) -> &[Line] {
        let len = self.tile_len();
        &self.lines()[index * len..][..len]
    }

    /// Puts row `row`, as its file stores it, into `out`.
    pub(crate) fn read_row(&self, row: usize, out: &mut Vec<u8>) {
        out.resize(self.row_bytes, 0);
        self.layout.row(self.tile(row / ROWS), row % ROWS, out);
    }
}

#[cfg(test)]
mod tests {
    use apr_tensor::Shape;

    use super::*;
    use crate::CpuOptions;

    #[test]
    fn every_row_of_every_type_comes_back_as_it_was() {
        let cpu = Cpu::new(CpuOptions { threads: Some(2), ..Default::default() }).unwrap();
        let types: Vec<DType> = DType::all().filter(|&t| Layout::of(t).is_some()).collect();
        assert_eq!(types.len(), 12);
        for dtype in types {
            let layout = Layout::of(dtype).unwrap();
            assert_eq!(layout.bytes, dtype.block_bytes(), "{dtype}");
            for (rows, blocks) in [(1, 1), (32, 2), (33, 3), (80, 1)] {
                let shape: Shape = [rows, blocks * dtype.block_len()].into();
                let bytes: Vec<u8> =
                    (0..rows * blocks * layout.bytes).map(|i| (i * 167 + i / 256) as u8).collect();
                let stored = Stored::new(dtype, shape, bytes.into()).unwrap();
                let tiles = Tiles::of(&stored, layout, &cpu).unwrap();
                let mut found = Vec::new();
                for row in 0..rows {
                    tiles.read_row(row, &mut found);
                    assert_eq!(found, stored.row_bytes(row), "{dtype} {row}");
                }
            }
        }
    }
}
