//! The choice of experts, their weights, and the sum by these.

use apr_model::{HostTensor, Result, Stage};
use half::{bf16, f16};

use super::normalizes;
use crate::{
    Fault,
    fault::{Family, OpFault, Plant},
    op::{ExpertSum, RouteWeights, TopK, row_len},
};

const fn choice(
    name: &'static str,
    damage: fn(&TopK<'_>, &mut HostTensor) -> Result<()>,
    about: &'static str,
) -> Fault {
    const IDS: &[Stage] = &[Stage::MoeRouterIndices];
    Fault::new(name, Family::Experts, IDS, Plant::Op(OpFault::TopK(damage)), about)
}

const fn weights(
    name: &'static str,
    damage: fn(&RouteWeights<'_>, &mut HostTensor) -> Result<()>,
    about: &'static str,
) -> Fault {
    const WEIGHTS: &[Stage] = &[Stage::MoeRouterWeights];
    Fault::new(name, Family::Experts, WEIGHTS, Plant::Op(OpFault::RouteWeights(damage)), about)
}

const fn sum(
    name: &'static str,
    damage: fn(&ExpertSum<'_>, &mut HostTensor) -> Result<()>,
    about: &'static str,
) -> Fault {
    const OUT: &[Stage] = &[Stage::FfnOut];
    Fault::new(name, Family::Experts, OUT, Plant::Op(OpFault::ExpertSum(damage)), about)
}

pub(in crate::catalogue) const FAULTS: &[Fault] = &[
    choice(
        "top-k-off-by-one",
        off_by_one,
        "The k-th expert is passed over for the next one, or the first is and all move up.",
    )
    .graded()
    .diagnosed(&["top-k-off-by-one"]),
    choice("top-k-smallest", smallest, "The experts with the smallest logits are chosen.")
        .diagnosed(&["top-k-smallest"]),
    choice("top-k-of-magnitudes", magnitudes, "The logits' sign is ignored in the choice.")
        .diagnosed(&["top-k-of-magnitudes"]),
    choice("top-k-of-row-before", ids_of_before, "Experts are those of the token before.")
        .diagnosed(&["rows-of-another-token"]),
    choice(
        "top-k-twice",
        twice,
        "The largest logit is not taken out once chosen: it fills the last slot too, or all.",
    )
    .graded()
    .diagnosed(&["top-k-repeated"]),
    choice("top-k-of-half", of_half, "Only the first half of the experts is looked at.")
        .diagnosed(&["top-k-of-part"]),
    weights(
        "router-not-renormalised",
        not_renormalised,
        "The probabilities of the chosen experts are not divided by their sum.",
    )
    .only(normalizes)
    .diagnosed(&["router-not-renormalised"]),
    weights(
        "router-renormalised",
        renormalised,
        "The probabilities of the chosen experts are divided by their sum, which the model does not ask for.",
    )
    .only(|target| !normalizes(target))
    .diagnosed(&["router-renormalised"]),
    weights("router-sigmoid", sigmoid, "Weights are sigmoids of the logits, as DeepSeek-V3's are.")
        .diagnosed(&["router-sigmoid"]),
    weights("router-base-2", base_2, "The router's softmax takes powers of 2.")
        .diagnosed(&["router-temperature"]),
    weights("router-temperature", tempered, "The router's logits are divided by 1.05, or by 2.")
        .graded()
        .diagnosed(&["router-temperature"]),
    weights("router-weights-exchanged", exchanged, "Weights are those of the slot before.")
        .diagnosed(&["router-slots-exchanged", "channels-exchanged"]),
    weights("router-weights-of-row-before", of_before, "Weights are those of the token before."),
    weights("router-weights-equal", equal, "All experts of a token have the same weight.")
        .diagnosed(&["router-weights-equal"]),
    weights(
        "router-last-expert-unused",
        last_unused,
        "Only k - 1 experts are used: the last one's weight is zero, and the others' sum is as it should be.",
    )
    .diagnosed(&["router-last-expert-unused"]),
    weights(
        "router-weights-scaled",
        scaled,
        "Weights are off by a factor: 1.001, or 2.5, which is DeepSeek-V3's.",
    )
    .graded()
    .diagnosed(&["constant-factor"]),
    weights("router-weights-rounded", rounded, "Weights are rounded to f16, or to bf16.").graded(),
    sum("experts-slot-missing", slot_missing, "The sum leaves a slot out: the last, or the first.")
        .graded()
        .diagnosed(&["experts-slot-missing"]),
    sum("experts-slot-twice", slot_twice, "The sum has the first slot twice.")
        .diagnosed(&["experts-slot-twice"]),
    sum("experts-unweighted", unweighted, "The sum has no weights.")
        .diagnosed(&["experts-unweighted"]),
    sum(
        "experts-weighted-twice",
        weighted_twice,
        "The experts' results are weighted once more in the sum.",
    )
    .diagnosed(&["experts-weighted-twice"]),
    sum(
        "experts-weights-exchanged",
        sum_exchanged,
        "The sum weights each slot with the weight of the one before.",
    )
    .diagnosed(&["experts-weights-exchanged"]),
    sum("experts-sum-of-other-token", other_token, "Sums are added up in the next token's row.")
        .diagnosed(&["rows-of-another-token"]),
    sum("experts-sum-f16", sum_f16, "The sum over experts is kept in half precision."),
];

fn off_by_one(op: &TopK<'_>, y: &mut HostTensor) -> Result<()> {
    let longer = op.kernels.top_k(&op.logits, op.k + 1)?;
    let passed_over = op.place.pick(op.k - 1, 0);
    let rows = y.values.chunks_exact_mut(op.k).zip(longer.values.chunks_exact(op.k + 1));
    rows.for_each(|(y, longer)| y[passed_over..].copy_from_slice(&longer[passed_over + 1..]));
    Ok(())
}

/// The choice by `f` of each logit and its id.
fn by(op: &TopK<'_>, y: &mut HostTensor, f: impl Fn(f64, usize) -> f64) -> Result<()> {
    let mut logits = op.logits.clone();
    let experts = row_len(&logits);
    for row in logits.values.chunks_exact_mut(experts) {
        row.iter_mut().enumerate().for_each(|(id, logit)| *logit = f(*logit, id));
    }
    *y = op.kernels.top_k(&logits, op.k)?;
    Ok(())
}

fn smallest(op: &TopK<'_>, y: &mut HostTensor) -> Result<()> {
    by(op, y, |logit, _| -logit)
}

fn magnitudes(op: &TopK<'_>, y: &mut HostTensor) -> Result<()> {
    by(op, y, |logit, _| logit.abs())
}

fn of_half(op: &TopK<'_>, y: &mut HostTensor) -> Result<()> {
    let half = row_len(&op.logits) / 2;
    by(op, y, |logit, id| if id < half { logit } else { f64::NEG_INFINITY })
}

fn twice(op: &TopK<'_>, y: &mut HostTensor) -> Result<()> {
    let from = op.place.pick(op.k - 1, 1);
    y.values.chunks_exact_mut(op.k).for_each(|ids| {
        let first = ids[0];
        ids[from..].fill(first);
    });
    Ok(())
}

/// Each row but the first becomes the one before it.
fn moved_down(y: &mut HostTensor) {
    let len = row_len(y);
    let kept = y.values.len() - len;
    y.values.copy_within(..kept, len);
}

fn ids_of_before(_: &TopK<'_>, y: &mut HostTensor) -> Result<()> {
    moved_down(y);
    Ok(())
}

fn not_renormalised(op: &RouteWeights<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.kernels.route_weights(&op.logits, &op.ids, false)?;
    Ok(())
}

fn renormalised(op: &RouteWeights<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.kernels.route_weights(&op.logits, &op.ids, true)?;
    Ok(())
}

/// Changes the weights of each row.
fn each_row(y: &mut HostTensor, change: impl Fn(&mut [f64])) -> Result<()> {
    let k = row_len(y);
    y.values.chunks_exact_mut(k).for_each(change);
    Ok(())
}

fn divide_by_sum(weights: &mut [f64]) {
    let sum: f64 = weights.iter().sum();
    weights.iter_mut().for_each(|weight| *weight /= sum);
}

fn sigmoid(op: &RouteWeights<'_>, y: &mut HostTensor) -> Result<()> {
    let (experts, k) = (row_len(&op.logits), row_len(&op.ids));
    let rows = op.logits.values.chunks_exact(experts).zip(op.ids.values.chunks_exact(k));
    for ((logits, ids), y) in rows.zip(y.values.chunks_exact_mut(k)) {
        let sigma = |id: &f64| 1.0 / (1.0 + libm::exp(-logits[*id as usize]));
        y.iter_mut().zip(ids).for_each(|(y, id)| *y = sigma(id));
        if op.normalize {
            divide_by_sum(y);
        }
    }
    Ok(())
}

fn base_2(op: &RouteWeights<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.with_logits(|logit| logit * std::f64::consts::LN_2)?;
    Ok(())
}

fn tempered(op: &RouteWeights<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.with_logits(|logit| logit / op.place.pick(1.05, 2.0))?;
    Ok(())
}

fn exchanged(_: &RouteWeights<'_>, y: &mut HostTensor) -> Result<()> {
    each_row(y, |weights| weights.rotate_right(1))
}

fn of_before(_: &RouteWeights<'_>, y: &mut HostTensor) -> Result<()> {
    moved_down(y);
    Ok(())
}

fn equal(_: &RouteWeights<'_>, y: &mut HostTensor) -> Result<()> {
    each_row(y, |weights| weights.fill(1.0 / weights.len() as f64))
}

fn last_unused(op: &RouteWeights<'_>, y: &mut HostTensor) -> Result<()> {
    each_row(y, |weights| {
        let Some((last, used)) = weights.split_last_mut() else { return };
        *last = 0.0;
        if op.normalize {
            divide_by_sum(used);
        }
    })
}

fn scaled(op: &RouteWeights<'_>, y: &mut HostTensor) -> Result<()> {
    let factor = op.place.pick(1.001, 2.5);
    y.values.iter_mut().for_each(|weight| *weight *= factor);
    Ok(())
}

fn rounded(op: &RouteWeights<'_>, y: &mut HostTensor) -> Result<()> {
    let half = |x: f64| f16::from_f64(x).to_f64();
    let brain = |x: f64| bf16::from_f64(x).to_f64();
    let round: fn(f64) -> f64 = op.place.pick(half, brain);
    y.values.iter_mut().for_each(|weight| *weight = round(*weight));
    Ok(())
}

fn slot_missing(op: &ExpertSum<'_>, y: &mut HostTensor) -> Result<()> {
    let slot = op.place.pick(row_len(&op.weights) - 1, 0);
    *y = op.weighted(|weights| weights[slot] = 0.0)?;
    Ok(())
}

fn slot_twice(op: &ExpertSum<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.weighted(|weights| weights[0] *= 2.0)?;
    Ok(())
}

fn unweighted(op: &ExpertSum<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.weighted(|weights| weights.fill(1.0))?;
    Ok(())
}

fn weighted_twice(op: &ExpertSum<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.weighted(|weights| weights.iter_mut().for_each(|weight| *weight *= *weight))?;
    Ok(())
}

fn sum_exchanged(op: &ExpertSum<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.weighted(|weights| weights.rotate_right(1))?;
    Ok(())
}

fn other_token(_: &ExpertSum<'_>, y: &mut HostTensor) -> Result<()> {
    let len = row_len(y);
    y.values.rotate_right(len);
    Ok(())
}

fn sum_f16(op: &ExpertSum<'_>, y: &mut HostTensor) -> Result<()> {
    let width = row_len(y);
    let k = row_len(&op.weights);
    for (row, y) in y.values.chunks_exact_mut(width).enumerate() {
        y.fill(0.0);
        for slot in row * k..(row + 1) * k {
            let weight = op.weights.values[slot];
            for (y, x) in y.iter_mut().zip(&op.x.values[slot * width..]) {
                *y = f16::from_f64(*y + weight * x).to_f64();
            }
        }
    }
    Ok(())
}
