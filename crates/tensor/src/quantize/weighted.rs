//! The numbers of a block, and how much an error of each matters.

use super::{
    Input,
    search::{each, extremes, sums},
};
use crate::block::Half;

/// `B` sub-blocks of `S` numbers, in units of a power of two that makes the largest 1 to 2, so that
/// searches neither overflow nor lose bits; and the weight of the squared error of each.
pub(super) struct Weighted<const S: usize, const B: usize> {
    pub(super) x: [[f32; S]; B],
    pub(super) w: [[f32; S]; B],
    unit: f32,
}

/// The weight of an error where nothing is known of the activations, as a function of the number.
#[derive(Clone, Copy)]
pub(super) enum Weight {
    /// Its square, so that relative errors count: for types without a minimum, whose large numbers
    /// decide the scale.
    Square,
    /// Its magnitude.
    Magnitude,
    /// Its magnitude, and the root mean square of its sub-block.
    MagnitudeAndMean,
}

/// What an importance is multiplied with.
#[derive(Clone, Copy)]
pub(super) enum Spread {
    /// One.
    None,
    /// `sqrt(m + x^2)`, where `m` is the mean square of the row.
    Row,
    /// `sqrt(times * m + x^2)`, where `m` is the mean square of the block.
    Block {
        /// See there.
        times: f32,
    },
}

impl<const S: usize, const B: usize> Weighted<S, B> {
    pub(super) fn new(input: &Input, weight: Weight, spread: Spread) -> Self {
        let mut x = [[0.0; S]; B];
        x.as_flattened_mut().copy_from_slice(input.values);
        let unit = unit(&x);
        let inverse = 1.0 / unit;
        x.as_flattened_mut().iter_mut().for_each(|x| *x *= inverse);
        let mut w = [[0.0; S]; B];
        let mean_squares = x.each_ref().map(|x| sums::<S, 1>(|i| [x[i] * x[i]])[0] / S as f32);
        let Some(importance) = input.importance else {
            for ((w, x), mean_square) in w.iter_mut().zip(&x).zip(mean_squares) {
                let mean = mean_square.sqrt();
                *w = match weight {
                    Weight::Square => each(|i| x[i] * x[i]),
                    Weight::Magnitude => each(|i| x[i].abs()),
                    Weight::MagnitudeAndMean => each(|i| mean + x[i].abs()),
                };
            }
            return Self { x, w, unit };
        };
        let mean_square = match spread {
            Spread::None => 0.0,
            // A row may be much larger than this block; then the block does not matter.
            Spread::Row => (importance.mean_square * f64::from(inverse).powi(2)).min(1e20) as f32,
            Spread::Block { times } => times * mean_squares.iter().sum::<f32>() / B as f32,
        };
        let all = w.as_flattened_mut().iter_mut().zip(x.as_flattened());
        for ((w, x), of_column) in all.zip(importance.columns) {
            let spread = match spread {
                Spread::None => 1.0,
                Spread::Row | Spread::Block { .. } => (mean_square + x * x).sqrt(),
            };
            *w = importance.relative(*of_column) * spread;
        }
        Self { x, w, unit }
    }

    /// A scale in half precision, and what that is in units of the block; `None` if it overflows.
    pub(super) fn half(&self, scale: f32) -> Option<(Half, f32)> {
        let half = Half::nearest(scale * self.unit)?;
        Some((half, half.to_f32() / self.unit))
    }
}

/// The largest power of two that is at most the largest magnitude. One for a block of subnormal
/// numbers, all of whose scales are zero in half precision.
fn unit<const S: usize, const B: usize>(x: &[[f32; S]; B]) -> f32 {
    let largest = x.iter().map(extremes).fold(0.0, |all: f32, (min, max)| all.max(max).max(-min));
    let power = f32::from_bits(largest.to_bits() & f32::INFINITY.to_bits());
    if power == 0.0 { 1.0 } else { power }
}
