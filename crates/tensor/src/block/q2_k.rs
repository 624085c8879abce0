//! Q2_K: 256 weights in 16 sub-blocks of 16, `(d * scale) * q - dmin * min`, q of 2 bits.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Block, Half};
use crate::DType;

/// A block of 256 weights: 2 bits each; a scale and a minimum of 4 bits for each 16.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Q2_K {
    /// Byte `j` holds the scale of sub-block `j` in its low nibble, the minimum in its high one.
    pub scales: [u8; 16],
    /// Two halves of 32 bytes; bits `2s` and `2s + 1` of byte `l` of half `h` are weight `128h +
    /// 32s + l`.
    pub qs: [u8; 64],
    /// The scale of the scales.
    pub d: Half,
    /// The scale of the minima.
    pub dmin: Half,
}

const _: () = assert!(size_of::<Q2_K>() == 84);

impl Block for Q2_K {
    const DTYPE: DType = DType::Q2_K;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        for (i, (out, scale)) in out.chunks_exact_mut(16).zip(self.scales).enumerate() {
            let (dl, ml) = (d * f32::from(scale & 0xf), dmin * f32::from(scale >> 4));
            let (start, shift) = crumbs(i);
            for (out, q) in out.iter_mut().zip(&self.qs[start..start + 16]) {
                *out = dl * f32::from((q >> shift) & 3) - ml;
            }
        }
    }

    fn steps(&self, out: &mut [f32]) {
        let min = self.dmin.step(15.0);
        for (out, scale) in out.chunks_exact_mut(16).zip(self.scales) {
            out.fill(self.d.scaled_step(f32::from(scale & 0xf), 15.0, 3.0) + min);
        }
    }
}

/// Where the two-bit parts of sub-block `i` of 16 weights are: the first byte, and the shift in
/// each.
pub(super) fn crumbs(i: usize) -> (usize, usize) {
    (32 * (i / 8) + 16 * (i % 2), 2 * (i / 2 % 4))
}
