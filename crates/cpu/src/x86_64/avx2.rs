//! AVX2 with FMA and F16C: 32 bytes at a time.

use std::arch::{asm, x86_64::*};

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
    type Lanes = [__m256; 2];

    #[inline(always)]
    fn splat(x: f32) -> Self::Lanes {
        // SAFETY: `Avx2`'s methods run only within kernels compiled for its features.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self::Lanes {
        // SAFETY: as in `splat`; both halves of the array are 32 bytes.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x[8..].as_ptr())] }
    }

    #[inline(always)]
    fn load_f16(x: &[f16; LANES]) -> Self::Lanes {
        // SAFETY: as in `splat`; the array is 32 bytes.
        unsafe {
            let halves = load(x.as_ptr().cast());
            let high = _mm256_extracti128_si256::<1>(halves);
            [_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(high)]
        }
    }

    #[inline(always)]
    fn store([low, high]: Self::Lanes) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: as in `splat`; both halves of the array are 32 bytes.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), low);
            _mm256_storeu_ps(out[8..].as_mut_ptr(), high);
        }
        out
    }

    #[inline(always)]
    fn fma(a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes {
        // SAFETY: as in `splat`.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn dot_32(q: &[i8; 32], a: &[i8; 32]) -> i32 {
        // SAFETY: as in `splat`; both arrays are 32 bytes.
        unsafe {
            let pairs = products(load(q.as_ptr()), load(a.as_ptr()), true);
            sum(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    fn dot_256(q: &[i8; 256], a: &[i8; 256], scales: &[i16; 16], signed: bool) -> i32 {
        // SAFETY: as in `splat`; 32 bytes from `32 * i` on are in bounds, and the scales are 32 bytes.
        unsafe {
            let (scales, mut acc) = (load(scales.as_ptr().cast()), _mm256_setzero_si256());
            for i in 0..8 {
                let pairs =
                    products(load(q.as_ptr().add(32 * i)), load(a.as_ptr().add(32 * i)), signed);
                acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, scale_pair(scales, i as i32)));
            }
            sum(acc)
        }
    }

    #[inline(always)]
    fn dot_16(a: &[i16; 16], b: &[i16; 16]) -> i32 {
        // SAFETY: as in `splat`; both arrays are 32 bytes.
        unsafe { sum(_mm256_madd_epi16(load(a.as_ptr().cast()), load(b.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn dot_32x4(q: &[i8; 32], a: [&[i8; 32]; 4]) -> [i32; 4] {
        // SAFETY: as in `splat`; all arrays are 32 bytes.
        unsafe {
            let (q, mut sums) = (load(q.as_ptr()), [_mm256_setzero_si256(); 4]);
            for (sum, a) in sums.iter_mut().zip(a) {
                *sum = _mm256_madd_epi16(products(q, load(a.as_ptr()), true), _mm256_set1_epi16(1));
            }
            sum4(sums)
        }
    }

    #[inline(always)]
    fn dot_256x4(q: &[i8; 256], a: [&[i8; 256]; 4], scales: &[i16; 16], signed: bool) -> [i32; 4] {
        // SAFETY: as in `splat`; 32 bytes from `32 * i` on are in bounds, and the scales are 32 bytes.
        unsafe {
            let (scales, mut sums) = (load(scales.as_ptr().cast()), [_mm256_setzero_si256(); 4]);
            for i in 0..8 {
                let (q, scale) = (load(q.as_ptr().add(32 * i)), scale_pair(scales, i as i32));
                for (sum, a) in sums.iter_mut().zip(a) {
                    let pairs = products(q, load(a.as_ptr().add(32 * i)), signed);
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, scale));
                }
            }
            sum4(sums)
        }
    }

    #[inline(always)]
    fn dot_16x4(a: &[i16; 16], b: [&[i16; 16]; 4]) -> [i32; 4] {
        // SAFETY: as in `splat`; all arrays are 32 bytes.
        unsafe {
            let (a, mut sums) = (load(a.as_ptr().cast()), [_mm256_setzero_si256(); 4]);
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = _mm256_madd_epi16(a, load(b.as_ptr().cast()));
            }
            sum4(sums)
        }
    }

    #[inline(always)]
    fn nibbles(qs: &[u8; 16], zero: i8) -> [i8; 32] {
        // SAFETY: as in `splat`.
        unsafe { store(_mm256_sub_epi8(split(qs), _mm256_set1_epi8(zero))) }
    }

    #[inline(always)]
    fn five_bits(qs: &[u8; 16], high: [u8; 4], zero: i8) -> [i8; 32] {
        // SAFETY: as in `splat`.
        unsafe {
            let fifth = _mm256_and_si256(spread_bits(high), _mm256_set1_epi8(16));
            let q = _mm256_or_si256(split(qs), fifth);
            store(_mm256_sub_epi8(q, _mm256_set1_epi8(zero)))
        }
    }

    #[inline(always)]
    fn lookup(qs: &[u8; 16], table: &[i8; 16]) -> [i8; 32] {
        // SAFETY: as in `splat`; the table is 16 bytes.
        unsafe {
            let table = _mm_loadu_si128(table.as_ptr().cast());
            store(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), split(qs)))
        }
    }

    #[inline(always)]
    fn half(x: Half) -> f32 {
        let bits: __m128i;
        // SAFETY: as in `splat`. As an intrinsic the move becomes one into the low part of some register, often that
        // of the sum over blocks, so that each block would wait for the sum of the last one.
        unsafe {
            asm!(
                "vmovd {bits}, {half:e}",
                bits = out(xmm_reg) bits,
                half = in(reg) u32::from(x.to_bits()),
                options(pure, nomem, nostack, preserves_flags),
            );
            _mm_cvtss_f32(_mm_cvtph_ps(bits))
        }
    }
}

/// # Safety
/// AVX2, and 32 readable bytes.
#[inline(always)]
pub(super) unsafe fn load(bytes: *const i8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_loadu_si256(bytes.cast()) }
}

/// Sums of two neighbouring products, in i16: at most 2 * 128 * 127, so nothing saturates. No `q` is negative
/// unless `signed`.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn products(q: __m256i, a: __m256i, signed: bool) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        match signed {
            true => _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(a, q)),
            false => _mm256_maddubs_epi16(q, a),
        }
    }
}

/// Sixteen bytes of scale `2i`, sixteen of scale `2i + 1`. (Shuffled out of one vector: of two broadcasts the compiler
/// takes the unpacking before them apart.)
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn scale_pair(scales: __m256i, i: i32) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let pair = _mm256_permutevar8x32_epi32(scales, _mm256_set1_epi32(i));
        let first_then_second = _mm256_set_m128i(_mm_set1_epi16(0x0302), _mm_set1_epi16(0x0100));
        _mm256_shuffle_epi8(pair, first_then_second)
    }
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

/// The sums of four times eight integers.
///
/// # Safety
/// AVX2.
#[inline(always)]
pub(super) unsafe fn sum4([a, b, c, d]: [__m256i; 4]) -> [i32; 4] {
    // SAFETY: the caller's promise; both types are 16 bytes without invalid values.
    unsafe {
        let halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
        let high = _mm256_extracti128_si256::<1>(halves);
        std::mem::transmute(_mm_add_epi32(_mm256_castsi256_si128(halves), high))
    }
}

/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn store(x: __m256i) -> [i8; 32] {
    // SAFETY: both are 32 bytes without invalid values.
    unsafe { std::mem::transmute(x) }
}

/// The low nibbles, then the high ones.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn split(qs: &[u8; 16]) -> __m256i {
    // SAFETY: the caller's promise; `qs` is 16 bytes.
    unsafe {
        let low = _mm_loadu_si128(qs.as_ptr().cast());
        let both = _mm256_set_m128i(_mm_srli_epi16::<4>(low), low);
        _mm256_and_si256(both, _mm256_set1_epi8(0xf))
    }
}

/// Byte `i` is all ones where bit `i` is set.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn spread_bits(bits: [u8; 4]) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let byte_of_bit = _mm256_set_epi64x(
            0x0303_0303_0303_0303,
            0x0202_0202_0202_0202,
            0x0101_0101_0101_0101,
            0,
        );
        let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(bits)), byte_of_bit);
        let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit)
    }
}
