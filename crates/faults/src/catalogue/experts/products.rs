//! Products with the experts' matrices: which matrix is read, and where the result of a group of rows goes.

use apr_model::{HostTensor, Result, Stage};
use apr_tensor::Stored;

use crate::{
    Fault,
    fault::{Family, OpFault, Plant},
    op::{Experts, row_len, select_rows},
};

const PRODUCTS: &[Stage] = &[Stage::MoeExpertGate, Stage::MoeExpertUp, Stage::MoeExpertOut];

/// Where the experts of a row are given the same.
const OF_ROWS: &[Stage] = &[Stage::MoeExpertGate, Stage::MoeExpertUp];

/// Where each is given its own.
const OF_SLOTS: &[Stage] = &[Stage::MoeExpertOut];

const fn product(
    name: &'static str,
    stages: &'static [Stage],
    damage: fn(&Experts<'_>, &mut HostTensor) -> Result<()>,
    about: &'static str,
) -> Fault {
    Fault::new(name, Family::Experts, stages, Plant::Op(OpFault::Experts(damage)), about)
}

pub(in crate::catalogue) const FAULTS: &[Fault] = &[
    product(
        "expert-off-by-one",
        PRODUCTS,
        next_expert,
        "The matrix is the next expert's: for the busiest expert, or for all.",
    )
    .graded()
    .diagnosed(&["other-expert-weights"]),
    product(
        "expert-of-other-slot",
        PRODUCTS,
        other_slot,
        "Each slot is multiplied with the matrix of the slot before.",
    )
    .diagnosed(&["experts-of-other-slots", "slots-exchanged", "other-expert-weights"]),
    product(
        "expert-of-first-slot",
        PRODUCTS,
        first_slot,
        "All slots of a token are multiplied with the matrix of the first one's expert.",
    )
    .diagnosed(&["experts-of-other-slots", "other-expert-weights"]),
    product(
        "expert-rows-shifted",
        PRODUCTS,
        rows_shifted,
        "Matrices are read from one row too late, up to the first row of the next expert's.",
    )
    .diagnosed(&["expert-rows-shifted"]),
    product(
        "expert-stride",
        PRODUCTS,
        stride,
        "Each matrix begins 8 rows too early for every one before it.",
    )
    .diagnosed(&["expert-stride"]),
    product(
        "expert-group-cut-off",
        PRODUCTS,
        group_cut_off,
        "The last of an expert's rows, where it has several, is never written: of the busiest expert, or of all.",
    )
    .graded()
    .diagnosed(&["expert-group-cut-off", "all-zeros"]),
    product(
        "expert-group-row-twice",
        PRODUCTS,
        group_row_twice,
        "The last of an expert's rows has the result of the one before it.",
    )
    .diagnosed(&["expert-rows-of-group"]),
    product(
        "expert-group-scattered",
        PRODUCTS,
        group_scattered,
        "Each of an expert's rows is given the result of the next one.",
    )
    .diagnosed(&["expert-rows-of-group"]),
    product(
        "expert-slots-exchanged",
        PRODUCTS,
        slots_exchanged,
        "Results are written to the slot after their own.",
    )
    .diagnosed(&["slots-exchanged", "experts-of-other-slots"]),
    product(
        "expert-row-of-slot",
        OF_ROWS,
        row_of_slot,
        "Slots are counted where rows are meant: activations are another token's.",
    )
    .diagnosed(&["expert-input-rows"]),
    product(
        "expert-input-of-first-slot",
        OF_SLOTS,
        input_of_first,
        "All experts of a token are given the activations of the first.",
    )
    .diagnosed(&["expert-input-slots"]),
    product("expert-left-zero", PRODUCTS, left_zero, "The busiest expert's results are never written.")
        .diagnosed(&["expert-missing", "all-zeros"]),
    product("expert-doubled", PRODUCTS, doubled, "The busiest expert's results are added up twice.")
        .diagnosed(&["expert-scaled"]),
];

/// The ids with `f` of each.
fn ids(op: &Experts<'_>, f: impl Fn(usize) -> usize) -> HostTensor {
    let values = op.ids.values.iter().map(|&id| f(id as usize) as f64).collect();
    HostTensor { shape: op.ids.shape.clone(), values }
}

fn next_expert(op: &Experts<'_>, y: &mut HostTensor) -> Result<()> {
    let hit = |id| op.place.pick(id == op.place.expert, true);
    *y = op.by_ids(&ids(op, |id| if hit(id) { (id + 1) % op.experts } else { id }))?;
    Ok(())
}

fn other_slot(op: &Experts<'_>, y: &mut HostTensor) -> Result<()> {
    let mut ids = op.ids.clone();
    ids.values.chunks_exact_mut(op.k()).for_each(|ids| ids.rotate_right(1));
    *y = op.by_ids(&ids)?;
    Ok(())
}

fn first_slot(op: &Experts<'_>, y: &mut HostTensor) -> Result<()> {
    let mut ids = op.ids.clone();
    ids.values.chunks_exact_mut(op.k()).for_each(|ids| ids.fill(ids[0]));
    *y = op.by_ids(&ids)?;
    Ok(())
}

/// The matrices with row `from(expert, row)` of all rows in place of row `row` of `expert`'s.
fn with_rows(op: &Experts<'_>, from: impl Fn(usize, usize) -> usize) -> Stored {
    let (out, all) = (op.out(), op.w.shape().rows());
    op.w.permute_rows(|row| from(row / out, row % out) % all)
}

fn rows_shifted(op: &Experts<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.by_matrices(&with_rows(op, |expert, row| expert * op.out() + row + 1))?;
    Ok(())
}

fn stride(op: &Experts<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.by_matrices(&with_rows(op, |expert, row| expert * (op.out() - 8) + row))?;
    Ok(())
}

/// Lets slot `slot` have the result of slot `from(i, slots)`, `i` being its place among the slots of its expert.
fn regrouped(op: &Experts<'_>, y: &mut HostTensor, from: impl Fn(usize, &[usize]) -> usize) {
    let (right, out) = (y.clone(), op.out());
    for slots in op.groups().values() {
        for (i, &slot) in slots.iter().enumerate() {
            let from = from(i, slots);
            y.values[slot * out..][..out].copy_from_slice(&right.values[from * out..][..out]);
        }
    }
}

fn group_cut_off(op: &Experts<'_>, y: &mut HostTensor) -> Result<()> {
    let out = op.out();
    for (expert, slots) in op.groups() {
        if let ([_, .., last], true) = (&slots[..], op.place.pick(expert == op.place.expert, true))
        {
            y.values[last * out..][..out].fill(0.0);
        }
    }
    Ok(())
}

fn group_row_twice(op: &Experts<'_>, y: &mut HostTensor) -> Result<()> {
    regrouped(op, y, |i, slots| slots[i.min(slots.len().saturating_sub(2))]);
    Ok(())
}

fn group_scattered(op: &Experts<'_>, y: &mut HostTensor) -> Result<()> {
    regrouped(op, y, |i, slots| slots[(i + 1) % slots.len()]);
    Ok(())
}

fn slots_exchanged(op: &Experts<'_>, y: &mut HostTensor) -> Result<()> {
    let (of_row, out) = (row_len(y), op.out());
    y.values.chunks_exact_mut(of_row).for_each(|slots| slots.rotate_right(out));
    Ok(())
}

fn row_of_slot(op: &Experts<'_>, y: &mut HostTensor) -> Result<()> {
    let n = op.x.shape[0];
    let slots = select_rows(&op.x, (0..n * op.k()).map(|slot| slot % n));
    *y = op.by_input(&HostTensor { shape: vec![n, op.k(), op.x.shape[1]], ..slots })?;
    Ok(())
}

fn input_of_first(op: &Experts<'_>, y: &mut HostTensor) -> Result<()> {
    let mut x = op.x.clone();
    let (of_row, width) = (row_len(&x), x.shape[2]);
    for slots in x.values.chunks_exact_mut(of_row) {
        let (first, others) = slots.split_at_mut(width);
        others.chunks_exact_mut(width).for_each(|slot| slot.copy_from_slice(first));
    }
    *y = op.by_input(&x)?;
    Ok(())
}

/// Multiplies the results of the busiest expert.
fn busiest_times(op: &Experts<'_>, y: &mut HostTensor, factor: f64) {
    let out = op.out();
    for slot in op.groups().remove(&op.place.expert).unwrap_or_default() {
        y.values[slot * out..][..out].iter_mut().for_each(|y| *y *= factor);
    }
}

fn left_zero(op: &Experts<'_>, y: &mut HostTensor) -> Result<()> {
    busiest_times(op, y, 0.0);
    Ok(())
}

fn doubled(op: &Experts<'_>, y: &mut HostTensor) -> Result<()> {
    busiest_times(op, y, 2.0);
    Ok(())
}
