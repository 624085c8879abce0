//! The exponential, and what is made of it.

use super::{LANES, lanes::sum};

/// `e^x`, within 1.05 ulp of the exact value, and of the smallest normal number below that.
///
/// `e^x = 2^n e^r` with `n` the integer nearest to `x / ln 2` and `r` in `[-ln 2 / 2, ln 2 / 2]`; `e^r` by the polynomial of
/// Cephes' `expf`. Only additions, products, fused products and integer shifts are used, so there is nothing in which
/// instruction sets could differ. Subnormal results are rounded once; above the largest f32 the result is
/// infinite, below half of the smallest it is 0; `exp(NaN)` is NaN.
#[inline(always)]
#[allow(clippy::excessive_precision, reason = "the constants as published")]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding it leaves the nearest integer in the low bits of the mantissa.
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23
    const LN_2_HIGH: f32 = 0.693_359_375; // exact in 10 bits: n * LN_2_HIGH is exact
    const LN_2_LOW: f32 = -2.121_944_4e-4;

    // Beyond these bounds nothing changes any more. Comparisons are such that NaN passes.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };

    let shifted = x.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));

    let p = 1.987_569_150_0e-4_f32;
    let p = p.mul_add(r, 1.398_199_950_7e-3);
    let p = p.mul_add(r, 8.333_451_907_3e-3);
    let p = p.mul_add(r, 4.166_579_589_4e-2);
    let p = p.mul_add(r, 1.666_666_545_9e-1);
    let p = p.mul_add(r, 5.000_000_120_1e-1);
    let p = p.mul_add(r * r, r) + 1.0;

    // In two steps, since 2^n itself may be out of range.
    let n = shifted.to_bits().wrapping_sub(MAGIC.to_bits()) as i32;
    let half = n >> 1;
    let pow2 = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    p * pow2(half) * pow2(n.wrapping_sub(half))
}

/// `x / (1 + e^-x)`.
#[inline(always)]
fn sigmoid_weighted(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `x / (1 + e^-x)`, element by element.
#[inline(always)]
pub(crate) fn silu(x: &[f32], out: &mut [f32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = sigmoid_weighted(x);
    }
}

/// [`silu`] of `x`, then its product with `up`, in place: what the two would give one after the other.
#[inline(always)]
pub(crate) fn swiglu(up: &[f32], x: &mut [f32]) {
    for (x, &up) in x.iter_mut().zip(up) {
        *x = sigmoid_weighted(*x) * up;
    }
}

/// `e^(x[i] - max) / sum`, in place. The sum is taken in [`LANES`] lanes in ascending order, then as a tree.
///
/// A NaN or a positive infinity among `x` makes every result NaN, as in the definition.
#[inline(always)]
pub(crate) fn softmax(x: &mut [f32]) {
    let max = maximum(x);
    let mut lanes = [0.0; LANES];
    let (chunks, tail) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        add_exp(chunk, max, &mut lanes);
    }
    if !tail.is_empty() {
        // What fills the last lanes up has the exponential 0.
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..tail.len()].copy_from_slice(tail);
        add_exp(&mut last, max, &mut lanes);
        tail.copy_from_slice(&last[..tail.len()]);
    }
    let sum = sum(lanes);
    for x in x {
        *x /= sum;
    }
}

/// Turns `x` into exponentials, and adds them to their lanes.
#[inline(always)]
fn add_exp(x: &mut [f32; LANES], max: f32, lanes: &mut [f32; LANES]) {
    for (x, lane) in x.iter_mut().zip(lanes) {
        *x = exp(*x - max);
        *lane += *x;
    }
}

/// The largest element; NaNs are passed over, since the exponentials will show them.
#[inline(always)]
fn maximum(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, x);
        }
    }
    lanes.iter().chain(tail).copied().fold(f32::NEG_INFINITY, larger)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The distance from the exact value in units of the last place of an f32 of its size.
    fn ulps(found: f32, exact: f64) -> f64 {
        let exponent = exact.log2().floor().max(-126.0) as i32;
        (f64::from(found) - exact).abs() / 2f64.powi(exponent - 23)
    }

    #[test]
    fn exp_is_within_its_bound_over_its_whole_range() {
        let mut worst = (0.0, 0.0);
        let mut x = -103.9f32;
        while x < 88.72 {
            let error = ulps(exp(x), f64::from(x).exp());
            if error > worst.0 {
                worst = (error, x);
            }
            x += 1.37e-4;
        }
        assert!(worst.0 <= 1.05, "{} ulp at {}", worst.0, worst.1);
    }

    #[test]
    fn exp_keeps_the_special_values() {
        assert_eq!(exp(0.0).to_bits(), 1f32.to_bits());
        assert_eq!(exp(-0.0).to_bits(), 1f32.to_bits());
        assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
        assert_eq!(exp(-104.5).to_bits(), 0);
        assert_eq!(exp(-103.5).to_bits(), 1, "the smallest subnormal");
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(88.73), f32::INFINITY);
        assert!(exp(88.72).is_finite());
        assert!(exp(f32::NAN).is_nan() && exp(-f32::NAN).is_nan());
    }

    #[test]
    fn softmax_of_nan_or_infinity_is_nan_everywhere() {
        for bad in [f32::NAN, f32::INFINITY] {
            for place in [0, 5, 16, 19] {
                let mut x = vec![0.5; 20];
                x[place] = bad;
                softmax(&mut x);
                assert!(x.iter().all(|x| x.is_nan()), "{bad} at {place}");
            }
        }
        let mut x = [f32::NEG_INFINITY, 2.0];
        softmax(&mut x);
        assert_eq!(x, [0.0, 1.0]);
    }

    #[test]
    fn softmax_is_the_definition_within_its_rounding() {
        for len in [1, 2, 15, 16, 17, 33, 1000] {
            let x: Vec<f32> = (0..len).map(|i| ((i * 7919) % 613) as f32 / 61.3 - 5.0).collect();
            let max = x.iter().copied().fold(f32::MIN, f32::max);
            let exact: Vec<f64> = x.iter().map(|&x| f64::from(x - max).exp()).collect();
            let total: f64 = exact.iter().sum();
            let mut found = x;
            softmax(&mut found);
            for (&found, exact) in found.iter().zip(exact) {
                // exp 1.05 ulp, the same in the sum plus len / 16 + 4 additions of half an ulp, the quotient half.
                let bound = (2.6 + (len / 32 + 3) as f64) * f64::from(f32::EPSILON);
                assert!((f64::from(found) * total / exact - 1.0).abs() <= bound);
            }
        }
    }
}
