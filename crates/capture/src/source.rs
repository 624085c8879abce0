//! Where the bytes of a recorded value lie until they are needed.

use std::{fs::File, ops::Range, path::Path, sync::Arc};

use apr_tensor::Bytes;
use memmap2::{Advice, MmapOptions};

use crate::{Error, Result, npz};

/// The place of a tensor's bytes.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// A range of a file.
    File { path: Arc<Path>, range: Range<u64> },
    /// A range of an entry of a zip archive.
    Zip { archive: Arc<Path>, entry: usize, range: Range<u64> },
    /// Columns side by side: for each part its source and the bytes of one of its rows.
    Columns { parts: Vec<(Source, usize)>, rows: usize },
}

impl Source {
    /// The file, for messages.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::File { path, .. } => path,
            Self::Zip { archive, .. } => archive,
            Self::Columns { parts, .. } => parts[0].0.path(),
        }
    }

    /// The bytes: mapped where they lie in a file, read where they do not.
    pub(crate) fn load(&self) -> Result<Bytes> {
        match self {
            Self::File { path, range } => map(path, range),
            Self::Zip { archive, entry, range } => Ok(npz::load(archive, *entry, range)?.into()),
            Self::Columns { parts, rows } => {
                let parts = parts
                    .iter()
                    .map(|(source, row_bytes)| Ok((source.load()?, *row_bytes)))
                    .collect::<Result<Vec<_>>>()?;
                let width: usize = parts.iter().map(|(_, row_bytes)| row_bytes).sum();
                let mut joined = Vec::with_capacity(width * rows);
                for row in 0..*rows {
                    for (bytes, row_bytes) in &parts {
                        joined.extend_from_slice(&bytes[row * row_bytes..(row + 1) * row_bytes]);
                    }
                }
                Ok(joined.into())
            }
        }
    }
}

fn map(path: &Path, range: &Range<u64>) -> Result<Bytes> {
    let file = File::open(path).map_err(Error::read(path))?;
    let length = file.metadata().map_err(Error::read(path))?.len();
    if length < range.end {
        let expected = format!("at least {} bytes", range.end);
        return Err(Error::malformed(path, "the file's length", expected, length));
    }
    let bytes = (range.end - range.start) as usize;
    if bytes == 0 {
        return Ok(Vec::new().into());
    }
    // SAFETY: the range lies within the file. Its bytes are plain data that are valid whatever they are; that nobody
    // truncates the file while it is mapped is the caller's part, as with every memory map.
    let map = unsafe { MmapOptions::new().offset(range.start).len(bytes).map(&file) };
    let map = map.map_err(Error::read(path))?;
    // A hint: values are read once, from front to back. Failure to take it changes nothing.
    let _ = map.advise(Advice::Sequential);
    Ok(Bytes::mapped(Arc::new(map)))
}
