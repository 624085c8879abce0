//! The algorithms, once for all instruction sets.
//!
//! Floating-point code is written over fixed arrays of [`LANES`] lanes, with `mul_add` where a product is
//! to be fused with a sum: Rust neither reorders nor fuses on its own, so the order of operations in the source is
//! the contract, and a compiler that is allowed AVX2 or NEON turns the arrays into vectors without changing a
//! bit. What compilers do badly (products of bytes, half precision) is behind [`Simd`]. The macro [`kernels!`]
//! compiles everything once per instruction set and makes the table.
//!
//! Code on a hot path is made of loops and `#[inline(always)]` functions: a large closure, or an `array::map`, may
//! be compiled on its own, and then without the instruction set of the kernel that calls it.
//!
//! Two things are outside the contract: the payload and sign of a NaN, and the speed of [`scalar`].

pub(crate) mod attention;
pub(crate) mod exp;
pub(crate) mod integer;
pub(crate) mod lanes;
pub(crate) mod norm;
pub(crate) mod quantize;
pub(crate) mod scalar;
#[cfg(test)]
mod tests;
pub(crate) mod unpack;

use apr_tensor::block::Half;
use half::f16;

pub(crate) use lanes::LANES;

/// What an instruction set does better than the compiler. Integer and widening operations are exact and `fma` is
/// correctly rounded, so there is one right answer to each.
pub(crate) trait Simd {
    /// [`LANES`] floats.
    type Lanes: Copy;

    fn splat(x: f32) -> Self::Lanes;
    fn load(x: &[f32; LANES]) -> Self::Lanes;
    fn load_f16(x: &[f16; LANES]) -> Self::Lanes;
    fn store(x: Self::Lanes) -> [f32; LANES];
    /// `a * b + c`, fused.
    fn fma(a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes;

    /// `sum(q[i] * a[i])`; no `a[i]` is -128.
    fn dot_32(q: &[i8; 32], a: &[i8; 32]) -> i32;
    /// `sum(scales[i / 16] * q[i] * a[i])`; no `a[i]` is -128, no scale is outside of an i8, and no `q[i]` is
    /// negative unless `signed`.
    fn dot_256(q: &[i8; 256], a: &[i8; 256], scales: &[i16; 16], signed: bool) -> i32;
    /// `sum(a[i] * b[i])`.
    fn dot_16(a: &[i16; 16], b: &[i16; 16]) -> i32;

    /// Four times [`dot_32`](Self::dot_32) with the same `q`.
    fn dot_32x4(q: &[i8; 32], a: [&[i8; 32]; 4]) -> [i32; 4];
    /// Four times [`dot_256`](Self::dot_256) with the same `q` and `scales`.
    fn dot_256x4(q: &[i8; 256], a: [&[i8; 256]; 4], scales: &[i16; 16], signed: bool) -> [i32; 4];
    /// Four times [`dot_16`](Self::dot_16) with the same `a`.
    fn dot_16x4(a: &[i16; 16], b: [&[i16; 16]; 4]) -> [i32; 4];

    /// The low nibbles of `qs`, then the high ones, minus `zero`.
    fn nibbles(qs: &[u8; 16], zero: i8) -> [i8; 32];
    /// The same with bit `i` of `high` as the fifth bit of number `i`.
    fn five_bits(qs: &[u8; 16], high: [u8; 4], zero: i8) -> [i8; 32];
    /// The same looked up in `table`.
    fn lookup(qs: &[u8; 16], table: &[i8; 16]) -> [i8; 32];

    /// A block's scale, widened.
    fn half(x: Half) -> f32;
}

/// Compiles the generic kernels for one instruction set: `KERNELS`, to be reached through `Isa::kernels` only.
macro_rules! kernels {
    ($simd:ty $(, $features:literal)?) => {
        $crate::generic::kernels! { @table [$($features)?] $simd }
    };
    // One kernel: a safe function for the table around the body that may use the features.
    (@fn [$($features:literal)?] $generic:path, ($($arg:ident: $type:ty),*)) => {{
        fn kernel($($arg: $type),*) {
            $(#[target_feature(enable = $features)])?
            unsafe fn kernel_impl($($arg: $type),*) {
                $generic($($arg),*)
            }
            // SAFETY: `Isa::kernels` hands the table out only where the machine has these features.
            unsafe { kernel_impl($($arg),*) }
        }
        kernel
    }};
    (@blocks $f:tt $generic:path) => {
        $crate::generic::kernels! { @fn $f $generic, (w: &[u8], x: &[$crate::activation::Q8], out: &mut [f32]) }
    };
    (@superblocks $f:tt $generic:path) => {
        $crate::generic::kernels! { @fn $f $generic, (w: &[u8], x: &[$crate::activation::Q8K], out: &mut [f32]) }
    };
    (@attention $f:tt $simd:ty, $element:ty) => {
        $crate::kernels::AttentionKernels {
            scores: $crate::generic::kernels! {
                @fn $f $crate::generic::attention::scores::<$simd, $element>,
                (q: &[f32], keys: &[$element], scale: f32, out: &mut [f32])
            },
            weighted_sum: $crate::generic::kernels! {
                @fn $f $crate::generic::attention::weighted_sum::<$simd, $element>,
                (weights: &[f32], values: &[$element], out: &mut [f32])
            },
        }
    };
    (@table $f:tt $simd:ty) => {
        pub(crate) static KERNELS: $crate::kernels::Kernels = {
            use apr_tensor::block::*;
            use $crate::{activation::{Q8, Q8K}, generic::*};
            $crate::kernels::Kernels {
                Q4_0: kernels! { @blocks $f integer::blocks::<$simd, Q4_0> },
                Q4_1: kernels! { @blocks $f integer::blocks::<$simd, Q4_1> },
                Q5_0: kernels! { @blocks $f integer::blocks::<$simd, Q5_0> },
                Q5_1: kernels! { @blocks $f integer::blocks::<$simd, Q5_1> },
                Q8_0: kernels! { @blocks $f integer::blocks::<$simd, Q8_0> },
                IQ4_NL: kernels! { @blocks $f integer::blocks::<$simd, IQ4_NL> },
                Q2_K: kernels! { @superblocks $f integer::superblocks::<$simd, Q2_K> },
                Q3_K: kernels! { @superblocks $f integer::superblocks::<$simd, Q3_K> },
                Q4_K: kernels! { @superblocks $f integer::superblocks::<$simd, Q4_K> },
                Q5_K: kernels! { @superblocks $f integer::superblocks::<$simd, Q5_K> },
                Q6_K: kernels! { @superblocks $f integer::superblocks::<$simd, Q6_K> },
                IQ4_XS: kernels! { @superblocks $f integer::superblocks::<$simd, IQ4_XS> },
                dots: kernels! { @fn $f lanes::dots::<$simd, f32>, (w: &[f32], x: &[f32], out: &mut [f32]) },
                widen_f16: kernels! { @fn $f lanes::widen_f16::<$simd>, (bytes: &[u8], out: &mut [f32]) },
                quantize_q8_0: kernels! { @fn $f quantize::q8_0, (x: &[f32], out: &mut [Q8]) },
                quantize_q8_k: kernels! { @fn $f quantize::q8_k, (x: &[f32], out: &mut [Q8K]) },
                rms_norm: kernels! {
                    @fn $f norm::rms_norm, (x: &[f32], w: &[f32], eps: f64, out: &mut [f32])
                },
                silu: kernels! { @fn $f exp::silu, (x: &[f32], out: &mut [f32]) },
                softmax: kernels! { @fn $f exp::softmax, (x: &mut [f32]) },
                attention_f16: kernels! { @attention $f $simd, half::f16 },
                attention_f32: kernels! { @attention $f $simd, f32 },
            }
        };
    };
}
pub(crate) use kernels;
