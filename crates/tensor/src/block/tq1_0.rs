//! TQ1_0: 256 ternary weights, `d * (t - 1)`, five base-3 digits t to a byte.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{Block, Half};
use crate::DType;

/// A block of 256 weights: one base-3 digit each, one scale.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TQ1_0 {
    /// Digit `n` of byte `l` is weight `32n + l` for the first 32 bytes, weight `160 + 16n + l` for
    /// the other 16.
    pub qs: [u8; 48],
    /// Digit `n` of byte `l` is weight `240 + 4n + l`; only four of five digits are used.
    pub qh: [u8; 4],
    /// The scale.
    pub d: Half,
}

const _: () = assert!(size_of::<TQ1_0>() == 54);

impl Block for TQ1_0 {
    const DTYPE: DType = DType::TQ1_0;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        let (first, rest) = out.split_at_mut(160);
        let (second, third) = rest.split_at_mut(80);
        for (bytes, out) in [(&self.qs[..32], first), (&self.qs[32..], second), (&self.qh, third)] {
            for (n, out) in out.chunks_exact_mut(bytes.len()).enumerate() {
                for (out, &byte) in out.iter_mut().zip(bytes) {
                    *out = d * (f32::from(digit(byte, n)) - 1.0);
                }
            }
        }
    }

    fn steps(&self, out: &mut [f32]) {
        out.fill(self.d.step(1.0));
    }
}

/// Digit `n` of a byte, the most significant first. A byte is the fraction `byte / 256` in base 3:
/// times `3^n` moves the digit behind the point, times 3 in front of it.
fn digit(byte: u8, n: usize) -> u8 {
    let fraction = byte.wrapping_mul([1, 3, 9, 27, 81][n]);
    ((u16::from(fraction) * 3) >> 8) as u8
}
