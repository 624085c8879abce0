//! Writing safetensors.

use serde_json::json;

use super::{MAX_HEADER, METADATA_KEY};
use crate::{
    Map, Result, Value,
    write::{Declared, Header, sealed::Layout, unwritable},
};

/// The header is padded with spaces to a multiple of this, so that data can be used in place.
const HEADER_ALIGNMENT: usize = 8;

/// Safetensors, as a container to write. Metadata are the texts of `__metadata__`.
#[derive(Clone, Copy, Debug)]
pub struct Safetensors;

/// Declares texts and tensors of a safetensors file, then writes them in the order of declaration.
pub type Writer = crate::write::Writer<Safetensors>;

impl Layout for Safetensors {
    const NAME: &'static str = "a safetensors file";

    fn refusal(tensor: &Declared) -> Option<String> {
        let Declared { name, dtype, .. } = tensor;
        (!super::holds(*dtype) || name == METADATA_KEY).then(|| format!(" of type {dtype}"))
    }

    fn header(metadata: &Map, tensors: &mut [Declared]) -> Result<Header> {
        let mut header = serde_json::Map::new();
        if let Some((key, value)) = metadata.iter().find(|(_, v)| !matches!(v, Value::String(_))) {
            return Err(unwritable::<Self>(format_args!("key `{key}`, {value}: texts only")));
        }
        if !metadata.is_empty() {
            header.insert(METADATA_KEY.to_owned(), metadata.into());
        }
        let mut offset = 0u64;
        for tensor in tensors {
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
            return Err(unwritable::<Self>(format_args!(
                "a header of {len} bytes; the limit is {MAX_HEADER}"
            )));
        }
        let mut bytes = len.to_le_bytes().to_vec();
        bytes.append(&mut text);
        Ok(Header { bytes, alignment: 1, checksum: false })
    }
}
