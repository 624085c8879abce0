//! NumPy's `.npz`: a zip archive of `.npy` files.

use std::{
    fs::File,
    io::{BufReader, Read},
    ops::Range,
    path::Path,
};

use zip::{ZipArchive, result::ZipError};

use crate::{
    Error, Result,
    npy::{self, Npy},
};

/// Archives with more entries are refused.
const MAX_ENTRIES: usize = 1_000_000;

/// The arrays of the archive at `path`: entry number, name, header.
pub(crate) fn read(path: &Path) -> Result<Vec<(usize, String, Npy)>> {
    let mut archive = open(path)?;
    if archive.len() > MAX_ENTRIES {
        let expected = format!("at most {MAX_ENTRIES}");
        return Err(Error::malformed(path, "the number of entries", expected, archive.len()));
    }
    (0..archive.len())
        .map(|index| {
            let entry = archive.by_index(index).map_err(zip_error(path))?;
            let full_name = entry.name().map_err(zip_error(path))?.into_owned();
            let Some(name) = full_name.strip_suffix(".npy") else {
                let what = format!("entry `{full_name}`");
                return Err(Error::malformed(path, what, "a name in .npy", "another"));
            };
            let size = entry.size();
            let npy = npy::parse(entry, size, &path.join(&full_name))?;
            Ok((index, name.to_owned(), npy))
        })
        .collect()
}

/// The bytes in `range` of entry number `index`.
pub(crate) fn load(path: &Path, index: usize, range: &Range<u64>) -> Result<Vec<u8>> {
    let mut archive = open(path)?;
    let entry = archive.by_index(index).map_err(zip_error(path))?;
    // The archive may promise more than it holds: memory is taken as bytes come.
    let mut entry = entry.take(range.end);
    std::io::copy(&mut entry.by_ref().take(range.start), &mut std::io::sink())
        .map_err(Error::read(path))?;
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(Error::read(path))?;
    let expected = range.end - range.start;
    if bytes.len() as u64 != expected {
        let what = format!("the length of entry {index}");
        return Err(Error::malformed(path, what, expected, bytes.len()));
    }
    Ok(bytes)
}

fn open(path: &Path) -> Result<ZipArchive<BufReader<File>>> {
    let file = File::open(path).map_err(Error::read(path))?;
    ZipArchive::new(BufReader::new(file)).map_err(zip_error(path))
}

fn zip_error(path: &Path) -> impl FnOnce(ZipError) -> Error {
    move |error| match error {
        ZipError::Io(source) => Error::Read { path: path.to_owned(), source },
        other => Error::malformed(path, "the zip archive", "a readable one", other),
    }
}
