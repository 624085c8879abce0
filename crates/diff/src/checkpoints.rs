//! Comparing two model files: what they declare, and tensor by tensor, whatever their containers.
//!
//! Tensors belong together by what they are for, not by how a container calls them. Rows of heads are brought into one
//! order where the architectures say how they are stored. Values are dequantised a row at a time. What differs by no more
//! than rounding to the stored types does is explained by them; what differs by more is a fault of a file, and has a
//! name where a simple one turns one tensor into the other. Equal tensors under another config are another model, so
//! the configs are compared first.

mod config;
mod damage;
mod matching;
mod pairing;
mod relation;
mod rows;
mod score;
mod steps;

use apr_format::Checkpoint;
use apr_model::Role;
use apr_tensor::Stored;
use rayon::prelude::*;
use serde::Serialize;

use crate::{Metrics, NotCompared, Options, Outcome, Reason, Result, Side};
pub use config::{ConfigComparison, ConfigDifference, UnreadableConfig};
pub use damage::{Damage, Extent};
use pairing::{Named, Pairing, Side as Model};
use relation::Case;
pub use relation::{Relation, RelationKind};
use score::{Score, score};
pub use steps::{Peak, Steps};

/// What to compare of two model files, and what counts as equal.
#[derive(Clone, Debug)]
pub struct TensorOptions {
    /// Compare only tensors with this in one of their names, and not the configs.
    pub filter: Option<String>,
    /// The largest relative L2 that counts as equal.
    pub tolerance: f64,
}

impl Default for TensorOptions {
    fn default() -> Self {
        Self { filter: None, tolerance: Options::TOLERANCE }
    }
}

/// How the tensors of one model file differ from those of another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckpointComparison {
    /// The version of this form: `apr-diff-tensors/1`.
    pub schema: &'static str,
    /// The file under test.
    pub a: String,
    /// The reference.
    pub b: String,
    /// The largest relative L2 that counts as equal.
    pub tolerance: f64,
    /// How the declared dimensions and constants differ; `None` if only some tensors were asked for.
    pub config: Option<ConfigComparison>,
    /// What was compared, from the embedding to the head.
    pub tensors: Vec<TensorComparison>,
    /// What was not, and why.
    pub not_compared: Vec<NotCompared>,
    /// What was done to the tensors before they were compared, and what could not be.
    pub notes: Vec<String>,
    /// What follows.
    pub outcome: Outcome,
}

/// How one tensor differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorComparison {
    /// What it is for, in GGUF's spelling; the name itself if that says nothing.
    pub name: String,
    /// What it is for, if its name says it.
    #[serde(skip)]
    pub role: Option<Role>,
    /// Its name in the file under test.
    pub name_a: String,
    /// Its name in the reference.
    pub name_b: String,
    /// Its stored type in the file under test.
    pub dtype_a: String,
    /// Its stored type in the reference.
    pub dtype_b: String,
    /// Its shape in the file under test, `[out, in]` for a matrix.
    pub shape: Vec<usize>,
    /// Its shape in the reference: another one only where a relation makes them equal.
    pub shape_b: Vec<usize>,
    /// Whether it is within the tolerance, and as it should lie.
    pub within: bool,
    /// Whether it is within the tolerance or else off by no more than what rounding to the stored types does.
    pub explained: bool,
    /// Whether the stored bytes are equal.
    pub bitwise: bool,
    /// The difference in units of what the stored types resolve; `None` without finite pairs.
    pub steps: Option<Steps>,
    /// What turns one into the other but for rounding, if they differ by more than that and something simple does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relation: Option<Relation>,
    /// Where they differ by more than rounding, if nothing simple turns one into the other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damage: Option<Damage>,
    /// The numbers; where the shapes differ, they are those after applying the relation.
    #[serde(flatten)]
    pub metrics: Metrics<Cell>,
}

/// Where an element stands in a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Cell {
    pub row: usize,
    pub col: usize,
}

/// Compares the model file `a`, which is under test, with `b`, the reference.
pub fn compare_checkpoints(
    a: &Checkpoint,
    b: &Checkpoint,
    options: &TensorOptions,
) -> Result<CheckpointComparison> {
    let (a, b) = (Model::of(a), Model::of(b));
    let Pairing { pairs, not_compared } = pairing::pair(&a, &b, options.filter.as_deref())?;
    let mut comparison = CheckpointComparison {
        schema: "apr-diff-tensors/1",
        a: a.path().display().to_string(),
        b: b.path().display().to_string(),
        tolerance: options.tolerance,
        config: options.filter.is_none().then(|| config::compare(&a, &b)),
        tensors: Vec::with_capacity(pairs.len()),
        not_compared,
        notes: [(Side::A, &a), (Side::B, &b)]
            .into_iter()
            .filter_map(|(side, model)| Some(format!("{side}: {}", model.note()?)))
            .collect(),
        outcome: Outcome::Unmeasured { because: String::new() },
    };
    let compared: Vec<_> = pairs
        .par_iter()
        .map(|(name, role, tensor_a, tensor_b)| {
            let role = *role;
            TensorPair { name, role, a: &a, tensor_a, b: &b, tensor_b }.compare(options.tolerance)
        })
        .collect::<Result<_>>()?;
    for ((name, ..), compared) in pairs.into_iter().zip(compared) {
        match compared {
            Ok(tensor) => comparison.tensors.push(tensor),
            Err(reason) => comparison.not_compared.push(NotCompared { name, reason }),
        }
    }
    comparison.outcome = outcome(&comparison);
    Ok(comparison)
}

fn outcome(comparison: &CheckpointComparison) -> Outcome {
    let CheckpointComparison { config, tensors, not_compared, .. } = comparison;
    if let Some(different) = config.as_ref().and_then(|config| config.differences.first()) {
        return Outcome::Differs { first: format!("{} of the config", different.key) };
    }
    if let Some(tensor) = tensors.iter().find(|tensor| !tensor.explained) {
        return Outcome::Differs { first: tensor.name.clone() };
    }
    if let Some(config) = config.as_ref().and_then(|config| config.unreadable.first()) {
        return Outcome::Unmeasured {
            because: format!("the config of {}: {}", config.side, config.why),
        };
    }
    let mut missing =
        not_compared.iter().filter(|left| !matches!(left.reason, Reason::Derived { .. }));
    let because = match (missing.next(), missing.count()) {
        (Some(first), 0) => format!("{}: {}", first.name, first.reason),
        (Some(first), more) => format!("{}: {} (and {more} more)", first.name, first.reason),
        (None, _) if tensors.is_empty() => "nothing was compared".to_owned(),
        (None, _) if tensors.iter().any(|tensor| !tensor.within) => return Outcome::Drift,
        (None, _) => {
            return Outcome::Match { bitwise: tensors.iter().all(|tensor| tensor.bitwise) };
        }
    };
    Outcome::Unmeasured { because }
}

struct TensorPair<'a> {
    name: &'a str,
    role: Option<Role>,
    a: &'a Model<'a>,
    tensor_a: &'a Named<'a>,
    b: &'a Model<'a>,
    tensor_b: &'a Named<'a>,
}

impl TensorPair<'_> {
    /// The comparison, or why there is none.
    fn compare(&self, tolerance: f64) -> Result<Result<TensorComparison, Reason>> {
        for (side, tensor) in [(Side::A, self.tensor_a), (Side::B, self.tensor_b)] {
            if !tensor.stored.dtype().can_dequantize() {
                let dtype = tensor.stored.dtype().name().to_owned();
                return Ok(Err(Reason::Unreadable { side, dtype }));
            }
        }
        let (a, b) = (
            self.a.in_halves(self.role, self.tensor_a)?,
            self.b.in_halves(self.role, self.tensor_b)?,
        );
        let dims = |stored: &Stored| stored.shape().dims().to_vec();
        let direct = (a.shape() == b.shape()).then(|| score(&a, &b));
        let within = direct.as_ref().is_some_and(|direct| direct.metrics.within(tolerance));
        let explained = within || direct.as_ref().is_some_and(Score::explained);
        let (mut relation, mut damage, mut related) = (None, None, None);
        if !explained {
            // A tensor of nothing may claim any number of rows.
            let whole = direct.as_ref().filter(|direct| direct.metrics.count > 0);
            let (found, strays) = whole.map(|_| Damage::of(&a, &b)).unzip();
            let case = Case {
                a: &a,
                b: &b,
                name: self.name,
                role: self.role,
                head_dim: self.a.head_dim().or(self.b.head_dim()),
                reference: self.b,
                before: whole,
                strays: &strays.unwrap_or_default(),
            };
            (relation, related) = relation::find(&case)?.unzip();
            damage = found.filter(|_| relation.is_none());
        }
        let Some(Score { metrics, steps }) = direct.or(related) else {
            return Ok(Err(Reason::Shape { a: dims(&a), b: dims(&b) }));
        };
        if metrics.finite == 0 && metrics.categories.mismatched == 0 {
            return Ok(Err(Reason::NothingFinite));
        }
        Ok(Ok(TensorComparison {
            name: self.name.to_owned(),
            role: self.role,
            name_a: self.tensor_a.name.to_string(),
            name_b: self.tensor_b.name.to_string(),
            dtype_a: a.dtype().name().to_owned(),
            dtype_b: b.dtype().name().to_owned(),
            shape: dims(&a),
            shape_b: dims(&b),
            within,
            explained,
            bitwise: a.dtype() == b.dtype()
                && a.shape() == b.shape()
                && a.bytes()[..] == b.bytes()[..],
            steps,
            relation,
            damage,
            metrics,
        }))
    }
}
