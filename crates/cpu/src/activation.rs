//! Activations rounded to 8 bits, as the integer dot products read them.
//!
//! The numbers are those of [`apr_tensor::activation`], which defines them; the layout is ours: scales are widened to
//! f32, and sums stand beside the quants for the weight types that have minima. A tensor is rounded once
//! per kind, however many weights it is multiplied with.

use std::sync::OnceLock;

use crate::memory::{Buffer, Plain};

/// Activations that share a scale.
pub(crate) trait Block8: Plain {
    /// Activations per block.
    const LEN: usize;
}

/// 32 activations: `d * qs[i]`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(crate) struct Q8 {
    /// The scale, rounded to f16.
    pub(crate) d: f32,
    /// The sum of `qs`, exactly: what ggml's Q8_1 has rounded.
    pub(crate) sum: i32,
    pub(crate) qs: [i8; 32],
}

impl Block8 for Q8 {
    const LEN: usize = 32;
}

/// 256 activations: `d * qs[i]`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(crate) struct Q8K {
    pub(crate) d: f32,
    /// The sums of each 16 of `qs`: of four of them those of the first and the third, then those of the others.
    /// Weights have their scales in bytes, and every other byte of a word makes a pair of 16-bit numbers.
    pub(crate) sums_16: [[i16; 2]; 8],
    /// The sums of each 32 of `qs`, in the same order.
    pub(crate) sums_32: [[i16; 2]; 4],
    pub(crate) qs: [i8; 256],
}

impl Block8 for Q8K {
    const LEN: usize = 256;
}

/// The rounded forms of a tensor, made when first asked for. Row after row of blocks.
#[derive(Debug, Default)]
pub(crate) struct Rounded {
    pub(crate) q8_0: OnceLock<Buffer<Q8>>,
    pub(crate) q8_k: OnceLock<Buffer<Q8K>>,
}
