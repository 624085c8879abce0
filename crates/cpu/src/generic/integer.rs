//! Dot products of quantised weights with activations rounded to 8 bits.
//!
//! The contract, for every stored type: within a block all sums are integers, hence exact. Block after block, in
//! ascending order and from 0, each product of two scales rounded to f32:
//!
//! ```text
//! acc = fma(d * d_activation, sum(scale * q * a) as f32, acc)
//! acc = fma(m * d_activation, sum(a) as f32, acc)              Q4_1, Q5_1
//! acc = fma(-dmin * d_activation, sum(min * a) as f32, acc)    Q2_K, Q4_K, Q5_K
//! ```
//!
//! That is one chain of sums per output element, so a layout with one row per lane could keep it too.

use super::{
    Simd,
    unpack::{Blocks32, Blocks256, Quants256},
};
use crate::activation::{Q8, Q8K};

/// A row of weights in blocks of 32 against each row of `x`. Unpacks each block once for all of them.
#[inline(always)]
pub(crate) fn blocks<S: Simd, B: Blocks32>(w: &[u8], x: &[Q8], out: &mut [f32]) {
    let blocks = B::slice_of(w);
    out.fill(0.0);
    for (b, block) in blocks.iter().enumerate() {
        let (q, d) = (block.quants(), S::half(block.scale()));
        let min = block.min().map(S::half);
        for (acc, x) in out.iter_mut().zip(x.chunks_exact(blocks.len())) {
            let x = &x[b];
            *acc = (d * x.d).mul_add(S::dot_32(&q, &x.qs) as f32, *acc);
            if let Some(min) = min {
                *acc = (min * x.d).mul_add(x.sum as f32, *acc);
            }
        }
    }
}

/// A row of weights in blocks of 256 against each row of `x`. Unpacks each block once for all of them.
#[inline(always)]
pub(crate) fn superblocks<S: Simd, B: Blocks256>(w: &[u8], x: &[Q8K], out: &mut [f32]) {
    let blocks = B::slice_of(w);
    let mut quants = Quants256::ZERO;
    out.fill(0.0);
    for (b, block) in blocks.iter().enumerate() {
        block.unpack(&mut quants);
        let Quants256 { q, scales, mins } = &quants;
        let d = S::half(block.scale());
        let min = block.min().map(|min| -S::half(min));
        for (acc, x) in out.iter_mut().zip(x.chunks_exact(blocks.len())) {
            let x = &x[b];
            *acc = (d * x.d).mul_add(S::dot_256(q, &x.qs, scales) as f32, *acc);
            if let Some(min) = min {
                *acc = (min * x.d).mul_add(dot_16(mins, &x.sums) as f32, *acc);
            }
        }
    }
}

#[inline(always)]
fn dot_16(a: &[i16; 16], b: &[i16; 16]) -> i32 {
    a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
}
