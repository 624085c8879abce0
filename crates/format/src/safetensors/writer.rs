//! Writing safetensors.

use std::io::Write;

use apr_tensor::{DType, Shape};
use serde_json::json;

use super::{MAX_HEADER, METADATA_KEY};
use crate::{
    Result,
    write::{Body, Declarations},
};

/// The header is padded with spaces to a multiple of this, so that data can be used in place.
const HEADER_ALIGNMENT: usize = 8;

/// Declares texts and tensors of a safetensors file, then writes them in the order of declaration.
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
        Self(Declarations::new("a safetensors file"))
    }

    /// Sets a text of `__metadata__`.
    pub fn set(&mut self, key: &str, text: &str) -> &mut Self {
        self.0.metadata.insert(key, text);
        self
    }

    /// Declares the next tensor.
    pub fn tensor(
        &mut self,
        name: &str,
        dtype: DType,
        shape: impl Into<Shape>,
    ) -> Result<&mut Self> {
        if !super::holds(dtype) || name == METADATA_KEY {
            return Err(self.0.unwritable(format_args!("tensor `{name}` of type {dtype}")));
        }
        self.0.tensor(name, dtype, shape.into())?;
        Ok(self)
    }

    /// Writes the header to `out`; what it returns takes the data.
    pub fn begin<W: Write>(&self, out: W) -> Result<Body<W>> {
        self.0.check_names()?;
        let mut header = serde_json::Map::new();
        if !self.0.metadata.is_empty() {
            header.insert(METADATA_KEY.to_owned(), (&self.0.metadata).into());
        }
        let mut offset = 0u64;
        for tensor in &self.0.tensors {
            let end = offset + tensor.len;
            let line = json!({
                "dtype": tensor.dtype.name(),
                "shape": tensor.shape.dims(),
                "data_offsets": [offset, end],
            });
            header.insert(tensor.name.clone(), line);
            offset = end;
        }
        let mut text = serde_json::Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(HEADER_ALIGNMENT), b' ');
        let len = text.len() as u64;
        if len > MAX_HEADER {
            return Err(self
                .0
                .unwritable(format_args!("a header of {len} bytes; the limit is {MAX_HEADER}")));
        }
        let mut bytes = len.to_le_bytes().to_vec();
        bytes.append(&mut text);
        Body::begin(out, &bytes, self.0.tensors.clone(), 1, None)
    }
}
