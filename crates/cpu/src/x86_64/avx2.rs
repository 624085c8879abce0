//! AVX2 with FMA and F16C: 32 bytes at a time; with AVX-VNNI or without.

use std::arch::x86_64::*;

use half::f16;

use crate::{
    generic::{LANES, Simd, unpack::Tiled, word},
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

    #[inline(always)]
    fn mul(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        // SAFETY: as in `splat`.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
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
        let words = Self::widen_halves(x);
        // SAFETY: as in `splat`.
        both!(|i| unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words[i])) })
    }

    #[inline(always)]
    fn load_halves(x: &[u8; 32]) -> Self::Lanes {
        let (halves, _) = x.as_chunks::<16>();
        // SAFETY: as in `splat`; each half of the array is 16 bytes.
        both!(|i| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(halves[i].as_ptr().cast())) })
    }

    type Words = [__m256i; 2];

    #[inline(always)]
    fn load_line(x: &Line) -> Self::Words {
        let (halves, _) = x.0.as_chunks::<32>();
        // SAFETY: as in `splat`; each half of a line is 32 bytes, and aligned to as many.
        both!(|i| unsafe { _mm256_load_si256(halves[i].as_ptr().cast()) })
    }

    #[inline(always)]
    fn widen_halves(x: &[u8; 32]) -> Self::Words {
        let (halves, _) = x.as_chunks::<16>();
        // SAFETY: as in `splat`; each half of the array is 16 bytes.
        both!(|i| unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(halves[i].as_ptr().cast())) })
    }

    #[inline(always)]
    fn splat_word(x: i32) -> Self::Words {
        // SAFETY: as in `splat`.
        [unsafe { _mm256_set1_epi32(x) }; 2]
    }

    #[inline(always)]
    fn and(x: Self::Words, mask: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        both!(|i| unsafe { _mm256_and_si256(x[i], _mm256_set1_epi32(mask as i32)) })
    }

    #[inline(always)]
    fn xor(x: Self::Words, mask: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        both!(|i| unsafe { _mm256_xor_si256(x[i], _mm256_set1_epi32(mask as i32)) })
    }

    #[inline(always)]
    fn or(a: Self::Words, b: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        both!(|i| unsafe { _mm256_or_si256(a[i], b[i]) })
    }

    #[inline(always)]
    fn shl(x: Self::Words, bits: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        both!(|i| unsafe { _mm256_sll_epi32(x[i], _mm_cvtsi32_si128(bits as i32)) })
    }

    #[inline(always)]
    fn shr(x: Self::Words, bits: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        both!(|i| unsafe { _mm256_srl_epi32(x[i], _mm_cvtsi32_si128(bits as i32)) })
    }

    #[inline(always)]
    fn sar(x: Self::Words, bits: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        both!(|i| unsafe { _mm256_sra_epi32(x[i], _mm_cvtsi32_si128(bits as i32)) })
    }

    #[inline(always)]
    fn add_word(a: Self::Words, b: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        both!(|i| unsafe { _mm256_add_epi32(a[i], b[i]) })
    }

    #[inline(always)]
    fn mul_word(a: Self::Words, b: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        both!(|i| unsafe { _mm256_mullo_epi32(a[i], b[i]) })
    }

    #[inline(always)]
    fn to_lanes(x: Self::Words) -> Self::Lanes {
        // SAFETY: as in `splat`.
        both!(|i| unsafe { _mm256_cvtepi32_ps(x[i]) })
    }

    #[inline(always)]
    fn dot<T: Tiled, const W: usize>(
        mut acc: Self::Words,
        q: &[Self::Words],
        a: &[[[i8; 4]; W]],
        n: usize,
    ) -> Self::Words {
        // Half by half, so that the quants and sums of one half fit into the registers.
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: as in `splat`; `VNNI` is that of a kernel that may use it.
            *acc = unsafe {
                match VNNI {
                    true => dot_vnni(*acc, q, a, n, i),
                    false => dot_in_16_bits(*acc, q, a, n, i, T::BITS),
                }
            };
        }
        acc
    }

    #[inline(always)]
    fn dot_pairs(acc: Self::Words, x: Self::Words, [low, high]: [i16; 2]) -> Self::Words {
        let pair = i32::from(low as u16) | i32::from(high) << 16;
        // SAFETY: as in `splat`.
        both!(|i| unsafe {
            _mm256_add_epi32(acc[i], _mm256_madd_epi16(x[i], _mm256_set1_epi32(pair)))
        })
    }

    #[inline(always)]
    fn spread_bits(x: Self::Words, group: usize) -> Self::Words {
        let byte = group as i32 / 2 * 0x0101_0101;
        let bit = 0x0804_0201 << (4 * (group as u32 % 2));
        // SAFETY: as in `splat`.
        both!(|i| unsafe {
            let first_of_word = _mm256_set1_epi64x(0x0404_0404_0000_0000);
            let second_of_pair =
                _mm256_set_epi64x(0x0808_0808_0808_0808, 0, 0x0808_0808_0808_0808, 0);
            let words = _mm256_add_epi8(first_of_word, second_of_pair);
            let bytes = _mm256_shuffle_epi8(x[i], _mm256_add_epi8(words, _mm256_set1_epi32(byte)));
            let bit = _mm256_set1_epi32(bit);
            let is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
            _mm256_and_si256(is_set, _mm256_set1_epi8(1))
        })
    }

    #[inline(always)]
    fn lookup(x: Self::Words, table: &[u8; 16]) -> Self::Words {
        // SAFETY: as in `splat`; the table is 16 bytes.
        both!(|i| unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, x[i])
        })
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

/// Four bytes in each word.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn splat_bytes(a: &[i8; 4]) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_set1_epi32(word(a)) }
}

/// See [`Simd::dot`], for half `i` of the words.
///
/// # Safety
/// AVX2 and AVX-VNNI.
#[inline(always)]
unsafe fn dot_vnni<const W: usize>(
    mut acc: __m256i,
    q: &[[__m256i; 2]],
    a: &[[[i8; 4]; W]],
    n: usize,
    i: usize,
) -> __m256i {
    for (q, a) in q.iter().zip(a) {
        // SAFETY: the caller's promise.
        acc = unsafe { _mm256_dpbusd_avx_epi32(acc, q[i], splat_bytes(&a[n])) };
    }
    acc
}

/// The same without VNNI: sums of two products of bytes are 16 bits wide, and so many of them are added before they are
/// widened as can not overflow.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn dot_in_16_bits<const W: usize>(
    mut acc: __m256i,
    q: &[[__m256i; 2]],
    a: &[[[i8; 4]; W]],
    n: usize,
    i: usize,
    bits: u32,
) -> __m256i {
    // With a sign the largest magnitude of 8 bits is 128.
    let largest = if bits == 8 { 128 } else { (1 << bits) - 1 };
    let most = (i16::MAX as usize / (2 * 127 * largest)).min(8);
    for (q, a) in q.chunks(most).zip(a.chunks(most)) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = pair_sums(q[0][i], splat_bytes(&a[0][n]), bits);
            for (q, a) in q[1..].iter().zip(&a[1..]) {
                sums = _mm256_add_epi16(sums, pair_sums(q[i], splat_bytes(&a[n]), bits));
            }
            acc = _mm256_add_epi32(acc, _mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
        }
    }
    acc
}

/// The sums of two products of bytes each. Of `q` those of 8 bits have a sign, which goes to the other factor.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn pair_sums(q: __m256i, a: __m256i, bits: u32) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        match bits {
            8 => _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(a, q)),
            _ => _mm256_maddubs_epi16(q, a),
        }
    }
}
