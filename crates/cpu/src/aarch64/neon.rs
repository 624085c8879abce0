//! NEON. Every AArch64 machine has it, so the generic code already compiles to its vectors and to its fused
//! multiply-add; nothing is written by hand.

use apr_tensor::block::Half;
use half::f16;

use crate::generic::{LANES, Simd, scalar::Scalar};

/// Whether this machine can run [`KERNELS`].
pub(crate) fn is_available() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
}

#[derive(Debug)]
pub(crate) struct Neon;

crate::generic::kernels! { Neon, "neon" }

impl Simd for Neon {
    #[inline(always)]
    fn dot_32(q: &[i8; 32], a: &[i8; 32]) -> i32 {
        Scalar::dot_32(q, a)
    }

    #[inline(always)]
    fn dot_256(q: &[i8; 256], a: &[i8; 256], scales: &[i16; 16]) -> i32 {
        Scalar::dot_256(q, a, scales)
    }

    #[inline(always)]
    fn widen_f16(x: &[f16; LANES]) -> [f32; LANES] {
        Scalar::widen_f16(x)
    }

    #[inline(always)]
    fn half(x: Half) -> f32 {
        Scalar::half(x)
    }
}
