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

use std::marker::PhantomData;

use super::{
    Simd,
    unpack::{Blocks32, Blocks256, Quants256},
};
use crate::activation::{Q8, Q8K};

/// A row of weights in blocks of 32 against each row of `x`.
#[inline(always)]
pub(crate) fn blocks<S: Simd, B: Blocks32>(w: &[u8], x: &[Q8], out: &mut [f32]) {
    each_block::<Factor32<S>, B, Q8>(B::slice_of(w), x, out);
}

/// A row of weights in blocks of 256 against each row of `x`.
#[inline(always)]
pub(crate) fn superblocks<S: Simd, B: Blocks256>(w: &[u8], x: &[Q8K], out: &mut [f32]) {
    each_block::<Factor256<S>, B, Q8K>(B::slice_of(w), x, out);
}

/// Block after block, in each sum of `out`. Unpacks each block once for all rows of `x`.
#[inline(always)]
fn each_block<F: Factor<B, A>, B, A>(blocks: &[B], x: &[A], out: &mut [f32]) {
    if let [out] = out {
        // A single sum stays in a register: through memory each step would wait for the last one's store.
        let mut acc = 0.0;
        for (block, x) in blocks.iter().zip(x) {
            acc = F::unpack(block).add_product(acc, x);
        }
        *out = acc;
        return;
    }
    out.fill(0.0);
    let (fours, rest) = out.as_chunks_mut::<4>();
    for (b, block) in blocks.iter().enumerate() {
        let factor = F::unpack(block);
        let row = |t: usize| &x[t * blocks.len() + b];
        for (t, acc) in fours.iter_mut().enumerate() {
            factor.add_products(acc, [row(4 * t), row(4 * t + 1), row(4 * t + 2), row(4 * t + 3)]);
        }
        for (t, acc) in rest.iter_mut().enumerate() {
            *acc = factor.add_product(*acc, row(4 * fours.len() + t));
        }
    }
}

/// A block of weights, ready to be multiplied with blocks of activations. (A trait and not a pair of closures:
/// closures are not compiled for the kernel's instruction set unless they happen to be inlined.)
trait Factor<B, A> {
    fn unpack(block: &B) -> Self;
    /// The sum that follows `acc`.
    fn add_product(&self, acc: f32, x: &A) -> f32;
    /// The same for four sums at once.
    fn add_products(&self, acc: &mut [f32; 4], x: [&A; 4]);
}

struct Factor32<S> {
    q: [i8; 32],
    d: f32,
    min: Option<f32>,
    simd: PhantomData<S>,
}

impl<S: Simd, B: Blocks32> Factor<B, Q8> for Factor32<S> {
    #[inline(always)]
    fn unpack(block: &B) -> Self {
        let (q, d, min) = (block.quants::<S>(), S::half(block.scale()), block.min().map(S::half));
        Self { q, d, min, simd: PhantomData }
    }

    #[inline(always)]
    fn add_product(&self, acc: f32, x: &Q8) -> f32 {
        let acc = (self.d * x.d).mul_add(S::dot_32(&self.q, &x.qs) as f32, acc);
        match self.min {
            Some(min) => (min * x.d).mul_add(x.sum as f32, acc),
            None => acc,
        }
    }

    #[inline(always)]
    fn add_products(&self, acc: &mut [f32; 4], x: [&Q8; 4]) {
        let d = [x[0].d, x[1].d, x[2].d, x[3].d];
        add_scaled(acc, self.d, d, S::dot_32x4(&self.q, [&x[0].qs, &x[1].qs, &x[2].qs, &x[3].qs]));
        if let Some(min) = self.min {
            add_scaled(acc, min, d, [x[0].sum, x[1].sum, x[2].sum, x[3].sum]);
        }
    }
}

struct Factor256<S> {
    quants: Quants256,
    d: f32,
    dmin: Option<f32>,
    simd: PhantomData<S>,
}

impl<S: Simd, B: Blocks256> Factor<B, Q8K> for Factor256<S> {
    #[inline(always)]
    fn unpack(block: &B) -> Self {
        let (d, dmin) = (S::half(block.scale()), block.min().map(S::half));
        Self { quants: block.unpack::<S>(), d, dmin, simd: PhantomData }
    }

    #[inline(always)]
    fn add_product(&self, acc: f32, x: &Q8K) -> f32 {
        let Quants256 { q, scales, mins } = &self.quants;
        let acc = (self.d * x.d).mul_add(S::dot_256(q, &x.qs, scales, B::SIGNED) as f32, acc);
        match self.dmin {
            Some(dmin) => (-dmin * x.d).mul_add(S::dot_16(mins, &x.sums) as f32, acc),
            None => acc,
        }
    }

    #[inline(always)]
    fn add_products(&self, acc: &mut [f32; 4], x: [&Q8K; 4]) {
        let Quants256 { q, scales, mins } = &self.quants;
        let (d, qs) = ([x[0].d, x[1].d, x[2].d, x[3].d], [&x[0].qs, &x[1].qs, &x[2].qs, &x[3].qs]);
        add_scaled(acc, self.d, d, S::dot_256x4(q, qs, scales, B::SIGNED));
        if let Some(dmin) = self.dmin {
            let sums = [&x[0].sums, &x[1].sums, &x[2].sums, &x[3].sums];
            add_scaled(acc, -dmin, d, S::dot_16x4(mins, sums));
        }
    }
}

/// `acc[i] = fma(w * x[i], sums[i], acc[i])`.
#[inline(always)]
fn add_scaled(acc: &mut [f32; 4], w: f32, x: [f32; 4], sums: [i32; 4]) {
    for i in 0..4 {
        acc[i] = (w * x[i]).mul_add(sums[i] as f32, acc[i]);
    }
}
