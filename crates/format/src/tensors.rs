//! The tensor index that every container ends up as, and the checks that all of them share.

use std::{ops::Range, path::Path};

use apr_tensor::{DType, Shape, Stored};
use indexmap::IndexMap;

use crate::{Error, File, Gap, Place, Result};

/// The most dimensions that a tensor may have; ggml has 4, `.apr` 8.
pub(crate) const MAX_DIMS: usize = 8;

/// The longest tensor name, in bytes.
pub(crate) const MAX_NAME: usize = 1024;

/// A tensor that is listed but cannot be read, because its type is unknown here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// The container's name of its type, or `ggml-N` and `apr-N` for a number without a name.
    pub dtype: String,
    /// Its shape, row-major.
    pub shape: Shape,
    /// Its size in bytes, if the container states it.
    pub bytes: Option<u64>,
}

/// How a tensor is stored, as far as it is known.
#[derive(Debug)]
pub(crate) enum Kind {
    Known {
        dtype: DType,
        bytes: u64,
    },
    Unknown {
        dtype: String,
        /// `None` if only the type could tell.
        bytes: Option<u64>,
    },
}

/// One line of a container's index, with absolute offsets.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) shape: Shape,
    pub(crate) start: u64,
}

/// The memory that one tensor takes from index to map, beyond the bytes of its name: the entry and the
/// bucket (twice, for growth), the gap after it, the order by offset, the table of hashes, the shape.
pub(crate) const ENTRY_COST: usize = 2 * size_of::<Entry>()
    + 2 * size_of::<Gap>()
    + 2 * size_of::<(usize, String, Stored)>()
    + MAX_DIMS * size_of::<usize>()
    + 32;

/// The memory that a name takes: with its tensor, and with the gap after that.
pub(crate) fn name_cost(name: &str) -> usize {
    2 * name.len()
}

impl Entry {
    /// One past the bytes that are certainly the tensor's: at least one if it has any element.
    pub(crate) fn end(&self) -> u64 {
        let bytes = match self.kind {
            Kind::Known { bytes, .. } | Kind::Unknown { bytes: Some(bytes), .. } => bytes,
            Kind::Unknown { .. } => u64::from(self.shape.checked_elements() != Some(0)),
        };
        self.start.saturating_add(bytes)
    }

    /// The size that type and shape ask for; an error if a row is no whole number of blocks.
    pub(crate) fn size_of(file: &Path, name: &str, dtype: DType, shape: &Shape) -> Result<u64> {
        dtype.tensor_bytes(shape).map(|n| n as u64).ok_or_else(|| Error::Malformed {
            file: file.to_owned(),
            at: Place::Tensor(name.to_owned()),
            expected: match dtype.block_len() {
                1 => "a shape that memory can hold".to_owned(),
                n => {
                    format!("a shape that memory can hold, in {dtype} rows of whole blocks of {n}")
                }
            },
            found: format!("shape {shape}"),
        })
    }
}

/// Where in a file the bytes of tensors are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Data {
    pub(crate) start: u64,
    /// Each tensor begins on a multiple of this from the start.
    pub(crate) alignment: u64,
    /// Bytes at the end of the file that are something else.
    pub(crate) footer: u64,
}

impl Data {
    fn range(self, file: &File) -> Range<u64> {
        let end = file.size().saturating_sub(self.footer);
        self.start.min(end)..end
    }
}

/// All tensors of a checkpoint, in the order of the files.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tensors {
    pub(crate) readable: IndexMap<String, Stored>,
    pub(crate) unreadable: IndexMap<String, Unreadable>,
    pub(crate) gaps: Vec<Gap>,
}

impl Tensors {
    /// Adds the tensors of `file`, which must lie within its data, without overlaps.
    pub(crate) fn add(&mut self, file: &File, entries: Vec<Entry>, data: Data) -> Result<()> {
        check_extent(file, &entries, data.footer)?;
        let mut by_offset: Vec<_> =
            entries.iter().filter(|entry| entry.end() > entry.start).collect();
        by_offset.sort_by_key(|entry| entry.start);
        check_overlaps(file, &by_offset)?;
        let taken = by_offset.iter().map(|entry| {
            let is_known = !matches!(entry.kind, Kind::Unknown { bytes: None, .. });
            (&*entry.name, entry.start, is_known.then(|| entry.end()))
        });
        self.gaps.extend(Gap::all(file, data.range(file), data.alignment, taken));
        self.readable.reserve(entries.len());
        for entry in entries {
            self.insert(file, entry)?;
        }
        Ok(())
    }

    fn insert(&mut self, file: &File, entry: Entry) -> Result<()> {
        let Entry { name, kind, shape, start } = entry;
        if self.contains(&name) {
            return Err(Error::Duplicate { file: file.path().to_owned(), at: Place::Tensor(name) });
        }
        match kind {
            Kind::Known { dtype, bytes } => {
                let bytes = usize::try_from(start)
                    .ok()
                    .zip(usize::try_from(start + bytes).ok())
                    .and_then(|(start, end)| file.bytes().slice(start..end))
                    .expect("check_extent has seen that every tensor lies within the file");
                let stored = Stored::new(dtype, shape, bytes).map_err(|reason| Error::Tensor {
                    file: file.path().to_owned(),
                    name: name.clone(),
                    reason,
                })?;
                self.readable.insert(name, stored);
            }
            Kind::Unknown { dtype, bytes } => {
                self.unreadable.insert(name, Unreadable { dtype, shape, bytes });
            }
        }
        Ok(())
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.readable.contains_key(name) || self.unreadable.contains_key(name)
    }

    /// The names most like `name`: those that share most of their beginning and end with it.
    pub(crate) fn near(&self, name: &str) -> Vec<String> {
        const SHOWN: usize = 3;
        let alike = |other: &str| {
            let same = |(a, b): &(u8, u8)| a == b;
            let prefix = name.bytes().zip(other.bytes()).take_while(same).count();
            let rest = name.len().min(other.len()) - prefix;
            let suffix =
                name.bytes().rev().zip(other.bytes().rev()).take(rest).take_while(same).count();
            prefix + suffix
        };
        let mut names: Vec<_> = self.readable.keys().map(|other| (alike(other), other)).collect();
        names.sort_by_key(|&(alike, _)| std::cmp::Reverse(alike));
        names
            .into_iter()
            .filter(|&(alike, _)| alike > 0)
            .take(SHOWN)
            .map(|(_, name)| name.clone())
            .collect()
    }
}

/// Every tensor must lie within the file. The one that ends last is named: it tells how much is missing.
fn check_extent(file: &File, entries: &[Entry], footer: u64) -> Result<()> {
    let Some(last) = entries.iter().max_by_key(|entry| entry.end()) else { return Ok(()) };
    let end = last.end().saturating_add(footer);
    if end <= file.size() {
        return Ok(());
    }
    Err(Error::Truncated {
        file: file.path().to_owned(),
        at: Place::Tensor(last.name.clone()),
        what: match footer {
            0 => "the tensor that ends last".to_owned(),
            _ => format!("the tensor that ends last, with {footer} bytes of checksum,"),
        },
        start: last.start,
        end,
        len: file.size(),
    })
}

fn check_overlaps(file: &File, by_offset: &[&Entry]) -> Result<()> {
    for pair in by_offset.windows(2) {
        let (first, second) = (pair[0], pair[1]);
        if second.start < first.end() {
            return Err(Error::Overlap {
                file: file.path().to_owned(),
                first: first.name.clone(),
                end: first.end(),
                second: second.name.clone(),
                start: second.start,
            });
        }
    }
    Ok(())
}
