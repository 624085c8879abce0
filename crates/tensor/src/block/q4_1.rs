//! Q4_1: 32 weights, `d * q + m`, q of 4 bits.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Block, Half};
use crate::DType;

/// A block of 32 weights: 4 bits each, one scale, one minimum.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Q4_1 {
    /// The scale.
    pub d: Half,
    /// The minimum.
    pub m: Half,
    /// Byte `j` holds weight `j` in its low nibble, weight `16 + j` in its high one.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<Q4_1>() == 20);

impl Block for Q4_1 {
    const DTYPE: DType = DType::Q4_1;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        let (low, high) = out.split_at_mut(16);
        for ((&q, low), high) in self.qs.iter().zip(low).zip(high) {
            *low = d * f32::from(q & 0xf) + m;
            *high = d * f32::from(q >> 4) + m;
        }
    }

    fn steps(&self, out: &mut [f32]) {
        out.fill(self.d.step(15.0) + self.m.ulp());
    }
}
