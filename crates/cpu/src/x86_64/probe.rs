//! What [`crate::probe`] needs of x86-64: chains of integer dot products that stay in registers.

use std::{
    arch::{asm, x86_64::*},
    hint::black_box,
};

/// Independent chains: at least the cycles that a product takes, times the products that begin in one.
const AVX512_CHAINS: usize = 16;
const AVX2_CHAINS: usize = 8;

/// 64 products and sums in each chain.
pub(crate) const INT8_AVX512_OPS: u64 = 2 * 64 * AVX512_CHAINS as u64;
/// 32 products and sums in each chain.
pub(crate) const INT8_AVX2_OPS: u64 = 2 * 32 * AVX2_CHAINS as u64;

/// VNNI: four products of bytes enter each sum at once.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(crate) fn int8_avx512(rounds: usize, out: &mut f32) {
    let (a, b) = (_mm512_set1_epi8(black_box(1)), _mm512_set1_epi8(black_box(1)));
    let mut sums = [_mm512_setzero_si512(); AVX512_CHAINS];
    for sum in &mut sums {
        // Chains that begin alike could be computed once.
        *sum = _mm512_set1_epi32(black_box(0));
    }
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    for sum in sums {
        *out += _mm512_reduce_add_epi32(sum) as f32;
    }
}

/// `maddubs` and sums in 16 bits, which wrap around. A product that is to be right does more.
#[target_feature(enable = "avx2")]
pub(crate) fn int8_avx2(rounds: usize, out: &mut f32) {
    let (mut a, b) = (_mm256_set1_epi8(black_box(1)), _mm256_set1_epi8(black_box(1)));
    let mut sums = [_mm256_setzero_si256(); AVX2_CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            // SAFETY: does nothing. A compiler that sees the same factors again would multiply them only once.
            unsafe {
                asm!("/* {0} */", inout(ymm_reg) a, options(pure, nomem, nostack, preserves_flags));
            }
            *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(a, b));
        }
    }
    for sum in sums {
        *out += total(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
    }
}

/// VNNI in 32 bytes.
#[target_feature(enable = "avx2,avxvnni")]
pub(crate) fn int8_avxvnni(rounds: usize, out: &mut f32) {
    let (a, b) = (_mm256_set1_epi8(black_box(1)), _mm256_set1_epi8(black_box(1)));
    let mut sums = [_mm256_setzero_si256(); AVX2_CHAINS];
    for sum in &mut sums {
        *sum = _mm256_set1_epi32(black_box(0));
    }
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, a, b);
        }
    }
    for sum in sums {
        *out += total(sum);
    }
}

#[target_feature(enable = "avx2")]
fn total(sums: __m256i) -> f32 {
    let mut words = [0i32; 8];
    // SAFETY: the array is 32 bytes.
    unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), sums) };
    let mut sum = 0i32;
    for word in words {
        sum = sum.wrapping_add(word);
    }
    sum as f32
}
