//! Two tensors of one shape against each other, row by row on all cores.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    Cell,
    rows::{Reader, Rows},
    steps::{StepSum, Steps},
};
use crate::{Metrics, metrics::Accumulator};

/// Elements that one task takes in: sums are formed in the same order whatever the number of threads.
const TASK: usize = 1 << 16;

/// No type that is used for weights loses more than this share of their norm. Where a wrong scale makes the
/// steps huge, everything is within a step.
const COARSEST: f64 = 0.5;

/// How far two tensors are apart.
#[derive(Clone, Debug)]
pub(super) struct Score {
    pub(super) metrics: Metrics<Cell>,
    /// `None` if nothing is finite.
    pub(super) steps: Option<Steps>,
}

impl Score {
    /// Whether rounding explains all of the difference.
    pub(super) fn explained(&self) -> bool {
        self.metrics.within(COARSEST) && self.steps.is_some_and(|steps| steps.explained())
    }
}

/// Compares tensors of the same dimensions.
pub(super) fn score(a: &dyn Rows, b: &dyn Rows) -> Score {
    let [rows, cols] = a.dims();
    assert_eq!([rows, cols], b.dims(), "tensors of one shape are compared");
    // A tensor of nothing may claim any number of rows, or rows of any length.
    if rows == 0 || cols == 0 {
        return Score { metrics: Accumulator::default().metrics(), steps: None };
    }
    let each = (TASK / cols).max(1);
    let parts: Vec<_> = (0..rows.div_ceil(each))
        .into_par_iter()
        .map(|task| part(a, b, task * each..rows.min((task + 1) * each)))
        .collect();
    let (mut sum, mut steps) = (Accumulator::default(), StepSum::default());
    for (part, part_steps) in &parts {
        sum.merge(part);
        steps.merge(part_steps);
    }
    Score { metrics: sum.metrics(), steps: steps.steps() }
}

fn part(a: &dyn Rows, b: &dyn Rows, rows: Range<usize>) -> (Accumulator<Cell>, StepSum) {
    let [_, cols] = a.dims();
    let mut read = Reader::new(cols);
    let mut wide = [vec![0.0f64; cols], vec![0.0f64; cols]];
    let (mut sum, mut step_sum) = (Accumulator::default(), StepSum::default());
    for row in rows {
        let [values_a, values_b, steps] = read.row([a, b], [row; 2]);
        for (wide, values) in wide.iter_mut().zip([values_a, values_b]) {
            wide.iter_mut().zip(values).for_each(|(to, &from)| *to = from.into());
        }
        sum.add(&wide[0], &wide[1], |col| Cell { row, col });
        step_sum.add_row(row, values_a, values_b, steps);
    }
    (sum, step_sum)
}

/// Whether rounding explains the difference of row `rows[0]` of `a` and row `rows[1]` of `b`.
pub(super) fn row_explained(a: &dyn Rows, b: &dyn Rows, rows: [usize; 2]) -> bool {
    let [_, cols] = a.dims();
    let mut read = Reader::new(cols);
    let [a, b, steps] = read.row([a, b], rows);
    let mut sum = StepSum::default();
    sum.add_row(0, a, b, steps);
    a.iter().chain(b).all(|x| x.is_finite()) && sum.steps().is_some_and(|sum| sum.explained())
}

/// The mean of `a - b` over what is finite.
pub(super) fn mean_difference(a: &dyn Rows, b: &dyn Rows) -> f64 {
    let [rows, cols] = a.dims();
    let mut read = Reader::new(cols);
    let (mut sum, mut count) = (0.0, 0.0);
    for row in 0..rows {
        let [a, b, _] = read.row([a, b], [row; 2]);
        for diff in a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b)) {
            if diff.is_finite() {
                sum += diff;
                count += 1.0;
            }
        }
    }
    sum / count
}
