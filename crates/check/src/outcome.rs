//! What came of a check.

use std::{fmt, time::Instant};

use apr_model::{BackendInfo, Site};
use serde::{Serialize, Serializer};

use crate::{Check, Place};

/// What came of all checks.
#[derive(Clone, Debug, Serialize)]
pub struct Checkup {
    /// How the backend computes.
    #[serde(skip)]
    pub backend: BackendInfo,
    /// The fingerprint of the plan, if the model can be loaded.
    pub plan: Option<String>,
    /// One entry per check, in the order in which they were made.
    pub checks: Vec<Checked>,
}

/// What came of one check.
#[derive(Clone, Debug, Serialize)]
pub struct Checked {
    /// The check.
    #[serde(serialize_with = "displayed")]
    pub name: Check,
    /// What must hold.
    pub holds: &'static str,
    /// Whether it does.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// What was looked at.
    pub looked_at: Option<String>,
    /// What is odd, but may well be as it should.
    pub notes: Vec<Note>,
    /// How long it took. What several checks share is paid for by the first.
    pub seconds: f64,
    /// Whether the check was asked for by its name.
    #[serde(skip)]
    pub asked_for: bool,
}

/// What is odd, but may well be as it should.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Note {
    /// The tensor that is odd, by its name in the file; `None` if it is something else.
    pub tensor: Option<String>,
    /// What is odd.
    pub what: String,
}

impl Note {
    /// A note of no tensor.
    pub(crate) fn new(what: String) -> Self {
        Self { tensor: None, what }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.tensor {
            Some(tensor) => write!(f, "{tensor}: {}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

/// Whether something holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// Everything that the check is about was looked at, and holds.
    Held,
    /// It does not hold.
    Broken {
        /// Where, at least one.
        breaks: Vec<Break>,
    },
    /// Not, or not all of it, could be looked at.
    NotMeasured {
        /// Why.
        why: String,
    },
    /// There is nothing that the check could be about.
    NotApplicable {
        /// What there is not.
        why: String,
    },
}

/// Where something does not hold.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Break {
    /// A run has other bits than the run it must agree with, first at this site. All inputs of that site agree.
    Bits {
        /// The run, in words.
        run: String,
        /// The first element that differs.
        #[serde(flatten)]
        at: Place,
        /// Its value in the run that it must agree with; `None` if that run gives other bits each time.
        #[serde(serialize_with = "optional_number")]
        expected: Option<f64>,
        /// Its value.
        #[serde(serialize_with = "number")]
        found: f64,
        /// Elements of that site that differ, in all rows.
        elements: u64,
        /// Rows of that site that differ.
        rows: u64,
    },
    /// Looking at one site changes the logits.
    Looking {
        /// The site that is looked at; `None` if no site alone does it.
        #[serde(serialize_with = "optional_site")]
        observed: Option<Site>,
        /// The first logit that changes.
        #[serde(flatten)]
        at: Place,
        /// Its value when nobody looks.
        #[serde(serialize_with = "number")]
        expected: f64,
        /// Its value when somebody does.
        #[serde(serialize_with = "number")]
        found: f64,
        /// Logits that change.
        elements: u64,
    },
    /// A value of the forward pass is NaN or infinite, first at this site.
    NotFinite {
        /// The first such element.
        #[serde(flatten)]
        at: Place,
        /// Its value.
        #[serde(serialize_with = "number")]
        found: f64,
        /// Such elements of that site, in all rows.
        elements: u64,
        /// Sites that have such elements.
        sites: u64,
    },
    /// A tensor of the file is not as it should be.
    Tensor {
        /// Its name in the file.
        tensor: String,
        /// What is wrong with it.
        what: String,
    },
    /// Anything else.
    Other {
        /// What is wrong.
        what: String,
    },
}

impl Checkup {
    /// 1 if something is broken; else 3 if nothing holds, or something asked for was not measured; else 0.
    pub fn exit_code(&self) -> u8 {
        exit_code(&self.checks)
    }
}

pub(crate) fn exit_code(checks: &[Checked]) -> u8 {
    let broken = |checked: &Checked| matches!(checked.outcome, Outcome::Broken { .. });
    let missed = |checked: &Checked| match checked.outcome {
        Outcome::NotMeasured { .. } => true,
        Outcome::NotApplicable { .. } => checked.asked_for,
        _ => false,
    };
    let held = |checked: &Checked| checked.outcome == Outcome::Held;
    if checks.iter().any(broken) {
        1
    } else if checks.iter().any(missed) || !checks.iter().any(held) {
        3
    } else {
        0
    }
}

impl Outcome {
    /// Broken in these places, or held if there are none.
    pub(crate) fn of(breaks: Vec<Break>) -> Self {
        if breaks.is_empty() { Self::Held } else { Self::Broken { breaks } }
    }

    /// Broken, in one place that is no value and no tensor.
    pub(crate) fn broken(what: impl ToString) -> Self {
        Self::Broken { breaks: vec![Break::Other { what: what.to_string() }] }
    }

    pub(crate) fn not_measured(why: impl ToString) -> Self {
        Self::NotMeasured { why: why.to_string() }
    }

    pub(crate) fn not_applicable(why: impl ToString) -> Self {
        Self::NotApplicable { why: why.to_string() }
    }
}

/// Makes a check: one that meets an obstacle ends with that for its outcome.
pub(crate) fn made(
    name: Check,
    asked_for: bool,
    verdict: impl FnOnce() -> Result<Verdict, Outcome>,
) -> Checked {
    let start = Instant::now();
    let Verdict { outcome, looked_at, notes } = verdict().unwrap_or_else(Verdict::from);
    let seconds = start.elapsed().as_secs_f64();
    Checked { name, holds: name.holds(), outcome, looked_at, notes, seconds, asked_for }
}

/// An outcome with what belongs to it.
#[derive(Debug)]
pub(crate) struct Verdict {
    pub(crate) outcome: Outcome,
    pub(crate) looked_at: Option<String>,
    pub(crate) notes: Vec<Note>,
}

impl Verdict {
    /// What came of looking at `looked_at`.
    pub(crate) fn new(breaks: Vec<Break>, looked_at: String) -> Self {
        Self { outcome: Outcome::of(breaks), looked_at: Some(looked_at), notes: Vec::new() }
    }
}

impl From<Outcome> for Verdict {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, looked_at: None, notes: Vec::new() }
    }
}

pub(crate) fn displayed<S: Serializer>(
    x: &impl ToString,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&x.to_string())
}

fn optional_site<S: Serializer>(site: &Option<Site>, serializer: S) -> Result<S::Ok, S::Error> {
    site.map(|site| site.to_string()).serialize(serializer)
}

/// NaN and infinities, which JSON has no numbers for, are written by name.
fn number<S: Serializer>(x: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    match x.is_finite() {
        true => serializer.serialize_f64(*x),
        false => serializer.serialize_str(&x.to_string()),
    }
}

fn optional_number<S: Serializer>(x: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    match x {
        Some(x) => number(x, serializer),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkup(outcomes: impl IntoIterator<Item = (Outcome, bool)>) -> Checkup {
        let checked = |(outcome, asked_for)| Checked {
            name: Check::Config,
            holds: "",
            outcome,
            looked_at: None,
            notes: Vec::new(),
            seconds: 0.0,
            asked_for,
        };
        let backend = BackendInfo { name: "", isa: "", threads: 1, kv: apr_tensor::DType::F32 };
        Checkup { backend, plan: None, checks: outcomes.into_iter().map(checked).collect() }
    }

    #[test]
    fn nothing_compared_is_never_success_and_broken_outweighs_unmeasured() {
        let held = || (Outcome::Held, false);
        let absent = |asked| (Outcome::not_applicable("no template"), asked);
        let missed = || (Outcome::not_measured("no memory"), false);
        assert_eq!(checkup([]).exit_code(), 3);
        assert_eq!(checkup([absent(false)]).exit_code(), 3);
        assert_eq!(checkup([held(), absent(false)]).exit_code(), 0);
        assert_eq!(checkup([held(), absent(true)]).exit_code(), 3);
        assert_eq!(checkup([held(), missed()]).exit_code(), 3);
        assert_eq!(checkup([held(), missed(), (Outcome::broken("x"), false)]).exit_code(), 1);
    }
}
