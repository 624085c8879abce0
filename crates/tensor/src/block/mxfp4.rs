//! MXFP4: 32 weights, `2^(e - 128) * table[q]`, q of 4 bits.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{Block, iq4_nl::lookup};
use crate::DType;

/// Twice the E2M1 numbers. Eight is the negative zero, which ggml reads as zero.
pub const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// How far each of [`MXFP4_VALUES`] is from its farther neighbour.
const GAPS: [i8; 16] = [1, 1, 1, 1, 2, 2, 4, 4, 1, 1, 1, 1, 2, 2, 4, 4];

/// A block of 32 weights: 4-bit floats that share an exponent.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MXFP4 {
    /// The shared exponent (E8M0).
    pub e: u8,
    /// Byte `j` holds weight `j` in its low nibble, weight `16 + j` in its high one.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<MXFP4>() == 17);

impl MXFP4 {
    /// Half of `2^(e - 127)`, since the table holds doubles. E8M0's NaN (255) is read as a number,
    /// as in ggml.
    pub fn half_scale(&self) -> f32 {
        f32::from_bits(match self.e {
            0 | 1 => 0x0020_0000 << self.e, // subnormal
            e => u32::from(e - 1) << 23,
        })
    }
}

impl Block for MXFP4 {
    const DTYPE: DType = DType::MXFP4;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        lookup(self.half_scale(), &MXFP4_VALUES, &self.qs, out);
    }

    fn steps(&self, out: &mut [f32]) {
        lookup(self.half_scale(), &GAPS, &self.qs, out);
    }
}
