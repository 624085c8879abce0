//! What must hold of a file's weights.
//!
//! Broken is only what no training and no converter makes on purpose. What merely looks odd (a norm far from 1, a row of
//! another scale, rows of zeros for tokens that nobody uses) is a note.

use std::collections::HashMap;

use apr_model::{LayerRole, Role};

use crate::{
    Break, Check, Note, Outcome,
    file::FileSession,
    outcome::Verdict,
    statistics::{BLOCK, LARGEST_F16, Numbers, TensorFacts},
};

/// How much larger than usual in its matrix a weight may be without a note. The outliers of trained models are some hundred
/// times as large; one flipped bit in an exponent is good for a factor of up to 65536.
const ORDINARY_OUTLIER: f64 = 1024.0;

/// Mean magnitudes of norm weights that need no note. Trained models have been seen from 0.03 to 20.
const ORDINARY_NORM: std::ops::RangeInclusive<f64> = 1.0 / 64.0..=64.0;

impl FileSession<'_> {
    pub(crate) fn finite_weights(&self) -> Result<Verdict, Outcome> {
        self.of_weights(Check::FiniteWeights, any, |facts, numbers| {
            let (row, column, value) = numbers.not_finite.first?;
            let (count, all) = (numbers.not_finite.count, numbers.elements);
            let at = facts.parts.element(row, column);
            let what = format!(
                "{count} of {all} numbers are NaN or infinite; the first is {value} in {at}"
            );
            Some(Odd::Broken(what))
        })
    }

    pub(crate) fn dead_weights(&self) -> Result<Verdict, Outcome> {
        self.of_weights(Check::DeadWeights, any, |facts, numbers| {
            if let Some(value) = facts.constant() {
                let what = format!("all {} numbers are {value}", numbers.elements);
                // Biases of zero and norms of one are what training begins with.
                let legitimate = !facts.is_matrix && (value != 0.0 || !is_norm(facts));
                return Some(match legitimate {
                    true => Odd::Note(what),
                    false => Odd::Broken(what),
                });
            }
            if !facts.is_matrix {
                return None;
            }
            if let Some(&(_, value)) = numbers.constant_parts.first() {
                let all: Vec<String> = numbers
                    .constant_parts
                    .iter()
                    .filter_map(|&(part, _)| facts.parts.name(part))
                    .collect();
                let what = format!("{}: all numbers are {value}", listed(&all));
                return Some(Odd::Broken(what));
            }
            let mut parts = Vec::new();
            if let Some((row, ..)) = numbers.zero_rows.first {
                let (count, at) = (numbers.zero_rows.count, facts.parts.row(row));
                parts.push(format!("{count} rows of zeros (first: {at})"));
            }
            if let Some((row, column, ())) = numbers.zero_blocks.first {
                let (count, at) = (numbers.zero_blocks.count, facts.parts.element(row, column));
                parts.push(format!("{count} blocks of {BLOCK} zeros in other rows (first: {at})"));
            }
            (!parts.is_empty()).then(|| Odd::Note(parts.join(", ")))
        })
    }

    pub(crate) fn duplicate_weights(&self) -> Result<Verdict, Outcome> {
        let mut seen: HashMap<blake3::Hash, (&TensorFacts, usize)> = HashMap::new();
        let mut breaks = Vec::new();
        let all = self.facts(Check::DuplicateWeights);
        for facts in all {
            // Tensors of one number say nothing about where they come from.
            if facts.constant().is_some() || facts.numbers.as_ref().is_ok_and(|n| n.elements < 2) {
                continue;
            }
            let dead = facts.numbers.iter().flat_map(|numbers| &numbers.constant_parts);
            let dead: Vec<usize> = dead.map(|&(part, _)| part).collect();
            for (part, &hash) in facts.hashes.iter().enumerate() {
                if dead.contains(&part) {
                    continue;
                }
                let Some(&(first, part_of_first)) = seen.get(&hash) else {
                    seen.insert(hash, (facts, part));
                    continue;
                };
                let tied = |a, b| (a, b) == (Some(Role::TokenEmbd), Some(Role::Output));
                if !tied(first.role, facts.role) && !tied(facts.role, first.role) {
                    let (this, other) = (facts.parts.name(part), first.parts.name(part_of_first));
                    let this = this.map_or(String::new(), |part| format!("{part} "));
                    let other = other.map_or(String::new(), |part| format!(", {part}"));
                    let what = format!("{this}holds the same bytes as `{}`{other}", first.name);
                    breaks.push(Break::Tensor { tensor: facts.name.clone(), what });
                }
            }
        }
        Ok(Verdict::new(breaks, format!("the bytes of {} tensors", all.len())))
    }

    pub(crate) fn norm_scale(&self) -> Result<Verdict, Outcome> {
        self.of_weights(Check::NormScale, is_norm, |_, numbers| {
            let mean = numbers.mean_abs;
            if !ORDINARY_NORM.contains(&mean) {
                return Some(Odd::Note(format!("the mean magnitude is {mean:.3e}")));
            }
            let (negative, all) = (numbers.negative, numbers.elements);
            (2 * negative > all).then(|| {
                Odd::Note(format!("{negative} of {all} weights are negative: is 1 missing?"))
            })
        })
    }

    pub(crate) fn row_scale(&self) -> Result<Verdict, Outcome> {
        let is_matrix = |facts: &TensorFacts| facts.is_matrix;
        self.of_weights(Check::RowScale, is_matrix, |facts, numbers| {
            let worst = numbers.odd_rows.first()?;
            let (count, median) = (numbers.odd_rows.len(), numbers.median_norm);
            let (at, norm) = (facts.parts.row(worst.row), worst.norm);
            Some(Odd::Note(format!(
                "the norms of {count} rows are far from the others' (farthest: {at} has {norm:.3e}, the median is {median:.3e})"
            )))
        })
    }

    pub(crate) fn block_scale(&self) -> Result<Verdict, Outcome> {
        self.of_weights(Check::BlockScale, any, |facts, numbers| {
            if let Some((row, column, x)) = numbers.huge.first {
                let (count, at) = (numbers.huge.count, facts.parts.element(row, column));
                return Some(Odd::Broken(format!(
                    "{count} numbers are beyond {LARGEST_F16}, the largest of F16; the first is {x:e} in {at}"
                )));
            }
            if !facts.is_matrix {
                return None;
            }
            let mut odd = Vec::new();
            let usual = numbers.median_norm / (numbers.columns.max(1) as f64).sqrt();
            if let Some((row, column, x)) = numbers.largest
                && usual > 0.0
                && f64::from(x.abs()) > ORDINARY_OUTLIER * usual
            {
                let at = facts.parts.element(row, column);
                odd.push(format!("{x:.3e} in {at} stands out; {usual:.3e} is usual"));
            }
            if let Some((row, column, x)) = numbers.faint_blocks.first {
                let (count, at) = (numbers.faint_blocks.count, facts.parts.element(row, column));
                odd.push(format!(
                    "{count} blocks of {BLOCK} hold next to nothing in rows that do (the first reaches {x:.3e}, in {at})"
                ));
            }
            (!odd.is_empty()).then(|| Odd::Note(odd.join("; ")))
        })
    }

    /// Judges each tensor that the check is about.
    fn of_weights(
        &self,
        check: Check,
        about: impl Fn(&TensorFacts) -> bool,
        judge: impl Fn(&TensorFacts, &Numbers) -> Option<Odd>,
    ) -> Result<Verdict, Outcome> {
        let (mut breaks, mut notes) = (Vec::new(), Vec::new());
        let (mut tensors, mut elements) = (0, 0);
        let unreadable = self.checkpoint.unreadable().map(|(name, unreadable)| {
            format!("{name}: {} cannot be read as numbers here", unreadable.dtype)
        });
        let mut missed: Vec<String> = unreadable.collect();
        for facts in self.facts(check).iter().filter(|facts| about(facts)) {
            let numbers = match &facts.numbers {
                Ok(numbers) => numbers,
                Err(why) => {
                    missed.push(format!("{}: {why}", facts.name));
                    continue;
                }
            };
            tensors += 1;
            elements += numbers.elements;
            match judge(facts, numbers) {
                Some(Odd::Broken(what)) => {
                    breaks.push(Break::Tensor { tensor: facts.name.clone(), what });
                }
                Some(Odd::Note(what)) => {
                    notes.push(Note { tensor: Some(facts.name.clone()), what })
                }
                None => {}
            }
        }
        let missed = missed.first().map(|first| match missed.len() {
            1 => first.clone(),
            n => format!("{first}, and {} more tensors", n - 1),
        });
        let outcome = match missed {
            Some(why) if breaks.is_empty() => Outcome::not_measured(why),
            None if tensors == 0 => Outcome::not_applicable("the file has no such tensors"),
            missed => {
                notes.extend(missed.map(|why| Note::new(format!("not measured: {why}"))));
                Outcome::of(breaks)
            }
        };
        let looked_at = Some(format!("{elements} numbers in {tensors} tensors"));
        Ok(Verdict { outcome, looked_at, notes })
    }

    /// One pass over all tensors, shared by all checks of weights.
    fn facts(&self, check: Check) -> &[TensorFacts] {
        self.facts.get_or_init(|| {
            let tensors = self.checkpoint.tensors();
            let bytes = |stored: &apr_tensor::Stored| stored.bytes().len() as u64;
            self.watch.begin(check, tensors.map(|(_, stored)| bytes(stored)).sum());
            let facts = |(name, stored)| {
                let facts = TensorFacts::of(name, stored);
                self.watch.advance(bytes(stored));
                facts
            };
            self.checkpoint.tensors().map(facts).collect()
        })
    }
}

/// What a tensor has that it should not have.
enum Odd {
    Broken(String),
    Note(String),
}

/// The first of many names.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let more = names.len().saturating_sub(SHOWN);
    let first = names[..names.len() - more].join(", ");
    if more > 0 { format!("{first} and {more} more") } else { first }
}

fn any(_: &TensorFacts) -> bool {
    true
}

fn is_norm(facts: &TensorFacts) -> bool {
    use LayerRole::{AttnKNorm, AttnNorm, AttnQNorm, FfnNorm};
    matches!(
        facts.role,
        Some(Role::OutputNorm | Role::Layer(_, AttnNorm | FfnNorm | AttnQNorm | AttnKNorm))
    )
}
