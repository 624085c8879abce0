//! What the writers of all containers share: declare the tensors, write the header, stream the bodies.
//!
//! Sizes follow from types and shapes, so a header is written before any data is there, and no more than one
//! tensor is in memory. Writing under a temporary name, to rename what is complete, is the caller's business.

use std::io::Write;

use apr_tensor::{DType, Shape};

use crate::{Error, Map, Result, error::Shortened};

/// A tensor that will be written.
#[derive(Clone, Debug)]
pub(crate) struct Declared {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Shape,
    pub(crate) len: u64,
}

/// Metadata and tensors of a file to be written.
#[derive(Clone, Debug)]
pub(crate) struct Declarations {
    container: &'static str,
    pub(crate) metadata: Map,
    pub(crate) tensors: Vec<Declared>,
}

impl Declarations {
    pub(crate) fn new(container: &'static str) -> Self {
        Self { container, metadata: Map::default(), tensors: Vec::new() }
    }

    pub(crate) fn tensor(&mut self, name: &str, dtype: DType, shape: Shape) -> Result<()> {
        let Some(len) = dtype.tensor_bytes(&shape) else {
            return Err(self.unwritable(format_args!(
                "tensor `{name}`: no whole blocks of {dtype} in shape {shape}"
            )));
        };
        self.tensors.push(Declared { name: name.to_owned(), dtype, shape, len: len as u64 });
        Ok(())
    }

    /// Names must be unique.
    pub(crate) fn check_names(&self) -> Result<()> {
        let mut names: Vec<_> = self.tensors.iter().map(|tensor| &tensor.name).collect();
        names.sort();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => {
                Err(self.unwritable(format_args!("two tensors `{}`", Shortened(pair[0]))))
            }
            None => Ok(()),
        }
    }

    pub(crate) fn unwritable(&self, what: impl std::fmt::Display) -> Error {
        Error::Unwritable { container: self.container, what: what.to_string() }
    }
}

/// A file whose header is written: takes the bodies of the tensors, in the order of its index.
#[derive(Debug)]
#[must_use = "a file without `finish` is cut off"]
pub struct Body<W> {
    out: W,
    tensors: std::vec::IntoIter<Declared>,
    alignment: u64,
    /// Of all bytes so far, if the container ends with a checksum.
    crc: Option<crc32fast::Hasher>,
}

impl<W: Write> Body<W> {
    /// Writes `header`; each of `tensors` will be padded with zeros to a multiple of `alignment`.
    pub(crate) fn begin(
        out: W,
        header: &[u8],
        tensors: Vec<Declared>,
        alignment: u64,
        crc: Option<crc32fast::Hasher>,
    ) -> Result<Self> {
        let mut body = Self { out, tensors: tensors.into_iter(), alignment, crc };
        body.put(header)?;
        Ok(body)
    }

    /// Name and size in bytes of the tensor that comes next; `None` after the last.
    pub fn next_tensor(&self) -> Option<(&str, u64)> {
        self.tensors.as_slice().first().map(|tensor| (tensor.name.as_str(), tensor.len))
    }

    /// Writes the next tensor.
    pub fn tensor(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(tensor) = self.tensors.as_slice().first().filter(|tensor| tensor.name == name)
        else {
            let expected = self.next_tensor().map(|(name, _)| name.to_owned());
            return Err(Error::WriteOrder { expected, found: format!("tensor `{name}`") });
        };
        if tensor.len != bytes.len() as u64 {
            return Err(Error::Tensor {
                file: "(being written)".into(),
                name: name.to_owned(),
                reason: apr_tensor::Error::Length {
                    dtype: tensor.dtype,
                    shape: tensor.shape.clone(),
                    expected: usize::try_from(tensor.len).ok(),
                    found: bytes.len(),
                },
            });
        }
        let padding = tensor.len.next_multiple_of(self.alignment) - tensor.len;
        self.tensors.next();
        self.put(bytes)?;
        self.put(&vec![0; padding as usize])
    }

    /// Ends the file, which must have all its tensors.
    pub fn finish(mut self) -> Result<W> {
        if let Some((missing, _)) = self.next_tensor() {
            let expected = Some(missing.to_owned());
            return Err(Error::WriteOrder { expected, found: "the end".to_owned() });
        }
        if let Some(crc) = self.crc.take() {
            self.put(&crc.finalize().to_le_bytes())?;
        }
        self.out.flush().map_err(Error::Write)?;
        Ok(self.out)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(crc) = &mut self.crc {
            crc.update(bytes);
        }
        self.out.write_all(bytes).map_err(Error::Write)
    }
}

/// Appends zeros up to a multiple of `alignment`.
pub(crate) fn pad(bytes: &mut Vec<u8>, alignment: u64) {
    bytes.resize(bytes.len().next_multiple_of(alignment as usize), 0);
}
