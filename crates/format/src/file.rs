//! A file, mapped into memory.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use apr_tensor::Bytes;
use memmap2::Mmap;

use crate::{Error, Metadata, Result, budget::Budget, json};

/// A file of a checkpoint and its bytes.
#[derive(Clone, Debug)]
pub struct File {
    path: PathBuf,
    bytes: Bytes,
}

impl File {
    /// Maps the file at `path`.
    ///
    /// Bytes are read from disk when they are looked at. Whoever changes the file in place meanwhile
    /// changes the bytes under us, and whoever shortens it ends this process with a bus error at the
    /// next look. Tools that replace a file by renaming a new one over it do no harm: the old one lives on.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let bytes = map(&path).map_err(|reason| Error::Io { file: path.clone(), reason })?;
        Ok(Self { path, bytes })
    }

    /// As `open`; `None` if there is no such file.
    pub(crate) fn open_if_present(path: PathBuf) -> Result<Option<Self>> {
        match Self::open(path) {
            Ok(file) => Ok(Some(file)),
            Err(Error::Io { reason, .. }) if reason.kind() == std::io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Bytes that are in memory already, under a name for messages.
    pub fn from_bytes(name: impl Into<PathBuf>, bytes: Bytes) -> Self {
        Self { path: name.into(), bytes }
    }

    /// The path, as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The contents.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The contents as text.
    pub fn text(&self) -> Result<&str> {
        crate::cursor::Cursor::new(&self.path, &self.bytes, 0).text(self.size(), "a text file")
    }

    /// The contents as a JSON object, in which a repeated key is an error.
    pub fn json(&self) -> Result<Metadata> {
        let mut budget = Budget::new(&self.path, self.size());
        let map = json::parse_object(&self.path, 0, &self.bytes, &mut budget)?;
        Ok(Metadata::new(&self.path, map))
    }
}

fn map(path: &Path) -> std::io::Result<Bytes> {
    // Looked at first, because opening a pipe would wait for its writer.
    if !fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("expected a regular file or a directory"));
    }
    let file = fs::File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::from_static(&[]));
    }
    // SAFETY: the map is read-only and outlives the descriptor. That nobody shortens or rewrites the file
    // meanwhile is not ours to enforce; what happens then is documented at `File::open`, and nothing that
    // was validated on open (offsets, sizes, names) is read from the map again.
    let map = unsafe { Mmap::map(&file)? };
    Ok(Bytes::mapped(Arc::new(map)))
}
