//! What a judge said, what it ought to have said, and how the two compare.

use std::{collections::BTreeMap, path::Path};

use apr_format::Checkpoint;
use apr_model::Site;
use serde::{Serialize, Serializer};

use crate::{Case, Effect, Expectation, Family};

/// Somebody who says what is wrong with a capture, from that and the model alone.
pub trait Judge: Sync {
    /// What is wrong with the capture at `capture` of a run of `model`.
    fn judge(&self, capture: &Path, model: &Checkpoint) -> Verdict;
}

impl<F: Fn(&Path, &Checkpoint) -> Verdict + Sync> Judge for F {
    fn judge(&self, capture: &Path, model: &Checkpoint) -> Verdict {
        self(capture, model)
    }
}

/// What a judge says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The stages that are wrong by themselves, in the order of computation.
    #[serde(serialize_with = "sites")]
    pub sites: Vec<Site>,
    /// What the first of them may compute instead: mistakes that all explain it, and that its values cannot tell apart.
    pub diagnoses: Vec<String>,
    /// What could not be judged, and why.
    pub unmeasured: Option<String>,
}

/// How a verdict compares with what was planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// The first stage named is the right one; of a capture that cannot be judged, that was said.
    Localised,
    /// The layer is right, the stage is not.
    LayerOnly,
    /// Another layer is blamed.
    WrongPlace,
    /// Nothing is blamed.
    Missed,
    /// Nothing is blamed, and the fault changes nothing beyond rounding.
    TooSmall,
    /// Nothing was planted, and nothing is blamed.
    Quiet,
    /// Nothing was planted, and something is blamed.
    FalseAlarm,
}

impl Finding {
    fn of(expectation: &Expectation, effect: Option<&Effect>, verdict: &Verdict) -> Self {
        let first = verdict.sites.first();
        let silent = first.is_none();
        match expectation {
            Expectation::Clean if silent && verdict.unmeasured.is_none() => Self::Quiet,
            Expectation::Clean => Self::FalseAlarm,
            Expectation::Unmeasured if !silent => Self::WrongPlace,
            Expectation::Unmeasured if verdict.unmeasured.is_some() => Self::Localised,
            Expectation::NotClean if !silent || verdict.unmeasured.is_some() => Self::Localised,
            Expectation::Unmeasured | Expectation::NotClean => Self::Missed,
            Expectation::Sites(sites) => match (first, sites.first()) {
                (None, _) if effect.is_some_and(|effect| !effect.is_visible()) => Self::TooSmall,
                (None, _) => Self::Missed,
                (found, expected) if found == expected => Self::Localised,
                (Some(found), Some(expected))
                    if found.layer.is_some() && found.layer == expected.layer =>
                {
                    Self::LayerOnly
                }
                _ => Self::WrongPlace,
            },
        }
    }
}

/// How a diagnosis compares with what was planted.
///
/// A judge who states several mistakes says that the values fit all of them. That is right if one of them is the one that
/// was planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Diagnosis {
    /// The one that was expected is among those given.
    Right,
    /// Only others than were expected.
    Wrong,
    /// One was expected and none was given.
    Missing,
    /// None was expected and one was given: it may even be right.
    Unasked,
    /// None was expected and none was given.
    None,
}

/// One case with all verdicts on it.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The case.
    #[serde(serialize_with = "text")]
    pub case: Case,
    /// The fault's name and family; `None` for a control.
    pub fault: Option<(&'static str, Family)>,
    /// What was to be said.
    pub expectation: Expectation,
    /// What the fault does; `None` for a control.
    pub effect: Option<Effect>,
    /// What the judge said.
    pub verdict: Verdict,
    /// How that compares.
    pub finding: Finding,
    /// How its diagnosis compares.
    pub diagnosis: Diagnosis,
    /// How comparing standard deviations fares; `None` where there is nothing to compare.
    pub std_ratio: Option<Finding>,
    /// How comparing cosines fares.
    pub cosine: Option<Finding>,
    /// How long the judge took.
    pub seconds: f64,
}

impl Diagnosis {
    fn of(expected: &[&str], given: &[String]) -> Self {
        match (expected, given) {
            ([], []) => Self::None,
            ([], _) => Self::Unasked,
            (_, []) => Self::Missing,
            _ if given.iter().any(|given| expected.contains(&given.as_str())) => Self::Right,
            _ => Self::Wrong,
        }
    }
}

impl Outcome {
    pub(crate) fn new(
        case: Case,
        (expectation, expected): (Expectation, &[&str]),
        effect: Option<Effect>,
        verdict: Verdict,
        classic: Option<[Option<Site>; 2]>,
        seconds: f64,
    ) -> Self {
        let fault = case.planting.map(|planting| planting.fault);
        let finding = Finding::of(&expectation, effect.as_ref(), &verdict);
        let diagnosis = Diagnosis::of(expected, &verdict.diagnoses);
        let [std_ratio, cosine] = [0, 1].map(|method| {
            let site = classic?[method];
            let verdict = Verdict { sites: site.into_iter().collect(), ..Verdict::default() };
            Some(Finding::of(&expectation, effect.as_ref(), &verdict))
        });
        let fault = fault.map(|fault| (fault.name, fault.family));
        Self {
            case,
            fault,
            expectation,
            effect,
            verdict,
            finding,
            diagnosis,
            std_ratio,
            cosine,
            seconds,
        }
    }
}

/// How often each finding was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally(pub BTreeMap<Finding, usize>);

impl Tally {
    fn of(findings: impl Iterator<Item = Finding>) -> Self {
        let mut tally = Self::default();
        findings.for_each(|finding| *tally.0.entry(finding).or_default() += 1);
        tally
    }

    /// How often `finding` was made.
    pub fn count(&self, finding: Finding) -> usize {
        self.0.get(&finding).copied().unwrap_or(0)
    }

    /// Cases with a fault that can be seen.
    pub fn faults(&self) -> usize {
        use Finding::*;
        [Localised, LayerOnly, WrongPlace, Missed].into_iter().map(|f| self.count(f)).sum()
    }

    /// Cases without a fault.
    pub fn controls(&self) -> usize {
        self.count(Finding::Quiet) + self.count(Finding::FalseAlarm)
    }
}

/// The whole score.
#[derive(Clone, Debug, Serialize)]
pub struct Score {
    /// Of the judge.
    pub judge: Tally,
    /// Of the judge, by family.
    pub by_family: BTreeMap<Family, Tally>,
    /// Of comparing standard deviations.
    pub std_ratio: Tally,
    /// Of comparing cosines.
    pub cosine: Tally,
    /// Of the judge's diagnoses, over the cases it localised.
    pub diagnoses: BTreeMap<Diagnosis, usize>,
    /// Seconds that the judge took per case, on average.
    pub seconds_per_case: f64,
    /// The cases.
    pub outcomes: Vec<Outcome>,
}

impl Score {
    /// The score of these cases.
    pub fn of(outcomes: Vec<Outcome>) -> Self {
        let mut by_family = BTreeMap::<Family, Vec<Finding>>::new();
        let mut diagnoses = BTreeMap::new();
        for outcome in &outcomes {
            if let Some((_, family)) = outcome.fault {
                by_family.entry(family).or_default().push(outcome.finding);
                if outcome.finding == Finding::Localised {
                    *diagnoses.entry(outcome.diagnosis).or_default() += 1;
                }
            }
        }
        let seconds = outcomes.iter().map(|outcome| outcome.seconds).sum::<f64>();
        Self {
            judge: Tally::of(outcomes.iter().map(|outcome| outcome.finding)),
            by_family: by_family
                .into_iter()
                .map(|(family, findings)| (family, Tally::of(findings.into_iter())))
                .collect(),
            std_ratio: Tally::of(outcomes.iter().filter_map(|outcome| outcome.std_ratio)),
            cosine: Tally::of(outcomes.iter().filter_map(|outcome| outcome.cosine)),
            diagnoses,
            seconds_per_case: seconds / outcomes.len().max(1) as f64,
            outcomes,
        }
    }
}

fn sites<S: Serializer>(sites: &[Site], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(sites.iter().map(Site::to_string))
}

fn text<S: Serializer>(case: &Case, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(case)
}

#[cfg(test)]
mod tests {
    use apr_model::Stage;

    use super::*;

    fn verdict(sites: &[Site], unmeasured: bool) -> Verdict {
        let unmeasured = unmeasured.then(|| "the last rows".to_owned());
        Verdict { sites: sites.to_vec(), diagnoses: Vec::new(), unmeasured }
    }

    #[test]
    fn a_diagnosis_is_right_if_the_truth_is_among_what_the_values_cannot_tell_apart() {
        let given = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        for (expected, names, diagnosis) in [
            (&["rope-theta"][..], &["rope-theta"][..], Diagnosis::Right),
            (&["rope-theta"], &["rope-missing", "rope-theta"], Diagnosis::Right),
            (&["rope-theta"], &["rope-missing"], Diagnosis::Wrong),
            (&["rope-theta"], &[], Diagnosis::Missing),
            (&[], &["rope-theta"], Diagnosis::Unasked),
            (&[], &[], Diagnosis::None),
        ] {
            assert_eq!(Diagnosis::of(expected, &given(names)), diagnosis, "{expected:?} {names:?}");
        }
    }

    #[test]
    fn a_verdict_is_right_by_its_first_site() {
        let [gate, up] = [Stage::FfnGate, Stage::FfnUp].map(|stage| Site::layer(2, stage));
        let head = Site::whole(Stage::LmHead);
        let expected = Expectation::Sites(vec![gate, up]);
        let seen = Effect { worst_element: 1e6, ..Effect::default() };
        for (sites, finding) in [
            (&[gate, up][..], Finding::Localised),
            (&[up], Finding::LayerOnly),
            (&[head], Finding::WrongPlace),
            (&[], Finding::Missed),
        ] {
            let verdict = verdict(sites, false);
            assert_eq!(Finding::of(&expected, Some(&seen), &verdict), finding);
        }
        let unseen = Effect::default();
        assert_eq!(Finding::of(&expected, Some(&unseen), &verdict(&[], false)), Finding::TooSmall);
        // Two stages of the whole model are two places.
        let expected = Expectation::Sites(vec![Site::whole(Stage::FinalNorm)]);
        assert_eq!(
            Finding::of(&expected, Some(&seen), &verdict(&[head], false)),
            Finding::WrongPlace
        );
    }

    #[test]
    fn what_cannot_be_judged_is_no_clean_bill_and_no_fault() {
        let site = Site::whole(Stage::LmHead);
        let of = |expectation, verdict| Finding::of(&expectation, None, &verdict);
        assert_eq!(of(Expectation::Unmeasured, verdict(&[], true)), Finding::Localised);
        assert_eq!(of(Expectation::Unmeasured, verdict(&[], false)), Finding::Missed);
        assert_eq!(of(Expectation::Unmeasured, verdict(&[site], true)), Finding::WrongPlace);
        assert_eq!(of(Expectation::NotClean, verdict(&[site], false)), Finding::Localised);
        assert_eq!(of(Expectation::Clean, verdict(&[], true)), Finding::FalseAlarm);
        assert_eq!(of(Expectation::Clean, verdict(&[], false)), Finding::Quiet);
    }
}
