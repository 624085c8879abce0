//! Q8_0: 32 weights, `d * q`, q of 8 bits.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Block, Half};
use crate::DType;

/// A block of 32 weights: 8 bits each, one scale.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Q8_0 {
    /// The scale.
    pub d: Half,
    /// The weights, in order.
    pub qs: [i8; 32],
}

const _: () = assert!(size_of::<Q8_0>() == 34);

impl Block for Q8_0 {
    const DTYPE: DType = DType::Q8_0;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (out, &q) in out.iter_mut().zip(&self.qs) {
            *out = d * f32::from(q);
        }
    }

    fn steps(&self, out: &mut [f32]) {
        out.fill(self.d.step(127.0));
    }
}
