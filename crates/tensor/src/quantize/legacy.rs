//! Blocks of 32 with scales of their own: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, APR_Q4.
//!
//! Without importance the largest value decides the scale, in ggml's arithmetic: the bytes are
//! those of llama.cpp's tools, so files can be compared.

use super::{
    Input, Quantize,
    plain::round_to_i8,
    search::{Codes, Integers, inverse, scale, scale_and_min},
    weighted::{Spread, Weight, Weighted},
};
use crate::block::{AprQ4, Half, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};

impl Quantize for Q8_0 {
    fn quantize(input: &Input) -> Option<Self> {
        let amax = input.values.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
        let d = amax / 127.0;
        let qs = std::array::from_fn(|i| round_to_i8(input.values[i], d));
        Some(Self { d: Half::nearest(d)?, qs })
    }
}

impl Quantize for Q4_0 {
    fn quantize(input: &Input) -> Option<Self> {
        let (d, codes) = symmetric(input, 8)?;
        Some(Self { d, qs: nibbles(&codes) })
    }
}

impl Quantize for AprQ4 {
    fn quantize(input: &Input) -> Option<Self> {
        let (d, codes) = symmetric(input, 8)?;
        Some(Self { d, qs: std::array::from_fn(|i| codes[2 * i] | codes[2 * i + 1] << 4) })
    }
}

impl Quantize for Q5_0 {
    fn quantize(input: &Input) -> Option<Self> {
        let (d, codes) = symmetric(input, 16)?;
        Some(Self { d, qh: fifth_bits(&codes), qs: nibbles(&codes) })
    }
}

impl Quantize for Q4_1 {
    fn quantize(input: &Input) -> Option<Self> {
        let (d, m, codes) = affine(input, 15)?;
        Some(Self { d, m, qs: nibbles(&codes) })
    }
}

impl Quantize for Q5_1 {
    fn quantize(input: &Input) -> Option<Self> {
        let (d, m, codes) = affine(input, 31)?;
        Some(Self { d, m, qh: fifth_bits(&codes), qs: nibbles(&codes) })
    }
}

/// A scale, and codes from 0 to `2 * zero - 1` that stand for `scale * (code - zero)`.
fn symmetric(input: &Input, zero: u8) -> Option<(Half, [u8; 32])> {
    let zero_point = f32::from(zero);
    if input.importance.is_none() {
        let first_largest = |max: f32, &x: &f32| if x.abs() > max.abs() { x } else { max };
        let d = input.values.iter().fold(0.0, first_largest) / -zero_point;
        let codes = cut(input.values, d, 0.0, zero_point + 0.5, 2 * zero - 1);
        return Some((Half::nearest(d)?, codes));
    }
    let block = block(input);
    let ([x], [w]) = (&block.x, &block.w);
    let codes = Integers { low: -zero_point, high: zero_point - 1.0 };
    let (d, unit) = block.half(scale(x, w, codes))?;
    let inverse = inverse(unit);
    Some((d, x.map(|x| (codes.nearest(x * inverse) + zero_point) as u8)))
}

/// A scale, a minimum, and codes from 0 to `top` that stand for `scale * code + minimum`.
fn affine(input: &Input, top: u8) -> Option<(Half, Half, [u8; 32])> {
    if input.importance.is_none() {
        let min = input.values.iter().copied().fold(f32::INFINITY, f32::min);
        let max = input.values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let d = (max - min) / f32::from(top);
        let codes = cut(input.values, d, min, 0.5, top);
        return Some((Half::nearest(d)?, Half::nearest(min)?, codes));
    }
    let block = block(input);
    let (d, min) = scale_and_min(&block.x[0], &block.w[0], top.into());
    let ((d, unit), (min, shift)) = (block.half(d)?, block.half(min)?);
    let (codes, inverse) = (Integers { low: 0.0, high: top.into() }, inverse(unit));
    Some((d, min, block.x[0].map(|x| codes.nearest((x - shift) * inverse) as u8)))
}

/// Without importance, these types are not searched.
fn block(input: &Input) -> Weighted<32, 1> {
    Weighted::new(input, Weight::Square, Spread::Row)
}

/// `(x - min) / d + offset`, cut to an integer from 0 to `top`. ggml's rounding: the halves of an
/// offset go up.
fn cut(values: &[f32], d: f32, min: f32, offset: f32, top: u8) -> [u8; 32] {
    let inverse = 1.0 / d;
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    std::array::from_fn(|i| (((values[i] - min) * inverse + offset) as u8).min(top))
}

/// The lower four bits: code `j` in the low nibble of byte `j`, code `16 + j` in the high one.
fn nibbles(codes: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|j| codes[j] & 0xf | codes[16 + j] << 4)
}

fn fifth_bits(codes: &[u8; 32]) -> [u8; 4] {
    let bits = codes.iter().enumerate().map(|(i, &code)| u32::from(code >> 4) << i);
    bits.fold(0, |all, bit| all | bit).to_le_bytes()
}
