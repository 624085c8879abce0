//! TQ2_0: 256 ternary weights, `d * (q - 1)`, q of 2 bits.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{Block, Half, q2_k::crumbs};
use crate::DType;

/// A block of 256 weights: 2 bits each, one scale.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TQ2_0 {
    /// Laid out as in [`Q2_K`](super::Q2_K).
    pub qs: [u8; 64],
    /// The scale.
    pub d: Half,
}

const _: () = assert!(size_of::<TQ2_0>() == 66);

impl Block for TQ2_0 {
    const DTYPE: DType = DType::TQ2_0;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (i, out) in out.chunks_exact_mut(16).enumerate() {
            let (start, shift) = crumbs(i);
            for (out, q) in out.iter_mut().zip(&self.qs[start..start + 16]) {
                *out = d * (f32::from((q >> shift) & 3) - 1.0);
            }
        }
    }

    fn steps(&self, out: &mut [f32]) {
        out.fill(self.d.step(1.0));
    }
}
