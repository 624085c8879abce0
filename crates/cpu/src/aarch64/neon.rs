//! NEON: float sums in registers of four lanes. Every AArch64 machine has it.
//!
//! Integer products and unpacking are the scalar twin's, which compilers turn into NEON well enough. The
//! tests compare this with the twin wherever they run on such a machine; no measurement has been made on one.

use std::arch::aarch64::*;

use half::f16;

use crate::{
    generic::{LANES, Simd, scalar::Scalar, unpack::Tiled},
    tile::Line,
};

/// Whether this machine can run [`KERNELS`].
pub(crate) fn is_available() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
}

#[derive(Debug)]
pub(crate) struct Neon;

crate::generic::kernels! { Neon, "neon" }

impl Simd for Neon {
    type Lanes = [float32x4_t; 4];

    const REGISTERS: usize = 6;

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
    fn prefetch<T>(_: *const T) {}

    #[inline(always)]
    fn fma(a: Self::Lanes, b: Self::Lanes, mut c: Self::Lanes) -> Self::Lanes {
        for i in 0..4 {
            // SAFETY: as in `splat`.
            c[i] = unsafe { vfmaq_f32(c[i], a[i], b[i]) };
        }
        c
    }

    #[inline(always)]
    fn mul(mut a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        for i in 0..4 {
            // SAFETY: as in `splat`.
            a[i] = unsafe { vmulq_f32(a[i], b[i]) };
        }
        a
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
    fn sum(x: Self::Lanes) -> f32 {
        Scalar::sum(Self::store(x))
    }

    #[inline(always)]
    fn load_f32(x: &[u8; 64]) -> Self::Lanes {
        Self::load(&Scalar::load_f32(x))
    }

    #[inline(always)]
    fn load_bf16(x: &[u8; 32]) -> Self::Lanes {
        Self::load(&Scalar::load_bf16(x))
    }

    #[inline(always)]
    fn load_halves(x: &[u8; 32]) -> Self::Lanes {
        Self::load(&Scalar::load_halves(x))
    }

    type Words = <Scalar as Simd>::Words;

    #[inline(always)]
    fn load_line(x: &Line) -> Self::Words {
        Scalar::load_line(x)
    }

    #[inline(always)]
    fn widen_halves(x: &[u8; 32]) -> Self::Words {
        Scalar::widen_halves(x)
    }

    #[inline(always)]
    fn splat_word(x: i32) -> Self::Words {
        Scalar::splat_word(x)
    }

    #[inline(always)]
    fn and(x: Self::Words, mask: u32) -> Self::Words {
        Scalar::and(x, mask)
    }

    #[inline(always)]
    fn xor(x: Self::Words, mask: u32) -> Self::Words {
        Scalar::xor(x, mask)
    }

    #[inline(always)]
    fn or(a: Self::Words, b: Self::Words) -> Self::Words {
        Scalar::or(a, b)
    }

    #[inline(always)]
    fn shl(x: Self::Words, bits: u32) -> Self::Words {
        Scalar::shl(x, bits)
    }

    #[inline(always)]
    fn shr(x: Self::Words, bits: u32) -> Self::Words {
        Scalar::shr(x, bits)
    }

    #[inline(always)]
    fn sar(x: Self::Words, bits: u32) -> Self::Words {
        Scalar::sar(x, bits)
    }

    #[inline(always)]
    fn add_word(a: Self::Words, b: Self::Words) -> Self::Words {
        Scalar::add_word(a, b)
    }

    #[inline(always)]
    fn mul_word(a: Self::Words, b: Self::Words) -> Self::Words {
        Scalar::mul_word(a, b)
    }

    #[inline(always)]
    fn to_lanes(x: Self::Words) -> Self::Lanes {
        Self::load(&Scalar::to_lanes(x))
    }

    #[inline(always)]
    fn dot<T: Tiled>(acc: Self::Words, q: &[Self::Words], a: &[[i8; 4]]) -> Self::Words {
        Scalar::dot::<T>(acc, q, a)
    }

    #[inline(always)]
    fn dot_pairs(acc: Self::Words, x: Self::Words, a: [i16; 2]) -> Self::Words {
        Scalar::dot_pairs(acc, x, a)
    }

    #[inline(always)]
    fn signed_pairs(x: Self::Words) -> (Self::Words, Self::Words) {
        Scalar::signed_pairs(x)
    }

    #[inline(always)]
    fn spread_bits(x: Self::Words, group: usize) -> Self::Words {
        Scalar::spread_bits(x, group)
    }

    #[inline(always)]
    fn lookup(x: Self::Words, table: &[u8; 16]) -> Self::Words {
        Scalar::lookup(x, table)
    }
}
