//! Writing `.apr` version 2.

use apr_tensor::DType;

use super::{
    ALIGNMENT, DTYPES, HEADER_CRC, HEADER_LEN, MAGIC, MAJOR, MAX_METADATA, MAX_NAME, QUANTIZED,
    ROW_MAJOR, VOCABULARY, VOCABULARY_KEY, header_crc,
};
use crate::{
    Map, Result,
    tensors::MAX_DIMS,
    write::{Declared, Header, pad, sealed::Layout, unwritable},
};

/// `.apr` version 2, as a container to write.
#[derive(Clone, Copy, Debug)]
pub struct Apr;

/// Declares metadata and tensors of an `.apr` file, then writes them, sorted by name.
pub type Writer = crate::write::Writer<Apr>;

impl Apr {
    /// Whether an `.apr` file can hold tensors of this type.
    pub fn holds(dtype: DType) -> bool {
        number_of(dtype).is_some()
    }
}

impl Layout for Apr {
    const NAME: &'static str = "an .apr file";

    fn refusal(tensor: &Declared) -> Option<String> {
        let Declared { name, dtype, shape, .. } = tensor;
        if !Self::holds(*dtype) {
            return Some(format!(" of type {dtype}"));
        }
        (name.len() > MAX_NAME.into() || shape.dims().len() > MAX_DIMS).then(|| {
            format!(" of shape {shape}: at most {MAX_NAME} bytes of name and {MAX_DIMS} dimensions")
        })
    }

    fn header(metadata: &Map, tensors: &mut [Declared]) -> Result<Header> {
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let mut flags = ROW_MAJOR;
        if tensors.iter().any(|tensor| tensor.dtype.is_quantized()) {
            flags |= QUANTIZED;
        }
        if metadata.get(VOCABULARY_KEY).is_some() {
            flags |= VOCABULARY;
        }

        let mut metadata = serde_json::Value::from(metadata).to_string().into_bytes();
        let metadata_size = metadata.len();
        if metadata_size > MAX_METADATA as usize {
            return Err(unwritable::<Self>(format_args!(
                "{metadata_size} bytes of metadata; the limit is {MAX_METADATA}"
            )));
        }
        pad(&mut metadata, ALIGNMENT);

        let mut index = Vec::new();
        let mut offset = 0u64;
        for tensor in &*tensors {
            index.extend((tensor.name.len() as u16).to_le_bytes());
            index.extend(tensor.name.as_bytes());
            index.push(number_of(tensor.dtype).expect("`refusal` has checked the type"));
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
        let mut bytes = MAGIC.to_vec();
        bytes.extend([MAJOR, 0]);
        bytes.extend(flags.to_le_bytes());
        bytes.extend((tensors.len() as u32).to_le_bytes());
        bytes.extend(HEADER_LEN.to_le_bytes());
        bytes.extend((metadata_size as u32).to_le_bytes());
        bytes.extend(index_offset.to_le_bytes());
        bytes.extend(data_offset.to_le_bytes());
        pad(&mut bytes, HEADER_LEN);
        let crc = header_crc(&bytes);
        bytes[HEADER_CRC].copy_from_slice(&crc.to_le_bytes());
        bytes.append(&mut metadata);
        bytes.append(&mut index);
        Ok(Header { bytes, alignment: ALIGNMENT, checksum: true })
    }
}

fn number_of(dtype: DType) -> Option<u8> {
    DTYPES.iter().find(|row| row.1 == dtype).map(|row| row.0)
}
