//! What [`crate::probe`] needs of AArch64: chains of integer dot products that stay in registers.

use std::{
    arch::{aarch64::*, asm},
    hint::black_box,
};

use super::neon;

/// Independent chains: at least the cycles that a product takes, times the products that begin in one.
const CHAINS: usize = 16;

/// 16 products and sums in each chain.
pub(crate) const INT8_NEON_OPS: u64 = 2 * 16 * CHAINS as u64;

/// Products and sums in 16 bits, which wrap around. A product that is to be right does more.
#[target_feature(enable = "neon")]
pub(crate) fn int8_neon(rounds: usize, out: &mut f32) {
    let (mut a, b) = (vdupq_n_s8(black_box(1)), vdupq_n_s8(black_box(1)));
    let mut sums = [vdupq_n_s16(0); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            // SAFETY: does nothing. A compiler that sees the same factors again would multiply them only once.
            unsafe {
                asm!("/* {0:v} */", inout(vreg) a, options(pure, nomem, nostack, preserves_flags));
            }
            *sum = vmlal_high_s8(vmlal_s8(*sum, vget_low_s8(a), vget_low_s8(b)), a, b);
        }
    }
    for sum in sums {
        *out += vaddlvq_s16(sum) as f32;
    }
}

/// Four products of bytes enter each sum at once.
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn int8_neondot(rounds: usize, out: &mut f32) {
    let (a, b) = (vdupq_n_s8(black_box(1)), vdupq_n_s8(black_box(1)));
    let mut sums = [vdupq_n_s32(0); CHAINS];
    for sum in &mut sums {
        // Chains that begin alike could be computed once.
        *sum = vdupq_n_s32(black_box(0));
    }
    for _ in 0..rounds {
        for sum in &mut sums {
            // SAFETY: this function's features.
            *sum = unsafe { neon::sdot(*sum, a, b) };
        }
    }
    for sum in sums {
        *out += vaddvq_s32(sum) as f32;
    }
}
