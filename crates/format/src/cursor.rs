//! Bounds-checked reading of little-endian fields.

use std::{fmt::Display, path::Path};

use crate::{Error, Place, Result};

/// A position in the bytes of a file. Every read names what it reads, for the error.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    file: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(file: &'a Path, bytes: &'a [u8], at: usize) -> Self {
        Self { file, bytes, at }
    }

    pub(crate) fn offset(&self) -> u64 {
        self.at as u64
    }

    /// The bytes that follow.
    pub(crate) fn remaining(&self) -> u64 {
        self.bytes.len().saturating_sub(self.at) as u64
    }

    pub(crate) fn take(&mut self, n: u64, what: impl Display) -> Result<&'a [u8]> {
        let taken = usize::try_from(n)
            .ok()
            .and_then(|n| self.bytes.get(self.at..self.at.checked_add(n)?))
            .ok_or_else(|| Error::Truncated {
                file: self.file.to_owned(),
                at: Place::Offset(self.offset()),
                what: what.to_string(),
                start: self.offset(),
                end: self.offset().saturating_add(n),
                len: self.bytes.len() as u64,
            })?;
        self.at += taken.len();
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self, what: impl Display) -> Result<[u8; N]> {
        Ok(self.take(N as u64, what)?.try_into().expect("take returns as much as asked for"))
    }

    pub(crate) fn u8(&mut self, what: impl Display) -> Result<u8> {
        self.array(what).map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self, what: impl Display) -> Result<u16> {
        self.array(what).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, what: impl Display) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: impl Display) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// `n` bytes of UTF-8.
    pub(crate) fn text(&mut self, n: u64, what: impl Display) -> Result<&'a str> {
        let start = self.at;
        let bytes = self.take(n, &what)?;
        std::str::from_utf8(bytes).map_err(|error| {
            let at = start + error.valid_up_to();
            self.malformed_at(
                at as u64,
                format!("UTF-8 in {what}"),
                format!("byte {:#04x}", self.bytes[at]),
            )
        })
    }

    /// An error about the field at `offset`.
    pub(crate) fn malformed_at(
        &self,
        offset: u64,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::Malformed {
            file: self.file.to_owned(),
            at: Place::Offset(offset),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// A count of things of at least `each` bytes, which must fit in the rest of the file.
    pub(crate) fn check_count(
        &self,
        offset: u64,
        count: u64,
        each: u64,
        what: impl Display,
    ) -> Result<()> {
        let most = self.remaining() / each;
        if count > most {
            let expected =
                format!("at most {most} {what} in the {} bytes that follow", self.remaining());
            let found =
                format!("{count}: the file is truncated or damaged; copy or download it again");
            return Err(self.malformed_at(offset, expected, found));
        }
        Ok(())
    }
}
