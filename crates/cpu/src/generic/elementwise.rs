//! Sums and products, element by element, each rounded by itself: nothing is fused.

use super::LANES;

/// `sum + x`, in place.
#[inline(always)]
pub(crate) fn add(x: &[f32], sum: &mut [f32]) {
    for (sum, &x) in sum.iter_mut().zip(x) {
        *sum += x;
    }
}

/// `x * y`.
#[inline(always)]
pub(crate) fn multiply(x: &[f32], y: &[f32], out: &mut [f32]) {
    for ((out, &x), &y) in out.iter_mut().zip(x).zip(y) {
        *out = x * y;
    }
}

/// `sum + weight * x`, in place.
#[inline(always)]
pub(crate) fn add_weighted(x: &[f32], weight: f32, sum: &mut [f32]) {
    for (sum, &x) in sum.iter_mut().zip(x) {
        *sum += weight * x;
    }
}

/// Turns the pairs `(i, i + pairs)` of each head of a row by the angles whose cosines and sines these are, rounded to
/// f32; channels beyond the pairs pass through.
#[inline(always)]
pub(crate) fn rotate(x: &[f32], head_dim: usize, cos: &[f64], sin: &[f64], out: &mut [f32]) {
    let pairs = cos.len();
    let ((wide_cos, tail_cos), (wide_sin, tail_sin)) =
        (cos.as_chunks::<LANES>(), sin.as_chunks::<LANES>());
    for (i, (cos, sin)) in wide_cos.iter().zip(wide_sin).enumerate() {
        turn(x, head_dim, i * LANES, pairs, cos, sin, out);
    }
    let start = wide_cos.len() * LANES;
    for (i, (&cos, &sin)) in tail_cos.iter().zip(tail_sin).enumerate() {
        turn(x, head_dim, start + i, pairs, &[cos], &[sin], out);
    }
    for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
        out[2 * pairs..].copy_from_slice(&x[2 * pairs..]);
    }
}

/// The `N` pairs from number `start` on, of each head. (From arrays and to arrays: compilers make vectors of those.)
#[inline(always)]
fn turn<const N: usize>(
    x: &[f32],
    head_dim: usize,
    start: usize,
    pairs: usize,
    cos: &[f64; N],
    sin: &[f64; N],
    out: &mut [f32],
) {
    let (cos, sin) = (rounded(cos), rounded(sin));
    for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
        let (firsts, seconds) = (&x[start..], &x[pairs + start..]);
        let a: [f32; N] = *firsts.first_chunk().expect("a head has all pairs");
        let b: [f32; N] = *seconds.first_chunk().expect("a head has all pairs");
        let (mut turned_a, mut turned_b) = ([0.0; N], [0.0; N]);
        for i in 0..N {
            turned_a[i] = a[i] * cos[i] - b[i] * sin[i];
        }
        for i in 0..N {
            turned_b[i] = b[i] * cos[i] + a[i] * sin[i];
        }
        out[start..][..N].copy_from_slice(&turned_a);
        out[pairs + start..][..N].copy_from_slice(&turned_b);
    }
}

#[inline(always)]
fn rounded<const N: usize>(x: &[f64; N]) -> [f32; N] {
    let mut out = [0.0; N];
    for i in 0..N {
        out[i] = x[i] as f32;
    }
    out
}
