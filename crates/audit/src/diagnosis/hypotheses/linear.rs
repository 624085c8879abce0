//! Products with a matrix: which weights, in which order, and which part of the sum.

use std::ops::Range;

use apr_model::{Backend, Site, Stage, Stage::*};
use apr_reference::Tensor as Plain;
use apr_tensor::{Stored, activation::ActivationType};
use rayon::prelude::*;

use super::{Hypothesis, fitted, named, of_part};
use crate::{
    Result,
    diagnosis::suspect::{Answer, Guess, Suspect, slack_of},
    twin::{
        Triple,
        slack::{self, WeightRow},
    },
};

const PRODUCTS: &[Stage] = &[QkvMatmul, AttnOut, FfnGate, FfnUp, MoeRouter, FfnOut, LmHead];
const QKV: &[Stage] = &[QkvMatmul, QkvBias];

pub(super) const TABLE: &[Hypothesis] = &[
    named("weight-transposed", PRODUCTS, transposed),
    named("gate-up-swapped", &[FfnGate, FfnUp], gate_up_swapped),
    named("kv-swapped", QKV, |s| order(s, &[&[0, 2, 1]], "k and v are exchanged")),
    named("q-k-v-order", QKV, |s| {
        let orders = [&[1, 0, 2][..], &[1, 2, 0], &[2, 0, 1], &[2, 1, 0]];
        order(s, &orders, "the projections are joined in another order")
    }),
    named("qk-rows-interleaved", QKV, |s| {
        let sentence =
            "the rows of each head are in the order of neighbouring pairs, not of halves";
        head_rows(s, sentence, |channel, half| channel % 2 * half + channel / 2)
    }),
    named("qk-rows-in-halves", QKV, |s| {
        let sentence = "the rows of each head were brought into the order of halves, in which they already were";
        head_rows(s, sentence, |channel, half| 2 * (channel % half) + channel / half)
    }),
    named("tail-block-dropped", PRODUCTS, |s| dropped(s, Dropped::Tail)),
    named("input-block-dropped", PRODUCTS, |s| dropped(s, Dropped::Block)),
    named("other-layer-weights", PRODUCTS, other_layer),
    named("other-tensor", PRODUCTS, other_tensor),
    named("rows-shifted", PRODUCTS, rows_shifted),
    named("input-misaligned", PRODUCTS, misaligned),
    named("sign-flipped", PRODUCTS, |s| {
        let (value, parts) = s.in_parts(&s.elementwise(|_, y| (-y, 1.0)))?;
        Ok(Some(Guess::new(value, of_part(&parts, "the sign is flipped"))))
    }),
    fitted("weight-block-zeroed", PRODUCTS, |s| dropped(s, Dropped::OfSomeOutputs)),
    fitted("weight-scaled", PRODUCTS, scaled),
];

/// The weight's buffer, which is `[out, in]`, read as `[in, out]`.
fn transposed(suspect: &Suspect<'_>) -> Answer {
    let read = |part: &Stored, outputs: Range<usize>, rows: &mut [f32]| {
        let (out, inputs) = (part.shape().rows(), part.shape().cols());
        let mut stored = vec![0.0f32; inputs];
        let mut loaded = None;
        for input in 0..inputs {
            let mut at = input * out + outputs.start;
            let end = input * out + outputs.end;
            while at < end {
                let (row, column) = (at / inputs, at % inputs);
                if loaded != Some(row) {
                    part.dequantize_row(row, &mut stored)?;
                    loaded = Some(row);
                }
                let take = (end - at).min(inputs - column);
                for i in 0..take {
                    let output = at + i - input * out - outputs.start;
                    rows[output * inputs + input] = stored[column + i];
                }
                at += take;
            }
        }
        Ok(())
    };
    let value = dense(suspect, |x, _| x, read)?;
    let (value, parts) = suspect.in_parts(&value)?;
    Ok(Some(Guess::new(value, of_part(&parts, "the weight is read transposed"))))
}

fn dequantized(part: &Stored, outputs: Range<usize>, rows: &mut [f32]) -> Result<()> {
    let inputs = part.shape().cols();
    for (row, to) in outputs.zip(rows.chunks_exact_mut(inputs)) {
        part.dequantize_row(row, to)?;
    }
    Ok(())
}

/// The stage's input multiplied with other weights: `x` is given the input as it is rounded for a part, and that part's
/// index; `weights` writes the weights of some outputs of a part.
fn dense(
    suspect: &Suspect<'_>,
    x: impl Fn(Vec<f64>, usize) -> Vec<f64>,
    weights: impl Fn(&Stored, Range<usize>, &mut [f32]) -> Result<()> + Sync,
) -> Result<Triple> {
    /// Outputs whose weights are in memory at a time.
    const TOGETHER: usize = 256;
    let input = suspect.input(0)?;
    let (n, width) = (input.emulated.shape[0], input.emulated.cols());
    let parts = &suspect.weight().parts;
    let columns = |part: &Stored| match &suspect.case.columns {
        Some(columns) => columns.clone(),
        None => 0..part.shape().rows(),
    };
    let total: usize = parts.iter().map(|part| columns(part).len()).sum();
    let mut y = Plain::zeros([n, total]);
    let mut weight_rows = Vec::with_capacity(total);
    for (index, part) in parts.iter().enumerate() {
        let rows = input.emulated.rows().flat_map(|row| rounded_row(suspect, part, row)).collect();
        let x = Plain { shape: vec![n, width], data: x(rows, index) };
        let columns = columns(part);
        let first = weight_rows.len();
        let starts: Vec<usize> = columns.clone().step_by(TOGETHER).collect();
        let blocks: Vec<Vec<(WeightRow, Vec<f64>)>> = starts
            .into_par_iter()
            .map(|start| {
                let outputs = start..(start + TOGETHER).min(columns.end);
                let mut rows = vec![0.0f32; outputs.len() * width];
                weights(part, outputs, &mut rows)?;
                let of_output = |w: &[f32]| {
                    let products = x.rows().map(|x| dot(x, w)).collect();
                    (WeightRow::certain(w), products)
                };
                Ok(rows.chunks_exact(width).map(of_output).collect())
            })
            .collect::<Result<_>>()?;
        for (column, (norm, products)) in blocks.into_iter().flatten().enumerate() {
            weight_rows.push(norm);
            for (row, product) in products.into_iter().enumerate() {
                y.data[row * total + first + column] = product;
            }
        }
    }
    let mut slack = slack::linear(&suspect.twin().units, &input.emulated, &weight_rows, &y);
    if input.slack.is_some() || suspect.twin().units.weights > 0.0 {
        // What input and weights may be off by comes to about the same as with the right ones.
        let through = slack_of(&suspect.expected);
        slack.iter_mut().zip(through).for_each(|(slack, through)| *slack = slack.hypot(*through));
    }
    Ok(Triple::alternative(y, slack))
}

/// A row of activations as it is rounded for `part`.
pub(super) fn rounded_row(suspect: &Suspect<'_>, part: &Stored, row: &[f64]) -> Vec<f64> {
    match suspect.twin().arithmetic.activations.of(part.dtype()) {
        ActivationType::F32 => row.to_vec(),
        kind => {
            let single: Vec<f32> = row.iter().map(|&x| x as f32).collect();
            let mut rounded = vec![0.0; row.len()];
            kind.round_row(&single, &mut rounded);
            rounded
        }
    }
}

fn dot(x: &[f64], w: &[f32]) -> f64 {
    const LANES: usize = 8;
    let (xs, ws) = (x.as_chunks::<LANES>(), w.as_chunks::<LANES>());
    let mut lanes = [0.0; LANES];
    for (x, w) in xs.0.iter().zip(ws.0) {
        for lane in 0..LANES {
            lanes[lane] += x[lane] * f64::from(w[lane]);
        }
    }
    let rest = xs.1.iter().zip(ws.1).map(|(x, &w)| x * f64::from(w));
    lanes.into_iter().chain(rest).sum()
}

fn gate_up_swapped(suspect: &Suspect<'_>) -> Answer {
    let (other, name) = match suspect.site.stage {
        FfnGate => (FfnUp, "up"),
        _ => (FfnGate, "gate"),
    };
    let parts = &suspect
        .case
        .evidence
        .model
        .weight(suspect.of_layer(other))
        .expect("a layer has both")
        .parts;
    let value = suspect.product(&suspect.input(0)?, parts)?;
    Ok(Some(Guess::new(value, format!("the weight is that of the {name} projection"))))
}

/// The projections of q, k and v one after the other in other orders.
fn order(suspect: &Suspect<'_>, orders: &[&[usize]], sentence: &str) -> Answer {
    let parts = suspect.parts();
    suspect.best(orders.iter().map(|order| {
        let source: Vec<usize> =
            order.iter().flat_map(|&part: &usize| parts[part].1.clone()).collect();
        let value = suspect.columns_from(|column| Some(source[column]));
        let names: Vec<&str> = order.iter().map(|&part| parts[part].0).collect();
        Ok(Guess::new(value, format!("{sentence}: {}", names.join(", "))))
    }))
}

/// The rows of each head of q or k in another order: of a head of `2 half` channels, `source` says where each is from.
fn head_rows(
    suspect: &Suspect<'_>,
    sentence: &str,
    source: impl Fn(usize, usize) -> usize,
) -> Answer {
    let head_dim = suspect.config().head_dim;
    let from = |column: usize| {
        let channel = column % head_dim;
        column - channel + source(channel, head_dim / 2)
    };
    let value = match suspect.site.stage {
        QkvMatmul => suspect.columns_from(|column| Some(from(column))),
        _ => super::bias::replaced(suspect, |column| suspect.vector()[from(column)])?,
    };
    let parts = suspect.parts();
    suspect.best([&[0, 1][..], &[0], &[1]].into_iter().map(|chosen| {
        let chosen: Vec<_> = chosen.iter().map(|&part: &usize| &parts[part]).collect();
        let mixed =
            suspect.mixed(&value, |_, column| chosen.iter().any(|part| part.1.contains(&column)));
        let names: Vec<&str> = chosen.iter().map(|part| part.0).collect();
        Ok(Guess::new(mixed, of_part(&names.join(" and "), sentence)))
    }))
}

/// Which inputs are left out, of which outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dropped {
    Tail,
    Block,
    OfSomeOutputs,
}

/// The sum without some of its terms. Which ones they are is seen in what is missing.
fn dropped(suspect: &Suspect<'_>, what: Dropped) -> Answer {
    let Some(captured) = suspect.captured() else { return Ok(None) };
    let width = suspect.row_width();
    let bound = suspect.case.evidence.replayed.bound;
    let n = suspect.case.record.rows.len();
    let wrong = |column: &usize| suspect.case.record.channels[*column].ratio() > bound.of(n);
    let parts = suspect.parts();
    let mut left_out: Vec<Range<usize>> = vec![0..0; parts.len()];
    let mut somewhere = false;
    for (index, (_, columns)) in parts.iter().enumerate() {
        let mut worst: Vec<usize> = columns.clone().filter(wrong).collect();
        let ratio = |column: &usize| suspect.case.record.channels[*column].ratio();
        worst.sort_by(|a, b| ratio(b).total_cmp(&ratio(a)));
        worst.truncate(COLUMNS_TO_LOOK_AT);
        if worst.is_empty() {
            continue;
        }
        left_out[index] = missing_inputs(suspect, captured, index, columns.start, &worst)?;
        somewhere |= !left_out[index].is_empty();
    }
    if !somewhere {
        return Ok(None);
    }
    let inputs = suspect.weight().parts[0].shape().cols();
    let is_tail = left_out.iter().all(|range| range.is_empty() || range.end == inputs);
    if is_tail != (what == Dropped::Tail) && what != Dropped::OfSomeOutputs {
        return Ok(None);
    }
    // What is left out, to be subtracted: so that the rest is as the declared arithmetic has it.
    let only = |mut x: Vec<f64>, part: usize| {
        for row in x.chunks_exact_mut(inputs) {
            for (i, x) in row.iter_mut().enumerate() {
                if !left_out[part].contains(&i) {
                    *x = 0.0;
                }
            }
        }
        x
    };
    let part = dense(suspect, only, dequantized)?;
    let value = suspect.elementwise(|i, y| (y - part.emulated.data[i], 1.0));
    let touched: Vec<bool> = match what {
        Dropped::OfSomeOutputs => (0..width).map(|column| wrong(&column)).collect(),
        _ => vec![true; width],
    };
    let outputs = touched.iter().filter(|&&touched| touched).count();
    let value = suspect.mixed(&value, |_, column| touched[column]);
    let mut said: Vec<String> = Vec::new();
    for ((name, _), range) in parts.iter().zip(&left_out).filter(|(_, range)| !range.is_empty()) {
        let at = match range {
            range if range.end == inputs => format!("the last {} of {inputs} inputs", range.len()),
            range => format!("inputs {}..{} of {inputs}", range.start, range.end),
        };
        said.push(of_part(name, &format!("{at} are left out")));
    }
    let mut sentence = said.join("; ");
    if what == Dropped::OfSomeOutputs {
        let first = touched.iter().position(|&touched| touched).unwrap_or(0);
        let offset = suspect.case.columns.as_ref().map_or(0, |columns| columns.start);
        sentence += &match outputs {
            1 => format!(" of output {}", offset + first),
            more => format!(" of {more} outputs, the first of which is {}", offset + first),
        };
    }
    let range = left_out.iter().find(|range| !range.is_empty()).expect("some are");
    let guess = Guess::new(value, sentence)
        .with("first_input", range.start as f64)
        .with("inputs", range.len() as f64);
    Ok(Some(guess))
}

/// Outputs that are asked what is missing in them.
const COLUMNS_TO_LOOK_AT: usize = 32;

/// The range of inputs whose terms are what the captured `outputs` lack, in steps of eight.
fn missing_inputs(
    suspect: &Suspect<'_>,
    captured: &Plain<f64>,
    part_index: usize,
    first_column: usize,
    outputs: &[usize],
) -> Result<Range<usize>> {
    const GRAIN: usize = 8;
    let part = &suspect.weight().parts[part_index];
    let width = part.shape().cols();
    let offset = suspect.case.columns.as_ref().map_or(0, |columns| columns.start);
    let x = suspect.input(0)?;
    let rows: Vec<usize> = suspect.case.judged().collect();
    let x: Vec<Vec<f64>> = rows
        .iter()
        .map(|&row| rounded_row(suspect, part, &x.emulated.data[row * width..][..width]))
        .collect();
    let grains = width.div_ceil(GRAIN);
    // Sums of the terms up to each grain, and what is missing, for each row and output.
    let mut sums: Vec<Vec<f64>> = vec![vec![0.0]; rows.len() * outputs.len()];
    let mut missing = vec![0.0; sums.len()];
    let mut w = vec![0.0f32; width];
    for (o, &column) in outputs.iter().enumerate() {
        part.dequantize_row(offset + column - first_column, &mut w)?;
        for (r, (x, &row)) in x.iter().zip(&rows).enumerate() {
            let at = row * suspect.row_width() + column;
            let scale = 1.0 / f64::from(slack_of(&suspect.expected)[at]);
            missing[o * rows.len() + r] =
                (suspect.expected.emulated.data[at] - captured.data[at]) * scale;
            let sums = &mut sums[o * rows.len() + r];
            for (x, w) in x.chunks(GRAIN).zip(w.chunks(GRAIN)) {
                sums.push(sums[sums.len() - 1] + dot(x, w) * scale);
            }
        }
    }
    let misfit = |range: &Range<usize>| -> f64 {
        let one = |(sums, missing): (&Vec<f64>, &f64)| {
            (missing - (sums[range.end] - sums[range.start])).powi(2)
        };
        sums.iter().zip(&missing).map(one).sum()
    };
    let nothing: f64 = missing.iter().map(|x| x * x).sum();
    let best = (0..grains)
        .into_par_iter()
        .flat_map_iter(|start| (start + 1..=grains).map(move |end| start..end))
        .map(|range| (misfit(&range), range))
        .min_by(|a, b| a.0.total_cmp(&b.0));
    Ok(match best {
        // Leaving everything out is another mistake.
        Some((misfit, range)) if misfit < nothing / 4.0 && range != (0..grains) => {
            range.start * GRAIN..(range.end * GRAIN).min(width)
        }
        _ => 0..0,
    })
}

fn other_layer(suspect: &Suspect<'_>) -> Answer {
    let (x, model) = (suspect.input(0)?, &suspect.case.evidence.model);
    let Some(own) = suspect.site.layer else { return Ok(None) };
    let layers = (0..suspect.config().num_hidden_layers).filter(|&layer| layer != own as usize);
    // Some layers may have experts, others not.
    let weights = layers
        .filter_map(|layer| Some((layer, model.weight(Site::layer(layer, suspect.site.stage))?)));
    suspect.best(weights.map(|(layer, weight)| {
        let (value, parts) = suspect.in_parts(&suspect.product(&x, &weight.parts)?)?;
        let sentence = of_part(&parts, &format!("the weight is that of layer {layer}"));
        Ok(Guess::new(value, sentence).with("layer", layer as f64))
    }))
}

/// Other matrices of the same layer and shape.
fn other_tensor(suspect: &Suspect<'_>) -> Answer {
    let (x, model) = (suspect.input(0)?, &suspect.case.evidence.model);
    let own = &suspect.weight().parts;
    let mut others: Vec<(String, Stored)> = Vec::new();
    for &stage in PRODUCTS {
        let site = suspect.of_layer(stage);
        // These two have a hypothesis of their own.
        let exchanged = matches!((stage, suspect.site.stage), (FfnGate, FfnUp) | (FfnUp, FfnGate));
        if exchanged || stage.is_whole_model() != suspect.site.stage.is_whole_model() {
            continue;
        }
        let parts = model.weight(site).map_or(&[][..], |weight| &weight.parts);
        for (index, part) in parts.iter().enumerate() {
            let name = if parts.len() == 3 { ["q", "k", "v"][index] } else { stage.name() };
            others.push((name.to_owned(), part.clone()));
        }
    }
    if suspect.site.stage == LmHead {
        let table = model.weight(Site::whole(Embedding)).expect("models have a table");
        others.push(("the embedding".to_owned(), table.parts[0].clone()));
    }
    let same = |a: &Stored, b: &Stored| a.bytes()[..] == b.bytes()[..];
    let mut guesses = Vec::new();
    for (index, part) in own.iter().enumerate() {
        let part_name = suspect.parts()[index].0;
        for (name, other) in &others {
            if other.shape() != part.shape() || same(other, part) {
                continue;
            }
            let mut parts = own.clone();
            parts[index] = other.clone();
            let sentence = of_part(part_name, &format!("the weight is that of {name}"));
            guesses.push((parts, sentence));
        }
    }
    let guesses = guesses
        .into_iter()
        .map(|(parts, sentence)| Ok(Guess::new(suspect.product(&x, &parts)?, sentence)));
    suspect.best(guesses)
}

/// Each output computed from the weights of another, some rows further.
fn rows_shifted(suspect: &Suspect<'_>) -> Answer {
    let x = suspect.input(0)?;
    let by = [1, -1, 2, -2, 4, -4, 8, -8, 16, -16, 32, -32];
    suspect.best(by.into_iter().map(|by: isize| {
        let value = match &suspect.case.columns {
            // Those next to the ones looked at have to be computed first.
            Some(columns) => {
                let part = &suspect.weight().parts[0];
                let rows = part.shape().rows();
                let order =
                    |row: usize| (columns.start + row).wrapping_add_signed(by).min(rows - 1);
                let rows: Vec<Stored> = (0..columns.len())
                    .map(|row| part.slice_rows(order(row)..order(row) + 1))
                    .collect();
                suspect.twin().linear(&x, &suspect.twin().weight(&rows)?)?
            }
            None => {
                let parts = suspect.parts();
                suspect.columns_from(|column| {
                    let (_, part) = parts.iter().find(|(_, part)| part.contains(&column))?;
                    let shifted = (column - part.start) as isize + by;
                    Some(part.start + shifted.rem_euclid(part.len() as isize) as usize)
                })
            }
        };
        let (value, parts) = suspect.in_parts(&value)?;
        let sentence = of_part(&parts, &format!("each output is that of the row {by:+} from it"));
        Ok(Guess::new(value, sentence).with("rows", by as f64))
    }))
}

/// The activations read from some elements too early or too late.
fn misaligned(suspect: &Suspect<'_>) -> Answer {
    let x = suspect.input(0)?;
    let (n, width) = (x.emulated.shape[0], x.emulated.cols());
    let by = [1, -1, 2, -2, 4, -4, 8, -8, 16, -16, 32, -32, 64, -64, 128, -128, 256, -256];
    suspect.best(by.into_iter().filter(|by: &isize| by.unsigned_abs() < width).map(|by| {
        let mut moved = x.emulated.data.clone();
        for row in moved.chunks_exact_mut(width) {
            match by {
                0.. => row.rotate_left(by as usize),
                _ => row.rotate_right(by.unsigned_abs()),
            }
        }
        let moved = Triple::known(Plain { shape: vec![n, width], data: moved });
        let value = suspect.product(&moved, &suspect.weight().parts)?;
        let (value, parts) = suspect.in_parts(&value)?;
        let sentence =
            of_part(&parts, &format!("the input is read {by:+} elements from where it is"));
        Ok(Guess::new(value, sentence).with("elements", by as f64))
    }))
}

/// One factor for each projection; zeros are another mistake.
fn scaled(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = suspect.captured() else { return Ok(None) };
    let width = suspect.row_width();
    let mut factors = Vec::new();
    for (name, columns) in suspect.parts() {
        let at = suspect
            .case
            .judged()
            .flat_map(|row| columns.clone().map(move |column| row * width + column));
        let factor = super::any::factor(suspect, captured, at);
        factors.push((name, columns, factor));
    }
    let of = |column: usize| {
        let part = factors.iter().find(|(_, columns, _)| columns.contains(&column));
        part.map_or(1.0, |(_, _, factor)| *factor)
    };
    let value = suspect.elementwise(|i, y| (y * of(i % width), of(i % width)));
    let (value, parts) = suspect.in_parts(&value)?;
    let said = factors
        .iter()
        .filter(|(name, ..)| parts.split(" and ").any(|part| part == *name))
        .map(|(name, _, factor)| {
            let constant = super::any::constant(*factor, suspect.config());
            of_part(name, &format!("the weight is scaled by {constant}"))
        });
    let sentence = said.collect::<Vec<_>>().join("; ");
    let chosen = factors.iter().filter(|(name, ..)| parts.split(" and ").any(|part| part == *name));
    let factors: Vec<f64> = chosen.map(|(_, _, factor)| *factor).collect();
    Ok(match factors[..] {
        [first, ..] if !factors.contains(&0.0) => {
            Some(Guess::new(value, sentence).with("factor", first))
        }
        _ => None,
    })
}
