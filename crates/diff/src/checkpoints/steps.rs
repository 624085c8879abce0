//! A difference in units of what the stored types resolve: the quantiser's own rounding, or more than that.
//!
//! A number that is rounded to nearest is off by at most half a [step](apr_tensor::block::steps) of its block. Quantisers that fit
//! a scale to many weights let the few largest be cut off, by more. So whole tensors, rows and blocks are judged by the
//! root of the mean square, and single elements generously. No bound depends on the model.

use serde::Serialize;

use super::Cell;
use crate::metrics::number;

/// Neighbouring elements that are judged together: a block of most types, a sub-block of the others.
pub(super) const BLOCK: usize = 32;

/// The difference of two tensors in units of steps: those of both sides added up, element by element.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Steps {
    /// The root mean square over the tensor.
    #[serde(serialize_with = "number")]
    pub rms: f64,
    /// That of the row where it is largest.
    pub worst_row: Peak<usize>,
    /// That of the 32 neighbouring elements of a row where it is largest; `at` is the first of them.
    pub worst_block: Peak<Cell>,
    /// The largest of a single element.
    pub worst_element: Peak<Cell>,
}

/// A largest value and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Peak<At> {
    /// Where.
    pub at: At,
    /// How large, in steps.
    #[serde(serialize_with = "number")]
    pub steps: f64,
}

impl Steps {
    /// The largest root mean square, of anything from a block to a tensor, that rounding leaves: half a step is as far off as
    /// one number can be, where none is cut off.
    pub const RMS: f64 = 0.5;
    /// The largest error of one element: fitted scales cut off by more than half a step, and no quantiser seen by a whole one.
    pub const ELEMENT: f64 = 4.0;

    /// Whether rounding to the stored types explains the difference.
    pub fn explained(&self) -> bool {
        let Self { rms, worst_row, worst_block, worst_element } = self;
        let within = [*rms, worst_row.steps, worst_block.steps].map(|rms| rms <= Self::RMS);
        within == [true; 3] && worst_element.steps <= Self::ELEMENT
    }
}

impl<At: Copy> Peak<At> {
    /// The larger of the two; what is no number is larger than any.
    fn or(self, other: Self) -> Self {
        if other.steps > self.steps || other.steps.is_nan() && !self.steps.is_nan() {
            other
        } else {
            self
        }
    }
}

/// What [`Steps`] are made of.
#[derive(Clone, Debug, Default)]
pub(super) struct StepSum {
    squares: f64,
    count: u64,
    row: Option<Peak<usize>>,
    block: Option<Peak<Cell>>,
    element: Option<Peak<Cell>>,
}

impl StepSum {
    /// Takes in row `row`: the values of both sides, and the steps of both added up.
    pub(super) fn add_row(&mut self, row: usize, a: &[f32], b: &[f32], steps: &[f32]) {
        let (mut squares, mut count) = (0.0, 0);
        for (col, block) in blocks(a, b, steps) {
            squares += block.squares;
            count += block.count;
            if let Some(rms) = block.rms() {
                peak(&mut self.block, Cell { row, col }, rms);
                peak(&mut self.element, Cell { row, col: col + block.worst.at }, block.worst.steps);
            }
        }
        if count > 0 {
            peak(&mut self.row, row, (squares / count as f64).sqrt());
        }
        self.squares += squares;
        self.count += count;
    }

    /// Takes in what `later` has seen.
    pub(super) fn merge(&mut self, later: &Self) {
        fn merge<At: Copy>(ours: &mut Option<Peak<At>>, theirs: Option<Peak<At>>) {
            if let Some(theirs) = theirs {
                peak(ours, theirs.at, theirs.steps);
            }
        }
        self.squares += later.squares;
        self.count += later.count;
        merge(&mut self.row, later.row);
        merge(&mut self.block, later.block);
        merge(&mut self.element, later.element);
    }

    /// `None` if nothing finite was seen.
    pub(super) fn steps(&self) -> Option<Steps> {
        Some(Steps {
            rms: (self.squares / self.count as f64).sqrt(),
            worst_row: self.row?,
            worst_block: self.block?,
            worst_element: self.element?,
        })
    }
}

/// The error of neighbouring elements, in steps. Pairs that are not finite take no part.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockError {
    squares: f64,
    count: u64,
    worst: Peak<usize>,
}

impl BlockError {
    fn rms(&self) -> Option<f64> {
        (self.count > 0).then(|| (self.squares / self.count as f64).sqrt())
    }

    /// Whether rounding explains it.
    pub(super) fn explained(&self) -> bool {
        self.rms().is_none_or(|rms| rms <= Steps::RMS && self.worst.steps <= Steps::ELEMENT)
    }
}

/// The blocks of a row: the first column of each, and its error.
pub(super) fn blocks(
    a: &[f32],
    b: &[f32],
    steps: &[f32],
) -> impl Iterator<Item = (usize, BlockError)> {
    let pairs = a.chunks(BLOCK).zip(b.chunks(BLOCK)).zip(steps.chunks(BLOCK));
    pairs.enumerate().map(|(i, ((a, b), steps))| (i * BLOCK, block(a, b, steps)))
}

fn block(a: &[f32], b: &[f32], steps: &[f32]) -> BlockError {
    let mut error = BlockError { squares: 0.0, count: 0, worst: Peak { at: 0, steps: -1.0 } };
    for (at, ((&a, &b), &step)) in a.iter().zip(b).zip(steps).enumerate() {
        if !(a.is_finite() && b.is_finite()) {
            continue;
        }
        let diff = (f64::from(a) - f64::from(b)).abs();
        // Without a difference there is nothing to measure, even where the step is zero.
        let steps = if diff == 0.0 { 0.0 } else { diff / f64::from(step) };
        error.squares += steps * steps;
        error.count += 1;
        error.worst = error.worst.or(Peak { at, steps });
    }
    error
}

fn peak<At: Copy>(peak: &mut Option<Peak<At>>, at: At, steps: f64) {
    let new = Peak { at, steps };
    *peak = Some(peak.map_or(new, |old| old.or(new)));
}
