//! Blocks of 32 weights, with a scale that is a float: sums are taken out of the unit after each block.
//!
//! All rows of activations meet eight blocks of weights, unpacked to bytes with a sign, before the next eight come. Those are asked for meanwhile.

use std::arch::{asm, x86_64::*};

use super::{Sums, Unit, load_half, shapes, store_half};
use crate::{
    activation::{MATRIX, Q8Matrix},
    generic::{
        Simd,
        tile::plus,
        unpack::{Block, Tiled32},
    },
    memory::{Fetch, fetch_share, prefetch},
    tile::{Line, ROWS},
    x86_64::avx512::Avx512,
};

/// Blocks that are unpacked before they are multiplied.
const BLOCKS: usize = 8;

/// A block of 16 rows.
#[derive(Clone, Copy)]
struct Unpacked {
    /// Four weights of each row in a line.
    weights: [Line; 8],
    d: __m512,
    m: __m512,
}

/// [`TileKernel::many`](crate::kernels::TileKernel::many).
#[inline(always)]
pub(super) fn products<T: Tiled32>(tile: &[Line], x: &[Q8Matrix], out: &mut [[f32; ROWS]]) {
    let _unit = Unit::shaped(&const { shapes(32) });
    let lines = T::LAYOUT.lines();
    let blocks = tile.len() / lines;
    let none = Unpacked { weights: [Line::ZERO; 8], d: Avx512::splat(0.0), m: Avx512::splat(0.0) };
    let (mut unpacked, mut sums) = ([[none; BLOCKS]; 2], [Sums::ZERO; 2]);
    let groups = out.len().div_ceil(MATRIX);
    let (whole, rest) = out.as_chunks_mut::<MATRIX>();
    // Of a last group that is not whole all rows are computed.
    let mut last = [[0.0; ROWS]; MATRIX];
    whole.as_flattened_mut().fill([0.0; ROWS]);
    let mut first = 0;
    for tile in tile.chunks(BLOCKS * lines) {
        let mut count = 0;
        for block in Block::all(tile, &T::LAYOUT) {
            for (half, unpacked) in unpacked.iter_mut().enumerate() {
                unpack::<T>(block.parts::<2>(0)[half], &mut unpacked[count]);
            }
            count += 1;
        }
        let [half_0, half_1] = &unpacked;
        let halves = [&half_0[..count], &half_1[..count]];
        let mut group = 0;
        while group < groups {
            fetch_share(tile, group, groups, Fetch::AtOnce);
            let x = &x[group * blocks + first..];
            let out = whole.get_mut(group).unwrap_or(&mut last);
            add::<T>(x, blocks, halves, &mut sums, out);
            group += 1;
        }
        first += count;
    }
    rest.copy_from_slice(&last[..rest.len()]);
}

#[inline(always)]
fn unpack<T: Tiled32>(block: Block<'_>, out: &mut Unpacked) {
    for (g, line) in out.weights.iter_mut().enumerate() {
        let weights = T::quants::<Avx512>(block, g);
        // SAFETY: this runs only within kernels; a line is 64 bytes and aligned to as many.
        unsafe {
            let signed = _mm512_sub_epi8(weights, _mm512_set1_epi8(T::ZERO as i8));
            _mm512_store_si512(line.0.as_mut_ptr().cast(), signed);
        }
    }
    out.d = block.load_halves::<Avx512>(0);
    if T::MIN {
        out.m = block.load_halves::<Avx512>(1);
    }
}

/// Adds the products of some blocks with the 16 rows of the first ones of `x`. Those of the next rows are `blocks` later. What `sums` held before is lost.
#[inline(always)]
fn add<T: Tiled32>(
    x: &[Q8Matrix],
    blocks: usize,
    weights: [&[Unpacked]; 2],
    sums: &mut [Sums; 2],
    out: &mut [[f32; ROWS]; MATRIX],
) {
    let next = x.as_ptr().wrapping_add(blocks);
    let x = &x[..weights[0].len()];
    for (half, weights) in weights.into_iter().enumerate() {
        let mut acc = [Avx512::splat(0.0); MATRIX];
        let mut n = 0;
        while n < MATRIX {
            acc[n] = load_half(&out[n], half);
            n += 1;
        }
        // The sums of the block that comes next are made while those of this one are scaled.
        multiply(&x[0], &weights[0], &mut sums[0]);
        for (b, (x_b, unpacked)) in x.iter().zip(weights).enumerate() {
            if b + 1 < x.len() {
                multiply(&x[b + 1], &weights[b + 1], &mut sums[(b + 1) % 2]);
            }
            let sums = &sums[b % 2];
            // The unit would wait for a second-level cache.
            let lines = next.wrapping_add(b).cast::<Line>().wrapping_add(4 * half);
            n = 0;
            while n < MATRIX {
                if n < 4 {
                    prefetch(lines.wrapping_add(n));
                }
                acc[n] = plus::<Avx512>(acc[n], unpacked.d, x_b.d[n], sums.row(n));
                if const { T::MIN } {
                    let sum = Avx512::splat_word(x_b.sum[n]);
                    acc[n] = plus::<Avx512>(acc[n], unpacked.m, x_b.d[n], sum);
                }
                n += 1;
            }
        }
        n = 0;
        while n < MATRIX {
            store_half(acc[n], &mut out[n], half);
            n += 1;
        }
    }
}

/// The sums of products of a block.
#[inline(always)]
fn multiply(x: &Q8Matrix, block: &Unpacked, sums: &mut Sums) {
    // SAFETY: this runs only within kernels, with registers that are shaped for 32 columns. It reads 16 rows of 32 bytes of `x`, eight lines of
    // weights, and writes all sums.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tileloadd tmm4, [{x} + {row}]",
            "tileloadd tmm5, [{w} + {line}]",
            "tdpbssd tmm0, tmm4, tmm5",
            "tilestored [{sums} + {line}], tmm0",
            x = in(reg) x.qs.as_ptr(),
            row = in(reg) 32usize,
            w = in(reg) block.weights.as_ptr(),
            line = in(reg) 64usize,
            sums = in(reg) sums,
            out("tmm0") _, out("tmm4") _, out("tmm5") _,
            options(nostack, preserves_flags)
        );
    }
}
