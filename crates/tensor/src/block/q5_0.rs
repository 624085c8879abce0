//! Q5_0: 32 weights, `d * (q - 16)`, q of 5 bits.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Block, Half, lopsided};
use crate::DType;

/// A block of 32 weights: 5 bits each, one scale.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Q5_0 {
    /// The scale.
    pub d: Half,
    /// Little-endian; bit `j` is the fifth bit of weight `j`.
    pub qh: [u8; 4],
    /// Byte `j` holds the low bits of weight `j` in its low nibble, of weight `16 + j` in its high
    /// one.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<Q5_0>() == 22);

impl Block for Q5_0 {
    const DTYPE: DType = DType::Q5_0;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (out, q) in out.iter_mut().zip(quants(&self.qh, &self.qs)) {
            *out = d * (f32::from(q) - 16.0);
        }
    }

    fn steps(&self, out: &mut [f32]) {
        self.dequantize(out);
        lopsided(out, 15.0 * self.d.to_f32(), self.d.step(16.0));
    }
}

/// The 32 five-bit numbers of a block.
pub(super) fn quants(qh: &[u8; 4], qs: &[u8; 16]) -> [u8; 32] {
    let qh = u32::from_le_bytes(*qh);
    std::array::from_fn(|i| {
        let low = (qs[i % 16] >> (4 * (i / 16))) & 0xf;
        low | (((qh >> i) & 1) as u8) << 4
    })
}
