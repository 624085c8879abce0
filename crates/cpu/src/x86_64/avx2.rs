//! AVX2 with FMA and F16C: 32 bytes at a time.

use std::arch::x86_64::*;

use apr_tensor::block::Half;
use half::f16;

use crate::generic::{LANES, Simd};

/// Whether this machine can run [`KERNELS`].
pub(crate) fn is_available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

#[derive(Debug)]
pub(crate) struct Avx2;

crate::generic::kernels! { Avx2, "avx2,fma,f16c" }

impl Simd for Avx2 {
    #[inline(always)]
    fn dot_32(q: &[i8; 32], a: &[i8; 32]) -> i32 {
        // SAFETY: this code runs only within kernels compiled for these features; pointers are to 32 bytes.
        unsafe {
            let pairs = products(load(q.as_ptr()), load(a.as_ptr()));
            sum(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    fn dot_256(q: &[i8; 256], a: &[i8; 256], scales: &[i16; 16]) -> i32 {
        // SAFETY: this code runs only within kernels compiled for these features; `i` and `2 * i + 1` are in bounds.
        unsafe {
            let mut acc = _mm256_setzero_si256();
            for i in 0..8 {
                let pairs = products(load(q.as_ptr().add(32 * i)), load(a.as_ptr().add(32 * i)));
                acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, scale_pair(scales, i)));
            }
            sum(acc)
        }
    }

    #[inline(always)]
    fn widen_f16(x: &[f16; LANES]) -> [f32; LANES] {
        // SAFETY: as above; an array of 16 `f16` is 32 bytes, one of 16 `f32` is two vectors.
        unsafe {
            let halves = load(x.as_ptr().cast());
            let low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
            let high = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves));
            std::mem::transmute([low, high])
        }
    }

    #[inline(always)]
    fn half(x: Half) -> f32 {
        // SAFETY: this code runs only within kernels compiled for these features.
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.to_bits().into()))) }
    }
}

/// # Safety
/// AVX2, and 32 readable bytes.
#[inline(always)]
pub(super) unsafe fn load(bytes: *const i8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_loadu_si256(bytes.cast()) }
}

/// Sums of two neighbouring products, in i16: at most 2 * 128 * 127, so nothing saturates.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn products(q: __m256i, a: __m256i) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(a, q)) }
}

/// Scales `2i` and `2i + 1`, sixteen bytes of each.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn scale_pair(scales: &[i16; 16], i: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_set_m128i(_mm_set1_epi16(scales[2 * i + 1]), _mm_set1_epi16(scales[2 * i])) }
}

/// The sum of eight integers.
///
/// # Safety
/// AVX2.
#[inline(always)]
pub(super) unsafe fn sum(x: __m256i) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
        let x = _mm_add_epi32(x, _mm_unpackhi_epi64(x, x));
        let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01>(x));
        _mm_cvtsi128_si32(x)
    }
}
