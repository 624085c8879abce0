//! One opened model, whatever the container.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use apr_tensor::{Bytes, Stored};
use sha2::{Digest, Sha256};

use crate::{
    Checksum, Companions, Error, File, Gap, Metadata, Result, Unreadable, apr,
    budget::Budget,
    gguf, huggingface,
    sniff::{Kind, sniff},
    tensors::Tensors,
};

/// The container that a checkpoint came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// A GGUF file.
    Gguf {
        /// Its version: 2 or 3.
        version: u32,
    },
    /// Safetensors: one file, or the shards of a Hugging Face directory.
    Safetensors,
    /// An `.apr` file.
    Apr,
}

impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Gguf { .. } => "gguf",
            Self::Safetensors => "safetensors",
            Self::Apr => "apr",
        })
    }
}

/// One opened model: metadata, and tensors as its files hold them.
///
/// Files are mapped, not read, so opening is quick and costs no memory for weights. Everything that the
/// files say about themselves has been checked when `open` returns: every tensor lies within its file, overlaps
/// no other, and has the size that its type and shape ask for. Names and keys are the container's own.
/// What happens if a file changes while it is open: see [`File::open`]. A checksum of a whole file is not
/// verified by `open`, which would have to read it all: see [`checksums`](Self::checksums).
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    container: Container,
    metadata: Metadata,
    tensors: Tensors,
    files: Vec<File>,
    companions: Companions,
}

impl Checkpoint {
    /// Opens a GGUF, safetensors or `.apr` file, told apart by their first bytes, the index of safetensors
    /// shards, or a Hugging Face directory.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path.as_ref(), false)
    }

    /// As [`open`](Self::open) for whoever looks for damage: a header whose checksum is wrong is read all the same.
    pub fn open_damaged(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path.as_ref(), true)
    }

    fn open_with(path: &Path, may_be_damaged: bool) -> Result<Self> {
        if path.is_dir() {
            return Ok(Self::from_huggingface(path, huggingface::open_directory(path)?));
        }
        let file = File::open(path)?;
        match sniff(&file)? {
            Kind::Safetensors => Ok(Self::from_huggingface(path, huggingface::open_single(file)?)),
            Kind::Json if path.to_string_lossy().ends_with(huggingface::INDEX_SUFFIX) => {
                Ok(Self::from_huggingface(path, huggingface::open_sharded(&file)?))
            }
            kind => Self::from_file(file, kind, may_be_damaged),
        }
    }

    /// Opens a file that is in memory; `name` stands for its path in messages.
    pub fn from_bytes(name: &str, bytes: Bytes) -> Result<Self> {
        let file = File::from_bytes(name, bytes);
        let kind = sniff(&file)?;
        Self::from_file(file, kind, false)
    }

    /// Opens a Hugging Face directory that is in memory: names and contents of its files, `model.safetensors` among
    /// them. `directory` stands for its path in messages.
    pub fn from_files(directory: &str, files: &[(String, Bytes)]) -> Result<Self> {
        let path = Path::new(directory);
        Ok(Self::from_huggingface(path, huggingface::from_files(path, files)?))
    }

    fn from_file(file: File, kind: Kind, may_be_damaged: bool) -> Result<Self> {
        let path = file.path().to_owned();
        let mut budget = Budget::new(&path, file.size());
        let (container, metadata, tensors) = match kind {
            Kind::Gguf => {
                let contents = gguf::read(&file, &mut budget)?;
                (Container::Gguf { version: contents.version }, contents.metadata, contents.tensors)
            }
            Kind::Apr => {
                let contents = apr::read(&file, &mut budget, may_be_damaged)?;
                (Container::Apr, contents.metadata, contents.tensors)
            }
            Kind::Safetensors => {
                return Ok(Self::from_huggingface(&path, huggingface::from_memory(file)?));
            }
            Kind::Json => {
                return Err(Error::NotAModel {
                    file: path,
                    found: "a JSON text",
                    help: "give the directory of the model, or its file of weights",
                });
            }
        };
        // What stands before the tensors, megabytes of vocabulary mostly, is not read again.
        file.bytes().release();
        let companions = Companions::default();
        Ok(Self { path, container, metadata, tensors, files: vec![file], companions })
    }

    fn from_huggingface(path: &Path, contents: huggingface::Contents) -> Self {
        let huggingface::Contents { metadata, tensors, files, companions } = contents;
        let container = Container::Safetensors;
        Self { path: path.to_owned(), container, metadata, tensors, files, companions }
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The container.
    pub fn container(&self) -> Container {
        self.container
    }

    /// The metadata: GGUF's keys, `config.json`, or `.apr`'s JSON. The texts that a safetensors header
    /// carries are an object under `__metadata__`.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensor of this name, if it is there and of a type that is known here.
    pub fn tensor(&self, name: &str) -> Option<&Stored> {
        self.tensors.readable.get(name)
    }

    /// The tensor of this name; else an error that lists names like it.
    pub fn require(&self, name: &str) -> Result<&Stored> {
        self.tensor(name).ok_or_else(|| match self.tensors.unreadable.get(name) {
            Some(tensor) => Error::UnreadableTensor {
                file: self.path.clone(),
                name: name.to_owned(),
                dtype: tensor.dtype.clone(),
            },
            None => Error::MissingTensor {
                file: self.path.clone(),
                name: name.to_owned(),
                count: self.tensors.readable.len(),
                near: self.tensors.near(name),
            },
        })
    }

    /// The same with other tensors under some of the names that it has; nothing is copied.
    ///
    /// # Panics
    /// If there is no such name.
    #[must_use]
    pub fn with_tensors(&self, others: impl IntoIterator<Item = (String, Stored)>) -> Self {
        let mut changed = self.clone();
        for (name, stored) in others {
            let place = changed.tensors.readable.get_mut(&name);
            *place.unwrap_or_else(|| panic!("there is no tensor {name}")) = stored;
        }
        changed
    }

    /// All readable tensors, in the order of the files.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &Stored)> {
        self.tensors.readable.iter().map(|(name, stored)| (name.as_str(), stored))
    }

    /// The tensors whose type is unknown here, in the order of the files.
    pub fn unreadable(&self) -> impl ExactSizeIterator<Item = (&str, &Unreadable)> {
        self.tensors.unreadable.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The files that hold the tensors, in order: one, or the shards sorted by name.
    pub fn files(&self) -> &[File] {
        &self.files
    }

    /// The checksums that the files state of themselves. Only `.apr` files do: of the header, and of everything.
    pub fn checksums(&self) -> Vec<Checksum> {
        match self.container {
            Container::Apr => self.files.iter().flat_map(apr::checksums).collect(),
            Container::Gguf { .. } | Container::Safetensors => Vec::new(),
        }
    }

    /// The bytes among the data that belong to no tensor, in the order of the files.
    pub fn gaps(&self) -> &[Gap] {
        &self.tensors.gaps
    }

    /// The other files of a Hugging Face directory.
    pub fn companions(&self) -> &Companions {
        &self.companions
    }

    /// The SHA-256, in hex, of the tensor index: one line `name dtype d0,d1` per tensor, sorted by name.
    pub fn index_sha256(&self) -> String {
        let readable = self.tensors().map(|(name, t)| (name, t.dtype().name(), t.shape()));
        let unreadable = self.unreadable().map(|(name, t)| (name, t.dtype.as_str(), &t.shape));
        let mut lines: Vec<_> = readable.chain(unreadable).collect();
        lines.sort_by_key(|line| line.0);
        let mut hash = Sha256::new();
        for (name, dtype, shape) in lines {
            let dims: Vec<_> = shape.dims().iter().map(usize::to_string).collect();
            hash.update(format!("{name} {dtype} {}\n", dims.join(",")));
        }
        hex(&hash.finalize())
    }

    /// The SHA-256, in hex, of the contents of [`files`](Self::files), one after the other: for a single
    /// file what `sha256sum` says. Reads every byte.
    pub fn file_sha256(&self) -> String {
        let mut hash = Sha256::new();
        for file in &self.files {
            hash.update(&file.bytes()[..]);
        }
        hex(&hash.finalize())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
