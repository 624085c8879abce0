//! IQ4_NL: 32 weights, `d * table[q]`, q of 4 bits.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Block, Half};
use crate::DType;

/// What the 4-bit numbers of IQ4_NL and IQ4_XS stand for: finer steps where weights are denser.
pub const IQ4_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// How far each of [`IQ4_VALUES`] is from its farther neighbour.
pub(super) const IQ4_GAPS: [i8; 16] = gaps(&IQ4_VALUES);

/// A block of 32 weights: 4 bits each through a table, one scale.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IQ4_NL {
    /// The scale.
    pub d: Half,
    /// Byte `j` holds weight `j` in its low nibble, weight `16 + j` in its high one.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<IQ4_NL>() == 18);

impl Block for IQ4_NL {
    const DTYPE: DType = DType::IQ4_NL;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        lookup(self.d.to_f32(), &IQ4_VALUES, &self.qs, out);
    }

    fn steps(&self, out: &mut [f32]) {
        lookup(self.d.to_f32().abs(), &IQ4_GAPS, &self.qs, out);
        let scale = 127.0 * self.d.ulp();
        out.iter_mut().for_each(|step| *step += scale);
    }
}

/// `scale * values[q]` for 32 nibbles: the low ones of `qs`, then the high ones.
pub(super) fn lookup(scale: f32, values: &[i8; 16], qs: &[u8], out: &mut [f32]) {
    let (low, high) = out.split_at_mut(16);
    for ((&q, low), high) in qs.iter().zip(low).zip(high) {
        *low = scale * f32::from(values[usize::from(q & 0xf)]);
        *high = scale * f32::from(values[usize::from(q >> 4)]);
    }
}

/// How far each of `values`, which ascend, is from its farther neighbour.
const fn gaps(values: &[i8; 16]) -> [i8; 16] {
    let mut gaps = [0; 16];
    let mut i = 0;
    while i < 15 {
        let gap = values[i + 1] - values[i];
        if gap > gaps[i] {
            gaps[i] = gap;
        }
        gaps[i + 1] = gap;
        i += 1;
    }
    gaps
}
