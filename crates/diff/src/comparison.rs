//! The result of a comparison: plain data, complete enough to be judged by somebody who was not there.

use std::{collections::BTreeSet, fmt};

use apr_capture::{Capture, manifest};
use apr_model::Site;
use serde::{Serialize, Serializer};

use crate::{Alignment, Flip, Logits, Metrics, TokenDifference};

/// One of the two things compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The one under test.
    A,
    /// The reference.
    B,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::A => "A",
            Self::B => "B",
        })
    }
}

/// How one capture differs from another, stage by stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The version of this form: `apr-diff/1`.
    pub schema: &'static str,
    /// The side under test.
    pub a: Origin,
    /// The reference.
    pub b: Origin,
    /// The largest relative L2 that counts as equal.
    pub tolerance: f64,
    /// How rows were aligned.
    pub alignment: Alignment,
    /// Where the tokens begin to differ, if they do.
    pub token_differences: Vec<TokenDifference>,
    /// What was compared, in the order of computation.
    pub stages: Vec<StageComparison>,
    /// What was not, and why.
    pub not_compared: Vec<NotCompared>,
    /// What only one side holds, where [only common stages](crate::Options::common) were asked for: not missed.
    pub left_out: Vec<NotCompared>,
    /// What follows.
    pub outcome: Outcome,
}

impl Comparison {
    /// The stage and row that are beyond the tolerance at the earliest position: from which token on the sides differ.
    pub fn first_row_beyond(&self) -> Option<(Site, &RowScore)> {
        let rows = self.stages.iter().flat_map(|s| s.rows.iter().map(|row| (s.site, row)));
        rows.filter(|(_, row)| !row.within(self.tolerance))
            .min_by_key(|(_, row)| (row.slot, row.position))
    }
}

/// Where a side comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the fields of the manifest")]
pub struct Origin {
    pub path: String,
    pub complete: bool,
    pub tool: Option<String>,
    pub model: Option<String>,
    pub backend: Option<String>,
    pub plan_fingerprint: Option<String>,
    /// What the side rounds on the way; `None` if it does not say.
    pub arithmetic: Option<Arithmetic>,
}

/// What an engine rounds to less than F32 on the way, as its plan declares. Two that differ here differ in their values,
/// without anything being wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Arithmetic {
    /// What activations are rounded to before they meet weights; empty if they are not.
    pub activations: Vec<String>,
    /// What keys and values are rounded to in the cache, if they are.
    pub kv: Option<String>,
}

impl Arithmetic {
    fn of(plan: &manifest::Plan, kv: Option<&str>) -> Self {
        let rounds = |dtype: &str| !matches!(dtype, "F32" | "F64" | "f32" | "f64" | "");
        let activations = plan.ops.iter().flat_map(|op| &op.activations);
        let activations: BTreeSet<_> = activations.filter(|dtype| rounds(dtype)).cloned().collect();
        Self {
            activations: activations.into_iter().collect(),
            kv: kv.filter(|dtype| rounds(dtype)).map(str::to_owned),
        }
    }
}

impl Origin {
    pub(crate) fn of(capture: &Capture) -> Self {
        let provenance = capture.provenance();
        Self {
            path: capture.path().display().to_string(),
            complete: capture.is_complete(),
            tool: provenance.map(|p| format!("{} {}", p.tool.name, p.tool.version)),
            model: provenance.map(|p| p.model.path.clone()),
            backend: provenance.and_then(|p| p.backend.as_ref()).map(|b| b.name.clone()),
            plan_fingerprint: provenance
                .and_then(|p| p.plan.as_ref())
                .and_then(|plan| plan.fingerprint.clone()),
            arithmetic: provenance
                .and_then(|p| Some(Arithmetic::of(p.plan.as_ref()?, p.kv.as_deref()))),
        }
    }
}

/// How a stage differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageComparison {
    /// Which stage, of which layer.
    #[serde(serialize_with = "site")]
    pub site: Site,
    /// Whether it is within the tolerance: by norm, in every category, and [row by row](RowScore::within).
    pub within: bool,
    /// Whether all that was compared is equal bit for bit, and stored in the same type.
    pub bitwise: bool,
    /// The numbers, over all rows compared.
    #[serde(flatten)]
    pub metrics: Metrics<Location>,
    /// The same row by row, in short.
    pub rows: Vec<RowScore>,
    /// Rows that only side A has.
    pub rows_only_a: usize,
    /// Rows that only side B has.
    pub rows_only_b: usize,
    /// Rows left out because the tokens before or at them differ.
    pub rows_other_tokens: usize,
    /// Slots left out because only one side chose their expert.
    #[serde(skip_serializing_if = "is_zero")]
    pub slots_left_out: usize,
    /// Rows whose experts differ, where the stage is the choice of experts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub flips: Vec<Flip>,
    /// What it means for the tokens, where the stage is the logits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logits: Option<Logits>,
}

impl StageComparison {
    /// The row with the largest relative L2.
    pub fn worst_row(&self) -> Option<&RowScore> {
        let error = |row: &&RowScore| row.relative_l2.unwrap_or(f64::NEG_INFINITY);
        self.rows.iter().max_by(|x, y| error(x).total_cmp(&error(y)))
    }
}

/// How one row differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RowScore {
    /// The sequence within a batch.
    pub slot: usize,
    /// The position, where it is known.
    pub position: Option<usize>,
    /// As in [`Metrics`]; where the reference's row has less than [a millionth](Self::TINY) of the norm of the stage's
    /// rows in the root mean square, relative to that norm, since almost nothing is a measure of nothing.
    #[serde(serialize_with = "crate::metrics::option_number")]
    pub relative_l2: Option<f64>,
    /// The largest difference.
    #[serde(serialize_with = "crate::metrics::option_number")]
    pub max_abs: Option<f64>,
    /// Pairs that differ in category.
    pub mismatched: u64,
    /// The side on which the row is all zeros, if it is on one only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead: Option<Side>,
}

impl RowScore {
    /// The share of the stage's usual norm below which a row is not measured by its own.
    pub const TINY: f64 = 1e-6;

    /// Whether the row is within the tolerance by itself, nothing differs in category, and it is not all zeros on one side only. The norm of a stage is
    /// that of its largest row, often the first token's, beside which another row may be wrong throughout.
    pub fn within(&self, tolerance: f64) -> bool {
        self.dead.is_none()
            && self.mismatched == 0
            && self.relative_l2.is_none_or(|error| error <= tolerance)
    }
}

/// Where an element stands in a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Location {
    /// The sequence within a batch.
    pub slot: usize,
    /// The position of the row, where it is known.
    pub position: Option<usize>,
    /// The row among those compared.
    pub row: usize,
    /// The head, in stages that have heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head: Option<usize>,
    /// The expert, in stages that have experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert: Option<usize>,
    /// The channel, within its head or expert if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel: Option<usize>,
    /// The position of the key, in scores and their softmax.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<usize>,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.position {
            Some(position) => write!(f, "position {position}")?,
            None => write!(f, "row {}", self.row)?,
        }
        let rest = [
            ("head", self.head),
            ("expert", self.expert),
            ("channel", self.channel),
            ("key", self.key),
        ];
        rest.iter()
            .filter_map(|(name, value)| Some((name, (*value)?)))
            .try_for_each(|(name, value)| write!(f, ", {name} {value}"))
    }
}

/// Something that was not compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NotCompared {
    /// The stage, or the name that says none.
    pub name: String,
    /// Why.
    #[serde(flatten)]
    pub reason: Reason,
}

/// Why something was not compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reason {
    /// A side does not hold it.
    Missing {
        /// That side.
        side: Side,
    },
    /// Neither side holds it.
    MissingOnBoth,
    /// No position occurs on both sides.
    NoCommonRows,
    /// From the first row on, the tokens differ.
    OtherTokens,
    /// A side holds a position twice.
    Ambiguous {
        /// That side.
        side: Side,
        /// The position.
        position: usize,
    },
    /// The rows are of different shapes.
    Shape {
        /// The shape on side A.
        a: Vec<usize>,
        /// The shape on side B.
        b: Vec<usize>,
    },
    /// The sides chose no expert in common in any row.
    OtherExperts,
    /// Both sides are NaN or infinite throughout, so there are no numbers to compare.
    NothingFinite,
    /// It is stored in a type that cannot be read as numbers.
    Unreadable {
        /// The side that holds it.
        side: Side,
        /// The type.
        dtype: String,
    },
    /// A side has it in its metadata instead of in a tensor.
    Derived {
        /// That side.
        side: Side,
    },
    /// The name says no stage that is known here.
    Unknown {
        /// The side that holds it.
        side: Side,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { side } => write!(f, "not in {side}"),
            Self::MissingOnBoth => f.write_str("in neither"),
            Self::NoCommonRows => f.write_str("no position occurs on both sides"),
            Self::OtherTokens => f.write_str("the tokens differ from the first row on"),
            Self::Ambiguous { side, position } => {
                write!(f, "{side} holds position {position} twice")
            }
            Self::Shape { a, b } => write!(f, "shape {a:?} in A and {b:?} in B"),
            Self::OtherExperts => f.write_str("the sides chose no expert in common"),
            Self::NothingFinite => f.write_str("no finite value on either side"),
            Self::Unreadable { side, dtype } => write!(f, "stored as {dtype} in {side}"),
            Self::Derived { side } => write!(f, "said by the metadata of {side}"),
            Self::Unknown { side } => write!(f, "a name in {side} that says no known stage"),
        }
    }
}

/// What follows from a comparison. It says nothing about whose fault a difference is: errors add up along the way, and
/// where one becomes visible is not where it arises.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Outcome {
    /// Everything asked for was compared and is within the tolerance.
    Match {
        /// Whether it is equal bit for bit.
        bitwise: bool,
    },
    /// Everything asked for was compared, and what is beyond the tolerance is what rounding to the stored types does. Only
    /// tensors have that: what rounding does to a stage, only the model can say.
    Drift,
    /// Something is beyond the tolerance.
    Differs {
        /// The first such stage, or tensor.
        first: String,
    },
    /// Nothing, or not everything asked for, was compared, and what was is within the tolerance.
    Unmeasured {
        /// What is missing.
        because: String,
    },
}

impl Outcome {
    /// The exit code that stands for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Match { .. } | Self::Drift => 0,
            Self::Differs { .. } => 1,
            Self::Unmeasured { .. } => 3,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Match { bitwise: true } => f.write_str("MATCH: equal bit for bit"),
            Self::Match { bitwise: false } => f.write_str("MATCH: all within the tolerance"),
            Self::Drift => f.write_str("DRIFT: all differences are explained by the stored types"),
            Self::Differs { first } => {
                write!(f, "DIFFERS: first beyond the tolerance is {first}")
            }
            Self::Unmeasured { because } => write!(f, "UNMEASURED: {because}"),
        }
    }
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

fn site<S: Serializer>(site: &Site, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(site)
}
