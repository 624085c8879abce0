//! Writing `.apr` version 2.

use std::io::Write;

use apr_tensor::{DType, Shape};

use super::{
    ALIGNMENT, DTYPES, HEADER_CRC, HEADER_LEN, MAGIC, MAJOR, MAX_METADATA, MAX_NAME, ROW_MAJOR,
    header_crc,
};
use crate::{
    Result, Value,
    tensors::MAX_DIMS,
    write::{Body, Declarations, pad},
};

/// Declares metadata and tensors of an `.apr` file, then writes them, sorted by name.
#[derive(Clone, Debug)]
pub struct Writer(Declarations);

impl Default for Writer {
    fn default() -> Self {
        Self::new()
    }
}

impl Writer {
    /// A file with nothing in it.
    pub fn new() -> Self {
        Self(Declarations::new("an .apr file"))
    }

    /// Sets a metadata key.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        self.0.metadata.insert(key, value);
        self
    }

    /// Declares a tensor. [`Body::next_tensor`] tells whose turn it is: the order is by name.
    pub fn tensor(
        &mut self,
        name: &str,
        dtype: DType,
        shape: impl Into<Shape>,
    ) -> Result<&mut Self> {
        let shape = shape.into();
        if number_of(dtype).is_none() {
            return Err(self.0.unwritable(format_args!("tensor `{name}` of type {dtype}")));
        }
        if name.len() > MAX_NAME.into() || shape.dims().len() > MAX_DIMS {
            return Err(self.0.unwritable(format_args!(
                "tensor `{name}` of shape {shape}: at most {MAX_NAME} bytes of name and {MAX_DIMS} dimensions"
            )));
        }
        self.0.tensor(name, dtype, shape)?;
        Ok(self)
    }

    /// Writes header, metadata and index to `out`; what it returns takes the data.
    pub fn begin<W: Write>(&self, out: W) -> Result<Body<W>> {
        self.0.check_names()?;
        let mut tensors = self.0.tensors.clone();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));

        let mut metadata = serde_json::Value::from(&self.0.metadata).to_string().into_bytes();
        let metadata_size = metadata.len();
        if metadata_size > MAX_METADATA as usize {
            return Err(self.0.unwritable(format_args!(
                "{metadata_size} bytes of metadata; the limit is {MAX_METADATA}"
            )));
        }
        pad(&mut metadata, ALIGNMENT);

        let mut index = Vec::new();
        let mut offset = 0u64;
        for tensor in &tensors {
            index.extend((tensor.name.len() as u16).to_le_bytes());
            index.extend(tensor.name.as_bytes());
            index.push(number_of(tensor.dtype).expect("`tensor` has checked the type"));
            index.push(tensor.shape.dims().len() as u8);
            for &dim in tensor.shape.dims() {
                index.extend((dim as u64).to_le_bytes());
            }
            index.extend(offset.to_le_bytes());
            index.extend(tensor.len.to_le_bytes());
            offset += tensor.len.next_multiple_of(ALIGNMENT);
        }
        pad(&mut index, ALIGNMENT);

        let index_offset = HEADER_LEN + metadata.len() as u64;
        let data_offset = index_offset + index.len() as u64;
        let mut header = MAGIC.to_vec();
        header.extend([MAJOR, 0]);
        header.extend(ROW_MAJOR.to_le_bytes());
        header.extend((tensors.len() as u32).to_le_bytes());
        header.extend(HEADER_LEN.to_le_bytes());
        header.extend((metadata_size as u32).to_le_bytes());
        header.extend(index_offset.to_le_bytes());
        header.extend(data_offset.to_le_bytes());
        pad(&mut header, HEADER_LEN);
        let crc = header_crc(&header);
        header[HEADER_CRC].copy_from_slice(&crc.to_le_bytes());
        header.append(&mut metadata);
        header.append(&mut index);
        Body::begin(out, &header, tensors, ALIGNMENT, Some(crc32fast::Hasher::new()))
    }
}

fn number_of(dtype: DType) -> Option<u8> {
    DTYPES.iter().find(|row| row.1 == dtype).map(|row| row.0)
}
