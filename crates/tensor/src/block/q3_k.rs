//! Q3_K: 256 weights in 16 sub-blocks of 16, `(d * (scale - 32)) * (q - 4)`, q of 3 bits.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Block, Half, lopsided, q2_k::crumbs};
use crate::DType;

/// A block of 256 weights: 3 bits each; a scale of 6 bits for each 16.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Q3_K {
    /// Bit `k` of byte `l` is the third bit of weight `32k + l`.
    pub hmask: [u8; 32],
    /// The lower two bits, laid out as in [`Q2_K`](super::Q2_K).
    pub qs: [u8; 64],
    /// See [`scale`](Self::scale).
    pub scales: [u8; 12],
    /// The scale of the scales.
    pub d: Half,
}

const _: () = assert!(size_of::<Q3_K>() == 110);

impl Q3_K {
    /// The scale of sub-block `i`, from -32 to 31.
    ///
    /// Its lower four bits are in bytes 0 to 7 (the first eight sub-blocks in the low nibbles), its
    /// upper two in bytes 8 to 11 (four sub-blocks per pair of bits).
    pub fn scale(&self, i: usize) -> i8 {
        let low = (self.scales[i % 8] >> (4 * (i / 8))) & 0xf;
        let high = (self.scales[8 + i % 4] >> (2 * (i / 4))) & 3;
        (low | high << 4) as i8 - 32
    }
}

impl Block for Q3_K {
    const DTYPE: DType = DType::Q3_K;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (i, out) in out.chunks_exact_mut(16).enumerate() {
            let dl = d * f32::from(self.scale(i));
            let (start, shift) = crumbs(i);
            let high = &self.hmask[16 * (i % 2)..][..16];
            for ((out, q), high) in out.iter_mut().zip(&self.qs[start..start + 16]).zip(high) {
                let q = (q >> shift) & 3 | ((high >> (i / 2)) & 1) << 2;
                *out = dl * (f32::from(q) - 4.0);
            }
        }
    }

    fn steps(&self, out: &mut [f32]) {
        self.dequantize(out);
        for (i, out) in out.chunks_exact_mut(16).enumerate() {
            let scale = f32::from(self.scale(i));
            lopsided(out, 3.0 * (self.d.to_f32() * scale), self.d.scaled_step(scale, 32.0, 4.0));
        }
    }
}
