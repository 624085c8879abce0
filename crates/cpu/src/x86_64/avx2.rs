//! AVX2 with FMA and F16C: 32 bytes at a time; with AVX-VNNI or without.

use std::arch::{asm, x86_64::*};

use half::f16;

use crate::{
    generic::{LANES, Simd, byte, unpack::Tiled, word},
    tile::Line,
};

/// Whether this machine can run [`plain::KERNELS`].
pub(crate) fn is_available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Whether this machine can run [`vnni::KERNELS`] as well.
pub(crate) fn has_vnni() -> bool {
    is_available() && is_x86_feature_detected!("avxvnni")
}

/// Without VNNI: what Haswell and Zen have.
pub(crate) mod plain {
    crate::generic::kernels! { super::Avx2<false>, "avx2,fma,f16c" }
}

/// With VNNI in the encoding for 32 bytes.
pub(crate) mod vnni {
    crate::generic::kernels! { super::Avx2<true>, "avx2,fma,f16c,avxvnni" }
}

/// Both halves of a vector of [`LANES`] lanes. A closure would not do: where one is not inlined, it is compiled without
/// the kernel's instruction set, and every intrinsic in it becomes a call.
macro_rules! both {
    (|$i:ident| $half:expr) => {
        [
            {
                let $i = 0;
                $half
            },
            {
                let $i = 1;
                $half
            },
        ]
    };
}

#[derive(Debug)]
pub(crate) struct Avx2<const VNNI: bool>;

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type Lanes = [__m256; 2];

    const REGISTERS: usize = 6;

    const SIGNED: bool = !VNNI;

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
            let halves = _mm256_loadu_si256(x.as_ptr().cast());
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

    type Part = __m256;

    const PARTS: usize = 2;

    #[inline(always)]
    fn part(x: Self::Lanes, i: usize) -> Self::Part {
        x[i]
    }

    #[inline(always)]
    fn set_part(x: &mut Self::Lanes, i: usize, part: Self::Part) {
        x[i] = part;
    }

    #[inline(always)]
    fn fma_part(a: Self::Part, b: Self::Part, c: Self::Part) -> Self::Part {
        // SAFETY: as in `splat`.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn mul_part(a: Self::Part, b: Self::Part) -> Self::Part {
        // SAFETY: as in `splat`.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn sum([low, high]: Self::Lanes) -> f32 {
        // SAFETY: as in `splat`.
        unsafe { sum(low, high) }
    }

    #[inline(always)]
    fn sums([a, b, c, d]: [Self::Lanes; 4]) -> [f32; 4] {
        // SAFETY: as in `splat`.
        unsafe {
            let eights = [
                _mm256_add_ps(a[0], a[1]),
                _mm256_add_ps(b[0], b[1]),
                _mm256_add_ps(c[0], c[1]),
                _mm256_add_ps(d[0], d[1]),
            ];
            sums(eights)
        }
    }

    #[inline(always)]
    fn load_f32(x: &[u8; 64]) -> Self::Lanes {
        let (halves, _) = x.as_chunks::<32>();
        // SAFETY: as in `splat`; each half of the array is 32 bytes.
        both!(|i| unsafe { _mm256_loadu_ps(halves[i].as_ptr().cast()) })
    }

    #[inline(always)]
    fn load_bf16(x: &[u8; 32]) -> Self::Lanes {
        // SAFETY: as in `splat`.
        both!(|i| unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(Self::widen_halves(x, i))) })
    }

    #[inline(always)]
    fn load_halves(x: &[u8; 32], part: usize) -> Self::Part {
        let (halves, _) = x.as_chunks::<16>();
        // SAFETY: as in `splat`; each half of the array is 16 bytes.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(halves[part].as_ptr().cast())) }
    }

    type Words = __m256i;

    #[inline(always)]
    fn load_words(x: &Line, part: usize) -> Self::Words {
        let (halves, _) = x.0.as_chunks::<32>();
        // SAFETY: as in `splat`; each half of a line is 32 bytes, and aligned to as many.
        unsafe { _mm256_load_si256(halves[part].as_ptr().cast()) }
    }

    #[inline(always)]
    fn now(x: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { now(x) }
    }

    #[inline(always)]
    fn widen_halves(x: &[u8; 32], part: usize) -> Self::Words {
        let (halves, _) = x.as_chunks::<16>();
        // SAFETY: as in `splat`; each half of the array is 16 bytes.
        unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(halves[part].as_ptr().cast())) }
    }

    #[inline(always)]
    fn splat_word(x: i32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm256_set1_epi32(x) }
    }

    #[inline(always)]
    fn and(x: Self::Words, mask: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm256_and_si256(x, _mm256_set1_epi32(mask as i32)) }
    }

    #[inline(always)]
    fn xor(x: Self::Words, mask: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm256_xor_si256(x, _mm256_set1_epi32(mask as i32)) }
    }

    #[inline(always)]
    fn or(a: Self::Words, b: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm256_or_si256(a, b) }
    }

    #[inline(always)]
    fn shl(x: Self::Words, bits: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm256_sll_epi32(x, _mm_cvtsi32_si128(bits as i32)) }
    }

    #[inline(always)]
    fn shr(x: Self::Words, bits: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm256_srl_epi32(x, _mm_cvtsi32_si128(bits as i32)) }
    }

    #[inline(always)]
    fn sar(x: Self::Words, bits: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm256_sra_epi32(x, _mm_cvtsi32_si128(bits as i32)) }
    }

    #[inline(always)]
    fn add_word(a: Self::Words, b: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm256_add_epi32(a, b) }
    }

    #[inline(always)]
    fn mul_word(a: Self::Words, b: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { _mm256_mullo_epi32(a, b) }
    }

    #[inline(always)]
    fn to_part(x: Self::Words) -> Self::Part {
        // SAFETY: as in `splat`.
        unsafe { _mm256_cvtepi32_ps(x) }
    }

    /// Without VNNI two numbers of 16 bits, the sums of two products of bytes each.
    type Dots = __m256i;

    const NARROW: bool = !VNNI;

    #[inline(always)]
    fn dots(start: i32) -> Self::Dots {
        Self::splat_word(start)
    }

    #[inline(always)]
    fn dot<T: Tiled>(dots: Self::Dots, q: Self::Words, a: &[i8; 4]) -> Self::Dots {
        // SAFETY: as in `splat`; `VNNI` is that of a kernel that may use it.
        unsafe {
            let a = _mm256_set1_epi32(word(a));
            match (VNNI, T::BITS) {
                (true, _) => _mm256_dpbusd_avx_epi32(dots, q, a),
                // These have a sign, which goes to the other factor.
                (false, 8) => {
                    let products = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(a, q));
                    _mm256_add_epi16(dots, products)
                }
                (false, _) => _mm256_add_epi16(dots, _mm256_maddubs_epi16(q, a)),
            }
        }
    }

    #[inline(always)]
    fn dots_now(x: Self::Dots) -> Self::Dots {
        Self::now(x)
    }

    /// Without VNNI twice in each word, for either number.
    #[inline(always)]
    fn scale(words: Self::Words, i: u32, signed: bool) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe {
            if VNNI {
                return byte::<Self>(words, i, signed);
            }
            // That byte and a zero: the top bit of a place says so.
            let pair = if signed { 0x80 | i << 8 } else { i | 0x80 << 8 };
            let places = _mm256_set1_epi32((pair | pair << 16) as i32);
            let pairs = _mm256_shuffle_epi8(words, _mm256_or_si256(places, first_bytes()));
            if signed { _mm256_srai_epi16::<8>(pairs) } else { pairs }
        }
    }

    #[inline(always)]
    fn add_dots(acc: Self::Words, dots: Self::Dots, scale: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        let products = unsafe {
            if VNNI { _mm256_mullo_epi32(dots, scale) } else { _mm256_madd_epi16(dots, scale) }
        };
        Self::add_word(acc, products)
    }

    #[inline(always)]
    fn to_words(dots: Self::Dots) -> Self::Words {
        // SAFETY: as in `splat`.
        if VNNI { dots } else { unsafe { _mm256_madd_epi16(dots, _mm256_set1_epi16(1)) } }
    }

    #[inline(always)]
    fn dot_pairs(acc: Self::Words, x: Self::Words, [low, high]: [i16; 2]) -> Self::Words {
        let pair = i32::from(low as u16) | i32::from(high) << 16;
        // SAFETY: as in `splat`.
        unsafe { _mm256_add_epi32(acc, _mm256_madd_epi16(x, _mm256_set1_epi32(pair))) }
    }

    #[inline(always)]
    fn spread_bits(x: Self::Words, group: usize, to: u32) -> Self::Words {
        let byte = group as i32 / 2 * 0x0101_0101;
        let bit = 0x0804_0201 << (4 * (group as u32 % 2));
        // SAFETY: as in `splat`.
        unsafe {
            let bytes = _mm256_or_si256(first_bytes(), _mm256_set1_epi32(byte));
            let bytes = _mm256_shuffle_epi8(x, bytes);
            let bit = _mm256_set1_epi32(bit);
            let is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
            _mm256_and_si256(is_set, _mm256_set1_epi8(1 << to))
        }
    }

    #[inline(always)]
    fn lookup(x: Self::Words, table: &[u8; 16]) -> Self::Words {
        // SAFETY: as in `splat`; the table is 16 bytes.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, x)
        }
    }
}

/// `x`, which compilers take for the result of something that has its place among others.
///
/// # Safety
/// AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn now(mut x: __m256i) -> __m256i {
    // SAFETY: there is no instruction in it.
    unsafe { asm!("/* {0} */", inout(ymm_reg) x, options(nomem, nostack, preserves_flags)) };
    x
}

/// The place of the first byte of its word, in each byte.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn first_bytes() -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let four = i128::from_le_bytes([0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]);
        _mm256_broadcastsi128_si256(std::mem::transmute::<i128, __m128i>(four))
    }
}

/// The tree of [`lanes::sum`](crate::generic::lanes::sum) over the low eight lanes and the high ones.
///
/// # Safety
/// AVX2.
#[inline(always)]
pub(super) unsafe fn sum(low: __m256, high: __m256) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let x = _mm256_add_ps(low, high);
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
    }
}

/// The rest of the tree, from eight lanes on, of four vectors at once: each level is one addition for all of them.
///
/// # Safety
/// AVX2.
#[inline(always)]
pub(super) unsafe fn sums([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        // Four lanes of one, then of the other.
        let ab = _mm256_add_ps(
            _mm256_permute2f128_ps::<0x20>(a, b),
            _mm256_permute2f128_ps::<0x31>(a, b),
        );
        let cd = _mm256_add_ps(
            _mm256_permute2f128_ps::<0x20>(c, d),
            _mm256_permute2f128_ps::<0x31>(c, d),
        );
        // Two of a and of c, then of b and of d.
        let x = _mm256_add_ps(
            _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd),
            _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd),
        );
        let x = _mm256_add_ps(x, _mm256_movehdup_ps(x));
        let (ac, bd) = (_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let mut out = [0.0; 4];
        // Lanes 0 and 2 of each.
        let acbd = _mm_shuffle_ps::<0b10_00_10_00>(ac, bd);
        _mm_storeu_ps(out.as_mut_ptr(), _mm_shuffle_ps::<0b11_01_10_00>(acbd, acbd));
        out
    }
}
