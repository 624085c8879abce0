//! AVX-512: 16 floats in one register, and VNNI, which sums four products of bytes at once.
//!
//! Blocks are unpacked and scaled in 32 bytes as by [`Avx2`]: their layouts are made of runs of 16 and 32.

use std::arch::x86_64::*;

use apr_tensor::block::Half;
use half::f16;

use super::avx2::{self, Avx2};
use crate::generic::{LANES, Simd};

/// Whether this machine can run [`KERNELS`].
pub(crate) fn is_available() -> bool {
    avx2::is_available()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
}

#[derive(Debug)]
pub(crate) struct Avx512;

crate::generic::kernels! { Avx512, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni" }

impl Simd for Avx512 {
    type Lanes = __m512;

    #[inline(always)]
    fn splat(x: f32) -> Self::Lanes {
        // SAFETY: `Avx512`'s methods run only within kernels compiled for its features.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self::Lanes {
        // SAFETY: as in `splat`; the array is 64 bytes.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_f16(x: &[f16; LANES]) -> Self::Lanes {
        // SAFETY: as in `splat`; the array is 32 bytes.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn store(x: Self::Lanes) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: as in `splat`; the array is 64 bytes.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) };
        out
    }

    #[inline(always)]
    fn fma(a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes {
        // SAFETY: as in `splat`.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn dot_32(q: &[i8; 32], a: &[i8; 32]) -> i32 {
        // SAFETY: as in `splat`; both arrays are 32 bytes.
        unsafe {
            let (q, a) = (avx2::load(q.as_ptr()), avx2::load(a.as_ptr()));
            let (q, a) = (_mm256_abs_epi8(q), _mm256_sign_epi8(a, q));
            avx2::sum(_mm256_dpbusd_epi32(_mm256_setzero_si256(), q, a))
        }
    }

    #[inline(always)]
    fn dot_256(q: &[i8; 256], a: &[i8; 256], scales: &[i16; 16], signed: bool) -> i32 {
        Avx2::dot_256(q, a, scales, signed)
    }

    #[inline(always)]
    fn dot_16(a: &[i16; 16], b: &[i16; 16]) -> i32 {
        Avx2::dot_16(a, b)
    }

    #[inline(always)]
    fn dot_32x4(q: &[i8; 32], a: [&[i8; 32]; 4]) -> [i32; 4] {
        // SAFETY: as in `splat`; all arrays are 32 bytes.
        unsafe {
            let q = avx2::load(q.as_ptr());
            let (size, mut sums) = (_mm256_abs_epi8(q), [_mm256_setzero_si256(); 4]);
            for (sum, a) in sums.iter_mut().zip(a) {
                *sum = _mm256_dpbusd_epi32(*sum, size, _mm256_sign_epi8(avx2::load(a.as_ptr()), q));
            }
            avx2::sum4(sums)
        }
    }

    #[inline(always)]
    fn dot_256x4(q: &[i8; 256], a: [&[i8; 256]; 4], scales: &[i16; 16], signed: bool) -> [i32; 4] {
        Avx2::dot_256x4(q, a, scales, signed)
    }

    #[inline(always)]
    fn dot_16x4(a: &[i16; 16], b: [&[i16; 16]; 4]) -> [i32; 4] {
        Avx2::dot_16x4(a, b)
    }

    #[inline(always)]
    fn nibbles(qs: &[u8; 16], zero: i8) -> [i8; 32] {
        Avx2::nibbles(qs, zero)
    }

    #[inline(always)]
    fn five_bits(qs: &[u8; 16], high: [u8; 4], zero: i8) -> [i8; 32] {
        Avx2::five_bits(qs, high, zero)
    }

    #[inline(always)]
    fn lookup(qs: &[u8; 16], table: &[i8; 16]) -> [i8; 32] {
        Avx2::lookup(qs, table)
    }

    #[inline(always)]
    fn half(x: Half) -> f32 {
        Avx2::half(x)
    }
}
