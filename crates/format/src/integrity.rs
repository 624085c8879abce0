//! What can be said of a file's bytes without knowing what they mean: checksums, and bytes that belong to nothing.
//!
//! Nothing is judged here: a reader refuses what it cannot read, and whoever verifies a file compares.

use std::{ops::Range, path::PathBuf};

use apr_tensor::Bytes;

use crate::File;

/// Bytes between two reports of progress.
const CHUNK: usize = 16 << 20;

/// A CRC32 that a file states of its own bytes.
#[derive(Clone, Debug)]
pub struct Checksum {
    /// What it is of.
    pub what: &'static str,
    /// The offset at which it is stated.
    pub at: u64,
    /// What is stated.
    pub stated: u32,
    /// The bytes that it is of, in pieces.
    pieces: Vec<Bytes>,
}

impl Checksum {
    /// The checksum stated at `at` in `file`, of the bytes in `ranges`.
    ///
    /// # Panics
    /// If one of them reaches beyond the file.
    pub(crate) fn of(
        file: &File,
        what: &'static str,
        at: usize,
        ranges: impl IntoIterator<Item = Range<usize>>,
    ) -> Self {
        let slice = |range| file.bytes().slice(range).expect("the caller has seen these bytes");
        let stated = slice(at..at + 4);
        let stated = u32::from_le_bytes(stated[..].try_into().expect("four bytes"));
        Self { what, at: at as u64, stated, pieces: ranges.into_iter().map(slice).collect() }
    }

    /// How many bytes it is of.
    pub fn covered(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len() as u64).sum()
    }

    /// What it should be: reads all that it is of. `advance` is told of bytes as they are read.
    pub fn compute(&self, advance: impl Fn(u64)) -> u32 {
        let mut crc = crc32fast::Hasher::new();
        for chunk in self.pieces.iter().flat_map(|piece| piece.chunks(CHUNK)) {
            crc.update(chunk);
            advance(chunk.len() as u64);
        }
        crc.finalize()
    }
}

/// Bytes among a file's data that belong to no tensor.
#[derive(Clone, Debug)]
pub struct Gap {
    /// The file.
    pub file: PathBuf,
    /// The tensor before them; `None` at the beginning of the data.
    pub after: Option<String>,
    /// Their offset.
    pub start: u64,
    /// What is there.
    pub bytes: Bytes,
    /// Whether they are too few for another tensor to have begun among them.
    pub is_padding: bool,
}

impl Gap {
    /// What of `data` in `file` lies outside of `taken`: names, beginnings and ends in ascending order. An end that is not known
    /// is `None`; what follows it is no gap that could be told.
    pub(crate) fn all<'a>(
        file: &File,
        data: Range<u64>,
        alignment: u64,
        taken: impl IntoIterator<Item = (&'a str, u64, Option<u64>)>,
    ) -> Vec<Self> {
        let mut gaps = Vec::new();
        let mut reached = Some((None, data.start));
        let mut add = |reached: Option<(Option<&str>, u64)>, end: u64| {
            let Some((after, start)) = reached.filter(|(_, start)| *start < end) else { return };
            let bytes = start as usize..end as usize;
            gaps.push(Self {
                file: file.path().to_owned(),
                after: after.map(str::to_owned),
                start,
                bytes: file.bytes().slice(bytes).expect("data lie within the file"),
                is_padding: end - start < alignment,
            });
        };
        for (name, start, end) in taken {
            add(reached, start);
            reached = end.map(|end| (Some(name), end));
        }
        add(reached, data.end);
        gaps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_outside_of_tensors_is_in_one_gap() {
        let file = File::from_bytes("x", vec![0; 100].into());
        let gaps = |taken: &[(&'static str, u64, Option<u64>)]| {
            let gaps = Gap::all(&file, 10..96, 32, taken.iter().copied());
            let told = |gap: Gap| (gap.after, gap.start, gap.bytes.len(), gap.is_padding);
            gaps.into_iter().map(told).collect::<Vec<_>>()
        };
        let after = |name: &str| Some(name.to_owned());
        assert_eq!(gaps(&[]), [(None, 10, 86, false)]);
        assert_eq!(gaps(&[("a", 10, Some(96))]), []);
        assert_eq!(
            gaps(&[("a", 10, Some(40)), ("b", 64, Some(64))]),
            [(after("a"), 40, 24, true), (after("b"), 64, 32, false)]
        );
        assert_eq!(gaps(&[("a", 10, None), ("b", 64, Some(90))]), [(after("b"), 90, 6, true)]);
    }

    #[test]
    fn a_checksum_in_pieces_is_that_of_the_bytes_in_a_row() {
        let mut bytes: Vec<u8> = (0..50).collect();
        bytes[20..24].copy_from_slice(&7u32.to_le_bytes());
        let file = File::from_bytes("x", bytes.clone().into());
        let checksum = Checksum::of(&file, "all but itself", 20, [0..20, 24..50]);
        assert_eq!((checksum.stated, checksum.at, checksum.covered()), (7, 20, 46));
        let read = std::cell::Cell::new(0);
        let computed = checksum.compute(|n| read.set(read.get() + n));
        bytes.drain(20..24);
        assert_eq!((computed, read.get()), (crc32fast::hash(&bytes), 46));
    }
}
