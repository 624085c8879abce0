//! One query against one head's cached keys and values.

use super::{
    LANES, Simd,
    lanes::{Element, dots, padded},
};

/// The scaled scores of `query` and the first `out.len()` keys: a [`dot`](super::lanes::dot), times `scale`.
#[inline(always)]
pub(crate) fn scores<S: Simd, E: Element>(query: &[f32], keys: &[E], scale: f32, out: &mut [f32]) {
    dots::<S, E>(query, keys, out);
    for out in out {
        *out *= scale;
    }
}

/// The sum of the first `weights.len()` values, weighted: in each channel `fma` over ascending keys, from 0.
#[inline(always)]
pub(crate) fn weighted_sum<S: Simd, E: Element>(weights: &[f32], values: &[E], out: &mut [f32]) {
    let width = out.len();
    let (wide, rest) = out.as_chunks_mut::<{ 4 * LANES }>();
    let (narrow, tail) = rest.as_chunks_mut::<LANES>();
    let mut start = 0;
    for out in wide {
        let groups = channels::<S, E, 4>(weights, values, width, start);
        out.copy_from_slice(groups.as_flattened());
        start += out.len();
    }
    for out in narrow {
        [*out] = channels::<S, E, 1>(weights, values, width, start);
        start += out.len();
    }
    if !tail.is_empty() {
        let mut acc = S::splat(0.0);
        for (&weight, value) in weights.iter().zip(values.chunks_exact(width)) {
            acc = S::fma(S::splat(weight), E::load::<S>(&padded(&value[start..])), acc);
        }
        tail.copy_from_slice(&S::store(acc)[..tail.len()]);
    }
}

/// `G` groups of channels from `start` on.
#[inline(always)]
fn channels<S: Simd, E: Element, const G: usize>(
    weights: &[f32],
    values: &[E],
    width: usize,
    start: usize,
) -> [[f32; LANES]; G] {
    let mut acc = [S::splat(0.0); G];
    for (&weight, value) in weights.iter().zip(values.chunks_exact(width)) {
        let weight = S::splat(weight);
        let groups = &value[start..].as_chunks::<LANES>().0[..G];
        for (acc, value) in acc.iter_mut().zip(groups) {
            *acc = S::fma(weight, E::load::<S>(value), *acc);
        }
    }
    let mut out = [[0.0; LANES]; G];
    for (out, acc) in out.iter_mut().zip(acc) {
        *out = S::store(acc);
    }
    out
}
