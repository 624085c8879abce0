//! Q5_1: 32 weights, `d * q + m`, q of 5 bits.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Block, Half, q5_0};
use crate::DType;

/// A block of 32 weights: 5 bits each, one scale, one minimum.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Q5_1 {
    /// The scale.
    pub d: Half,
    /// The minimum.
    pub m: Half,
    /// Little-endian; bit `j` is the fifth bit of weight `j`.
    pub qh: [u8; 4],
    /// Byte `j` holds the low bits of weight `j` in its low nibble, of weight `16 + j` in its high
    /// one.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<Q5_1>() == 24);

impl Block for Q5_1 {
    const DTYPE: DType = DType::Q5_1;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        for (out, q) in out.iter_mut().zip(q5_0::quants(&self.qh, &self.qs)) {
            *out = d * f32::from(q) + m;
        }
    }

    fn steps(&self, out: &mut [f32]) {
        out.fill(self.d.step(31.0) + self.m.ulp());
    }
}
