//! All that was measured, and all that failed.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{
    machine::Machine,
    measurement::{Kind, Measurement, Setting},
};

/// What is compared between engines.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Case {
    pub(super) model: String,
    pub(super) threads: usize,
    pub(super) depth: usize,
    pub(super) kind: Kind,
    pub(super) tokens: usize,
}

/// An engine that could not be built, or not measure something.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) peer: String,
    /// What it was to measure; `None` if it could not even be built.
    pub(super) setting: Option<Setting>,
    pub(super) reason: String,
}

impl Failure {
    pub(super) fn whole(peer: String, reason: String) -> Self {
        Self { peer, setting: None, reason }
    }

    pub(super) fn of(peer: String, setting: &Setting, reason: String) -> Self {
        Self { peer, setting: Some(setting.clone()), reason }
    }
}

/// Samples of all engines.
#[derive(Clone, Debug, Default)]
pub(super) struct Record {
    /// Names and versions, in the order of their turns.
    pub(super) peers: Vec<(String, String)>,
    pub(super) machine: Machine,
    pub(super) failures: Vec<Failure>,
    /// Tokens per second of each engine.
    cases: BTreeMap<Case, BTreeMap<String, Vec<f64>>>,
}

impl Record {
    pub(super) fn add(&mut self, peer: &str, setting: &Setting, measured: Vec<Measurement>) {
        for Measurement { kind, tokens, depth, samples } in measured {
            let (model, threads) = (setting.model_name(), setting.threads);
            let case = self.cases.entry(Case { model, threads, depth, kind, tokens }).or_default();
            case.entry(peer.to_owned()).or_default().extend(samples);
        }
    }

    pub(super) fn fail(&mut self, failure: Failure) {
        eprintln!("xtask: {} failed: {}", failure.peer, failure.reason);
        self.failures.push(failure);
    }

    /// Whether it was tried already, in vain.
    pub(super) fn has_failed(&self, peer: &str, setting: &Setting) -> bool {
        let mut failures = self.failures.iter();
        failures.any(|failure| failure.peer == peer && failure.setting.as_ref() == Some(setting))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.cases.is_empty()
    }

    /// All that was compared, and what of each engine.
    pub(super) fn cases(&self) -> impl Iterator<Item = (&Case, Vec<(&str, Summary)>)> {
        self.cases.iter().map(|(case, samples)| {
            // In the order of their turns.
            let order = self.peers.iter().filter_map(|(peer, _)| samples.get_key_value(peer));
            (case, order.map(|(peer, samples)| (peer.as_str(), Summary::of(samples))).collect())
        })
    }

    pub(super) fn json(&self) -> Value {
        let peers: Vec<_> = self
            .peers
            .iter()
            .map(|(name, version)| json!({ "name": name, "version": version }))
            .collect();
        let failures = self.failures.iter().map(|failure| {
            let setting = failure.setting.as_ref().map(Setting::to_string);
            json!({ "peer": failure.peer, "setting": setting, "reason": failure.reason })
        });
        let results = self.cases.iter().flat_map(|(case, peers)| {
            peers.iter().map(move |(peer, samples)| {
                json!({
                    "peer": peer,
                    "model": case.model,
                    "threads": case.threads,
                    "kind": case.kind.name(),
                    "tokens": case.tokens,
                    "depth": case.depth,
                    "samples": samples,
                    "median": Summary::of(samples).median,
                })
            })
        });
        json!({
            "schema": "apr-peers/1",
            "machine": self.machine.json(),
            "peers": peers,
            "results": results.collect::<Vec<_>>(),
            "failures": failures.collect::<Vec<_>>(),
        })
    }
}

/// What is shown of the samples of one engine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Summary {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl Summary {
    /// Of samples, of which there is at least one.
    fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let (lower, upper) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        let (least, most) = (sorted[0], sorted[sorted.len() - 1]);
        Self { median: (lower + upper) / 2.0, least, most }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::measurement::Lengths;

    #[test]
    fn a_median_is_in_the_middle() {
        let of = |samples: &[f64]| Summary::of(samples).median;
        assert_eq!([of(&[5.0]), of(&[9.0, 1.0]), of(&[1.0, 50.0, 2.0])], [5.0, 5.0, 2.0]);
    }

    #[test]
    fn what_failed_is_named_and_the_others_go_on() {
        let lengths = Lengths { prompt: 512, generate: 64, depth: 0 };
        let setting = Setting { model: "dir/m.gguf".into(), threads: 2, lengths };
        let peers = vec![("a".into(), "1".into()), ("b".into(), "2".into())];
        let mut record = Record { peers, ..Record::default() };
        let measured =
            |x| vec![Measurement { kind: Kind::Decode, tokens: 64, depth: 0, samples: vec![x] }];
        record.add("a", &setting, measured(10.0));
        record.add("a", &setting, measured(12.0));
        record.fail(Failure::of("b".into(), &setting, "no such model".into()));
        assert!(record.has_failed("b", &setting) && !record.has_failed("a", &setting));
        let json = record.json();
        assert_eq!(json["results"][0]["samples"], json!([10.0, 12.0]));
        assert_eq!(json["results"][0]["median"], 11.0);
        assert_eq!(json["failures"][0]["reason"], "no such model");
    }
}
