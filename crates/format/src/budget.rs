//! A bound on the memory that a file can make us allocate.

use std::path::{Path, PathBuf};

use crate::{Error, Place, Result};

/// What metadata and index may take beyond twice the size of the files.
pub(crate) const ALLOWANCE: u64 = 48 << 20;

/// The memory that is left for one checkpoint: charged *before* anything is allocated by a file's word.
///
/// Charges are upper bounds of what the allocator will see, growth of vectors included; together with the
/// few small things that are not charged, opening stays below twice the size of the files plus 64 MiB.
#[derive(Debug)]
pub(crate) struct Budget {
    file: PathBuf,
    limit: u64,
    left: u64,
}

impl Budget {
    pub(crate) fn new(file: &Path, len: u64) -> Self {
        let limit = len.saturating_mul(2).saturating_add(ALLOWANCE);
        Self { file: file.to_owned(), limit, left: limit }
    }

    /// Goes on with another file of the same checkpoint, whose size was not in the sum.
    pub(crate) fn add_file(&mut self, file: &Path, len: u64) {
        self.go_on(file);
        self.limit = self.limit.saturating_add(len.saturating_mul(2));
        self.left = self.left.saturating_add(len.saturating_mul(2));
    }

    /// Goes on with another file of the same checkpoint, whose size was in the sum.
    pub(crate) fn go_on(&mut self, file: &Path) {
        self.file = file.to_owned();
    }

    /// Whether `bytes` can still be allocated; takes them if so.
    pub(crate) fn take(&mut self, bytes: usize) -> bool {
        let after = self.left.checked_sub(bytes as u64);
        self.left = after.unwrap_or(self.left);
        after.is_some()
    }

    /// As `take`, with an error that says where.
    pub(crate) fn charge(&mut self, bytes: usize, at: impl FnOnce() -> Place) -> Result<()> {
        if self.take(bytes) {
            return Ok(());
        }
        Err(Error::Limit {
            file: self.file.clone(),
            at: at(),
            what: "the memory that metadata and tensor index take, in bytes,",
            found: (self.limit - self.left).saturating_add(bytes as u64),
            limit: self.limit,
        })
    }
}
