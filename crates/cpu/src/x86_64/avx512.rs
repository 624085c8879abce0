//! AVX-512: 64 bytes at a time, and VNNI, which sums four products of bytes at once.

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
    #[inline(always)]
    fn dot_32(q: &[i8; 32], a: &[i8; 32]) -> i32 {
        // SAFETY: this code runs only within kernels compiled for these features; pointers are to 32 bytes.
        unsafe {
            let (q, a) = (avx2::load(q.as_ptr()), avx2::load(a.as_ptr()));
            let (q, a) = (_mm256_abs_epi8(q), _mm256_sign_epi8(a, q));
            avx2::sum(_mm256_dpbusd_epi32(_mm256_setzero_si256(), q, a))
        }
    }

    #[inline(always)]
    fn dot_256(q: &[i8; 256], a: &[i8; 256], scales: &[i16; 16]) -> i32 {
        Avx2::dot_256(q, a, scales)
    }

    #[inline(always)]
    fn widen_f16(x: &[f16; LANES]) -> [f32; LANES] {
        // SAFETY: as above; an array of 16 `f16` is 32 bytes, one of 16 `f32` is one vector.
        unsafe {
            let halves = _mm256_loadu_si256(x.as_ptr().cast());
            std::mem::transmute(_mm512_cvtph_ps(halves))
        }
    }

    #[inline(always)]
    fn half(x: Half) -> f32 {
        Avx2::half(x)
    }
}
