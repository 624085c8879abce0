//! Which rows meet which experts of a mixture.

use std::collections::BTreeMap;

use apr_tensor::Stored;

use crate::{Real, Tensor};

/// The rows that each chosen expert gets, by expert: number `i` is slot `i % k` of token row `i / k`, `ids` being `[n, k]`.
pub fn by_expert<F: Real>(ids: &Tensor<F>) -> BTreeMap<usize, Vec<usize>> {
    let mut rows = BTreeMap::<usize, Vec<usize>>::new();
    for (i, id) in ids.data.iter().enumerate() {
        rows.entry(id.wide() as usize).or_default().push(i);
    }
    rows
}

/// The matrix of expert `expert` in `w`, which holds those of all `experts`, one below the other.
pub fn expert(w: &[Stored], experts: usize, expert: usize) -> Vec<Stored> {
    let all: usize = w.iter().map(|part| part.shape().rows()).sum();
    let (first, end) = (all / experts * expert, all / experts * (expert + 1));
    let mut before = 0;
    let mut parts = Vec::new();
    for part in w {
        let rows = part.shape().rows();
        let (start, stop) = (first.clamp(before, before + rows), end.clamp(before, before + rows));
        if start < stop {
            parts.push(part.slice_rows(start - before..stop - before));
        }
        before += rows;
    }
    parts
}

/// The rows of `x` that `of` names, number `i` being slot `i % k` of token row `i / k`. `x` has a row for each slot, or one
/// for all `k` of them.
pub fn gather<T: Copy>(x: &[T], shape: &[usize], k: usize, of: &[usize]) -> Vec<T> {
    let width = shape[shape.len() - 1];
    let slots = if shape.len() == 3 { 1 } else { k };
    of.iter().flat_map(|i| &x[i / slots * width..][..width]).copied().collect()
}

/// Puts `rows`, each `width` long, where `of` says they belong in `out`.
pub fn scatter<T: Copy>(rows: &[T], width: usize, of: &[usize], out: &mut [T]) {
    for (row, i) in rows.chunks_exact(width).zip(of) {
        out[i * width..][..width].copy_from_slice(row);
    }
}
