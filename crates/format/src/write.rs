//! What the writers of all containers share: declare the tensors, write the header, stream the bodies.
//!
//! Sizes follow from types and shapes, so a header is written before any data is there, and of the data no more than
//! one piece has to be in memory. Writing under a temporary name, to rename what is complete, is the caller's business.

use std::{fmt, io::Write, marker::PhantomData};

use apr_tensor::{DType, Shape};

use crate::{Error, Map, Result, Value, error::Shortened};

/// A container that can be written: [`Gguf`](crate::gguf::Gguf), [`Apr`](crate::apr::Apr) or
/// [`Safetensors`](crate::safetensors::Safetensors).
pub trait Format: fmt::Debug + sealed::Layout {}

impl<F: fmt::Debug + sealed::Layout> Format for F {}

pub(crate) mod sealed {
    use super::*;

    /// What containers differ in.
    pub trait Layout {
        /// What a file of it is called in a message.
        const NAME: &'static str;

        /// Why the container cannot hold a tensor like this, if it cannot.
        fn refusal(tensor: &Declared) -> Option<String>;

        /// Everything before the data, and the order of `tensors`, which come as declared.
        fn header(metadata: &Map, tensors: &mut [Declared]) -> Result<Header>;
    }
}

/// A tensor that will be written.
#[derive(Clone, Debug)]
#[doc(hidden)]
pub struct Declared {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Shape,
    pub(crate) len: u64,
}

/// What comes before the data, and what is done to the data.
#[derive(Clone, Debug)]
#[doc(hidden)]
pub struct Header {
    pub(crate) bytes: Vec<u8>,
    /// Each tensor is padded with zeros to a multiple of this.
    pub(crate) alignment: u64,
    /// Whether the file ends with a checksum of all before it.
    pub(crate) checksum: bool,
}

/// Declares metadata and tensors of a file, then writes them.
#[derive(Clone, Debug)]
pub struct Writer<F> {
    metadata: Map,
    tensors: Vec<Declared>,
    format: PhantomData<F>,
}

impl<F: Format> Default for Writer<F> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F: Format> Writer<F> {
    /// A file with nothing in it.
    pub fn new() -> Self {
        Self { metadata: Map::default(), tensors: Vec::new(), format: PhantomData }
    }

    /// Sets a metadata key.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        self.metadata.insert(key, value);
        self
    }

    /// Declares a tensor. [`Body::next_tensor`] tells whose turn it is: the order is the container's.
    pub fn tensor(
        &mut self,
        name: &str,
        dtype: DType,
        shape: impl Into<Shape>,
    ) -> Result<&mut Self> {
        let shape = shape.into();
        let Some(len) = dtype.tensor_bytes(&shape) else {
            return Err(unwritable::<F>(format_args!(
                "tensor `{name}`: no whole blocks of {dtype} in shape {shape}"
            )));
        };
        let declared = Declared { name: name.to_owned(), dtype, shape, len: len as u64 };
        if let Some(why) = F::refusal(&declared) {
            return Err(unwritable::<F>(format_args!("tensor `{name}`{why}")));
        }
        self.tensors.push(declared);
        Ok(self)
    }

    /// Writes all that comes before the data to `out`; what it returns takes the data.
    pub fn begin<W: Write>(&self, out: W) -> Result<Body<W>> {
        self.check_names()?;
        let mut tensors = self.tensors.clone();
        let Header { bytes, alignment, checksum } = F::header(&self.metadata, &mut tensors)?;
        let crc = checksum.then(crc32fast::Hasher::new);
        let mut body = Body { out, tensors: tensors.into_iter(), written: 0, alignment, crc };
        body.put(&bytes)?;
        Ok(body)
    }

    /// Names must be unique.
    fn check_names(&self) -> Result<()> {
        let mut names: Vec<_> = self.tensors.iter().map(|tensor| &tensor.name).collect();
        names.sort();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => {
                Err(unwritable::<F>(format_args!("two tensors `{}`", Shortened(pair[0]))))
            }
            None => Ok(()),
        }
    }
}

/// The error for something that has no place in a container.
pub(crate) fn unwritable<F: Format>(what: impl fmt::Display) -> Error {
    Error::Unwritable { container: F::NAME, what: what.to_string() }
}

/// A file whose header is written: takes the bodies of the tensors, in the order of its index.
#[derive(Debug)]
#[must_use = "a file without `finish` is cut off"]
pub struct Body<W> {
    out: W,
    tensors: std::vec::IntoIter<Declared>,
    /// Bytes of the next tensor that are there already.
    written: u64,
    alignment: u64,
    /// Of all bytes so far, if the container ends with a checksum.
    crc: Option<crc32fast::Hasher>,
}

impl<W: Write> Body<W> {
    /// Name and size in bytes of the tensor that comes next, or that is not whole yet; `None` after the last.
    pub fn next_tensor(&self) -> Option<(&str, u64)> {
        self.tensors.as_slice().first().map(|tensor| (tensor.name.as_str(), tensor.len))
    }

    /// Writes the next tensor.
    pub fn tensor(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(tensor) = self.turn_of(name).filter(|_| self.written == 0) else {
            return Err(self.out_of_turn(name));
        };
        if tensor.len != bytes.len() as u64 {
            return Err(wrong_length(tensor, bytes.len() as u64));
        }
        self.part(name, bytes)
    }

    /// Writes some of the next tensor's bytes. It is done when all are there; one without bytes needs one
    /// part that is empty.
    pub fn part(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(tensor) = self.turn_of(name) else { return Err(self.out_of_turn(name)) };
        let written = self.written + bytes.len() as u64;
        if written > tensor.len {
            return Err(wrong_length(tensor, written));
        }
        let (len, padding) = (tensor.len, tensor.len.next_multiple_of(self.alignment) - tensor.len);
        self.put(bytes)?;
        self.written = written;
        if written == len {
            self.put(&vec![0; padding as usize])?;
            self.tensors.next();
            self.written = 0;
        }
        Ok(())
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

    fn turn_of(&self, name: &str) -> Option<&Declared> {
        self.tensors.as_slice().first().filter(|tensor| tensor.name == name)
    }

    fn out_of_turn(&self, name: &str) -> Error {
        let expected = self.next_tensor().map(|(name, _)| name.to_owned());
        Error::WriteOrder { expected, found: format!("tensor `{name}`") }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(crc) = &mut self.crc {
            crc.update(bytes);
        }
        self.out.write_all(bytes).map_err(Error::Write)
    }
}

fn wrong_length(tensor: &Declared, found: u64) -> Error {
    Error::Tensor {
        file: "(being written)".into(),
        name: tensor.name.clone(),
        reason: apr_tensor::Error::Length {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            expected: usize::try_from(tensor.len).ok(),
            found: usize::try_from(found).unwrap_or(usize::MAX),
        },
    }
}

/// Appends zeros up to a multiple of `alignment`.
pub(crate) fn pad(bytes: &mut Vec<u8>, alignment: u64) {
    bytes.resize(bytes.len().next_multiple_of(alignment as usize), 0);
}
