//! The scalar twin: the same arithmetic in plain Rust. It runs everywhere and is what vector code is tested against.

use std::array;

use half::f16;

use super::{LANES, Simd, lanes, unpack::Tiled};
use crate::tile::Line;

#[derive(Debug)]
pub(crate) struct Scalar;

super::kernels! { Scalar }

impl Simd for Scalar {
    type Lanes = [f32; LANES];

    const REGISTERS: usize = 6;

    #[inline(always)]
    fn splat(x: f32) -> Self::Lanes {
        [x; LANES]
    }

    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self::Lanes {
        *x
    }

    #[inline(always)]
    fn load_f16(x: &[f16; LANES]) -> Self::Lanes {
        x.map(f16::to_f32)
    }

    #[inline(always)]
    fn store(x: Self::Lanes) -> [f32; LANES] {
        x
    }

    #[inline(always)]
    fn fma(a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes {
        array::from_fn(|i| a[i].mul_add(b[i], c[i]))
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
        array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn sum(x: Self::Lanes) -> f32 {
        lanes::sum(x)
    }

    #[inline(always)]
    fn load_f32(x: &[u8; 64]) -> Self::Lanes {
        let (floats, _) = x.as_chunks();
        array::from_fn(|i| f32::from_le_bytes(floats[i]))
    }

    #[inline(always)]
    fn load_bf16(x: &[u8; 32]) -> Self::Lanes {
        Self::widen_halves(x, 0).map(|x| f32::from_bits(x << 16))
    }

    #[inline(always)]
    fn load_halves(x: &[u8; 32], _: usize) -> Self::Part {
        array::from_fn(|i| f16::from_le_bytes([x[2 * i], x[2 * i + 1]]).to_f32())
    }

    type Words = [u32; LANES];

    #[inline(never)]
    fn load_words(x: &Line, _: usize) -> Self::Words {
        let (words, _) = x.0.as_chunks();
        array::from_fn(|i| u32::from_le_bytes(words[i]))
    }

    #[inline(never)]
    fn widen_halves(x: &[u8; 32], _: usize) -> Self::Words {
        array::from_fn(|i| u16::from_le_bytes([x[2 * i], x[2 * i + 1]]).into())
    }

    #[inline(never)]
    fn splat_word(x: i32) -> Self::Words {
        [x as u32; LANES]
    }

    #[inline(never)]
    fn and(x: Self::Words, mask: u32) -> Self::Words {
        x.map(|x| x & mask)
    }

    #[inline(never)]
    fn xor(x: Self::Words, mask: u32) -> Self::Words {
        x.map(|x| x ^ mask)
    }

    #[inline(never)]
    fn or(a: Self::Words, b: Self::Words) -> Self::Words {
        array::from_fn(|i| a[i] | b[i])
    }

    #[inline(never)]
    fn shl(x: Self::Words, bits: u32) -> Self::Words {
        x.map(|x| x << bits)
    }

    #[inline(never)]
    fn shr(x: Self::Words, bits: u32) -> Self::Words {
        x.map(|x| x >> bits)
    }

    #[inline(never)]
    fn sar(x: Self::Words, bits: u32) -> Self::Words {
        x.map(|x| (x as i32 >> bits) as u32)
    }

    #[inline(never)]
    fn add_word(a: Self::Words, b: Self::Words) -> Self::Words {
        array::from_fn(|i| a[i].wrapping_add(b[i]))
    }

    #[inline(never)]
    fn mul_word(a: Self::Words, b: Self::Words) -> Self::Words {
        array::from_fn(|i| a[i].wrapping_mul(b[i]))
    }

    #[inline(never)]
    fn to_part(x: Self::Words) -> Self::Part {
        x.map(|x| x as i32 as f32)
    }

    type Dots = Self::Words;

    #[inline(never)]
    fn dots(start: i32) -> Self::Dots {
        Self::splat_word(start)
    }

    // Unrolled loops would be large with it.
    #[inline(never)]
    fn dot<T: Tiled>(mut dots: Self::Dots, q: Self::Words, a: &[i8; 4]) -> Self::Dots {
        for (sum, q) in dots.iter_mut().zip(q) {
            for (q, a) in q.to_le_bytes().into_iter().zip(a) {
                *sum = sum.wrapping_add((i32::from(q) * i32::from(*a)) as u32);
            }
        }
        dots
    }

    #[inline(never)]
    fn add_dots(acc: Self::Words, dots: Self::Dots, scale: Self::Words) -> Self::Words {
        Self::add_word(acc, Self::mul_word(dots, scale))
    }

    #[inline(never)]
    fn to_words(dots: Self::Dots) -> Self::Words {
        dots
    }

    #[inline(never)]
    fn dot_pairs(acc: Self::Words, x: Self::Words, a: [i16; 2]) -> Self::Words {
        let [low, high] = a.map(i32::from);
        let sum = |x: u32| i32::from(x as i16) * low + i32::from((x >> 16) as i16) * high;
        array::from_fn(|i| acc[i].wrapping_add(sum(x[i]) as u32))
    }

    #[inline(never)]
    fn spread_bits(x: Self::Words, group: usize, to: u32) -> Self::Words {
        // Bit i of the nibble goes to bit 8i: it is copied there by the term 2^(7i) of the product.
        x.map(|x| ((((x >> (4 * group)) & 0xf) * 0x0020_4081) & 0x0101_0101) << to)
    }

    #[inline(never)]
    fn lookup(x: Self::Words, table: &[u8; 16]) -> Self::Words {
        x.map(|x| u32::from_le_bytes(x.to_le_bytes().map(|i| table[usize::from(i & 0xf)])))
    }
}
