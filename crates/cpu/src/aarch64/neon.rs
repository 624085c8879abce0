//! NEON: float sums in registers of four lanes. Every AArch64 machine has it.
//!
//! Integer products and unpacking are the scalar twin's, which compilers turn into NEON well enough. The
//! tests compare this with the twin wherever they run on such a machine; no measurement has been made on one.

use std::arch::aarch64::*;

use apr_tensor::block::Half;
use half::f16;

use crate::generic::{LANES, Simd, scalar::Scalar};

/// Whether this machine can run [`KERNELS`].
pub(crate) fn is_available() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
}

#[derive(Debug)]
pub(crate) struct Neon;

crate::generic::kernels! { Neon, "neon" }

impl Simd for Neon {
    type Lanes = [float32x4_t; 4];

    #[inline(always)]
    fn splat(x: f32) -> Self::Lanes {
        // SAFETY: `Neon`'s methods run only within kernels compiled for its features.
        unsafe { [vdupq_n_f32(x); 4] }
    }

    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self::Lanes {
        let [a, b, c, d] = [0, 4, 8, 12].map(|i| x[i..].as_ptr());
        // SAFETY: as in `splat`; each quarter of the array is 16 bytes.
        unsafe { [vld1q_f32(a), vld1q_f32(b), vld1q_f32(c), vld1q_f32(d)] }
    }

    #[inline(always)]
    fn load_f16(x: &[f16; LANES]) -> Self::Lanes {
        Self::load(&Scalar::load_f16(x))
    }

    #[inline(always)]
    fn store(x: Self::Lanes) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        for (x, out) in x.into_iter().zip(out.chunks_exact_mut(4)) {
            // SAFETY: as in `splat`; `out` is 16 bytes.
            unsafe { vst1q_f32(out.as_mut_ptr(), x) };
        }
        out
    }

    #[inline(always)]
    fn fma(a: Self::Lanes, b: Self::Lanes, mut c: Self::Lanes) -> Self::Lanes {
        for i in 0..4 {
            // SAFETY: as in `splat`.
            c[i] = unsafe { vfmaq_f32(c[i], a[i], b[i]) };
        }
        c
    }

    #[inline(always)]
    fn dot_32(q: &[i8; 32], a: &[i8; 32]) -> i32 {
        Scalar::dot_32(q, a)
    }

    #[inline(always)]
    fn dot_256(q: &[i8; 256], a: &[i8; 256], scales: &[i16; 16], signed: bool) -> i32 {
        Scalar::dot_256(q, a, scales, signed)
    }

    #[inline(always)]
    fn dot_16(a: &[i16; 16], b: &[i16; 16]) -> i32 {
        Scalar::dot_16(a, b)
    }

    #[inline(always)]
    fn dot_32x4(q: &[i8; 32], a: [&[i8; 32]; 4]) -> [i32; 4] {
        Scalar::dot_32x4(q, a)
    }

    #[inline(always)]
    fn dot_256x4(q: &[i8; 256], a: [&[i8; 256]; 4], scales: &[i16; 16], signed: bool) -> [i32; 4] {
        Scalar::dot_256x4(q, a, scales, signed)
    }

    #[inline(always)]
    fn dot_16x4(a: &[i16; 16], b: [&[i16; 16]; 4]) -> [i32; 4] {
        Scalar::dot_16x4(a, b)
    }

    #[inline(always)]
    fn nibbles(qs: &[u8; 16], zero: i8) -> [i8; 32] {
        Scalar::nibbles(qs, zero)
    }

    #[inline(always)]
    fn five_bits(qs: &[u8; 16], high: [u8; 4], zero: i8) -> [i8; 32] {
        Scalar::five_bits(qs, high, zero)
    }

    #[inline(always)]
    fn lookup(qs: &[u8; 16], table: &[i8; 16]) -> [i8; 32] {
        Scalar::lookup(qs, table)
    }

    #[inline(always)]
    fn half(x: Half) -> f32 {
        Scalar::half(x)
    }
}
