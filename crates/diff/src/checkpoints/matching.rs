//! Which row of one tensor is which of another: nearest neighbours by a few of their numbers.

use apr_model::{LayerRole, Role};
use apr_tensor::Stored;

use super::{rows::Rows, score::row_explained};

/// Numbers of a row that it is known by.
const SIGNATURE: usize = 32;
/// Rows that are looked for before all are.
const SAMPLE: usize = 8;
/// Pairs of rows that are tried at most.
const MAX_PAIRS: usize = 1 << 27;

/// Where the rows of a tensor come from.
pub(super) enum Moved {
    /// Row `r` is row `r + by`.
    Shifted(isize),
    /// The source of each row.
    Rows(Vec<usize>),
}

/// Up to `count` numbers below `len`, evenly spread.
pub(super) fn spread(len: usize, count: usize) -> impl Iterator<Item = usize> {
    let count = count.min(len);
    (0..count).map(move |i| i * len / count + len / count / 2)
}

/// The rows of `a` that differ from those of `b` by more than rounding.
pub(super) fn strays(a: &dyn Rows, b: &dyn Rows) -> Vec<usize> {
    (0..a.dims()[0]).filter(|&row| !row_explained(a, b, [row; 2])).collect()
}

/// Looks for the [`strays`] of `a` among all rows of `b`.
pub(super) fn moved(a: &dyn Rows, b: &dyn Rows, strays: &[usize]) -> Option<Moved> {
    let [rows, cols] = a.dims();
    if rows < 2 || cols < 2 {
        return None;
    }
    let (of_a, of_b) = (signatures(a), signatures(b));
    let found: Vec<(usize, usize)> = spread(strays.len(), SAMPLE)
        .map(|i| (strays[i], of_b.nearest(of_a.of(strays[i]), strays[i])))
        .filter(|&(row, source)| row != source && row_explained(a, b, [row, source]))
        .collect();
    // Rows that a shift has pushed over the edge have no source.
    let (&(row, source), needed) = (found.first()?, strays.len().min(SAMPLE) - 1);
    if found.len() < needed.max(1) {
        return None;
    }
    let by = source as isize - row as isize;
    let most = strays.len() + by.unsigned_abs() >= rows;
    if most && found.iter().all(|&(row, source)| source as isize - row as isize == by) {
        return Some(Moved::Shifted(by));
    }
    if strays.len().saturating_mul(rows) > MAX_PAIRS {
        return None;
    }
    let mut sources: Vec<usize> = (0..rows).collect();
    for &row in strays {
        sources[row] = of_b.nearest(of_a.of(row), row);
    }
    Some(Moved::Rows(sources))
}

/// A few numbers of each row.
struct Signatures {
    width: usize,
    numbers: Vec<f32>,
}

fn signatures(of: &dyn Rows) -> Signatures {
    let [rows, cols] = of.dims();
    let columns: Vec<usize> = spread(cols, SIGNATURE).collect();
    let mut row_of = vec![0.0; cols];
    let mut numbers = Vec::with_capacity(rows * columns.len());
    for row in 0..rows {
        of.values(row, &mut row_of);
        numbers.extend(columns.iter().map(|&col| row_of[col]));
    }
    Signatures { width: columns.len(), numbers }
}

impl Signatures {
    fn of(&self, row: usize) -> &[f32] {
        &self.numbers[row * self.width..(row + 1) * self.width]
    }

    /// The row that is nearest to `wanted`; `own` if there is none.
    fn nearest(&self, wanted: &[f32], own: usize) -> usize {
        let mut best = (own, f32::INFINITY);
        for (row, numbers) in self.numbers.chunks_exact(self.width).enumerate() {
            let mut distance = 0.0;
            for (x, y) in wanted.chunks(8).zip(numbers.chunks(8)) {
                distance += x.iter().zip(y).map(|(x, y)| (x - y) * (x - y)).sum::<f32>();
                if distance >= best.1 {
                    break;
                }
            }
            if distance < best.1 {
                best = (row, distance);
            }
        }
        best.0
    }
}

/// Which head each head is, if `sources` move whole heads of the tensor of `role`.
pub(super) fn whole_heads_moved(
    role: Role,
    head_dim: usize,
    sources: &[usize],
) -> Option<Vec<usize>> {
    use LayerRole::{AttnK, AttnQ, AttnV};
    if !matches!(role, Role::Layer(_, AttnQ | AttnK | AttnV)) || head_dim == 0 {
        return None;
    }
    let heads = sources.chunks_exact(head_dim);
    if !heads.remainder().is_empty() {
        return None;
    }
    let whole = |head: &[usize]| {
        let in_order = head.iter().enumerate().all(|(i, &source)| source == head[0] + i);
        (in_order && head[0].is_multiple_of(head_dim)).then_some(head[0] / head_dim)
    };
    heads.map(whole).collect()
}

/// Whether the elements of the tensor of `role` are whole heads.
pub(super) fn is_bias_of_heads(role: Role, stored: &Stored, head_dim: usize) -> bool {
    use LayerRole::{AttnKBias, AttnQBias, AttnVBias};
    matches!(role, Role::Layer(_, AttnQBias | AttnKBias | AttnVBias))
        && head_dim >= 2
        && stored.shape().elements().is_multiple_of(head_dim)
}
