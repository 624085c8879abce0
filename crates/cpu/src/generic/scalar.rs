//! The scalar twin: the same arithmetic in plain Rust. It runs everywhere and is what vector code is tested against.

use std::array;

use apr_tensor::block::Half;
use half::f16;

use super::{LANES, Simd};

#[derive(Debug)]
pub(crate) struct Scalar;

super::kernels! { Scalar }

impl Simd for Scalar {
    type Lanes = [f32; LANES];

    #[inline(always)]
    fn splat(x: f32) -> Self::Lanes {
        [x; LANES]
    }

    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self::Lanes {
        *x
    }

    #[inline(always)]
    fn load_f16(x: &[f16; LANES]) -> Self::Lanes {
        x.map(f16::to_f32)
    }

    #[inline(always)]
    fn store(x: Self::Lanes) -> [f32; LANES] {
        x
    }

    #[inline(always)]
    fn fma(a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes {
        array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn dot_32(q: &[i8; 32], a: &[i8; 32]) -> i32 {
        dot(q, a)
    }

    #[inline(always)]
    fn dot_256(q: &[i8; 256], a: &[i8; 256], scales: &[i16; 16], _signed: bool) -> i32 {
        let sub_blocks = q.as_chunks::<16>().0.iter().zip(a.as_chunks::<16>().0);
        sub_blocks.zip(scales).map(|((q, a), &scale)| i32::from(scale) * dot(q, a)).sum()
    }

    #[inline(always)]
    fn dot_16(a: &[i16; 16], b: &[i16; 16]) -> i32 {
        a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
    }

    #[inline(always)]
    fn dot_32x4(q: &[i8; 32], a: [&[i8; 32]; 4]) -> [i32; 4] {
        a.map(|a| Self::dot_32(q, a))
    }

    #[inline(always)]
    fn dot_256x4(q: &[i8; 256], a: [&[i8; 256]; 4], scales: &[i16; 16], signed: bool) -> [i32; 4] {
        a.map(|a| Self::dot_256(q, a, scales, signed))
    }

    #[inline(always)]
    fn dot_16x4(a: &[i16; 16], b: [&[i16; 16]; 4]) -> [i32; 4] {
        b.map(|b| Self::dot_16(a, b))
    }

    #[inline(always)]
    fn nibbles(qs: &[u8; 16], zero: i8) -> [i8; 32] {
        array::from_fn(|i| nibble(qs, i) as i8 - zero)
    }

    #[inline(always)]
    fn five_bits(qs: &[u8; 16], high: [u8; 4], zero: i8) -> [i8; 32] {
        let fifth = |i: usize| (high[i / 8] >> (i % 8)) & 1;
        array::from_fn(|i| (nibble(qs, i) | fifth(i) << 4) as i8 - zero)
    }

    #[inline(always)]
    fn lookup(qs: &[u8; 16], table: &[i8; 16]) -> [i8; 32] {
        array::from_fn(|i| table[usize::from(nibble(qs, i))])
    }

    #[inline(always)]
    fn half(x: Half) -> f32 {
        x.to_f32()
    }
}

#[inline(always)]
fn nibble(qs: &[u8; 16], i: usize) -> u8 {
    (qs[i % 16] >> (4 * (i / 16))) & 0xf
}

#[inline(always)]
fn dot(q: &[i8], a: &[i8]) -> i32 {
    q.iter().zip(a).map(|(&q, &a)| i32::from(q) * i32::from(a)).sum()
}
