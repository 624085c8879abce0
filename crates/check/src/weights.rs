//! What must hold of a file's shapes and weights.
//!
//! Broken is only what no training and no converter makes on purpose. What merely looks odd (a norm far from 1, a row of
//! another scale, rows of zeros for tokens that nobody uses) is a note.

use std::collections::HashMap;

use apr_model::{LayerRole, Role};

use crate::{
    Break, Check, Factory, Outcome,
    outcome::Verdict,
    session::Session,
    statistics::{BLOCK, Numbers, TensorFacts},
};

/// Mean magnitudes of norm weights that need no note. Trained models have been seen from 0.03 to 20.
const ORDINARY_NORM: std::ops::RangeInclusive<f64> = 1.0 / 64.0..=64.0;

impl<F: Factory> Session<'_, F> {
    pub(crate) fn config(&self) -> Result<Verdict, Outcome> {
        use apr_model::Error::*;
        self.watch.begin(Check::Config, 0);
        match &self.model {
            Ok(model) => {
                let config = model.config();
                let (layers, tensors) = (config.num_hidden_layers, self.checkpoint.tensors().len());
                let looked_at =
                    format!("{}, {layers} layers, {tensors} tensors", config.architecture);
                Ok(Verdict::new(Vec::new(), looked_at))
            }
            // The file may be sound: it is this engine that lacks something.
            Err(
                error @ (UnsupportedArchitecture { .. }
                | UnsupportedValue { .. }
                | UnsupportedType { .. }
                | WeightType { .. }),
            ) => Err(Outcome::not_measured(error)),
            Err(error) => Err(Outcome::broken(error)),
        }
    }

    pub(crate) fn finite_weights(&self) -> Result<Verdict, Outcome> {
        self.of_weights(Check::FiniteWeights, any, |facts, numbers| {
            let (row, column, value) = numbers.not_finite.first?;
            let (count, all) = (numbers.not_finite.count, numbers.elements);
            let what = format!(
                "{count} of {all} numbers are NaN or infinite; the first is {value} in row {row}, column {column}"
            );
            Some(Odd::Broken(tensor(facts, what)))
        })
    }

    pub(crate) fn dead_weights(&self) -> Result<Verdict, Outcome> {
        self.of_weights(Check::DeadWeights, any, |facts, numbers| {
            if let Some(value) = facts.constant() {
                let what = format!("all {} numbers are {value}", numbers.elements);
                // Biases of zero and norms of one are what training begins with.
                let legitimate = !facts.is_matrix && (value != 0.0 || !is_norm(facts));
                return Some(match legitimate {
                    true => Odd::Note(format!("{}: {what}", facts.name)),
                    false => Odd::Broken(tensor(facts, what)),
                });
            }
            if !facts.is_matrix {
                return None;
            }
            let mut parts = Vec::new();
            if let Some((row, ..)) = numbers.zero_rows.first {
                parts.push(format!("{} rows of zeros (first: row {row})", numbers.zero_rows.count));
            }
            if let Some((row, column, ())) = numbers.zero_blocks.first {
                let count = numbers.zero_blocks.count;
                parts.push(format!(
                    "{count} blocks of {BLOCK} zeros in other rows (first: row {row}, column {column})"
                ));
            }
            (!parts.is_empty()).then(|| Odd::Note(format!("{}: {}", facts.name, parts.join(", "))))
        })
    }

    pub(crate) fn duplicate_weights(&self) -> Result<Verdict, Outcome> {
        let mut seen: HashMap<blake3::Hash, &TensorFacts> = HashMap::new();
        let mut breaks = Vec::new();
        let all = self.facts(Check::DuplicateWeights);
        for facts in all {
            // Tensors of one number say nothing about where they come from.
            if facts.constant().is_some() || facts.numbers.as_ref().is_ok_and(|n| n.elements < 2) {
                continue;
            }
            let Some(first) = seen.get(&facts.hash) else {
                seen.insert(facts.hash, facts);
                continue;
            };
            let tied = |a, b| (a, b) == (Some(Role::TokenEmbd), Some(Role::Output));
            if !tied(first.role, facts.role) && !tied(facts.role, first.role) {
                breaks.push(tensor(facts, format!("holds the same bytes as `{}`", first.name)));
            }
        }
        Ok(Verdict::new(breaks, format!("the bytes of {} tensors", all.len())))
    }

    pub(crate) fn norm_scale(&self) -> Result<Verdict, Outcome> {
        self.of_weights(Check::NormScale, is_norm, |facts, numbers| {
            let (name, mean) = (&facts.name, numbers.mean_abs);
            if !ORDINARY_NORM.contains(&mean) {
                return Some(Odd::Note(format!("{name}: the mean magnitude is {mean:.3e}")));
            }
            let (negative, all) = (numbers.negative, numbers.elements);
            (2 * negative > all).then(|| {
                Odd::Note(format!(
                    "{name}: {negative} of {all} weights are negative: is 1 missing?"
                ))
            })
        })
    }

    pub(crate) fn row_scale(&self) -> Result<Verdict, Outcome> {
        let is_matrix = |facts: &TensorFacts| facts.is_matrix;
        self.of_weights(Check::RowScale, is_matrix, |facts, numbers| {
            let worst = numbers.odd_rows.first()?;
            let (count, median) = (numbers.odd_rows.len(), numbers.median_norm);
            Some(Odd::Note(format!(
                "{}: the norms of {count} rows are far from the others' (farthest: row {} has {:.3e}, the median is {median:.3e})",
                facts.name, worst.row, worst.norm
            )))
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
                Some(Odd::Broken(found)) => breaks.push(found),
                Some(Odd::Note(note)) => notes.push(note),
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
                notes.extend(missed.map(|why| format!("not measured: {why}")));
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
    Broken(Break),
    Note(String),
}

fn tensor(facts: &TensorFacts, what: String) -> Break {
    Break::Tensor { tensor: facts.name.clone(), what }
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
