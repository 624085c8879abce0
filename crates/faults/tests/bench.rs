//! The bench covers what it says, and counts right.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use apr_capture::Capture;
use apr_faults::{
    Bench, BenchOptions, Case, Engine, Family, Finding, Format, ModelSpec, Score, Severity,
    Verdict, catalogue,
};
use apr_format::Checkpoint;
use apr_model::{Architecture, Site, Stage};
use common::trained;

fn all_cases() -> Vec<Case> {
    Bench::new(&BenchOptions::default(), Some(trained())).unwrap().cases().to_vec()
}

/// Where the cases of each kind are.
#[derive(Default)]
struct Coverage {
    layers: BTreeSet<Option<u32>>,
    stages: BTreeSet<Stage>,
    architectures: BTreeSet<&'static str>,
    formats: BTreeSet<Format>,
    severities: BTreeSet<String>,
    engines: BTreeSet<Engine>,
    trained: bool,
}

fn coverage() -> BTreeMap<&'static str, Coverage> {
    let mut coverage = BTreeMap::<&'static str, Coverage>::new();
    for case in all_cases() {
        let Some(planting) = case.planting else { continue };
        let of = coverage.entry(planting.fault.name).or_default();
        of.layers.insert(planting.site.layer);
        of.stages.insert(planting.site.stage);
        of.severities.insert(planting.severity.to_string());
        of.engines.insert(case.engine);
        of.formats.insert(case.model.format());
        match case.model {
            ModelSpec::Trained { .. } => of.trained = true,
            ModelSpec::Random { architecture, .. } => {
                of.architectures.insert(architecture.name());
            }
        }
    }
    coverage
}

#[test]
fn there_are_many_kinds_of_each_family_and_no_two_share_a_name() {
    let mut families = BTreeMap::<Family, usize>::new();
    let mut names = BTreeSet::new();
    for fault in catalogue::all() {
        *families.entry(fault.family).or_default() += 1;
        assert!(names.insert(fault.name), "{} twice", fault.name);
        assert!(fault.about.ends_with('.') && !fault.stages.is_empty(), "{}", fault.name);
        assert_eq!(catalogue::find(fault.name).unwrap().about, fault.about);
    }
    assert!(names.len() >= 60 && families.len() == 7, "{families:?}");
    assert!(families.values().all(|&kinds| kinds >= 10), "{families:?}");
    assert!(catalogue::find("bit-rot").is_err());
}

#[test]
fn every_kind_is_planted_in_two_layers_and_in_every_architecture_and_format_that_has_what_it_is_about()
 {
    // What some kinds are about, others do not have.
    let only_qwen2 = [
        "bias-lost",
        "bias-shifted",
        "bias-of-other-layer",
        "bias-twice",
        "bias-subtracted",
        "bias-skipped",
    ];
    let only_llama = ["qk-permutation-lost", "rope-scaling-lost", "file-rope-factors-lost"];
    let only_some_types = [
        "scale-of-neighbour",
        "nibbles-exchanged",
        "sub-block-scale",
        "minimum-ignored",
        "quants-unsigned",
        "activations-one-scale",
        "matrix-transposed",
        "matrix-rounded-bf16",
        "matrix-f16-overflow",
        "embedding-f16",
        "declared-unrounded",
        "matrix-type-mislabelled",
        "experts-transposed",
        // Some formats of the random mixture divide weights by their sum, others do not.
        "router-not-renormalised",
        "router-renormalised",
        "file-renormalised-not",
        "file-renormalised",
        "captured-weights-unnormalised",
    ];
    let untied = ["head-row-shifted", "head-tied-wrongly"];
    let coverage = coverage();
    for fault in catalogue::all() {
        let name = fault.name;
        let of = coverage.get(name).unwrap_or_else(|| panic!("{name} is nowhere"));
        if fault.is_layered() && name != "captured-post-norm" {
            let layers = of.layers.iter().filter(|layer| layer.is_some()).count();
            assert!(layers >= 2, "{name}: {:?}", of.layers);
        }
        let only_experts = fault.family == Family::Experts
            || fault.stages.iter().all(|stage| stage.of_experts() == Some(true));
        let architectures = match name {
            _ if only_qwen2.contains(&name) || only_llama.contains(&name) || only_experts => 1,
            _ if untied.contains(&name) || name == "file-rope-linear" => 3,
            _ => Architecture::ALL.len(),
        };
        assert_eq!(of.architectures.len(), architectures, "{name}");
        let formats = if only_some_types.contains(&name) { 1 } else { 3 };
        assert!(of.formats.len() >= formats, "{name}: {:?}", of.formats);
        let not_trained = only_llama.contains(&name) || untied.contains(&name) || only_experts;
        assert!(of.trained || not_trained, "{name}");
        assert_eq!(of.severities.len(), fault.severities().len(), "{name}");
        if of.formats.len() == 3 && !only_experts {
            assert!(of.engines.len() >= 2, "{name}");
        }
    }
}

#[test]
fn controls_cover_every_model_on_every_engine() {
    let controls = all_cases().into_iter().filter(|case| case.planting.is_none());
    let covered: BTreeSet<String> =
        controls.map(|case| format!("{} {}", case.model, case.engine)).collect();
    assert_eq!(covered.len(), ModelSpec::all().count() * Engine::ALL.len());
}

#[test]
fn the_quick_bench_has_every_kind_and_severity_once() {
    let options = BenchOptions { quick: true, ..BenchOptions::default() };
    let quick = Bench::new(&options, Some(trained())).unwrap();
    let mut kinds = BTreeMap::<(&str, Severity2), usize>::new();
    for planting in quick.cases().iter().filter_map(|case| case.planting) {
        *kinds.entry((planting.fault.name, planting.severity.into())).or_default() += 1;
    }
    let expected: usize = catalogue::all().map(|fault| fault.severities().len()).sum();
    assert_eq!(kinds.len(), expected);
    assert!(kinds.values().all(|&n| n == 1));
    let models: BTreeSet<String> =
        quick.cases().iter().map(|case| case.model.to_string()).collect();
    assert_eq!(models.len(), ModelSpec::all().count());
}

/// Severities in an order.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Severity2(bool);

impl From<Severity> for Severity2 {
    fn from(severity: Severity) -> Self {
        Self(severity == Severity::Gross)
    }
}

fn bench(only: &[&str]) -> Bench {
    let only = only.iter().map(|&name| name.to_owned()).collect();
    let options = BenchOptions { quick: true, only, seed: 1, ..BenchOptions::default() };
    Bench::new(&options, None).unwrap()
}

#[test]
fn only_what_is_asked_for_is_run_and_unknown_names_are_refused() {
    assert!(bench(&["control"]).cases().iter().all(|case| case.planting.is_none()));
    let family = bench(&["attention"]);
    assert!(
        family
            .cases()
            .iter()
            .all(|c| c.planting.is_some_and(|p| p.fault.family == Family::Attention))
    );
    let options = BenchOptions { only: vec!["bit-rot".to_owned()], ..BenchOptions::default() };
    assert!(Bench::new(&options, None).unwrap_err().to_string().contains("bit-rot"));
}

#[test]
fn models_are_chosen_by_name_with_or_without_their_format() {
    let models = |names: &[&str]| {
        let models = names.iter().map(|&name| name.to_owned()).collect();
        let only = vec!["control".to_owned()];
        let options = BenchOptions { models, only, ..BenchOptions::default() };
        let bench = Bench::new(&options, None).map_err(|error| error.to_string())?;
        let names: BTreeSet<String> = bench.cases().iter().map(|c| c.model.to_string()).collect();
        Ok::<_, String>(names.into_iter().collect::<Vec<_>>())
    };
    let chosen = models(&["qwen2", "llama-Q8_0"]).unwrap();
    assert_eq!(chosen, ["llama-Q8_0", "qwen2-F32", "qwen2-Q4_K_M", "qwen2-Q8_0"]);
    let error = models(&["qwen"]).unwrap_err();
    assert!(error.contains("`qwen`") && error.contains("qwen3_moe-F32"), "{error}");
}

#[test]
fn a_judge_that_sees_nothing_misses_everything_and_raises_no_alarm() {
    let dir = tempfile::tempdir().unwrap();
    let bench = bench(&["control", "weight-transposed", "captured-nan", "file-truncated"]);
    let shown = AtomicUsize::new(0);
    let blind = |_: &Path, _: &Checkpoint| Verdict::default();
    let outcomes = bench.run(&blind, dir.path(), &|_| {
        shown.fetch_add(1, Ordering::Relaxed);
    });
    let outcomes = outcomes.unwrap();
    assert_eq!(outcomes.len(), bench.cases().len());
    assert_eq!(shown.into_inner(), outcomes.len());
    let score = Score::of(outcomes);
    assert_eq!((score.judge.count(Finding::Missed), score.judge.faults()), (3, 3));
    assert_eq!(score.judge.count(Finding::Quiet), 12);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "no capture stays");
}

/// Sees NaN and nothing else, and calls it by name.
fn nan_detector(capture: &Path, _: &Checkpoint) -> Verdict {
    let capture = Capture::open(capture).unwrap();
    let holds_nan = |site: &Site| {
        let steps = 0..capture.steps().len();
        steps
            .filter_map(|step| capture.tensor(step, *site).ok())
            .any(|t| t.to_f32().iter().any(|x| x.is_nan()))
    };
    let first = capture.sites().into_iter().find(holds_nan);
    let diagnoses = first.iter().map(|_| "nan-origin".to_owned()).collect();
    Verdict { sites: first.into_iter().collect(), diagnoses, unmeasured: None }
}

#[test]
fn a_judge_is_credited_with_what_it_finds() {
    let dir = tempfile::tempdir().unwrap();
    let bench = bench(&["control", "captured-nan", "nan", "relu"]);
    let score = Score::of(bench.run(&nan_detector, dir.path(), &|_| {}).unwrap());
    // Two severities of `nan`.
    assert_eq!((score.judge.count(Finding::Localised), score.judge.count(Finding::Missed)), (3, 1));
    assert_eq!(score.diagnoses.values().sum::<usize>(), 3);
    assert_eq!(score.by_family[&Family::Capture].count(Finding::Localised), 1);
    assert_eq!(score.judge.count(Finding::FalseAlarm), 0);
}

#[test]
fn comparing_with_a_reference_run_blames_where_drift_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let outcomes = bench(&["weights"]).run(&nan_detector, dir.path(), &|_| {}).unwrap();
    let score = Score::of(outcomes);
    let localised = |tally: &apr_faults::Tally| tally.count(Finding::Localised);
    assert!(localised(&score.cosine) > localised(&score.std_ratio), "{:?}", score.cosine);
    assert!(localised(&score.cosine) < score.cosine.faults(), "{:?}", score.cosine);
}
