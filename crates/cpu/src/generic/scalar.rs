//! The scalar twin: the same arithmetic in plain Rust. It runs everywhere and is what vector code is tested against.

use apr_tensor::block::Half;
use half::f16;

use super::{LANES, Simd};

#[derive(Debug)]
pub(crate) struct Scalar;

impl Simd for Scalar {
    #[inline(always)]
    fn dot_32(q: &[i8; 32], a: &[i8; 32]) -> i32 {
        dot(q, a)
    }

    #[inline(always)]
    fn dot_256(q: &[i8; 256], a: &[i8; 256], scales: &[i16; 16]) -> i32 {
        let sub_blocks = q.as_chunks::<16>().0.iter().zip(a.as_chunks::<16>().0);
        sub_blocks.zip(scales).map(|((q, a), &scale)| i32::from(scale) * dot(q, a)).sum()
    }

    #[inline(always)]
    fn widen_f16(x: &[f16; LANES]) -> [f32; LANES] {
        x.map(f16::to_f32)
    }

    #[inline(always)]
    fn half(x: Half) -> f32 {
        x.to_f32()
    }
}

#[inline(always)]
fn dot(q: &[i8], a: &[i8]) -> i32 {
    q.iter().zip(a).map(|(&q, &a)| i32::from(q) * i32::from(a)).sum()
}

super::kernels! { Scalar }
