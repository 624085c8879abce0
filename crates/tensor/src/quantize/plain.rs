//! Types that only round: narrower floats, and 8 bits.

use half::{bf16, f16};

use super::Row;
use crate::{DType, Error, Result};

pub(super) fn f32(row: &Row, out: &mut [u8]) -> Result<()> {
    for (out, x) in out.as_chunks_mut().0.iter_mut().zip(row.values) {
        *out = x.to_le_bytes();
    }
    Ok(())
}

/// To nearest, ties to even.
pub(super) fn f16(row: &Row, out: &mut [u8]) -> Result<()> {
    narrow(DType::F16, row, out, |x| {
        let narrow = f16::from_f32(x);
        narrow.is_finite().then_some(narrow.to_le_bytes())
    })
}

/// To nearest, ties to even.
pub(super) fn bf16(row: &Row, out: &mut [u8]) -> Result<()> {
    narrow(DType::BF16, row, out, |x| {
        let narrow = bf16::from_f32(x);
        narrow.is_finite().then_some(narrow.to_le_bytes())
    })
}

fn narrow(
    dtype: DType,
    row: &Row,
    out: &mut [u8],
    narrow: impl Fn(f32) -> Option<[u8; 2]>,
) -> Result<()> {
    for (index, (out, &value)) in out.as_chunks_mut().0.iter_mut().zip(row.values).enumerate() {
        *out = narrow(value).ok_or(Error::TooLarge { dtype, index, value })?;
    }
    Ok(())
}

/// `x / scale` rounded to nearest, ties away from zero; zero if the scale has no inverse.
///
/// This is how ggml and aprender write files. (Activations are
/// [rounded](crate::activation::quantize_q8_0) with ties to even and another inverse.)
pub(super) fn round_to_i8(x: f32, scale: f32) -> i8 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { (x * inverse).round().clamp(-127.0, 127.0) as i8 } else { 0 }
}
