//! Sums and products, element by element, each rounded by itself: nothing is fused.

use super::LANES;

/// `x + y`.
#[inline(always)]
pub(crate) fn add(x: &[f32], y: &[f32], out: &mut [f32]) {
    for ((out, &x), &y) in out.iter_mut().zip(x).zip(y) {
        *out = x + y;
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

/// The `N` pairs from number `start` on, of each head.
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
    let (mut c, mut s) = ([0.0; N], [0.0; N]);
    for i in 0..N {
        (c[i], s[i]) = (cos[i] as f32, sin[i] as f32);
    }
    for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
        let (out_a, out_b) = out.split_at_mut(pairs);
        let (a, b) = (&x[start..][..N], &x[pairs + start..][..N]);
        let (out_a, out_b) = (&mut out_a[start..][..N], &mut out_b[start..][..N]);
        for i in 0..N {
            out_a[i] = a[i] * c[i] - b[i] * s[i];
            out_b[i] = b[i] * c[i] + a[i] * s[i];
        }
    }
}
