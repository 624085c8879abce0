//! Blocks of weights as the integer dot product wants them: one signed byte per weight, integer scales.
//!
//! The layouts are documented on the block types of [`apr_tensor::block`]; the loops here go over whole runs of bytes
//! so that they compile to vector code.

use apr_tensor::block::{
    Block, Half, IQ4_NL, IQ4_VALUES, IQ4_XS, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K,
    Q8_0,
};

use super::Simd;

/// Types of 32 weights that share a scale: weight `i` is `scale * quants[i] + min`.
pub(crate) trait Blocks32: Block {
    fn scale(&self) -> Half;
    fn min(&self) -> Option<Half> {
        None
    }
    fn quants<S: Simd>(&self) -> [i8; 32];
}

/// Types of 256 weights: weight `i` is `d * scales[i / 16] * q[i] - dmin * mins[i / 16]`.
pub(crate) trait Blocks256: Block {
    /// Whether a `q` may be negative.
    const SIGNED: bool;

    fn scale(&self) -> Half;
    fn min(&self) -> Option<Half> {
        None
    }
    fn unpack<S: Simd>(&self) -> Quants256;
}

/// The integers of a block of 256.
#[repr(C, align(64))]
pub(crate) struct Quants256 {
    pub(crate) q: [i8; 256],
    pub(crate) scales: [i16; 16],
    pub(crate) mins: [i16; 16],
}

impl Quants256 {
    pub(crate) const ZERO: Self = Self { q: [0; 256], scales: [0; 16], mins: [0; 16] };
}

impl Blocks32 for Q4_0 {
    #[inline(always)]
    fn scale(&self) -> Half {
        self.d
    }

    #[inline(always)]
    fn quants<S: Simd>(&self) -> [i8; 32] {
        S::nibbles(&self.qs, 8)
    }
}

impl Blocks32 for Q4_1 {
    #[inline(always)]
    fn scale(&self) -> Half {
        self.d
    }

    #[inline(always)]
    fn min(&self) -> Option<Half> {
        Some(self.m)
    }

    #[inline(always)]
    fn quants<S: Simd>(&self) -> [i8; 32] {
        S::nibbles(&self.qs, 0)
    }
}

impl Blocks32 for Q5_0 {
    #[inline(always)]
    fn scale(&self) -> Half {
        self.d
    }

    #[inline(always)]
    fn quants<S: Simd>(&self) -> [i8; 32] {
        S::five_bits(&self.qs, self.qh, 16)
    }
}

impl Blocks32 for Q5_1 {
    #[inline(always)]
    fn scale(&self) -> Half {
        self.d
    }

    #[inline(always)]
    fn min(&self) -> Option<Half> {
        Some(self.m)
    }

    #[inline(always)]
    fn quants<S: Simd>(&self) -> [i8; 32] {
        S::five_bits(&self.qs, self.qh, 0)
    }
}

impl Blocks32 for Q8_0 {
    #[inline(always)]
    fn scale(&self) -> Half {
        self.d
    }

    #[inline(always)]
    fn quants<S: Simd>(&self) -> [i8; 32] {
        self.qs
    }
}

impl Blocks32 for IQ4_NL {
    #[inline(always)]
    fn scale(&self) -> Half {
        self.d
    }

    #[inline(always)]
    fn quants<S: Simd>(&self) -> [i8; 32] {
        S::lookup(&self.qs, &IQ4_VALUES)
    }
}

impl Blocks256 for Q2_K {
    const SIGNED: bool = false;

    #[inline(always)]
    fn scale(&self) -> Half {
        self.d
    }

    #[inline(always)]
    fn min(&self) -> Option<Half> {
        Some(self.dmin)
    }

    #[inline(always)]
    fn unpack<S: Simd>(&self) -> Quants256 {
        let mut out = Quants256::ZERO;
        crumbs(&self.qs, &mut out.q);
        for i in 0..16 {
            out.scales[i] = i16::from(self.scales[i] & 0xf);
            out.mins[i] = i16::from(self.scales[i] >> 4);
        }
        out
    }
}

impl Blocks256 for Q3_K {
    const SIGNED: bool = true;

    #[inline(always)]
    fn scale(&self) -> Half {
        self.d
    }

    #[inline(always)]
    fn unpack<S: Simd>(&self) -> Quants256 {
        let mut out = Quants256::ZERO;
        crumbs(&self.qs, &mut out.q);
        for (k, q) in out.q.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (q, high) in q.iter_mut().zip(&self.hmask) {
                *q = (*q | (((high >> k) & 1) << 2) as i8) - 4;
            }
        }
        for i in 0..16 {
            out.scales[i] = self.scale(i).into();
        }
        out
    }
}

/// Two-bit numbers: byte `l` of half `h` holds those of weights `128h + 32s + l`.
#[inline(always)]
fn crumbs(qs: &[u8; 64], q: &mut [i8; 256]) {
    for (k, q) in q.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (half, shift) = (k / 4, 2 * (k % 4));
        for (q, byte) in q.iter_mut().zip(&qs[32 * half..]) {
            *q = ((byte >> shift) & 3) as i8;
        }
    }
}

impl Blocks256 for Q4_K {
    const SIGNED: bool = false;

    #[inline(always)]
    fn scale(&self) -> Half {
        self.d
    }

    #[inline(always)]
    fn min(&self) -> Option<Half> {
        Some(self.dmin)
    }

    #[inline(always)]
    fn unpack<S: Simd>(&self) -> Quants256 {
        let mut out = Quants256::ZERO;
        nibble_quarters(&self.qs, &mut out.q);
        scales_and_mins(&self.scales, &mut out);
        out
    }
}

impl Blocks256 for Q5_K {
    const SIGNED: bool = false;

    #[inline(always)]
    fn scale(&self) -> Half {
        self.d
    }

    #[inline(always)]
    fn min(&self) -> Option<Half> {
        Some(self.dmin)
    }

    #[inline(always)]
    fn unpack<S: Simd>(&self) -> Quants256 {
        let mut out = Quants256::ZERO;
        nibble_quarters(&self.qs, &mut out.q);
        for (k, q) in out.q.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (q, high) in q.iter_mut().zip(&self.qh) {
                *q |= (((high >> k) & 1) << 4) as i8;
            }
        }
        scales_and_mins(&self.scales, &mut out);
        out
    }
}

/// Quarters of 64 weights: the low nibbles of 32 bytes, then the high ones.
#[inline(always)]
fn nibble_quarters(qs: &[u8; 128], q: &mut [i8; 256]) {
    for (bytes, q) in qs.as_chunks::<32>().0.iter().zip(q.as_chunks_mut::<64>().0) {
        for i in 0..32 {
            q[i] = (bytes[i] & 0xf) as i8;
            q[32 + i] = (bytes[i] >> 4) as i8;
        }
    }
}

/// The eight 6-bit scales and minima of Q4_K and Q5_K, four at a time in a word; see [`apr_tensor::block::scale_min`].
#[inline(always)]
fn scales_and_mins(packed: &[u8; 12], out: &mut Quants256) {
    const SIX: u32 = 0x3f3f_3f3f;
    const FOUR: u32 = 0x0f0f_0f0f;
    const TWO: u32 = 0x0303_0303;
    let (words, _) = packed.as_chunks();
    let word = |i: usize| u32::from_le_bytes(words[i]);
    let (s, m, rest) = (word(0), word(1), word(2));
    let scales = [(s & SIX).to_le_bytes(), (rest & FOUR | (s >> 6 & TWO) << 4).to_le_bytes()];
    let mins = [(m & SIX).to_le_bytes(), (rest >> 4 & FOUR | (m >> 6 & TWO) << 4).to_le_bytes()];
    for i in 0..16 {
        out.scales[i] = scales.as_flattened()[i / 2].into();
        out.mins[i] = mins.as_flattened()[i / 2].into();
    }
}

impl Blocks256 for Q6_K {
    const SIGNED: bool = true;

    #[inline(always)]
    fn scale(&self) -> Half {
        self.d
    }

    #[inline(always)]
    fn unpack<S: Simd>(&self) -> Quants256 {
        let mut out = Quants256::ZERO;
        let halves = self.ql.as_chunks::<64>().0.iter().zip(self.qh.as_chunks::<32>().0);
        for ((low, high), q) in halves.zip(out.q.as_chunks_mut::<128>().0) {
            for i in 0..32 {
                let six = |low: u8, shift: u8| (low | ((high[i] >> shift) & 3) << 4) as i8 - 32;
                q[i] = six(low[i] & 0xf, 0);
                q[32 + i] = six(low[32 + i] & 0xf, 2);
                q[64 + i] = six(low[i] >> 4, 4);
                q[96 + i] = six(low[32 + i] >> 4, 6);
            }
        }
        for (out, &scale) in out.scales.iter_mut().zip(&self.scales) {
            *out = scale.into();
        }
        out
    }
}

impl Blocks256 for IQ4_XS {
    const SIGNED: bool = true;

    #[inline(always)]
    fn scale(&self) -> Half {
        self.d
    }

    #[inline(always)]
    fn unpack<S: Simd>(&self) -> Quants256 {
        let mut out = Quants256::ZERO;
        for (qs, q) in self.qs.as_chunks::<16>().0.iter().zip(out.q.as_chunks_mut::<32>().0) {
            *q = S::lookup(qs, &IQ4_VALUES);
        }
        for i in 0..16 {
            out.scales[i] = self.scale(i / 2).into();
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use apr_tensor::block::scale_min;

    use super::*;

    #[test]
    fn packed_scales_are_those_of_the_block_types_definition() {
        for seed in 0..50u32 {
            let packed = std::array::from_fn(|i| (seed * 97 + i as u32 * 59 + 13) as u8);
            let mut out = Quants256::ZERO;
            scales_and_mins(&packed, &mut out);
            for i in 0..16 {
                let (scale, min) = scale_min(&packed, i / 2);
                assert_eq!((out.scales[i], out.mins[i]), (scale.into(), min.into()));
            }
        }
    }
}
