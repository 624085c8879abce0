//! A stage that a mistake may be in, and values that it may have computed instead.

use std::{collections::BTreeMap, ops::Range};

use apr_model::{Axes, Backend, Config, Site, Stage};
use apr_reference::Tensor as Plain;

use super::case::Case;
use crate::{
    Result, inputs,
    judge::Record,
    twin::{Triple, Twin, Weight},
};

/// A stage that a case's mistake may be in: the case's own, or one that nobody captured and that leads to it.
pub(crate) struct Suspect<'c> {
    pub(crate) case: &'c Case<'c>,
    pub(crate) site: Site,
    /// What the declared arithmetic gives.
    pub(crate) expected: Triple,
}

/// What a stage may have computed instead.
#[derive(Clone, Debug)]
pub(crate) struct Guess {
    pub(crate) value: Triple,
    /// The mistake, in a sentence without a full stop.
    pub(crate) sentence: String,
    pub(crate) parameters: BTreeMap<&'static str, f64>,
}

impl Guess {
    pub(crate) fn new(value: Triple, sentence: impl Into<String>) -> Self {
        Self { value, sentence: sentence.into(), parameters: BTreeMap::new() }
    }

    pub(crate) fn with(mut self, name: &'static str, parameter: f64) -> Self {
        self.parameters.insert(name, parameter);
        self
    }
}

/// What a hypothesis answers: nothing if it cannot apply.
pub(crate) type Answer = Result<Option<Guess>>;

impl<'c> Suspect<'c> {
    pub(crate) fn new(case: &'c Case<'c>, site: Site) -> Result<Self> {
        let expected = if site == case.site { case.expected.clone() } else { case.value(site)? };
        Ok(Self { case, site, expected })
    }

    pub(crate) fn config(&self) -> &'c Config {
        self.case.config()
    }

    pub(crate) fn twin(&self) -> &'c Twin {
        self.case.twin()
    }

    /// The stage's layer; 0 for a stage of the whole model.
    pub(crate) fn layer(&self) -> usize {
        self.site.layer.map_or(0, |layer| layer as usize)
    }

    /// Input `index` of the stage's op.
    pub(crate) fn input(&self, index: usize) -> Result<Triple> {
        self.case.value(inputs(self.site, self.config())[index])
    }

    /// A stage of the same layer.
    pub(crate) fn of_layer(&self, stage: Stage) -> Site {
        Site { stage, ..self.site }
    }

    /// The matrix that the stage reads.
    pub(crate) fn weight(&self) -> &'c Weight {
        self.case.evidence.model.weight(self.site).expect("products have a matrix")
    }

    /// The norm weight or bias that the stage reads.
    pub(crate) fn vector(&self) -> &'c Vec<f64> {
        self.case.evidence.model.vector(self.site).expect("norms and biases have a vector")
    }

    /// What was captured of the stage itself, if it was.
    pub(crate) fn captured(&self) -> Option<&'c Plain<f64>> {
        (self.site == self.case.site).then_some(&self.case.captured)
    }

    /// Holds the captured value against what follows from `alternative`.
    pub(crate) fn judge(&self, alternative: &Triple) -> Result<Record> {
        Ok(match self.site == self.case.site {
            true => self.case.judge(alternative),
            false => self.case.judge(&self.case.through(self.site, alternative)?),
        })
    }

    /// How many times what it may be the error of `alternative` is.
    pub(crate) fn excess(&self, alternative: &Triple) -> Result<f64> {
        Ok(self.case.excess(&self.judge(alternative)?))
    }

    /// The error over all elements, which changes smoothly with a parameter.
    pub(crate) fn misfit(&self, alternative: &Triple) -> Result<f64> {
        let record = self.judge(alternative)?;
        let wrong_category = if record.not_finite > 0 { f64::INFINITY } else { 0.0 };
        Ok(record.whole.ratio().max(wrong_category))
    }

    /// The guess that leaves least unexplained; the first that leaves nothing.
    pub(crate) fn best(&self, guesses: impl IntoIterator<Item = Result<Guess>>) -> Answer {
        let mut best: Option<(f64, Guess)> = None;
        for guess in guesses {
            let guess = guess?;
            let excess = self.excess(&guess.value)?;
            if best.as_ref().is_none_or(|(least, _)| excess < *least) {
                best = Some((excess, guess));
            }
            if excess <= 1.0 {
                break;
            }
        }
        Ok(best.map(|(_, guess)| guess))
    }

    /// The projections that share a matrix: their names and columns.
    pub(crate) fn parts(&self) -> Vec<(&'static str, Range<usize>)> {
        match joined(self.site.stage, self.config()) {
            parts if parts.is_empty() => vec![("", 0..self.row_width())],
            parts => parts,
        }
    }

    /// `alternative` in those projections in which it fits best, and which they are.
    pub(crate) fn in_parts(&self, alternative: &Triple) -> Result<(Triple, String)> {
        let parts = self.parts();
        let mut best: Option<(f64, Triple, String)> = None;
        for chosen in 1..1usize << parts.len() {
            let is_chosen = |index: &usize| chosen & (1 << index) != 0;
            let chosen: Vec<_> = (0..parts.len()).filter(is_chosen).map(|i| &parts[i]).collect();
            let mixed = self
                .mixed(alternative, |_, column| chosen.iter().any(|part| part.1.contains(&column)));
            let excess = self.excess(&mixed)?;
            if best.as_ref().is_none_or(|(least, _, _)| excess < *least) {
                let names: Vec<&str> = chosen.iter().map(|part| part.0).collect();
                best = Some((excess, mixed, names.join(" and ")));
            }
        }
        let (_, mixed, names) = best.expect("there is a part");
        Ok((mixed, names))
    }

    /// `alternative` where `here` says so, by index of row and column, and what is expected elsewhere.
    pub(crate) fn mixed(
        &self,
        alternative: &Triple,
        here: impl Fn(usize, usize) -> bool,
    ) -> Triple {
        let mut value = Plain::clone(&self.expected.emulated);
        let mut slack = slack_of(&self.expected).to_vec();
        let other = slack_of(alternative);
        let width = self.row_width();
        for (i, value) in value.data.iter_mut().enumerate() {
            if here(self.row_of(i), i % width) {
                *value = alternative.emulated.data[i];
                slack[i] = other[i];
            }
        }
        Triple::alternative(value, slack)
    }

    /// Columns of a row; over all its heads, where they are channels, or all its experts.
    pub(crate) fn row_width(&self) -> usize {
        match self.site.stage.axes() {
            Axes::RowHeadChannel | Axes::RowSlotChannel => {
                self.expected.exact.shape[1..].iter().product()
            }
            _ => self.expected.exact.cols(),
        }
    }

    /// The channel of element `i`: the same one for each expert of a row.
    pub(crate) fn channel_of(&self, i: usize) -> usize {
        i % (self.row_width() / self.case.slots())
    }

    /// The index of the row of element `i`.
    pub(crate) fn row_of(&self, i: usize) -> usize {
        i / self.row_width() % self.case.rows.len()
    }

    /// What is expected, with each element put through `f` with its index, and its slack scaled by what `f` says.
    pub(crate) fn elementwise(&self, f: impl Fn(usize, f64) -> (f64, f64)) -> Triple {
        elementwise(&self.expected, f)
    }

    /// What is expected, with its columns from elsewhere; `None` leaves a column as it is.
    pub(crate) fn columns_from(&self, source: impl Fn(usize) -> Option<usize>) -> Triple {
        let width = self.row_width();
        let from = |i: usize| source(i % width).map_or(i, |column| i - i % width + column);
        self.gathered(from)
    }

    /// What is expected, with its rows from elsewhere.
    pub(crate) fn rows_from(&self, source: impl Fn(usize) -> usize) -> Triple {
        let width = self.row_width();
        let from = |i: usize| {
            let row = self.row_of(i);
            (i / width - row + source(row)) * width + i % width
        };
        self.gathered(from)
    }

    fn gathered(&self, from: impl Fn(usize) -> usize) -> Triple {
        let Triple { emulated, .. } = &self.expected;
        let slack = slack_of(&self.expected);
        let indices = 0..emulated.data.len();
        let data = indices.clone().map(|i| emulated.data[from(i)]).collect();
        let slack = indices.map(|i| slack[from(i)]).collect();
        Triple::alternative(Plain { shape: emulated.shape.clone(), data }, slack)
    }

    /// The product of `x` with a matrix in parts; of the case's own stage only the columns that it looks at.
    pub(crate) fn product(&self, x: &Triple, parts: &[apr_tensor::Stored]) -> Result<Triple> {
        let parts = match &self.case.columns {
            Some(columns) => vec![parts[0].slice_rows(columns.clone())],
            None => parts.to_vec(),
        };
        Ok(self.twin().linear(x, &self.twin().weight(&parts)?)?)
    }
}

/// The projections that `stage` joins, and their columns.
pub(crate) fn joined(stage: Stage, config: &Config) -> Vec<(&'static str, Range<usize>)> {
    let (q, kv) = (config.q_dim(), config.kv_dim());
    match stage {
        Stage::QkvMatmul | Stage::QkvBias => {
            vec![("q", 0..q), ("k", q..q + kv), ("v", q + kv..q + 2 * kv)]
        }
        _ => Vec::new(),
    }
}

/// The slack of a computed value.
pub(crate) fn slack_of(value: &Triple) -> &[f32] {
    value.slack.as_deref().expect("computed values have a slack")
}

/// `value` with each element put through `f` with its index; `f` also says by what its slack grows.
pub(crate) fn elementwise(value: &Triple, f: impl Fn(usize, f64) -> (f64, f64)) -> Triple {
    let mut data = Vec::with_capacity(value.emulated.data.len());
    let mut slack = Vec::with_capacity(value.emulated.data.len());
    for (i, (&x, &s)) in value.emulated.data.iter().zip(slack_of(value)).enumerate() {
        let (y, slope) = f(i, x);
        data.push(y);
        let rounding = f64::from(f32::EPSILON) * y.abs();
        slack.push((f64::from(s) * slope).hypot(rounding) as f32);
    }
    Triple::alternative(Plain { shape: value.emulated.shape.clone(), data }, slack)
}
