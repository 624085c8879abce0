//! Captures of experts that are not what they say: the engine was right, what was written down is not.

use apr_model::{Site, Stage};

use super::normalizes;
use crate::{
    Fault,
    fault::{CapturePlace, Family, Plant},
    recording::Recording,
};

/// Values of each expert of a row.
const OF_SLOTS: &[Stage] = &[
    Stage::MoeExpertGate,
    Stage::MoeExpertUp,
    Stage::MoeExpertSilu,
    Stage::MoeExpertSwigl,
    Stage::MoeExpertOut,
];

const fn capture(
    name: &'static str,
    stages: &'static [Stage],
    change: fn(&CapturePlace<'_>, &mut Recording),
    about: &'static str,
) -> Fault {
    Fault::new(name, Family::Capture, stages, Plant::Capture(change), about)
}

pub(in crate::catalogue) const FAULTS: &[Fault] = &[
    capture(
        "captured-weights-by-id",
        &[Stage::MoeRouterWeights],
        slots_by_id,
        "The weights were captured in the order of the experts' ids, the ids in that of the weights.",
    )
    .diagnosed(&["router-slots-exchanged"]),
    capture(
        "captured-weights-unnormalised",
        &[Stage::MoeRouterWeights],
        weights_unnormalised,
        "Weights were captured before they were divided by their sum.",
    )
    .only(normalizes)
    .diagnosed(&["router-not-renormalised"]),
    capture(
        "captured-experts-by-id",
        OF_SLOTS,
        slots_by_id,
        "The experts of a row were captured in the order of their ids, not of their weights.",
    )
    .diagnosed(&["slots-exchanged", "experts-of-other-slots"]),
    capture(
        "captured-slots-outermost",
        OF_SLOTS,
        slots_outermost,
        "The values are written slot by slot: the first expert of all rows, then the second.",
    ),
    capture(
        "captured-experts-weighted",
        &[Stage::MoeExpertOut],
        experts_weighted,
        "The experts' results were captured after they were weighted.",
    )
    .diagnosed(&["experts-weighted"]),
];

fn at(place: &CapturePlace<'_>, stage: Stage) -> Site {
    Site { stage, ..place.site }
}

/// Lets `change` make each row of the site from that row of `stage` and its own.
fn each_row(
    place: &CapturePlace<'_>,
    recording: &mut Recording,
    stage: Stage,
    change: impl Fn(&[f64], &mut [f64]),
) {
    for step in 0..recording.steps.len() {
        let Some((tensor, other)) = recording.get(step, at(place, stage)) else { continue };
        let (rows, other) = (tensor.shape[0], other.to_vec());
        let Some((_, values)) = recording.get_mut(step, place.site) else { continue };
        let (of_other, width) = (other.len() / rows, values.len() / rows);
        let rows = other.chunks_exact(of_other).zip(values.chunks_exact_mut(width));
        rows.for_each(|(other, row)| change(other, row));
    }
}

fn weights_unnormalised(place: &CapturePlace<'_>, recording: &mut Recording) {
    // The probabilities of the chosen are to each other as their weights are; those of all sum to one.
    each_row(place, recording, Stage::MoeRouter, |logits, weights| {
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut powers: Vec<f64> = logits.iter().map(|logit| libm::exp(logit - max)).collect();
        powers.sort_by(|a, b| b.total_cmp(a));
        let chosen: f64 = powers[..weights.len()].iter().sum();
        let share = chosen / powers.iter().sum::<f64>();
        weights.iter_mut().for_each(|weight| *weight *= share);
    });
}

fn slots_by_id(place: &CapturePlace<'_>, recording: &mut Recording) {
    each_row(place, recording, Stage::MoeRouterIndices, |ids, row| {
        let (right, width) = (row.to_vec(), row.len() / ids.len());
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_by(|&a, &b| ids[a].total_cmp(&ids[b]));
        for (slot, from) in row.chunks_exact_mut(width).zip(order) {
            slot.copy_from_slice(&right[from * width..][..width]);
        }
    });
}

fn slots_outermost(place: &CapturePlace<'_>, recording: &mut Recording) {
    for step in 0..recording.steps.len() {
        let Some((tensor, values)) = recording.get_mut(step, place.site) else { continue };
        let [n, k, width] = tensor.shape[..] else { continue };
        let right = values.clone();
        for (to, slot) in values.chunks_exact_mut(width).enumerate() {
            let from = to % n * k + to / n;
            slot.copy_from_slice(&right[from * width..][..width]);
        }
    }
}

fn experts_weighted(place: &CapturePlace<'_>, recording: &mut Recording) {
    each_row(place, recording, Stage::MoeRouterWeights, |weights, row| {
        let width = row.len() / weights.len();
        for (weight, slot) in weights.iter().zip(row.chunks_exact_mut(width)) {
            slot.iter_mut().for_each(|x| *x *= weight);
        }
    });
}
