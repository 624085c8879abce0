//! AVX-512: 16 lanes in one register, and VNNI, which sums four products of bytes at once.

use std::arch::{asm, x86_64::*};

use half::f16;

use super::avx2;
use crate::{
    generic::{LANES, Simd, unpack::Tiled, word},
    tile::Line,
};

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

    const REGISTERS: usize = 16;

    const IS_WIDE: bool = true;

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

    type Part = Self::Lanes;

    const PARTS: usize = 1;

    #[inline(always)]
    fn part(x: Self::Lanes, _: usize) -> Self::Part {
        x
    }

    #[inline(always)]
    fn set_part(x: &mut Self::Lanes, _: usize, part: Self::Part) {
        *x = part;
    }

    #[inline(always)]
    fn fma_part(a: Self::Part, b: Self::Part, c: Self::Part) -> Self::Part {
        Self::fma(a, b, c)
    }

    #[inline(always)]
    fn mul_part(a: Self::Part, b: Self::Part) -> Self::Part {
        // SAFETY: as in `splat`.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn sum(x: Self::Lanes) -> f32 {
        // SAFETY: as in `splat`.
        unsafe { avx2::sum(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x)) }
    }

    #[inline(always)]
    fn sums([a, b, c, d]: [Self::Lanes; 4]) -> [f32; 4] {
        // SAFETY: as in `splat`.
        unsafe { avx2::sums([halved(a), halved(b), halved(c), halved(d)]) }
    }

    #[inline(always)]
    fn load_f32(x: &[u8; 64]) -> Self::Lanes {
        // SAFETY: as in `splat`; the array is 64 bytes.
        unsafe { _mm512_loadu_ps(x.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_bf16(x: &[u8; 32]) -> Self::Lanes {
        // SAFETY: as in `splat`.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(Self::widen_halves(x, 0))) }
    }

    #[inline(always)]
    fn load_halves(x: &[u8; 32], _: usize) -> Self::Part {
        // SAFETY: as in `splat`; the array is 32 bytes.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }

    type Words = __m512i;

    #[inline(always)]
    fn load_words(x: &Line, _: usize) -> Self::Words {
        // Compilers keep the order of what is volatile.
        // SAFETY: as in `splat`; a line is 64 bytes and aligned to as many.
        unsafe { x.0.as_ptr().cast::<__m512i>().read_volatile() }
    }

    #[inline(always)]
    fn now(x: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { now(x) }
    }

    #[inline(always)]
    fn widen_halves(x: &[u8; 32], _: usize) -> Self::Words {
        // SAFETY: as in `splat`; the array is 32 bytes.
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn splat_word(x: i32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    fn and(x: Self::Words, mask: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm512_and_si512(x, _mm512_set1_epi32(mask as i32)) }
    }

    #[inline(always)]
    fn xor(x: Self::Words, mask: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm512_xor_si512(x, _mm512_set1_epi32(mask as i32)) }
    }

    #[inline(always)]
    fn or(a: Self::Words, b: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm512_or_si512(a, b) }
    }

    #[inline(always)]
    fn shl(x: Self::Words, bits: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm512_sll_epi32(x, _mm_cvtsi32_si128(bits as i32)) }
    }

    #[inline(always)]
    fn shr(x: Self::Words, bits: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm512_srl_epi32(x, _mm_cvtsi32_si128(bits as i32)) }
    }

    #[inline(always)]
    fn sar(x: Self::Words, bits: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm512_sra_epi32(x, _mm_cvtsi32_si128(bits as i32)) }
    }

    #[inline(always)]
    fn add_word(a: Self::Words, b: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    fn mul_word(a: Self::Words, b: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm512_mullo_epi32(a, b) }
    }

    #[inline(always)]
    fn to_part(x: Self::Words) -> Self::Part {
        // SAFETY: as in `splat`.
        unsafe { _mm512_cvtepi32_ps(x) }
    }

    type Dots = Self::Words;

    #[inline(always)]
    fn dots(start: i32) -> Self::Dots {
        Self::splat_word(start)
    }

    #[inline(always)]
    fn dot<T: Tiled>(dots: Self::Dots, q: Self::Words, a: &[i8; 4]) -> Self::Dots {
        // SAFETY: as in `splat`.
        unsafe { _mm512_dpbusd_epi32(dots, q, _mm512_set1_epi32(word(a))) }
    }

    #[inline(always)]
    fn dots_now(x: Self::Dots) -> Self::Dots {
        Self::now(x)
    }

    #[inline(always)]
    fn add_dots(acc: Self::Words, dots: Self::Dots, scale: Self::Words) -> Self::Words {
        Self::add_word(acc, Self::mul_word(dots, scale))
    }

    #[inline(always)]
    fn to_words(dots: Self::Dots) -> Self::Words {
        dots
    }

    #[inline(always)]
    fn dot_pairs(acc: Self::Words, x: Self::Words, [low, high]: [i16; 2]) -> Self::Words {
        let pair = i32::from(low as u16) | i32::from(high) << 16;
        // SAFETY: as in `splat`.
        unsafe { _mm512_dpwssd_epi32(acc, x, _mm512_set1_epi32(pair)) }
    }

    #[inline(always)]
    fn spread_bits(x: Self::Words, group: usize, to: u32) -> Self::Words {
        let byte = group as i32 / 2 * 0x0101_0101;
        let in_its_word = i128::from_le_bytes([0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]);
        // SAFETY: as in `splat`; the cast keeps all bits.
        unsafe {
            let words = _mm512_broadcast_i32x4(std::mem::transmute::<i128, __m128i>(in_its_word));
            let bytes = _mm512_shuffle_epi8(x, _mm512_add_epi32(words, _mm512_set1_epi32(byte)));
            let bit = _mm512_set1_epi32(0x0804_0201 << (4 * (group as u32 % 2)));
            _mm512_maskz_set1_epi8(_mm512_test_epi8_mask(bytes, bit), 1 << to)
        }
    }

    #[inline(always)]
    fn lookup(x: Self::Words, table: &[u8; 16]) -> Self::Words {
        // SAFETY: as in `splat`; the table is 16 bytes.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, x)
        }
    }
}

/// The sum of the low half and the high one.
///
/// # Safety
/// AVX-512.
#[inline(always)]
unsafe fn halved(x: __m512) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x)) }
}

/// `x`, which compilers take for the result of something that has its place between volatile loads.
///
/// # Safety
/// AVX-512.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn now(mut x: __m512i) -> __m512i {
    // SAFETY: there is no instruction in it.
    unsafe { asm!("/* {0} */", inout(zmm_reg) x, options(nomem, nostack, preserves_flags)) };
    x
}
