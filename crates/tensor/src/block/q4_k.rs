//! Q4_K: 256 weights in 8 sub-blocks of 32, `(d * scale) * q - dmin * min`, q of 4 bits.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Block, Half};
use crate::DType;

/// A block of 256 weights: 4 bits each; a scale and a minimum of 6 bits for each 32.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Q4_K {
    /// The scale of the scales.
    pub d: Half,
    /// The scale of the minima.
    pub dmin: Half,
    /// See [`scale_min`].
    pub scales: [u8; 12],
    /// Four quarters of 32 bytes; byte `l` of quarter `j` holds weight `64j + l` in its low nibble,
    /// weight `64j + 32 + l` in its high one.
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<Q4_K>() == 144);

impl Block for Q4_K {
    const DTYPE: DType = DType::Q4_K;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        for (i, out) in out.chunks_exact_mut(32).enumerate() {
            let (scale, min) = scale_min(&self.scales, i);
            let (dl, ml) = (d * f32::from(scale), dmin * f32::from(min));
            let (start, shift) = (32 * (i / 2), 4 * (i % 2));
            for (out, q) in out.iter_mut().zip(&self.qs[start..start + 32]) {
                *out = dl * f32::from((q >> shift) & 0xf) - ml;
            }
        }
    }

    fn steps(&self, out: &mut [f32]) {
        let min = self.dmin.step(63.0);
        for (i, out) in out.chunks_exact_mut(32).enumerate() {
            let (scale, _) = scale_min(&self.scales, i);
            out.fill(self.d.scaled_step(f32::from(scale), 63.0, 15.0) + min);
        }
    }
}

/// The 6-bit scale and minimum of sub-block `i` of a Q4_K or Q5_K block.
///
/// For the first four sub-blocks they are the lower six bits of bytes `i` and `4 + i`. For the
/// others the lower four bits are the nibbles of byte `4 + i`, and the upper two are what the first
/// eight bytes have left.
pub fn scale_min(scales: &[u8; 12], i: usize) -> (u8, u8) {
    if i < 4 {
        (scales[i] & 0x3f, scales[4 + i] & 0x3f)
    } else {
        let low = scales[4 + i];
        (low & 0xf | scales[i - 4] >> 6 << 4, low >> 4 | scales[i] >> 6 << 4)
    }
}
