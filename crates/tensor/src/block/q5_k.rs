//! Q5_K: 256 weights in 8 sub-blocks of 32, `(d * scale) * q - dmin * min`, q of 5 bits.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Block, Half, q4_k::scale_min};
use crate::DType;

/// A block of 256 weights: 5 bits each; a scale and a minimum of 6 bits for each 32.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Q5_K {
    /// The scale of the scales.
    pub d: Half,
    /// The scale of the minima.
    pub dmin: Half,
    /// See [`scale_min`].
    pub scales: [u8; 12],
    /// Bit `k` of byte `l` is the fifth bit of weight `32k + l`.
    pub qh: [u8; 32],
    /// The lower four bits, laid out as in [`Q4_K`](super::Q4_K).
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<Q5_K>() == 176);

impl Block for Q5_K {
    const DTYPE: DType = DType::Q5_K;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        for (i, out) in out.chunks_exact_mut(32).enumerate() {
            let (scale, min) = scale_min(&self.scales, i);
            let (dl, ml) = (d * f32::from(scale), dmin * f32::from(min));
            let (start, shift) = (32 * (i / 2), 4 * (i % 2));
            for ((out, q), high) in out.iter_mut().zip(&self.qs[start..start + 32]).zip(self.qh) {
                let q = (q >> shift) & 0xf | ((high >> i) & 1) << 4;
                *out = dl * f32::from(q) - ml;
            }
        }
    }

    fn steps(&self, out: &mut [f32]) {
        let min = self.dmin.step(63.0);
        for (i, out) in out.chunks_exact_mut(32).enumerate() {
            let (scale, _) = scale_min(&self.scales, i);
            out.fill(self.d.scaled_step(f32::from(scale), 63.0, 31.0) + min);
        }
    }
}
