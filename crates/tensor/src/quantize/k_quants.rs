//! Blocks of 256: how what was found is packed.

use super::{
    Input, Quantize,
    search::Integers,
    super_block::{Affine, Symmetric},
    weighted::{Spread, Weight, Weighted},
};
use crate::block::{Q2_K, Q3_K, Q4_K, Q5_K, Q6_K};

impl Quantize for Q2_K {
    fn quantize(input: &Input) -> Option<Self> {
        let block = Weighted::<16, 16>::new(input, Weight::Magnitude, Spread::Block { times: 1.0 });
        let Affine { d, dmin, scales, mins, codes } = Affine::fit(&block, 3.0, 15.0)?;
        let scales = std::array::from_fn(|i| scales[i] | mins[i] << 4);
        Some(Self { scales, qs: crumbs(&bytes(&codes, 0.0)), d, dmin })
    }
}

impl Quantize for Q3_K {
    fn quantize(input: &Input) -> Option<Self> {
        let block = Weighted::<16, 16>::new(input, Weight::Square, Spread::Block { times: 2.0 });
        let codes = Integers { low: -4.0, high: 3.0 };
        let scale_codes = Integers { low: -32.0, high: 31.0 };
        let Symmetric { d, scales, codes } = Symmetric::fit(&block, codes, scale_codes)?;
        let codes = bytes(&codes, 4.0);
        let mut packed = [0; 12];
        for (i, scale) in scales.into_iter().enumerate() {
            let scale = (scale + 32.0) as u8;
            packed[i % 8] |= (scale & 0xf) << (4 * (i / 8));
            packed[8 + i % 4] |= (scale >> 4) << (2 * (i / 4));
        }
        let hmask = bits(&codes, 2);
        Some(Self { hmask, qs: crumbs(&codes), scales: packed, d })
    }
}

impl Quantize for Q4_K {
    fn quantize(input: &Input) -> Option<Self> {
        let block =
            Weighted::<32, 8>::new(input, Weight::MagnitudeAndMean, Spread::Block { times: 2.0 });
        let Affine { d, dmin, scales, mins, codes } = Affine::fit(&block, 15.0, 63.0)?;
        let scales = scales_and_mins(&scales, &mins);
        Some(Self { d, dmin, scales, qs: nibbles(&bytes(&codes, 0.0)) })
    }
}

impl Quantize for Q5_K {
    fn quantize(input: &Input) -> Option<Self> {
        let block =
            Weighted::<32, 8>::new(input, Weight::MagnitudeAndMean, Spread::Block { times: 2.0 });
        let Affine { d, dmin, scales, mins, codes } = Affine::fit(&block, 31.0, 63.0)?;
        let (codes, scales) = (bytes(&codes, 0.0), scales_and_mins(&scales, &mins));
        Some(Self { d, dmin, scales, qh: bits(&codes, 4), qs: nibbles(&codes) })
    }
}

impl Quantize for Q6_K {
    fn quantize(input: &Input) -> Option<Self> {
        let block = Weighted::<16, 16>::new(input, Weight::Square, Spread::None);
        let codes = Integers { low: -32.0, high: 31.0 };
        let scale_codes = Integers { low: -128.0, high: 127.0 };
        let Symmetric { d, scales, codes } = Symmetric::fit(&block, codes, scale_codes)?;
        let codes = bytes(&codes, 32.0);
        let (mut ql, mut qh) = ([0; 128], [0; 64]);
        for (i, &q) in codes.iter().enumerate() {
            let (half, i) = (i / 128, i % 128);
            ql[64 * half + i % 64] |= (q & 0xf) << (4 * (i / 64));
            qh[32 * half + i % 32] |= (q >> 4) << (2 * (i / 32));
        }
        Some(Self { ql, qh, scales: scales.map(|scale| scale as i8), d })
    }
}

/// The codes as they are stored: from 0.
fn bytes<const S: usize, const B: usize>(codes: &[[f32; S]; B], zero: f32) -> [u8; 256] {
    let mut out = [0; 256];
    for (out, code) in out.iter_mut().zip(codes.as_flattened()) {
        // An integer up to 63; through i32 in vector code.
        *out = (code + zero) as i32 as u8;
    }
    out
}

/// The lower two bits: bits `2s` and `2s + 1` of byte `l` of half `h` are those of weight `128h +
/// 32s + l`.
fn crumbs(codes: &[u8; 256]) -> [u8; 64] {
    let mut out = [0; 64];
    for (i, q) in codes.iter().enumerate() {
        out[32 * (i / 128) + i % 32] |= (q & 3) << (2 * (i / 32 % 4));
    }
    out
}

/// The lower four bits: byte `l` of quarter `j` holds those of weight `64j + l` and of weight `64j
/// + 32 + l`.
fn nibbles(codes: &[u8; 256]) -> [u8; 128] {
    let mut out = [0; 128];
    for (i, q) in codes.iter().enumerate() {
        out[32 * (i / 64) + i % 32] |= (q & 0xf) << (4 * (i / 32 % 2));
    }
    out
}

/// Bit `at` of each code: bit `k` of byte `l` is that of weight `32k + l`.
fn bits(codes: &[u8; 256], at: u8) -> [u8; 32] {
    let mut out = [0; 32];
    for (i, q) in codes.iter().enumerate() {
        out[i % 32] |= ((q >> at) & 1) << (i / 32);
    }
    out
}

/// What [`scale_min`](crate::block::scale_min) reads.
fn scales_and_mins(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut out = [0; 12];
    for i in 0..4 {
        out[i] = scales[i] | scales[4 + i] >> 4 << 6;
        out[4 + i] = mins[i] | mins[4 + i] >> 4 << 6;
        out[8 + i] = scales[4 + i] & 0xf | mins[4 + i] << 4;
    }
    out
}
