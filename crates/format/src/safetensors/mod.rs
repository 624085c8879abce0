//! Safetensors: a length, a JSON header, and the bytes of the tensors without a hole.

use apr_tensor::DType;

mod reader;
mod writer;

pub(crate) use reader::{Contents, read};
pub use writer::{Safetensors, Writer};

/// The key of the header that is no tensor: free texts of the writer.
pub(crate) const METADATA_KEY: &str = "__metadata__";

/// Whether safetensors has this type; it has more that we have not, and those are listed as unreadable.
fn holds(dtype: DType) -> bool {
    use DType::*;
    matches!(dtype, F64 | F32 | F16 | BF16 | I64 | I32 | I16 | I8 | U8 | Bool)
}

/// The longest header, in bytes, as the reference implementation has it.
const MAX_HEADER: u64 = 100_000_000;
