//! `.apr` version 2: header, JSON metadata, tensor index, data on multiples of 64, checksum.
//!
//! Opening verifies the checksum of the header and leaves that of the whole file to whoever verifies files: it would read every byte
//! of a file of which a run may need few. Compressed, encrypted, sharded and column-major files are refused: silently wrong
//! weights are worse.
//! Signatures are not verified.

use apr_tensor::DType;

mod reader;
mod writer;

pub(crate) use reader::{checksums, read};
pub use writer::{Apr, Writer};

pub(crate) const MAGIC: &[u8; 4] = b"APR\0";

const MAJOR: u8 = 2;

/// Everything begins on a multiple of this.
const ALIGNMENT: u64 = 64;

const HEADER_LEN: u64 = 64;

/// Where the header's own checksum is; it covers the bytes before and after itself.
const HEADER_CRC: std::ops::Range<usize> = 40..44;

/// The checksum of everything, at the very end.
const FOOTER_LEN: u64 = 4;

const MAX_METADATA: u32 = 16 << 20;
const MAX_NAME: u16 = 256;

/// The flag that says what is the only supported layout anyway.
const ROW_MAJOR: u16 = 0x400;

/// The flag of files with quantised tensors.
const QUANTIZED: u16 = 0x20;

/// The flag of files with a vocabulary, and the key that it is under.
const VOCABULARY: u16 = 0x200;
const VOCABULARY_KEY: &str = "tokenizer.vocabulary";

/// Two spellings of one key: the container's own, and Hugging Face's.
const ALIASES: &[(&str, &str)] = &[
    ("num_layers", "num_hidden_layers"),
    ("num_heads", "num_attention_heads"),
    ("num_kv_heads", "num_key_value_heads"),
];

/// The numbers of the types, the spelling that is written first.
const DTYPES: &[(u8, DType)] = &[
    (0, DType::F32),
    (1, DType::F16),
    (30, DType::BF16),
    (3, DType::F64),
    (4, DType::I32),
    (5, DType::I64),
    (6, DType::I8),
    (7, DType::U8),
    (12, DType::Q4_K),
    (14, DType::Q6_K),
    (128, DType::AprQ4),
    (129, DType::AprQ8),
    (8, DType::AprQ4),
    (9, DType::AprQ8),
];

/// The checksum of a header, whose first 64 bytes these are.
fn header_crc(header: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header[..HEADER_CRC.start]);
    crc.update(&header[HEADER_CRC.end..]);
    crc.finalize()
}
