//! Blocks of 256 weights, in sub-blocks that have integers for scales.
//!
//! A weight times its scale has up to 14 bits, so it becomes two bytes, and the sum is that of the low bytes plus 256 times that of the high ones:
//! nothing is to be done for sub-blocks any more. All rows of activations then meet what has been made of a block of weights, and the next one is asked for
//! meanwhile.

use std::arch::{asm, x86_64::*};

use super::{Sums, Unit, load_half, shapes, store_half};
use crate::{
    activation::{MATRIX, Q8KMatrix},
    generic::{
        Simd, byte,
        tile::{
            for_eight, plus,
            superblocks::{Pairs, pairs, weighted},
        },
        unpack::{Block, Tiled256},
    },
    memory::{Fetch, prefetch},
    tile::{Line, ROWS},
    x86_64::avx512::Avx512,
};

/// The weights of a block of 16 rows, 64 words of each: four bytes of each row in a line.
type Bytes = [Line; 64];

/// The low bytes of both halves of a tile, then the high ones.
struct Scaled([Bytes; 4]);

/// Whether a weight times its scale may take more than one byte without a sign. Scales without a sign have at most six bits.
const fn has_high_bytes<T: Tiled256>() -> bool {
    T::SIGNED_SCALES || T::ZERO != 0 || ((1 << T::BITS) - 1) * 63 > 255
}

/// [`TileKernel::many`](crate::kernels::TileKernel::many).
#[inline(always)]
pub(super) fn products<T: Tiled256>(tile: &[Line], x: &[Q8KMatrix], out: &mut [[f32; ROWS]]) {
    let _unit = Unit::shaped(&const { shapes(64) });
    let blocks = tile.len() / T::LAYOUT.lines();
    let (mut scaled, mut sums) = (Scaled([[Line::ZERO; 64]; 4]), [Sums::ZERO; 4]);
    let groups = out.len().div_ceil(MATRIX);
    let (whole, rest) = out.as_chunks_mut::<MATRIX>();
    // Of a last group that is not whole all rows are computed.
    let mut last = [[0.0; ROWS]; MATRIX];
    whole.as_flattened_mut().fill([0.0; ROWS]);
    for (b, block) in Block::all(tile, &T::LAYOUT).enumerate() {
        let halves = block.parts::<2>(0);
        let [low_0, low_1, high_0, high_1] = &mut scaled.0;
        scale::<T>(halves[0], low_0, high_0);
        scale::<T>(halves[1], low_1, high_1);
        let factors = [Factors::of::<T>(halves[0]), Factors::of::<T>(halves[1])];
        let mut group = 0;
        while group < groups {
            block.fetch_ahead::<Avx512, T, 2>(group, groups, Fetch::AtOnce);
            let x = &x[group * blocks + b..];
            let out = whole.get_mut(group).unwrap_or(&mut last);
            add::<T>(x, blocks, &scaled, &factors, &mut sums, out);
            group += 1;
        }
    }
    rest.copy_from_slice(&last[..rest.len()]);
}

/// What integer sums of a block are multiplied with, for 16 rows.
struct Factors {
    d: __m512,
    minus_dmin: __m512,
    mins: Pairs<Avx512>,
}

impl Factors {
    #[inline(always)]
    fn of<T: Tiled256>(block: Block<'_>) -> Self {
        let d = block.load_halves::<Avx512>(0);
        let mins = pairs::<Avx512, T>(T::mins::<Avx512>(block), false);
        let mut minus_dmin = d;
        if T::MIN {
            minus_dmin = Avx512::mul_part(block.load_halves::<Avx512>(1), Avx512::splat(-1.0));
        }
        Self { d, minus_dmin, mins }
    }
}

/// The weights of a block times their scales, low bytes and high ones.
#[inline(always)]
fn scale<T: Tiled256>(block: Block<'_>, low: &mut Bytes, high: &mut Bytes) {
    let scales = T::scales::<Avx512>(block);
    for_eight!(J, {
        let words = block.run::<T>(J);
        let mut by = Avx512::splat_word(0);
        for_eight!(G, {
            let i = (32 * J + 4 * G) / T::SUB_BLOCK;
            if const { (4 * G).is_multiple_of(T::SUB_BLOCK) } {
                by = twice(byte::<Avx512>(scales[i / 4], i as u32 % 4, T::SIGNED_SCALES));
            }
            let weights = T::quants::<Avx512>(words.group::<T>(G), J, G);
            // SAFETY: this runs only within kernels; a line is 64 bytes and aligned to as many.
            unsafe {
                let (lows, highs) = split(weights, T::ZERO, by);
                _mm512_store_si512(low[8 * J + G].0.as_mut_ptr().cast(), lows);
                if const { has_high_bytes::<T>() } {
                    _mm512_store_si512(high[8 * J + G].0.as_mut_ptr().cast(), highs);
                }
            }
        });
    });
}

/// A number of 16 bits in both halves of each word.
#[inline(always)]
fn twice(words: __m512i) -> __m512i {
    // SAFETY: this runs only within kernels.
    unsafe { _mm512_mask_blend_epi16(0xaaaa_aaaa, words, _mm512_slli_epi32::<16>(words)) }
}

/// The low and the high bytes of `(weight - zero) * scale`, where weights are bytes without a sign and scales have 16 bits.
///
/// # Safety
/// AVX-512 with BW.
#[inline(always)]
unsafe fn split(weights: __m512i, zero: i32, scales: __m512i) -> (__m512i, __m512i) {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm512_set1_epi16(0xff);
        let mut even = _mm512_and_si512(weights, low);
        let mut odd = _mm512_srli_epi16::<8>(weights);
        if zero != 0 {
            even = _mm512_sub_epi16(even, _mm512_set1_epi16(zero as i16));
            odd = _mm512_sub_epi16(odd, _mm512_set1_epi16(zero as i16));
        }
        even = _mm512_mullo_epi16(even, scales);
        odd = _mm512_mullo_epi16(odd, scales);
        let lows = _mm512_or_si512(_mm512_and_si512(even, low), _mm512_slli_epi16::<8>(odd));
        let highs = _mm512_or_si512(_mm512_srli_epi16::<8>(even), _mm512_andnot_si512(low, odd));
        (lows, highs)
    }
}

/// Adds the products of a block with the 16 rows of `x[0]`. Those of the next rows are `blocks` later. What `sums` held before is lost.
#[inline(always)]
fn add<T: Tiled256>(
    x: &[Q8KMatrix],
    blocks: usize,
    weights: &Scaled,
    factors: &[Factors; 2],
    sums: &mut [Sums; 4],
    out: &mut [[f32; ROWS]; MATRIX],
) {
    let (x, next) = (&x[0], x.as_ptr().wrapping_add(blocks));
    if const { has_high_bytes::<T>() } {
        multiply(x, weights, sums);
    } else {
        multiply_low(x, weights, sums);
    }
    for (half, factors) in factors.iter().enumerate() {
        for (n, out) in out.iter_mut().enumerate() {
            // The unit would wait for a second-level cache.
            let line = next.cast::<Line>().wrapping_add(4 * n + 2 * half);
            prefetch(line);
            prefetch(line.wrapping_add(1));
            let mut sum = sums[half].row(n);
            if const { has_high_bytes::<T>() } {
                // SAFETY: this runs only within kernels.
                unsafe {
                    sum = _mm512_add_epi32(sum, _mm512_slli_epi32::<8>(sums[2 + half].row(n)));
                }
            }
            let mut acc = plus::<Avx512>(load_half(out, half), factors.d, x.d[n], sum);
            if const { T::MIN } {
                let sum = weighted::<Avx512, T, MATRIX>(&factors.mins, &x.sums, n);
                acc = plus::<Avx512>(acc, factors.minus_dmin, x.d[n], sum);
            }
            store_half(acc, out, half);
        }
    }
}

/// The products of 64 columns: those of low bytes enter registers 0 and 1.
macro_rules! low_bytes {
    ($k:literal) => {
        concat!(
            "tileloadd tmm4, [{x} + {row} + 64 * ",
            $k,
            "]\n",
            "tileloadd tmm5, [{w} + {line} + 1024 * ",
            $k,
            "]\n",
            "tdpbsud tmm0, tmm4, tmm5\n",
            "tileloadd tmm6, [{w} + {line} + 4096 + 1024 * ",
            $k,
            "]\n",
            "tdpbsud tmm1, tmm4, tmm6\n",
        )
    };
}

/// After those, the products of high bytes with the same activations enter registers 2 and 3.
macro_rules! high_bytes {
    ($k:literal) => {
        concat!(
            "tileloadd tmm7, [{w} + {line} + 8192 + 1024 * ",
            $k,
            "]\n",
            "tdpbssd tmm2, tmm4, tmm7\n",
            "tileloadd tmm5, [{w} + {line} + 12288 + 1024 * ",
            $k,
            "]\n",
            "tdpbssd tmm3, tmm4, tmm5\n",
        )
    };
}

/// All sums of products, of low bytes and of high ones.
#[inline(always)]
fn multiply(x: &Q8KMatrix, weights: &Scaled, sums: &mut [Sums; 4]) {
    // SAFETY: this runs only within kernels, with registers that are shaped for 64 columns. It reads 16 rows of 256 bytes of `x`, and all of
    // `weights`, and writes all of `sums`.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            low_bytes!(0), high_bytes!(0), low_bytes!(1), high_bytes!(1),
            low_bytes!(2), high_bytes!(2), low_bytes!(3), high_bytes!(3),
            "tilestored [{sums} + {line}], tmm0",
            "tilestored [{sums} + {line} + 1024], tmm1",
            "tilestored [{sums} + {line} + 2048], tmm2",
            "tilestored [{sums} + {line} + 3072], tmm3",
            x = in(reg) x.qs.as_ptr(),
            row = in(reg) 256usize,
            w = in(reg) weights.0.as_ptr(),
            line = in(reg) 64usize,
            sums = in(reg) sums.as_mut_ptr(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags)
        );
    }
}

/// The same where there are only low bytes: the first two of `sums`.
#[inline(always)]
fn multiply_low(x: &Q8KMatrix, weights: &Scaled, sums: &mut [Sums; 4]) {
    // SAFETY: as above, but for the high bytes and their sums.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1",
            low_bytes!(0), low_bytes!(1), low_bytes!(2), low_bytes!(3),
            "tilestored [{sums} + {line}], tmm0",
            "tilestored [{sums} + {line} + 1024], tmm1",
            x = in(reg) x.qs.as_ptr(),
            row = in(reg) 256usize,
            w = in(reg) weights.0.as_ptr(),
            line = in(reg) 64usize,
            sums = in(reg) sums.as_mut_ptr(),
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
            options(nostack, preserves_flags)
        );
    }
}
