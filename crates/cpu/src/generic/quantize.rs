//! Rounding activations to 8 bits: [`apr_tensor::activation`]'s definition, in a form that compiles to vector code.

use half::f16;

use super::LANES;
use crate::activation::{Block8, Q8, Q8K};

/// All bits of a float but its sign.
const MAGNITUDE: u32 = 0x7fff_ffff;

/// A row in blocks of 32.
#[inline(always)]
pub(crate) fn q8_0(x: &[f32], out: &mut [Q8]) {
    for (x, out) in x.as_chunks::<{ Q8::LEN }>().0.iter().zip(out) {
        let amax = largest(x);
        let scale = if amax.is_finite() { amax / 127.0 } else { f32::NAN };
        out.d = [f16::from_f32(scale).to_f32()];
        let qs = out.qs.as_flattened_mut().as_flattened_mut();
        round(x, 127.0 / amax, amax, qs);
        out.sum = [qs.iter().map(|&q| i32::from(q)).sum()];
    }
}

/// A row in blocks of 256.
#[inline(always)]
pub(crate) fn q8_k(x: &[f32], out: &mut [Q8K]) {
    for (x, out) in x.as_chunks::<{ Q8K::LEN }>().0.iter().zip(out) {
        let amax = largest(x);
        let signed = x[first_of(x, amax)];
        let inverse = -127.0 / signed;
        out.d = match amax {
            0.0 => [0.0],
            _ if amax.is_finite() => [1.0 / inverse],
            _ => [f32::NAN],
        };
        let qs = out.qs.as_flattened_mut().as_flattened_mut();
        round(x, inverse, amax, qs);
        let mut sums = [0; 16];
        for (sum, qs) in sums.iter_mut().zip(qs.as_chunks::<16>().0) {
            *sum = qs.iter().map(|&q| i16::from(q)).sum();
        }
        out.sums.of_16 = paired(&sums);
        let mut wider = [0; 8];
        for (i, sum) in wider.iter_mut().enumerate() {
            *sum = sums[2 * i] + sums[2 * i + 1];
        }
        out.sums.of_32 = paired(&wider);
    }
}

/// The place of the first element of magnitude `amax`, of which there is one. Lane by lane, so that it compiles to vector code.
#[inline(always)]
fn first_of(x: &[f32; Q8K::LEN], amax: f32) -> usize {
    let mut first = [u32::MAX; LANES];
    for (i, x) in x.as_chunks::<LANES>().0.iter().enumerate() {
        for lane in 0..LANES {
            let is_largest = x[lane].to_bits() & MAGNITUDE == amax.to_bits();
            let place = if is_largest { (i * LANES + lane) as u32 } else { u32::MAX };
            first[lane] = first[lane].min(place);
        }
    }
    first.into_iter().fold(u32::MAX, u32::min) as usize
}

/// Of each four sums the first and the third, then the second and the fourth.
#[inline(always)]
fn paired<const N: usize, const PAIRS: usize>(sums: &[i16; N]) -> [[[i16; 2]; 1]; PAIRS] {
    let mut pairs = [[[0; 2]]; PAIRS];
    for (pair, out) in pairs.iter_mut().enumerate() {
        let first = pair / 2 * 4 + pair % 2;
        *out = [[sums[first], sums[first + 2]]];
    }
    pairs
}

/// The largest magnitude; NaN if there is one. Magnitudes are ordered like their bits, NaNs last.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let bits = |x: &f32| x.to_bits() & MAGNITUDE;
    f32::from_bits(x.iter().map(bits).fold(0, u32::max))
}

/// `round(x * inverse)`, ties to even; zeros if the block has no finite scale and inverse.
#[inline(always)]
fn round(x: &[f32], inverse: f32, amax: f32, out: &mut [i8]) {
    /// Adding it leaves the nearest integer in the low bits of the mantissa.
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23
    if !(inverse.is_finite() && amax.is_finite()) {
        out.fill(0);
        return;
    }
    for (out, &x) in out.iter_mut().zip(x) {
        *out = (x * inverse + MAGIC).to_bits() as i8;
    }
}
