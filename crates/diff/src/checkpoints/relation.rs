//! What turns one tensor into the other: hypotheses, tried only on tensors that differ.
//!
//! A hypothesis has to explain the difference: identical tensors are identical, whatever else they may be (a square one
//! its own transpose, for example), and quantisation noise is not made smaller by a permutation.

use apr_model::HeadRows;
use apr_tensor::Stored;
use serde::Serialize;

use super::{Cell, TensorPair, pairing::whole_heads};
use crate::{Metrics, Result, Side, metrics::Accumulator};

/// A hypothesis explains a difference if it leaves no more than this share of it.
const EXPLAINS: f64 = 0.25;
/// Larger tensors are not transposed: that takes one of them in memory as a whole.
const MAX_TRANSPOSED: usize = 1 << 28;

/// What turns the tensor under test into the reference's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Relation {
    /// What it is.
    pub kind: RelationKind,
    /// The relative L2 that it leaves.
    #[serde(serialize_with = "crate::metrics::option_number")]
    pub relative_l2: Option<f64>,
}

/// A way in which tensors are wrongly stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RelationKind {
    /// Rows and columns are exchanged.
    Transposed,
    /// The rows of each head are in interleaved pairs where the reference has halves.
    RowsInterleaved,
    /// The rows of each head are in halves where the reference has interleaved pairs.
    RowsInHalves,
}

/// The relation that explains a difference of `error` best, with the numbers under it.
pub(super) fn find(
    pair: &TensorPair<'_>,
    a: &Stored,
    b: &Stored,
    error: f64,
) -> Result<Option<(Relation, Metrics<Cell>)>> {
    let mut best: Option<(Relation, Metrics<Cell>)> = None;
    let mut consider = |kind, metrics: Metrics<Cell>| {
        let Some(left) = metrics.relative_l2 else { return };
        let better =
            |(relation, _): &(Relation, _)| relation.relative_l2.is_none_or(|l2| left < l2);
        // Between different shapes nothing was measured, so a transposition has to stand on its own.
        let before = if error.is_finite() { error } else { 1.0 };
        if left < before && left <= EXPLAINS * before && best.as_ref().is_none_or(better) {
            best = Some((Relation { kind, relative_l2: Some(left) }, metrics));
        }
    };
    if let Some(metrics) = transposed(pair, a, b)? {
        consider(RelationKind::Transposed, metrics);
    }
    let head_dim = pair.a.head_dim().or(pair.b.head_dim());
    if let (Some(role), Some(head_dim)) = (pair.role, head_dim)
        && a.shape() == b.shape()
        && whole_heads(a, role, head_dim)
    {
        let halves = |stored: &Stored, side| {
            let halves = HeadRows::Interleaved.to_halves(role, stored, head_dim);
            halves.map_err(|error| pair.blame_model(side, error))
        };
        consider(RelationKind::RowsInterleaved, pair.rows(&halves(a, Side::A)?, b)?);
        consider(RelationKind::RowsInHalves, pair.rows(a, &halves(b, Side::B)?)?);
    }
    Ok(best)
}

/// The numbers of `a` against the transpose of `b`, if their shapes allow.
fn transposed(pair: &TensorPair<'_>, a: &Stored, b: &Stored) -> Result<Option<Metrics<Cell>>> {
    let (&[rows, cols], &[b_rows, b_cols]) = (a.shape().dims(), b.shape().dims()) else {
        return Ok(None);
    };
    if (rows, cols) != (b_cols, b_rows)
        || rows.min(cols) < 2
        || a.shape().elements() > MAX_TRANSPOSED
    {
        return Ok(None);
    }
    let b = b.to_f32().map_err(|error| pair.blame(Side::B, error))?;
    let mut buffer = vec![0.0; cols];
    let mut sum = Accumulator::default();
    for row in 0..rows {
        a.dequantize_row(row, &mut buffer).map_err(|error| pair.blame(Side::A, error))?;
        let row_a: Vec<f64> = buffer.iter().map(|&x| x.into()).collect();
        let column_b: Vec<f64> = (0..cols).map(|col| b[col * rows + row].into()).collect();
        sum.add(&row_a, &column_b, |col| Cell { row, col });
    }
    Ok(Some(sum.metrics()))
}
