//! Q6_K: 256 weights in 16 sub-blocks of 16, `(d * scale) * (q - 32)`, q of 6 bits.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Block, Half, lopsided};
use crate::DType;

/// A block of 256 weights: 6 bits each; a scale of 8 bits for each 16.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Q6_K {
    /// The lower four bits. Two halves of 64 bytes; byte `l` of half `h` holds those of weight
    /// `128h + l` in its low nibble, of weight `128h + 64 + l` in its high one.
    pub ql: [u8; 128],
    /// The upper two bits. Two halves of 32 bytes; bits `2s` and `2s + 1` of byte `l` of half `h`
    /// belong to weight `128h + 32s + l`.
    pub qh: [u8; 64],
    /// The scale of each sub-block.
    pub scales: [i8; 16],
    /// The scale of the scales.
    pub d: Half,
}

const _: () = assert!(size_of::<Q6_K>() == 210);

impl Block for Q6_K {
    const DTYPE: DType = DType::Q6_K;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (i, (out, scale)) in out.chunks_exact_mut(16).zip(self.scales).enumerate() {
            let dl = d * f32::from(scale);
            let (half, part) = (i / 8, i % 8);
            let (low, low_shift) = (64 * half + 16 * (part % 4), 4 * (part / 4));
            let (high, high_shift) = (32 * half + 16 * (part % 2), 2 * (part / 2));
            for ((out, low), high) in
                out.iter_mut().zip(&self.ql[low..low + 16]).zip(&self.qh[high..high + 16])
            {
                let q = (low >> low_shift) & 0xf | ((high >> high_shift) & 3) << 4;
                *out = dl * (f32::from(q) - 32.0);
            }
        }
    }

    fn steps(&self, out: &mut [f32]) {
        self.dequantize(out);
        for (out, scale) in out.chunks_exact_mut(16).zip(self.scales) {
            let scale = f32::from(scale);
            lopsided(out, 31.0 * (self.d.to_f32() * scale), self.d.scaled_step(scale, 128.0, 32.0));
        }
    }
}
