//! APR_Q4: 32 weights, `d * (q - 8)`, q of 4 bits. Q4_0's fields with another order of nibbles.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Block, Half, lopsided};
use crate::DType;

/// A block of 32 weights of an `.apr` file: 4 bits each, one scale.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct AprQ4 {
    /// The scale.
    pub d: Half,
    /// Byte `j` holds weight `2j` in its low nibble, weight `2j + 1` in its high one.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<AprQ4>() == 18);

impl Block for AprQ4 {
    const DTYPE: DType = DType::AprQ4;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (out, q) in out.chunks_exact_mut(2).zip(self.qs) {
            out[0] = d * (f32::from(q & 0xf) - 8.0);
            out[1] = d * (f32::from(q >> 4) - 8.0);
        }
    }

    fn steps(&self, out: &mut [f32]) {
        self.dequantize(out);
        lopsided(out, 7.0 * self.d.to_f32(), self.d.step(8.0));
    }
}
