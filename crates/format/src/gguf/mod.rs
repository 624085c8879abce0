//! GGUF, versions 2 and 3, little-endian.
//!
//! A header, typed key-value pairs, an index of tensors, and their data, each tensor on a multiple of
//! `general.alignment`. Dimensions are stored fastest first and reversed here. Version 1, big-endian files and
//! the formats before GGUF are refused; a tensor of unknown type is listed, and its size is not guessed.
//! One part of a model that was split into several files is refused.

mod reader;
mod writer;

pub(crate) use reader::read;
pub use writer::{Gguf, Writer};

pub(crate) const MAGIC: &[u8; 4] = b"GGUF";

/// The key that sets the alignment of tensor data, and its value when it is absent.
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u64 = 32;

/// The key that says of how many files this is one.
const SPLIT_KEY: &str = "split.count";

/// The numbers of GGUF's value types.
mod value_type {
    pub(super) const U8: u32 = 0;
    pub(super) const I8: u32 = 1;
    pub(super) const U16: u32 = 2;
    pub(super) const I16: u32 = 3;
    pub(super) const U32: u32 = 4;
    pub(super) const I32: u32 = 5;
    pub(super) const F32: u32 = 6;
    pub(super) const BOOL: u32 = 7;
    pub(super) const STRING: u32 = 8;
    pub(super) const ARRAY: u32 = 9;
    pub(super) const U64: u32 = 10;
    pub(super) const I64: u32 = 11;
    pub(super) const F64: u32 = 12;
}
