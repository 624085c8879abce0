//! Q4_0: 32 weights, `d * (q - 8)`, q of 4 bits.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Block, Half, lopsided};
use crate::DType;

/// A block of 32 weights: 4 bits each, one scale.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Q4_0 {
    /// The scale.
    pub d: Half,
    /// Byte `j` holds weight `j` in its low nibble, weight `16 + j` in its high one.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<Q4_0>() == 18);

impl Block for Q4_0 {
    const DTYPE: DType = DType::Q4_0;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        let (low, high) = out.split_at_mut(16);
        for ((&q, low), high) in self.qs.iter().zip(low).zip(high) {
            *low = d * (f32::from(q & 0xf) - 8.0);
            *high = d * (f32::from(q >> 4) - 8.0);
        }
    }

    fn steps(&self, out: &mut [f32]) {
        self.dequantize(out);
        lopsided(out, 7.0 * self.d.to_f32(), self.d.step(8.0));
    }
}
