//! IQ4_XS: 256 weights in 8 sub-blocks of 32, `(d * (scale - 32)) * table[q]`, q of 4 bits.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{
    Block, Half,
    iq4_nl::{IQ4_GAPS, IQ4_VALUES, lookup},
};
use crate::DType;

/// A block of 256 weights: 4 bits each through a table; a scale of 6 bits for each 32.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IQ4_XS {
    /// The scale of the scales.
    pub d: Half,
    /// Little-endian; bits `2i` and `2i + 1` are the upper two of scale `i`.
    pub scales_h: [u8; 2],
    /// Byte `j` holds the lower four bits of scale `2j` in its low nibble, of `2j + 1` in its high
    /// one.
    pub scales_l: [u8; 4],
    /// Eight times 16 bytes, each laid out as in [`IQ4_NL`](super::IQ4_NL).
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<IQ4_XS>() == 136);

impl IQ4_XS {
    /// The scale of sub-block `i`, from -32 to 31.
    pub fn scale(&self, i: usize) -> i8 {
        let low = (self.scales_l[i / 2] >> (4 * (i % 2))) & 0xf;
        let high = (u16::from_le_bytes(self.scales_h) >> (2 * i)) as u8 & 3;
        (low | high << 4) as i8 - 32
    }
}

impl Block for IQ4_XS {
    const DTYPE: DType = DType::IQ4_XS;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        let parts = self.qs.chunks_exact(16).zip(out.chunks_exact_mut(32));
        for (i, (qs, out)) in parts.enumerate() {
            lookup(d * f32::from(self.scale(i)), &IQ4_VALUES, qs, out);
        }
    }

    fn steps(&self, out: &mut [f32]) {
        let d = self.d.to_f32().abs();
        let parts = self.qs.chunks_exact(16).zip(out.chunks_exact_mut(32));
        for (i, (qs, out)) in parts.enumerate() {
            lookup(d * f32::from(self.scale(i)).abs(), &IQ4_GAPS, qs, out);
            let scale = 127.0 * self.d.step(32.0);
            out.iter_mut().for_each(|step| *step += scale);
        }
    }
}
