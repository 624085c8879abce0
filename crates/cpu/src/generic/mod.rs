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
pub(crate) mod elementwise;
pub(crate) mod exp;
pub(crate) mod float;
pub(crate) mod lanes;
pub(crate) mod norm;
pub(crate) mod quantize;
pub(crate) mod scalar;
#[cfg(test)]
mod tests;
pub(crate) mod tile;
pub(crate) mod unpack;

use half::f16;

pub(crate) use lanes::LANES;
use unpack::Tiled;

use crate::tile::Line;

/// What an instruction set does better than the compiler. Integer and widening operations are exact and `fma` is
/// correctly rounded, so there is one right answer to each.
pub(crate) trait Simd: Sized {
    /// [`LANES`] floats.
    type Lanes: Copy;

    /// How many sums of [`LANES`] floats stay in registers, beside what they are made of.
    const REGISTERS: usize;

    /// Whether bytes of 8 bits are multiplied with their sign, and not with 128 added to them.
    const SIGNED: bool = false;

    /// Whether the sums of a word of both halves of a tile stay in registers.
    const IS_WIDE: bool = false;

    fn splat(x: f32) -> Self::Lanes;
    fn load(x: &[f32; LANES]) -> Self::Lanes;
    fn load_f16(x: &[f16; LANES]) -> Self::Lanes;
    fn store(x: Self::Lanes) -> [f32; LANES];
    /// `a * b + c`, fused.
    fn fma(a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes;

    /// The lanes of one register.
    type Part: Copy;

    /// How many registers [`LANES`] floats take: 1, 2 or 4.
    const PARTS: usize;

    fn part(x: Self::Lanes, i: usize) -> Self::Part;
    fn set_part(x: &mut Self::Lanes, i: usize, part: Self::Part);
    /// As [`fma`](Self::fma).
    fn fma_part(a: Self::Part, b: Self::Part, c: Self::Part) -> Self::Part;
    fn mul_part(a: Self::Part, b: Self::Part) -> Self::Part;

    /// The tree of [`lanes::sum`].
    fn sum(x: Self::Lanes) -> f32;
    /// The same of each.
    #[inline(always)]
    fn sums(x: [Self::Lanes; 4]) -> [f32; 4] {
        [Self::sum(x[0]), Self::sum(x[1]), Self::sum(x[2]), Self::sum(x[3])]
    }
    /// Little-endian floats.
    fn load_f32(x: &[u8; 64]) -> Self::Lanes;
    /// Little-endian upper halves of floats.
    fn load_bf16(x: &[u8; 32]) -> Self::Lanes;
    /// Part `part` of little-endian half-precision numbers, exactly.
    fn load_halves(x: &[u8; 32], part: usize) -> Self::Part;

    /// A word in each lane of a register: a number, or four bytes. Arithmetic wraps.
    type Words: Copy;

    /// Part `part` of a line. Those of [wide](Self::IS_WIDE) instruction sets are loaded in the order of the source.
    fn load_words(x: &Line, part: usize) -> Self::Words;
    /// The same number. Where compilers would, they do not move how it is computed to another place: wide instruction sets have it before they load a line that
    /// comes later in the source.
    #[inline(always)]
    fn now(x: Self::Words) -> Self::Words {
        x
    }
    /// Part `part` of little-endian 16-bit numbers, as numbers without a sign.
    fn widen_halves(x: &[u8; 32], part: usize) -> Self::Words;
    fn splat_word(x: i32) -> Self::Words;
    fn and(x: Self::Words, mask: u32) -> Self::Words;
    fn xor(x: Self::Words, mask: u32) -> Self::Words;
    fn or(a: Self::Words, b: Self::Words) -> Self::Words;
    fn shl(x: Self::Words, bits: u32) -> Self::Words;
    /// Fills up with zeros.
    fn shr(x: Self::Words, bits: u32) -> Self::Words;
    /// Fills up with the sign.
    fn sar(x: Self::Words, bits: u32) -> Self::Words;
    fn add_word(a: Self::Words, b: Self::Words) -> Self::Words;
    fn mul_word(a: Self::Words, b: Self::Words) -> Self::Words;
    /// To the nearest float, ties to even.
    fn to_part(x: Self::Words) -> Self::Part;

    /// Sums of products of bytes for each lane.
    type Dots: Copy;

    /// Whether [`Dots`](Self::Dots) are several numbers of 16 bits for each lane, and not one of 32.
    const NARROW: bool = false;

    /// What sums begin with: `start`, which is 0 where they are [narrow](Self::NARROW).
    fn dots(start: i32) -> Self::Dots;
    /// `dots + sum(q.byte[i] * a[i])`. The bytes of `q` are those of a `T`: they have no sign, but for those of 8 bits if
    /// [`SIGNED`](Self::SIGNED). No `a` is -128.
    fn dot<T: Tiled>(dots: Self::Dots, q: Self::Words, a: &[i8; 4]) -> Self::Dots;
    /// As [`now`](Self::now).
    #[inline(always)]
    fn dots_now(x: Self::Dots) -> Self::Dots {
        x
    }
    /// Byte `i` of each word as [`add_dots`](Self::add_dots) wants it.
    #[inline(always)]
    fn scale(words: Self::Words, i: u32, signed: bool) -> Self::Words {
        byte::<Self>(words, i, signed)
    }
    /// `acc + dots * scale`.
    fn add_dots(acc: Self::Words, dots: Self::Dots, scale: Self::Words) -> Self::Words;
    /// The sums as numbers.
    fn to_words(dots: Self::Dots) -> Self::Words;

    /// `acc + x.low * a[0] + x.high * a[1]`, of the 16-bit halves of each word, with a sign.
    fn dot_pairs(acc: Self::Words, x: Self::Words, a: [i16; 2]) -> Self::Words;
    /// Bit `to` of byte `i` of each word is bit `4 * group + i` of that word of `x`; the others are 0.
    fn spread_bits(x: Self::Words, group: usize, to: u32) -> Self::Words;
    /// Each byte, below 16, looked up.
    fn lookup(x: Self::Words, table: &[u8; 16]) -> Self::Words;
}

/// Byte `i` of each word as a number.
#[inline(always)]
pub(crate) fn byte<S: Simd>(words: S::Words, i: u32, signed: bool) -> S::Words {
    let top = S::shl(words, 24 - 8 * i);
    if signed { S::sar(top, 24) } else { S::shr(top, 24) }
}

/// Four bytes as one number, in the order in which they lie in memory.
#[inline(always)]
pub(crate) fn word(bytes: &[i8; 4]) -> i32 {
    i32::from_ne_bytes([bytes[0] as u8, bytes[1] as u8, bytes[2] as u8, bytes[3] as u8])
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
    (@tile $f:tt $simd:ty, $multiply:ty, $activation:ty) => {
        $crate::kernels::TileKernel {
            one: $crate::generic::kernels! {
                @fn $f $crate::generic::tile::products_with_one::<$simd, $multiply>,
                (tile: &[$crate::tile::Line], x: &[$activation], out: &mut [f32; $crate::tile::ROWS])
            },
            several: $crate::generic::kernels! {
                @fn $f $crate::generic::tile::products_with_several::<$simd, $multiply>,
                (
                    tile: &[$crate::tile::Line],
                    x: &[<$activation as $crate::activation::Block8>::Packed],
                    out: &mut [[f32; $crate::tile::ROWS]]
                )
            },
            many: None,
        }
    };
    (@float $f:tt $simd:ty, $float:ty) => {
        $crate::generic::kernels! {
            @fn $f $crate::generic::float::products::<$simd, $float>,
            (w: &[u8], cols: usize, x: &[$crate::activation::Floats], out: &mut [[f32; $crate::tile::ROWS]])
        }
    };
    (@attention $f:tt $simd:ty, $element:ty) => {
        $crate::kernels::AttentionKernels {
            scores: $crate::generic::kernels! {
                @fn $f $crate::generic::attention::scores::<$simd, $element>,
                (queries: &[f32], rows: usize, keys: &[$element], scale: f32, out: &mut [f32])
            },
            weighted_sums: $crate::generic::kernels! {
                @fn $f $crate::generic::attention::weighted_sums::<$simd, $element>,
                (weights: &[f32], seen: &[usize], values: &[$element], out: &mut [f32])
            },
        }
    };
    (@table $f:tt $simd:ty) => {
        pub(crate) static KERNELS: $crate::kernels::Kernels = {
            use apr_tensor::block::*;
            use $crate::{activation::{Q8, Q8K}, generic::*};
            $crate::kernels::Kernels {
                Q4_0: kernels! { @tile $f $simd, tile::Blocks<Q4_0>, Q8 },
                Q4_1: kernels! { @tile $f $simd, tile::Blocks<Q4_1>, Q8 },
                Q5_0: kernels! { @tile $f $simd, tile::Blocks<Q5_0>, Q8 },
                Q5_1: kernels! { @tile $f $simd, tile::Blocks<Q5_1>, Q8 },
                Q8_0: kernels! { @tile $f $simd, tile::Blocks<Q8_0>, Q8 },
                IQ4_NL: kernels! { @tile $f $simd, tile::Blocks<IQ4_NL>, Q8 },
                Q2_K: kernels! { @tile $f $simd, tile::Superblocks<Q2_K>, Q8K },
                Q3_K: kernels! { @tile $f $simd, tile::Superblocks<Q3_K>, Q8K },
                Q4_K: kernels! { @tile $f $simd, tile::Superblocks<Q4_K>, Q8K },
                Q5_K: kernels! { @tile $f $simd, tile::Superblocks<Q5_K>, Q8K },
                Q6_K: kernels! { @tile $f $simd, tile::Superblocks<Q6_K>, Q8K },
                IQ4_XS: kernels! { @tile $f $simd, tile::Superblocks<IQ4_XS>, Q8K },
                F32: kernels! { @float $f $simd, float::F32 },
                F16: kernels! { @float $f $simd, float::F16 },
                BF16: kernels! { @float $f $simd, float::BF16 },
                widen_f16: kernels! { @fn $f lanes::widen_f16::<$simd>, (bytes: &[u8], out: &mut [f32]) },
                quantize_q8_0: kernels! { @fn $f quantize::q8_0, (x: &[f32], out: &mut [Q8]) },
                quantize_q8_k: kernels! { @fn $f quantize::q8_k, (x: &[f32], out: &mut [Q8K]) },
                rms_norm: kernels! {
                    @fn $f norm::rms_norm, (x: &[f32], w: &[f32], eps: f64, out: &mut [f32])
                },
                silu: kernels! { @fn $f exp::silu, (x: &[f32], out: &mut [f32]) },
                swiglu: kernels! {
                    @fn $f exp::swiglu, (up: &[f32], gate: &mut [f32])
                },
                add: kernels! { @fn $f elementwise::add, (x: &[f32], sum: &mut [f32]) },
                multiply: kernels! {
                    @fn $f elementwise::multiply, (x: &[f32], y: &[f32], out: &mut [f32])
                },
                add_weighted: kernels! {
                    @fn $f elementwise::add_weighted, (x: &[f32], weight: f32, sum: &mut [f32])
                },
                rotate: kernels! {
                    @fn $f elementwise::rotate,
                    (x: &[f32], head_dim: usize, cos: &[f64], sin: &[f64], out: &mut [f32])
                },
                softmax: kernels! { @fn $f exp::softmax, (x: &mut [f32]) },
                attention_f16: kernels! { @attention $f $simd, half::f16 },
                attention_f32: kernels! { @attention $f $simd, f32 },
            }
        };
    };
}
pub(crate) use kernels;
