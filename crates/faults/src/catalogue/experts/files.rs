//! Experts that are not the model's: exchanged, lost or stacked wrongly on the way into the file.
//!
//! The engine runs an altered file, and is faultless on that. The judge is given the original.

use std::ops::Range;

use apr_format::Draft;
use apr_model::{LayerRole, Role, Stage};
use apr_tensor::{DType, Stored};

use super::normalizes;
use crate::{
    Fault, Result, Severity,
    catalogue::weights::{is_scaled_exactly, scale, transpose, with_bytes},
    fault::{Blames, Family, FilePlace, Plant, Reach},
};

const PRODUCTS: &[Stage] = &[Stage::MoeExpertGate, Stage::MoeExpertUp, Stage::MoeExpertOut];

/// Where a fault of all three matrices of an expert begins.
const FIRST: &[Stage] = &[Stage::MoeExpertGate];

/// The three matrices of an expert.
const EXPERTS: [LayerRole; 3] =
    [LayerRole::FfnGateExps, LayerRole::FfnUpExps, LayerRole::FfnDownExps];

const fn file(
    name: &'static str,
    stages: &'static [Stage],
    alter: fn(&FilePlace<'_>, &mut Draft) -> Result<()>,
    about: &'static str,
) -> Fault {
    Fault::new(name, Family::Weights, stages, Plant::File(alter), about)
}

const fn config(
    name: &'static str,
    stages: &'static [Stage],
    alter: fn(&FilePlace<'_>, &mut Draft) -> Result<()>,
    about: &'static str,
) -> Fault {
    Fault::new(name, Family::Config, stages, Plant::File(alter), about).reaching(Reach::EveryLayer)
}

pub(in crate::catalogue) const FAULTS: &[Fault] = &[
    file("experts-swapped", FIRST, swapped, "Two experts of the layer are exchanged.")
        .also(PRODUCTS)
        .diagnosed(&["other-expert-weights"]),
    file(
        "expert-matrix-swapped",
        PRODUCTS,
        matrix_swapped,
        "One of the matrices of two experts is exchanged.",
    )
    .diagnosed(&["other-expert-weights"]),
    file(
        "expert-of-next-layer",
        // A down projection may be stored otherwise in the next layer.
        &[Stage::MoeExpertGate, Stage::MoeExpertUp],
        of_next_layer,
        "A matrix of an expert is exchanged with the next layer's.",
    )
    .reaching(Reach::NextLayer)
    .diagnosed(&["other-layer-weights"]),
    file(
        "expert-gate-up-swapped",
        FIRST,
        gate_up_swapped,
        "Gate and up projection of one expert are exchanged.",
    )
    .also(&[Stage::MoeExpertUp])
    .diagnosed(&["gate-up-swapped"]),
    file("expert-scaled", PRODUCTS, scaled, "One expert's matrix is off by a factor: 0.99, or 2.")
        .graded()
        .diagnosed(&["expert-scaled"])
        .closed(is_scaled_exactly),
    file("expert-zero", PRODUCTS, zeroed, "One expert's matrix was never read: it is zero.")
        .diagnosed(&["expert-missing", "all-zeros"]),
    file(
        "experts-in-order-of-names",
        FIRST,
        in_order_of_names,
        "The converter has stacked the experts in the order of their names: 0, 1, 10, 11, 2.",
    )
    .also(PRODUCTS)
    .reaching(Reach::EveryLayer)
    .diagnosed(&["other-expert-weights"]),
    file(
        "experts-innermost",
        PRODUCTS,
        innermost,
        "The converter has stacked the experts row by row: the first of each, then the second of each.",
    )
    .diagnosed(&["experts-interleaved"]),
    file(
        "experts-transposed",
        PRODUCTS,
        transposed,
        "The experts' matrices are square and stored transposed.",
    )
    .only(|target| target.weights.contains(&DType::F32))
    .diagnosed(&["weight-transposed"]),
    file(
        "router-rows-swapped",
        &[Stage::MoeRouter],
        router_swapped,
        "The router's rows of two experts are exchanged.",
    )
    .diagnosed(&["channels-exchanged"]),
    config(
        "file-experts-per-token",
        &[Stage::MoeRouterIndices],
        experts_per_token,
        "The file asks for one expert too few, or too many.",
    )
    .graded()
    // Values of another shape are compared with nothing.
    .blaming(Blames::Anything),
    config(
        "file-renormalised-not",
        &[Stage::MoeRouterWeights],
        other_norm,
        "The file does not ask for the weights to be divided by their sum, as the model does.",
    )
    .only(normalizes)
    .diagnosed(&["router-not-renormalised"]),
    config(
        "file-renormalised",
        &[Stage::MoeRouterWeights],
        other_norm,
        "The file asks for the weights to be divided by their sum, as the model does not.",
    )
    .only(|target| !normalizes(target))
    .diagnosed(&["router-renormalised"]),
];

fn count(place: &FilePlace<'_>) -> usize {
    place.config.moe.as_ref().map_or(1, |moe| moe.num_experts)
}

/// An expert beside the busiest one.
fn other_expert(place: &FilePlace<'_>) -> usize {
    let count = count(place);
    (place.expert + 1 + place.rng().below(count - 1)) % count
}

/// Brings the experts of a tensor into another order: `source_of(e)` in place of expert `e`.
fn reorder(
    place: &FilePlace<'_>,
    draft: &mut Draft,
    role: Role,
    source_of: impl Fn(usize) -> usize,
) -> Result<()> {
    let stored = place.tensor(draft, role)?;
    let rows = stored.shape().rows() / count(place);
    *stored = stored.permute_rows(|row| source_of(row / rows) * rows + row % rows);
    Ok(())
}

fn swap_two(place: &FilePlace<'_>, draft: &mut Draft, role: Role) -> Result<()> {
    let (a, b) = (place.expert, other_expert(place));
    reorder(place, draft, role, |expert| match expert {
        _ if expert == a => b,
        _ if expert == b => a,
        _ => expert,
    })
}

fn swapped(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    EXPERTS.into_iter().try_for_each(|role| swap_two(place, draft, place.of_layer(role)))
}

fn matrix_swapped(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    swap_two(place, draft, place.role())
}

fn router_swapped(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    swap_two(place, draft, place.role())
}

fn in_order_of_names(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let mut order: Vec<usize> = (0..count(place)).collect();
    order.sort_by_key(usize::to_string);
    for layer in 0..place.config.num_hidden_layers {
        for role in EXPERTS {
            reorder(place, draft, Role::Layer(layer, role), |expert| order[expert])?;
        }
    }
    Ok(())
}

fn innermost(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let stored = place.tensor(draft, place.role())?;
    let experts = count(place);
    let rows = stored.shape().rows() / experts;
    *stored = stored.permute_rows(|row| row % experts * rows + row / experts);
    Ok(())
}

/// The bytes of the busiest expert's matrix.
fn bytes_of_expert(place: &FilePlace<'_>, stored: &Stored) -> Range<usize> {
    let len = stored.bytes().len() / count(place);
    place.expert * len..(place.expert + 1) * len
}

/// Exchanges the busiest expert's matrix with the same one of another tensor of the same type.
fn swap_between(place: &FilePlace<'_>, draft: &mut Draft, a: Role, b: Role) -> Result<()> {
    let range = bytes_of_expert(place, place.tensor(draft, a)?);
    let first = place.tensor(draft, a)?.bytes()[range.clone()].to_vec();
    let second = place.tensor(draft, b)?.bytes()[range.clone()].to_vec();
    with_bytes(place.tensor(draft, a)?, |bytes| bytes[range.clone()].copy_from_slice(&second))?;
    with_bytes(place.tensor(draft, b)?, |bytes| bytes[range].copy_from_slice(&first))
}

fn gate_up_swapped(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let [gate, up, _] = EXPERTS.map(|role| place.of_layer(role));
    swap_between(place, draft, gate, up)
}

fn of_next_layer(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let role = place.role();
    let Role::Layer(_, of_layer) = role else { return Ok(()) };
    swap_between(place, draft, role, Role::Layer(place.next_layer(), of_layer))
}

fn zeroed(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let stored = place.tensor(draft, place.role())?;
    let range = bytes_of_expert(place, stored);
    with_bytes(stored, |bytes| bytes[range].fill(0))
}

/// Changes one expert's matrix, which stays of its type.
fn with_expert(
    stored: &mut Stored,
    experts: usize,
    expert: usize,
    change: impl FnOnce(&mut Stored) -> Result<()>,
) -> Result<()> {
    let rows = stored.shape().rows() / experts;
    let mut one = stored.slice_rows(expert * rows..(expert + 1) * rows);
    change(&mut one)?;
    let len = one.bytes().len();
    with_bytes(stored, |bytes| bytes[expert * len..][..len].copy_from_slice(one.bytes()))
}

fn scaled(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let factor = match place.severity {
        Severity::Subtle => 0.99,
        Severity::Gross => 2.0,
    };
    let stored = place.tensor(draft, place.role())?;
    with_expert(stored, count(place), place.expert, |one| scale(one, factor))
}

fn transposed(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let experts = count(place);
    let stored = place.tensor(draft, place.role())?;
    (0..experts).try_for_each(|expert| with_expert(stored, experts, expert, transpose))
}

fn experts_per_token(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let k = place.config.moe.as_ref().map_or(1, |moe| moe.num_experts_per_tok);
    let other = match place.severity {
        Severity::Subtle => k - 1,
        Severity::Gross => k + 1,
    };
    place.set(draft, "expert_used_count", other as u64);
    Ok(())
}

fn other_norm(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let normalizes = place.config.moe.as_ref().is_some_and(|moe| moe.norm_topk_prob);
    place.set(draft, "expert_weights_norm", !normalizes);
    Ok(())
}
