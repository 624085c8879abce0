//! Products with the matrices of experts: whose matrix, whose activations, and where the results go.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use apr_model::{Backend, Site, Stage, Stage::*};
use apr_reference::{Tensor as Plain, by_expert, scatter};
use apr_tensor::{Bytes, DType, Shape, Stored};

use super::{Hypothesis, fitted, general, named};
use crate::{
    Result,
    diagnosis::{
        geometry,
        suspect::{Answer, Guess, Suspect, slack_of},
    },
    twin::{Triple, Weight},
};

const PRODUCTS: &[Stage] = &[MoeExpertGate, MoeExpertUp, MoeExpertOut];
const OF_ROWS: &[Stage] = &[MoeExpertGate, MoeExpertUp];
const OF_SLOTS: &[Stage] = &[MoeExpertOut];

pub(super) const TABLE: &[Hypothesis] = &[
    named("expert-missing", PRODUCTS, missing),
    named("other-expert-weights", PRODUCTS, other_expert),
    named("experts-of-other-slots", PRODUCTS, of_other_slots),
    named("slots-exchanged", PRODUCTS, slots_exchanged),
    named("gate-up-swapped", OF_ROWS, gate_up_swapped),
    named("other-layer-weights", PRODUCTS, other_layer),
    named("weight-transposed", PRODUCTS, transposed),
    named("expert-rows-shifted", PRODUCTS, rows_shifted),
    named("expert-stride", PRODUCTS, stride),
    named("experts-interleaved", PRODUCTS, interleaved),
    named("experts-weighted", OF_SLOTS, weighted),
    named("expert-input-slots", OF_SLOTS, input_slots),
    fitted("expert-scaled", PRODUCTS, scaled),
    general("expert-group-cut-off", PRODUCTS, group_cut_off),
    general("expert-rows-of-group", PRODUCTS, rows_of_group),
    general("expert-input-rows", OF_ROWS, input_rows),
];

/// The inputs of a product with the matrices of experts.
struct Product<'s, 'c> {
    suspect: &'s Suspect<'c>,
    x: Triple,
    ids: Triple,
    /// Experts there are, of which a row has `k`.
    experts: usize,
    k: usize,
    /// Channels of a result.
    out: usize,
    /// The experts that are wrong, or all.
    wrong: BTreeSet<usize>,
}

impl<'s, 'c> Product<'s, 'c> {
    fn of(suspect: &'s Suspect<'c>) -> Result<Self> {
        let (x, ids) = (suspect.input(0)?, suspect.input(1)?);
        let experts = suspect.case.experts(suspect.site).map_or(1, |moe| moe.num_experts);
        let wrong = match suspect.captured() {
            Some(_) => geometry::wrong_experts(suspect.case),
            None => (0..experts).collect(),
        };
        let (k, out) = (ids.emulated.cols(), suspect.expected.emulated.cols());
        Ok(Self { suspect, x, ids, experts, k, out, wrong })
    }

    fn slots(&self) -> usize {
        self.ids.emulated.data.len()
    }

    fn expert(&self, slot: usize) -> usize {
        self.ids.emulated.data[slot] as usize
    }

    fn is_wrong(&self, slot: usize) -> bool {
        self.wrong.contains(&self.expert(slot))
    }

    /// `alternative` where an expert is wrong, and what is expected elsewhere.
    fn mixed(&self, alternative: &Triple) -> Triple {
        let mut value = Plain::clone(&self.suspect.expected.emulated);
        let mut slack = slack_of(&self.suspect.expected).to_vec();
        for slot in (0..self.slots()).filter(|&slot| self.is_wrong(slot)) {
            let range = slot * self.out..(slot + 1) * self.out;
            value.data[range.clone()].copy_from_slice(&alternative.emulated.data[range.clone()]);
            slack[range.clone()].copy_from_slice(&slack_of(alternative)[range]);
        }
        Triple::alternative(value, slack)
    }

    /// The product of `x` with `weight`, `expert` saying whose matrix each slot meets.
    fn with(&self, x: &Triple, weight: &Weight, expert: impl Fn(usize) -> usize) -> Result<Triple> {
        let data = (0..self.slots()).map(|slot| expert(slot) as f64).collect();
        let ids = Triple::known(Plain { shape: self.ids.emulated.shape.clone(), data });
        Ok(self.suspect.twin().expert_linear(x, weight, self.experts, &ids)?)
    }

    /// The rows of `x` that the slots `of` read.
    fn rows(&self, x: &Triple, of: &[usize]) -> Triple {
        x.gathered(self.k, of)
    }

    /// Each wrong expert's slots multiplied with what `matrix` gives for it.
    fn by_matrix(&self, matrix: impl Fn(usize) -> Option<Vec<Stored>>) -> Result<Option<Triple>> {
        self.by_rows(|expert, x| {
            let Some(parts) = matrix(expert) else { return Ok(None) };
            let twin = self.suspect.twin();
            Ok(Some(twin.linear(&x, &twin.weight(&parts)?)?))
        })
    }

    /// What `product` gives for each wrong expert and its rows; nothing if it gives nothing for one.
    fn by_rows(
        &self,
        product: impl Fn(usize, Triple) -> Result<Option<Triple>>,
    ) -> Result<Option<Triple>> {
        let mut value = Plain::clone(&self.suspect.expected.emulated);
        let mut slack = slack_of(&self.suspect.expected).to_vec();
        for (expert, slots) in by_expert(&self.ids.emulated) {
            if !self.wrong.contains(&expert) {
                continue;
            }
            let Some(y) = product(expert, self.rows(&self.x, &slots))? else { return Ok(None) };
            scatter(&y.emulated.data, self.out, &slots, &mut value.data);
            scatter(slack_of(&y), self.out, &slots, &mut slack);
        }
        Ok(Some(Triple::alternative(value, slack)))
    }

    /// What is expected, each slot having the result of another.
    fn reordered(&self, source: impl Fn(usize) -> usize) -> Triple {
        let expected = &self.suspect.expected;
        let from = |i: usize| source(i / self.out) * self.out + i % self.out;
        let all = 0..expected.emulated.data.len();
        let data = all.clone().map(|i| expected.emulated.data[from(i)]).collect();
        let slack = all.map(|i| slack_of(expected)[from(i)]).collect();
        Triple::alternative(Plain { shape: expected.emulated.shape.clone(), data }, slack)
    }

    /// How far the captured result of `slot` is from `row`.
    fn apart(&self, captured: &Plain<f64>, slot: usize, row: &[f64]) -> f64 {
        let captured = &captured.data[slot * self.out..][..self.out];
        captured.iter().zip(row).map(|(c, y)| (c - y).powi(2)).sum()
    }

    /// `in expert 3, ` where not all are wrong.
    fn of_wrong(&self, sentence: &str) -> String {
        let chosen: BTreeSet<usize> = (0..self.slots()).map(|slot| self.expert(slot)).collect();
        match self.wrong.is_superset(&chosen) {
            true => sentence.to_owned(),
            false => format!("in {}, {sentence}", geometry::experts(&self.wrong)),
        }
    }
}

fn missing(suspect: &Suspect<'_>) -> Answer {
    let product = Product::of(suspect)?;
    let nothing = suspect.elementwise(|_, _| (0.0, 0.0));
    let sentence = product.of_wrong("the results are zeros");
    Ok(Some(Guess::new(product.mixed(&nothing), sentence)))
}

/// Each wrong expert has the matrix of the one that its first row is nearest to.
fn other_expert(suspect: &Suspect<'_>) -> Answer {
    let product = Product::of(suspect)?;
    let Some(captured) = suspect.captured() else { return Ok(None) };
    let judged: BTreeSet<usize> = suspect.case.judged().collect();
    let mut first: BTreeMap<usize, usize> = BTreeMap::new();
    for slot in 0..product.slots() {
        if product.is_wrong(slot) && judged.contains(&(slot / product.k)) {
            first.entry(product.expert(slot)).or_insert(slot);
        }
    }
    let slots: Vec<usize> = first.values().copied().collect();
    let x = product.rows(&product.x, &slots);
    let mut nearest = vec![(f64::INFINITY, 0); slots.len()];
    let twin = suspect.twin();
    for other in 0..product.experts {
        let matrix = apr_reference::expert(&suspect.weight().parts, product.experts, other);
        let y = twin.linear(&x, &twin.weight(&matrix)?)?;
        for ((nearest, &slot), y) in nearest.iter_mut().zip(&slots).zip(y.emulated.rows()) {
            let apart = product.apart(captured, slot, y);
            if apart < nearest.0 {
                *nearest = (apart, other);
            }
        }
    }
    let source: BTreeMap<usize, usize> =
        first.keys().copied().zip(nearest.into_iter().map(|(_, other)| other)).collect();
    let others: Vec<(usize, usize)> =
        source.iter().map(|(&e, &other)| (e, other)).filter(|(e, other)| e != other).collect();
    let Some(&(one, other)) = others.first() else { return Ok(None) };
    let of = |slot: usize| {
        let expert = product.expert(slot);
        source.get(&expert).copied().unwrap_or(expert)
    };
    let by = |(expert, other): (usize, usize)| (other + product.experts - expert) % product.experts;
    let sentence = match others.len() {
        1 => format!("expert {one} is computed with the matrix of expert {other}"),
        n if others.iter().all(|&pair| by(pair) == by((one, other))) => {
            let signed = match by((one, other)) {
                by if by > product.experts / 2 => by as i64 - product.experts as i64,
                by => by as i64,
            };
            format!("{n} experts are computed with the matrix of the one {signed:+} from them")
        }
        _ => {
            let some: Vec<String> = others
                .iter()
                .take(4)
                .map(|(e, other)| format!("{e} with that of {other}"))
                .collect();
            format!("experts are computed with matrices of others: {}", some.join(", "))
        }
    };
    let value = product.with(&product.x, suspect.weight(), of)?;
    Ok(Some(Guess::new(value, sentence).with("experts", others.len() as f64)))
}

/// The slots of each row in the order of ids, beside those orders that do not depend on ids.
fn orders(product: &Product<'_, '_>) -> Vec<(Vec<usize>, String)> {
    let k = product.k;
    let of_row = |order: &[usize]| -> Vec<usize> {
        (0..product.slots()).map(|slot| slot / k * k + order[slot % k]).collect()
    };
    let by_id = (0..product.slots() / k).flat_map(|row| {
        let mut order: Vec<usize> = (row * k..(row + 1) * k).collect();
        order.sort_by_key(|&slot| product.expert(slot));
        order
    });
    let mut orders = vec![(by_id.collect(), "the slots by ascending id".to_owned())];
    let plain = super::routing::orders(k).into_iter();
    orders.extend(plain.map(|(order, words)| (of_row(&order), words)));
    orders
}

fn of_other_slots(suspect: &Suspect<'_>) -> Answer {
    let product = Product::of(suspect)?;
    suspect.best(orders(&product).into_iter().map(|(source, words)| {
        let value =
            product.with(&product.x, suspect.weight(), |slot| product.expert(source[slot]))?;
        Ok(Guess::new(value, format!("the matrix of each slot is that of {words}")))
    }))
}

fn slots_exchanged(suspect: &Suspect<'_>) -> Answer {
    let product = Product::of(suspect)?;
    suspect.best(orders(&product).into_iter().map(|(source, words)| {
        let value = product.reordered(|slot| source[slot]);
        Ok(Guess::new(value, format!("the result of each slot is that of {words}")))
    }))
}

/// Other matrices of experts, in the wrong ones.
fn with_weight(suspect: &Suspect<'_>, site: Site, sentence: &str) -> Result<Option<Guess>> {
    let product = Product::of(suspect)?;
    let Some(weight) = suspect.case.evidence.model.weight(site) else { return Ok(None) };
    let dims = |weight: &Weight| {
        let rows: usize = weight.parts.iter().map(|part| part.shape().rows()).sum();
        (rows, weight.parts[0].shape().cols())
    };
    if dims(weight) != dims(suspect.weight()) {
        return Ok(None);
    }
    let value = product.with(&product.x, weight, |slot| product.expert(slot))?;
    Ok(Some(Guess::new(product.mixed(&value), product.of_wrong(sentence))))
}

fn gate_up_swapped(suspect: &Suspect<'_>) -> Answer {
    let (other, name) = match suspect.site.stage {
        MoeExpertGate => (MoeExpertUp, "up"),
        _ => (MoeExpertGate, "gate"),
    };
    let sentence = format!("the weight is that of the {name} projection");
    with_weight(suspect, suspect.of_layer(other), &sentence)
}

fn other_layer(suspect: &Suspect<'_>) -> Answer {
    let own = suspect.layer();
    let layers = (0..suspect.config().num_hidden_layers).filter(|&layer| layer != own);
    let guesses = layers.map(|layer| {
        let site = Site::layer(layer, suspect.site.stage);
        let guess = with_weight(suspect, site, &format!("the weight is that of layer {layer}"))?;
        Ok(guess.map(|guess| guess.with("layer", layer as f64)))
    });
    suspect.best(guesses.filter_map(Result::transpose))
}

/// Rows `range` of a matrix in parts.
fn slice(parts: &[Stored], range: Range<usize>) -> Vec<Stored> {
    let mut before = 0;
    let mut sliced = Vec::new();
    for part in parts {
        let rows = part.shape().rows();
        let at = |row: usize| row.clamp(before, before + rows) - before;
        let within = at(range.start)..at(range.end);
        if !within.is_empty() {
            sliced.push(part.slice_rows(within));
        }
        before += rows;
    }
    sliced
}

/// Each wrong expert's matrix begins elsewhere: at the row that `first` says, counted over all experts.
fn beginning(product: &Product<'_, '_>, first: impl Fn(usize) -> isize) -> Result<Option<Triple>> {
    let (parts, out) = (&product.suspect.weight().parts, product.out);
    let all = product.experts * out;
    product.by_matrix(|expert| {
        let start = first(expert).rem_euclid(all as isize) as usize;
        let mut matrix = slice(parts, start..(start + out).min(all));
        matrix.extend(slice(parts, 0..(start + out).saturating_sub(all)));
        Some(matrix)
    })
}

fn rows_shifted(suspect: &Suspect<'_>) -> Answer {
    let product = Product::of(suspect)?;
    let guesses = [1, -1, 2, -2, 4, -4, 8, -8, 16, -16, 32, -32].map(|by: isize| {
        let Some(value) = beginning(&product, |expert| (expert * product.out) as isize + by)?
        else {
            return Ok(None);
        };
        let sentence =
            format!("each output is that of the row {by:+} from it, of all experts' rows");
        Ok(Some(Guess::new(value, product.of_wrong(&sentence)).with("rows", by as f64)))
    });
    suspect.best(guesses.into_iter().filter_map(Result::transpose))
}

/// All matrices but the first begin too early or too late.
fn stride(suspect: &Suspect<'_>) -> Answer {
    let mut product = Product::of(suspect)?;
    product.wrong = (0..product.experts).collect();
    let out = product.out as isize;
    let by = [1, 2, 4, 8, 16, 32, 64].into_iter().filter(|by| by < &out);
    let guesses = by.flat_map(|by| [-by, by]).map(|by: isize| {
        let Some(value) = beginning(&product, |expert| expert as isize * (out + by))? else {
            return Ok(None);
        };
        let sentence = format!("matrices begin every {} rows, not every {out}", out + by);
        Ok(Some(Guess::new(value, sentence).with("rows", (out + by) as f64)))
    });
    suspect.best(guesses.filter_map(Result::transpose))
}

fn interleaved(suspect: &Suspect<'_>) -> Answer {
    let product = Product::of(suspect)?;
    let (parts, experts) = (&suspect.weight().parts, product.experts);
    let rows = |expert: usize| {
        let row = |row: usize| row * experts + expert;
        (0..product.out).flat_map(|i| slice(parts, row(i)..row(i) + 1)).collect()
    };
    let Some(value) = product.by_matrix(|expert| Some(rows(expert)))? else { return Ok(None) };
    let sentence = "the rows of the experts' matrices are read as if they lay by turns";
    Ok(Some(Guess::new(value, sentence)))
}

/// The buffer of a wrong expert's matrix, which is `[out, in]`, read as `[in, out]`.
fn transposed(suspect: &Suspect<'_>) -> Answer {
    let product = Product::of(suspect)?;
    let value = product.by_rows(|expert, x| {
        let own = apr_reference::expert(&suspect.weight().parts, product.experts, expert);
        let [part] = &own[..] else { return Ok(None) };
        let (out, inputs) = (part.shape().rows(), part.shape().cols());
        let stored = part.to_f32()?;
        let read: Vec<u8> = (0..out * inputs)
            .flat_map(|i| stored[i % inputs * out + i / inputs].to_le_bytes())
            .collect();
        let read = Stored::new(DType::F32, Shape::new([out, inputs]), Bytes::from(read))?;
        // Activations are rounded as for the matrix that is stored.
        let rounded = x.emulated.rows().flat_map(|x| super::linear::rounded_row(suspect, part, x));
        let shape = x.emulated.shape.clone();
        let rounded = Triple::known(Plain { shape, data: rounded.collect() });
        let twin = suspect.twin();
        Ok(Some(twin.linear(&rounded, &twin.weight(&[read])?)?))
    })?;
    let sentence = product.of_wrong("the weight is read transposed");
    Ok(value.map(|value| Guess::new(value, sentence)))
}

fn weighted(suspect: &Suspect<'_>) -> Answer {
    let weights = suspect.case.value(suspect.of_layer(MoeRouterWeights))?;
    let width = suspect.expected.emulated.cols();
    let value = suspect.elementwise(|i, y| {
        let weight = weights.emulated.data[i / width];
        (weight * y, weight)
    });
    let sentence = "the results are multiplied by the router's weights, which is for the sum to do";
    Ok(Some(Guess::new(value, sentence)))
}

fn input_slots(suspect: &Suspect<'_>) -> Answer {
    let product = Product::of(suspect)?;
    suspect.best(orders(&product).into_iter().map(|(source, words)| {
        let rows = product.rows(&product.x, &source);
        let shape = product.x.emulated.shape.clone();
        let x = Triple::known(Plain { shape, data: rows.emulated.data.clone() });
        let value = product.with(&x, suspect.weight(), |slot| product.expert(slot))?;
        Ok(Guess::new(value, format!("the activations of each slot are those of {words}")))
    }))
}

/// One factor for each wrong expert.
fn scaled(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = suspect.captured() else { return Ok(None) };
    let product = Product::of(suspect)?;
    let mut factors: BTreeMap<usize, f64> = BTreeMap::new();
    for &expert in &product.wrong {
        let at = super::any::judged_elements(suspect);
        let at = at.filter(|i| product.expert(i / product.out) == expert);
        factors.insert(expert, super::any::factor(suspect, captured, at));
    }
    let value = suspect.elementwise(|i, y| {
        let factor = factors.get(&product.expert(i / product.out)).copied().unwrap_or(1.0);
        (factor * y, factor)
    });
    let some = factors.iter().take(4).map(|(expert, &factor)| {
        format!("expert {expert} is scaled by {}", super::any::constant(factor, suspect.config()))
    });
    let sentence = some.collect::<Vec<_>>().join(", ");
    let first = factors.values().next().copied();
    Ok(first.map(|factor| Guess::new(value, sentence).with("factor", factor)))
}

/// The slots of each expert within a step, in order.
fn groups(product: &Product<'_, '_>) -> Vec<Vec<usize>> {
    let case = product.suspect.case;
    let mut groups: BTreeMap<(usize, usize), Vec<usize>> = BTreeMap::new();
    for slot in 0..product.slots() {
        let step = case.evidence.step_of(case.rows[slot / product.k]);
        groups.entry((step, product.expert(slot))).or_default().push(slot);
    }
    groups.into_values().collect()
}

/// The last row of an expert is not written, where it has several.
fn group_cut_off(suspect: &Suspect<'_>) -> Answer {
    let product = Product::of(suspect)?;
    let several = groups(&product).into_iter().filter(|slots| slots.len() > 1);
    let last: BTreeSet<usize> = several
        .filter_map(|slots| slots.last().copied())
        .filter(|&slot| product.is_wrong(slot))
        .collect();
    let value = suspect.elementwise(|i, y| match last.contains(&(i / product.out)) {
        true => (0.0, 0.0),
        false => (y, 1.0),
    });
    let sentence = product.of_wrong("the last of the rows that go to an expert is left zero");
    Ok(Some(Guess::new(value, sentence)))
}

/// Results of an expert are those of other rows of its own.
fn rows_of_group(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = suspect.captured() else { return Ok(None) };
    let product = Product::of(suspect)?;
    let expected =
        |slot: usize| &suspect.expected.emulated.data[slot * product.out..][..product.out];
    let mut source: Vec<usize> = (0..product.slots()).collect();
    let mut moved = 0;
    for slots in groups(&product) {
        for &slot in slots.iter().filter(|&&slot| product.is_wrong(slot)) {
            let apart = |&&from: &&usize| product.apart(captured, slot, expected(from));
            let nearest = slots.iter().min_by(|a, b| apart(a).total_cmp(&apart(b)));
            source[slot] = nearest.copied().unwrap_or(slot);
            moved += usize::from(source[slot] != slot);
        }
    }
    if moved == 0 {
        return Ok(None);
    }
    let value = product.reordered(|slot| source[slot]);
    let sentence = format!("{moved} results are those of other rows that go to the same expert");
    Ok(Some(Guess::new(value, sentence).with("rows", moved as f64)))
}

/// Activations are those of other rows: of whichever each result is nearest to.
fn input_rows(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = suspect.captured() else { return Ok(None) };
    let product = Product::of(suspect)?;
    let n = product.x.emulated.shape[0];
    let mut source: Vec<usize> = (0..product.slots()).map(|slot| slot / product.k).collect();
    let twin = suspect.twin();
    for (expert, slots) in by_expert(&product.ids.emulated) {
        if !product.wrong.contains(&expert) {
            continue;
        }
        let matrix = apr_reference::expert(&suspect.weight().parts, product.experts, expert);
        let y = twin.linear(&product.x, &twin.weight(&matrix)?)?;
        let y: Vec<&[f64]> = y.emulated.rows().collect();
        for slot in slots {
            let apart = |row: &usize| product.apart(captured, slot, y[*row]);
            let nearest = (0..n).min_by(|a, b| apart(a).total_cmp(&apart(b)));
            source[slot] = nearest.unwrap_or(source[slot]);
        }
    }
    let moved = (0..product.slots()).filter(|&slot| source[slot] != slot / product.k).count();
    if moved == 0 {
        return Ok(None);
    }
    let width = product.x.emulated.cols();
    let rows: Vec<f64> = source
        .iter()
        .flat_map(|&row| product.x.emulated.data[row * width..][..width].to_vec())
        .collect();
    let x = Triple::known(Plain { shape: vec![n, product.k, width], data: rows });
    let value = product.with(&x, suspect.weight(), |slot| product.expert(slot))?;
    let sentence = format!("the activations of {moved} results are those of other rows");
    Ok(Some(Guess::new(value, sentence).with("rows", moved as f64)))
}
