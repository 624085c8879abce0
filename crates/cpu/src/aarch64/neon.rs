//! NEON, which every AArch64 machine has: 16 bytes at a time; with dot products of bytes or without.
//!
//! All of it is built and tested under emulation (`cargo xtask emulate`). How fast it is on a machine has never been
//! measured.

use std::arch::{aarch64::*, asm};

use half::f16;

use crate::{
    generic::{LANES, Simd, unpack::Tiled, word},
    tile::Line,
};

/// Whether this machine can run [`plain::KERNELS`]. Numbers in memory are taken for little-endian ones.
pub(crate) fn is_available() -> bool {
    cfg!(target_endian = "little") && std::arch::is_aarch64_feature_detected!("neon")
}

/// Whether this machine can run [`dotprod::KERNELS`] as well.
pub(crate) fn has_dotprod() -> bool {
    is_available() && std::arch::is_aarch64_feature_detected!("dotprod")
}

/// Without dot products: what Armv8.0 has.
pub(crate) mod plain {
    crate::generic::kernels! { super::Neon<false>, "neon" }
}

/// With `sdot`, which sums four products of bytes at once.
pub(crate) mod dotprod {
    crate::generic::kernels! { super::Neon<true>, "neon,dotprod" }
}

/// All registers of a vector of [`LANES`] lanes. No loop and no closure, so that nothing is left of it but registers.
macro_rules! each {
    (|$i:ident| $register:expr) => {
        [
            {
                let $i = 0;
                $register
            },
            {
                let $i = 1;
                $register
            },
            {
                let $i = 2;
                $register
            },
            {
                let $i = 3;
                $register
            },
        ]
    };
}

#[derive(Debug)]
pub(crate) struct Neon<const DOTPROD: bool>;

impl<const DOTPROD: bool> Simd for Neon<DOTPROD> {
    type Lanes = [float32x4_t; 4];

    const REGISTERS: usize = 6;

    const SIGNED: bool = true;

    #[inline(always)]
    fn splat(x: f32) -> Self::Lanes {
        // SAFETY: `Neon`'s methods run only within kernels compiled for its features.
        unsafe { [vdupq_n_f32(x); 4] }
    }

    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self::Lanes {
        let (quarters, _) = x.as_chunks::<4>();
        // SAFETY: as in `splat`; each quarter of the array is 16 bytes.
        each!(|i| unsafe { vld1q_f32(quarters[i].as_ptr()) })
    }

    #[inline(always)]
    fn load_f16(x: &[f16; LANES]) -> Self::Lanes {
        // SAFETY: as in `splat`; the array is 32 bytes.
        unsafe { widened([vld1q_u8(x.as_ptr().cast()), vld1q_u8(x[8..].as_ptr().cast())]) }
    }

    #[inline(always)]
    fn store(x: Self::Lanes) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        let (quarters, _) = out.as_chunks_mut::<4>();
        // SAFETY: as in `splat`; each quarter of the array is 16 bytes.
        each!(|i| unsafe { vst1q_f32(quarters[i].as_mut_ptr(), x[i]) });
        out
    }

    #[inline(always)]
    fn fma(a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes {
        // SAFETY: as in `splat`.
        each!(|i| unsafe { vfmaq_f32(c[i], a[i], b[i]) })
    }

    type Part = float32x4_t;

    const PARTS: usize = 4;

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
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    fn mul_part(a: Self::Part, b: Self::Part) -> Self::Part {
        // SAFETY: as in `splat`.
        unsafe { vmulq_f32(a, b) }
    }

    /// The tree of [`lanes::sum`](crate::generic::lanes::sum).
    #[inline(always)]
    fn sum(x: Self::Lanes) -> f32 {
        // SAFETY: as in `splat`.
        unsafe {
            let x = vaddq_f32(vaddq_f32(x[0], x[2]), vaddq_f32(x[1], x[3]));
            vpadds_f32(vadd_f32(vget_low_f32(x), vget_high_f32(x)))
        }
    }

    #[inline(always)]
    fn load_f32(x: &[u8; 64]) -> Self::Lanes {
        let (quarters, _) = x.as_chunks::<16>();
        // SAFETY: as in `splat`; each quarter of the array is 16 bytes.
        each!(|i| unsafe { vreinterpretq_f32_u8(vld1q_u8(quarters[i].as_ptr())) })
    }

    #[inline(always)]
    fn load_bf16(x: &[u8; 32]) -> Self::Lanes {
        // SAFETY: as in `splat`.
        each!(|i| unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(Self::widen_halves(x, i))) })
    }

    #[inline(always)]
    fn load_halves(x: &[u8; 32], part: usize) -> Self::Part {
        let (quarters, _) = x.as_chunks::<8>();
        // SAFETY: as in `splat`; each quarter of the array is 8 bytes.
        unsafe { vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(quarters[part].as_ptr()))) }
    }

    type Words = uint32x4_t;

    #[inline(always)]
    fn load_words(x: &Line, part: usize) -> Self::Words {
        let (quarters, _) = x.0.as_chunks::<16>();
        // SAFETY: as in `splat`; each quarter of a line is 16 bytes.
        unsafe { vreinterpretq_u32_u8(vld1q_u8(quarters[part].as_ptr())) }
    }

    #[inline(always)]
    fn widen_halves(x: &[u8; 32], part: usize) -> Self::Words {
        let (quarters, _) = x.as_chunks::<8>();
        // SAFETY: as in `splat`; each quarter of the array is 8 bytes.
        unsafe { vmovl_u16(vreinterpret_u16_u8(vld1_u8(quarters[part].as_ptr()))) }
    }

    #[inline(always)]
    fn splat_word(x: i32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { vdupq_n_u32(x as u32) }
    }

    #[inline(always)]
    fn and(x: Self::Words, mask: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { vandq_u32(x, vdupq_n_u32(mask)) }
    }

    #[inline(always)]
    fn xor(x: Self::Words, mask: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { veorq_u32(x, vdupq_n_u32(mask)) }
    }

    #[inline(always)]
    fn or(a: Self::Words, b: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { vorrq_u32(a, b) }
    }

    #[inline(always)]
    fn shl(x: Self::Words, bits: u32) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { vshlq_u32(x, vdupq_n_s32(bits as i32)) }
    }

    #[inline(always)]
    fn shr(x: Self::Words, bits: u32) -> Self::Words {
        // SAFETY: as in `splat`. To the right is to the left by less than nothing.
        unsafe { vshlq_u32(x, vdupq_n_s32(-(bits as i32))) }
    }

    #[inline(always)]
    fn sar(x: Self::Words, bits: u32) -> Self::Words {
        let bits = -(bits as i32);
        // SAFETY: as in `splat`.
        unsafe { vreinterpretq_u32_s32(vshlq_s32(vreinterpretq_s32_u32(x), vdupq_n_s32(bits))) }
    }

    #[inline(always)]
    fn add_word(a: Self::Words, b: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { vaddq_u32(a, b) }
    }

    #[inline(always)]
    fn mul_word(a: Self::Words, b: Self::Words) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe { vmulq_u32(a, b) }
    }

    #[inline(always)]
    fn to_part(x: Self::Words) -> Self::Part {
        // SAFETY: as in `splat`.
        unsafe { vcvtq_f32_s32(vreinterpretq_s32_u32(x)) }
    }

    /// With dot products four sums, and nothing; without them sums of 16 bits, of the words 0 and 1 and of 2 and 3.
    type Dots = [int32x4_t; 2];

    const NARROW: bool = !DOTPROD;

    #[inline(always)]
    fn dots(start: i32) -> Self::Dots {
        // SAFETY: as in `splat`.
        unsafe { [vdupq_n_s32(start); 2] }
    }

    #[inline(always)]
    fn dot<T: Tiled>([first, second]: Self::Dots, q: Self::Words, a: &[i8; 4]) -> Self::Dots {
        // SAFETY: as in `splat`; `DOTPROD` is that of a kernel that may use it.
        unsafe {
            let (q, a) = (vreinterpretq_s8_u32(q), vreinterpretq_s8_s32(vdupq_n_s32(word(a))));
            if DOTPROD {
                return [sdot(first, q, a), second];
            }
            let (first, second) = (vreinterpretq_s16_s32(first), vreinterpretq_s16_s32(second));
            let first = vmlal_s8(first, vget_low_s8(q), vget_low_s8(a));
            let second = vmlal_high_s8(second, q, a);
            [vreinterpretq_s32_s16(first), vreinterpretq_s32_s16(second)]
        }
    }

    #[inline(always)]
    fn add_dots(acc: Self::Words, dots: Self::Dots, scale: Self::Words) -> Self::Words {
        Self::add_word(acc, Self::mul_word(Self::to_words(dots), scale))
    }

    #[inline(always)]
    fn to_words([first, second]: Self::Dots) -> Self::Words {
        // SAFETY: as in `splat`.
        unsafe {
            if DOTPROD {
                return vreinterpretq_u32_s32(first);
            }
            let (first, second) = (vreinterpretq_s16_s32(first), vreinterpretq_s16_s32(second));
            vreinterpretq_u32_s32(vpaddlq_s16(vpaddq_s16(first, second)))
        }
    }

    #[inline(always)]
    fn dot_pairs(acc: Self::Words, x: Self::Words, [low, high]: [i16; 2]) -> Self::Words {
        let pair = i32::from(low as u16) | i32::from(high) << 16;
        // SAFETY: as in `splat`.
        unsafe {
            let (x, a) = (vreinterpretq_s16_u32(x), vreinterpretq_s16_s32(vdupq_n_s32(pair)));
            let first = vmull_s16(vget_low_s16(x), vget_low_s16(a));
            let sums = vpaddq_s32(first, vmull_high_s16(x, a));
            vaddq_u32(acc, vreinterpretq_u32_s32(sums))
        }
    }

    #[inline(always)]
    fn spread_bits(x: Self::Words, group: usize, to: u32) -> Self::Words {
        const FIRST_OF_WORD: [u8; 16] = [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12];
        // SAFETY: as in `splat`; the array is 16 bytes.
        unsafe {
            let byte = vdupq_n_u8(group as u8 / 2);
            let byte = vaddq_u8(vld1q_u8(FIRST_OF_WORD.as_ptr()), byte);
            let bytes = vqtbl1q_u8(vreinterpretq_u8_u32(x), byte);
            let bit = vdupq_n_u32(0x0804_0201 << (4 * (group as u32 % 2)));
            let is_set = vtstq_u8(bytes, vreinterpretq_u8_u32(bit));
            vreinterpretq_u32_u8(vandq_u8(is_set, vdupq_n_u8(1 << to)))
        }
    }

    #[inline(always)]
    fn lookup(x: Self::Words, table: &[u8; 16]) -> Self::Words {
        // SAFETY: as in `splat`; the table is 16 bytes.
        unsafe {
            let table = vld1q_u8(table.as_ptr());
            vreinterpretq_u32_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(x)))
        }
    }
}

/// Half-precision numbers, eight and eight.
///
/// # Safety
/// NEON.
#[inline(always)]
unsafe fn widened([low, high]: [uint8x16_t; 2]) -> [float32x4_t; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let (low, high) = (vreinterpretq_f16_u8(low), vreinterpretq_f16_u8(high));
        [
            vcvt_f32_f16(vget_low_f16(low)),
            vcvt_high_f32_f16(low),
            vcvt_f32_f16(vget_low_f16(high)),
            vcvt_high_f32_f16(high),
        ]
    }
}

/// `acc` and four products of bytes in each word: those of `q` with those of `a`.
///
/// # Safety
/// NEON and its dot products.
#[inline(always)]
pub(super) unsafe fn sdot(mut acc: int32x4_t, q: int8x16_t, a: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's promise; nothing but `acc` changes.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {q:v}.16b, {a:v}.16b",
            acc = inout(vreg) acc,
            q = in(vreg) q,
            a = in(vreg) a,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}
