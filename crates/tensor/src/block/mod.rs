//! ggml's block layouts and what their bytes mean, one type per file.
//!
//! A block type stores a fixed number of consecutive elements of a row together with the scales
//! that they share. Each is a `#[repr(C)]` struct of alignment one, so that [`Block::slice_of`] can
//! view mapped bytes in place; kernels elsewhere read the same structs. The arithmetic of
//! [`Block::dequantize`] is the definition of the type: every operation is rounded to f32, in the
//! order that ggml and the `gguf` Python package use, so results are equal by bits. The way
//! back, where there is a choice to make, is [`quantize`](crate::quantize).

#![allow(non_camel_case_types, reason = "the names of the field")]

mod apr_q4;
mod iq4_nl;
mod iq4_xs;
mod mxfp4;
mod plain;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod tq1_0;
mod tq2_0;

use half::f16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use apr_q4::AprQ4;
pub use iq4_nl::{IQ4_NL, IQ4_VALUES};
pub use iq4_xs::IQ4_XS;
pub use mxfp4::{MXFP4, MXFP4_VALUES};
pub use q2_k::Q2_K;
pub use q3_k::Q3_K;
pub use q4_0::Q4_0;
pub use q4_1::Q4_1;
pub use q4_k::{Q4_K, scale_min};
pub use q5_0::Q5_0;
pub use q5_1::Q5_1;
pub use q5_k::Q5_K;
pub use q6_k::Q6_K;
pub use q8_0::Q8_0;
pub use tq1_0::TQ1_0;
pub use tq2_0::TQ2_0;

use crate::{DType, Error, Result};

/// The layout of one block, and the numbers that it stands for.
pub trait Block: FromBytes + Immutable + KnownLayout + Unaligned + Sized {
    /// The type of tensors made of these blocks.
    const DTYPE: DType;
    /// Elements per block.
    const LEN: usize;

    /// Writes the elements of this block to `out`, which must hold [`Self::LEN`] of them.
    fn dequantize(&self, out: &mut [f32]);

    /// Writes the [step](steps) of each element to `out`, which must hold [`Self::LEN`] of them.
    fn steps(&self, out: &mut [f32]);

    /// The blocks in `bytes`, in place, whatever their alignment.
    ///
    /// # Panics
    /// If `bytes` is no whole number of blocks; a [`Stored`](crate::Stored) never holds such a row.
    fn slice_of(bytes: &[u8]) -> &[Self] {
        <[Self]>::ref_from_bytes(bytes).expect("a row holds whole blocks")
    }
}

/// A little-endian half-precision number in a block.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(transparent)]
pub struct Half([u8; 2]);

impl Half {
    /// The bits, for hardware that converts them.
    #[inline]
    pub fn to_bits(self) -> u16 {
        u16::from_le_bytes(self.0)
    }

    /// The number nearest to `x`, ties to even; `None` if that is not finite.
    pub(crate) fn nearest(x: f32) -> Option<Self> {
        let half = f16::from_f32(x);
        half.is_finite().then_some(Self(half.to_le_bytes()))
    }

    /// The number, exactly.
    pub fn to_f32(self) -> f32 {
        f16::from_le_bytes(self.0).to_f32()
    }

    /// The distance to the next larger number of half precision.
    fn ulp(self) -> f32 {
        plain::f16_ulp(self.to_bits())
    }

    /// The step of codes up to `codes` with this scale: the scale, and what its own rounding moves
    /// the largest code.
    fn step(self, codes: f32) -> f32 {
        self.to_f32().abs() + codes * self.ulp()
    }

    /// The step of codes up to `codes` whose scale is `scale` times this, an integer up to `most`.
    /// One unit of that integer counts as well: a sub-block beside a much larger one has only few.
    fn scaled_step(self, scale: f32, most: f32, codes: f32) -> f32 {
        let d = self.to_f32().abs();
        d * (scale.abs() + codes) + codes * most * self.ulp()
    }
}

/// Turns the elements of a sub-block into their steps, where codes reach one further down than up: the largest, `top`,
/// stands for the mirror image of the smallest as well, so its step is twice that of the others.
fn lopsided(elements: &mut [f32], top: f32, step: f32) {
    elements.iter_mut().for_each(|x| *x = if *x == top { 2.0 * step } else { step });
}

/// Turns `bytes`, a whole number of blocks of `dtype`, into the numbers that they stand for.
///
/// The bytes of an [`AprQ8`](DType::AprQ8) row mean nothing without the scale at the head of its
/// tensor: this refuses them, [`Stored::dequantize_row`](crate::Stored::dequantize_row) reads them.
///
/// ```
/// # use apr_tensor::{DType, dequantize};
/// let mut block = [0; 18]; // one block of Q4_0: an f16 scale, 16 bytes of nibbles
/// block[..2].copy_from_slice(&0x3800u16.to_le_bytes()); // 0.5
/// block[2] = 0xf7; // elements 0 and 16
/// let mut values = [0.0; 32];
/// dequantize(DType::Q4_0, &block, &mut values)?;
/// assert_eq!((values[0], values[16]), (-0.5, 3.5));
/// # Ok::<(), apr_tensor::Error>(())
/// ```
pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    apply(dtype, bytes, out, |codec| codec.dequantize)
}

fn apply(
    dtype: DType,
    bytes: &[u8],
    out: &mut [f32],
    reader: impl Fn(Codec) -> Reader,
) -> Result<()> {
    let Some(codec) = codec(dtype) else {
        return Err(if dtype == DType::AprQ8 { Error::NoScale } else { Error::NotNumeric(dtype) });
    };
    let expected = dtype.row_bytes(out.len());
    if expected != Some(bytes.len()) {
        let (shape, found) = ([out.len()].into(), bytes.len());
        return Err(Error::Length { dtype, shape, expected, found });
    }
    reader(codec)(bytes, out);
    Ok(())
}

/// Writes the step of each element of `bytes`, a whole number of blocks of `dtype`: how far apart the
/// numbers are that the block could hold there.
///
/// A float's step is the distance to the next larger one. An element of a block type has that between neighbouring codes,
/// plus what one unit of each stored scale and minimum moves the largest code, since these are
/// rounded too. Where codes reach one further down than up, the largest has twice that. So a number that is rounded to nearest, under scales that reach the largest of its block, is
/// off by at most half a step.
///
/// ```
/// # use apr_tensor::{DType, block};
/// let mut steps = [0.0; 2];
/// block::steps(DType::BF16, &[0x80, 0x3f, 0x00, 0x40], &mut steps)?; // 1 and 2
/// assert_eq!(steps, [1.0 / 128.0, 1.0 / 64.0]);
/// # Ok::<(), apr_tensor::Error>(())
/// ```
pub fn steps(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    apply(dtype, bytes, out, |codec| codec.steps)
}

type Reader = fn(&[u8], &mut [f32]);

/// How a type is read.
#[derive(Clone, Copy)]
pub(crate) struct Codec {
    dequantize: Reader,
    steps: Reader,
}

/// The one list of types that can be read as numbers, but for `AprQ8`.
pub(crate) fn codec(dtype: DType) -> Option<Codec> {
    Some(match dtype {
        DType::F64 => plain::F64,
        DType::F32 => plain::F32,
        DType::F16 => plain::F16,
        DType::BF16 => plain::BF16,
        DType::I64 => plain::I64,
        DType::I32 => plain::I32,
        DType::I16 => plain::I16,
        DType::I8 => plain::I8,
        DType::U8 => plain::U8,
        DType::Bool => plain::BOOL,
        DType::Q4_0 => blocks::<Q4_0>(),
        DType::Q4_1 => blocks::<Q4_1>(),
        DType::Q5_0 => blocks::<Q5_0>(),
        DType::Q5_1 => blocks::<Q5_1>(),
        DType::Q8_0 => blocks::<Q8_0>(),
        DType::Q2_K => blocks::<Q2_K>(),
        DType::Q3_K => blocks::<Q3_K>(),
        DType::Q4_K => blocks::<Q4_K>(),
        DType::Q5_K => blocks::<Q5_K>(),
        DType::Q6_K => blocks::<Q6_K>(),
        DType::IQ4_NL => blocks::<IQ4_NL>(),
        DType::IQ4_XS => blocks::<IQ4_XS>(),
        DType::TQ1_0 => blocks::<TQ1_0>(),
        DType::TQ2_0 => blocks::<TQ2_0>(),
        DType::MXFP4 => blocks::<MXFP4>(),
        DType::AprQ4 => blocks::<AprQ4>(),
        DType::AprQ8
        | DType::Q8_1
        | DType::Q8_K
        | DType::IQ2_XXS
        | DType::IQ2_XS
        | DType::IQ2_S
        | DType::IQ3_XXS
        | DType::IQ3_S
        | DType::IQ1_S
        | DType::IQ1_M => return None,
    })
}

fn blocks<B: Block>() -> Codec {
    fn each<B: Block>(bytes: &[u8], out: &mut [f32], read: impl Fn(&B, &mut [f32])) {
        for (block, out) in B::slice_of(bytes).iter().zip(out.chunks_exact_mut(B::LEN)) {
            read(block, out);
        }
    }
    Codec {
        dequantize: |bytes, out| each(bytes, out, B::dequantize),
        steps: |bytes, out| each(bytes, out, B::steps),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_agree_with_the_type_table() {
        fn check<B: Block>() {
            assert_eq!((B::LEN, size_of::<B>()), (B::DTYPE.block_len(), B::DTYPE.block_bytes()));
            assert!(codec(B::DTYPE).is_some(), "{}", B::DTYPE);
        }
        check::<Q4_0>();
        check::<Q4_1>();
        check::<Q5_0>();
        check::<Q5_1>();
        check::<Q8_0>();
        check::<Q2_K>();
        check::<Q3_K>();
        check::<Q4_K>();
        check::<Q5_K>();
        check::<Q6_K>();
        check::<IQ4_NL>();
        check::<IQ4_XS>();
        check::<TQ1_0>();
        check::<TQ2_0>();
        check::<MXFP4>();
        check::<AprQ4>();
    }
}
