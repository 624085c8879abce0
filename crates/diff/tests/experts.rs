//! Captures of a mixture of experts: which experts were chosen, and whether they computed the same.

#[path = "../../capture/tests/support/mod.rs"]
mod support;

use std::path::Path;

use apr_capture::{Capture, Dims, Recorder, RecorderOptions};
use apr_diff::*;
use apr_model::{MoeConfig, Observer, Site, Stage, Values, View};
use support::{all_sites, prefill, provenance, value};

const EXPERTS: usize = 6;
const LOGITS: [[f32; EXPERTS]; 2] =
    [[0.5, 3.0, -1.0, 2.0, 0.0, 1.9995], [4.0, 1.0, 1.5, 0.0, 2.0, -3.0]];

fn dims() -> Dims {
    let moe = MoeConfig {
        num_experts: EXPERTS,
        num_experts_per_tok: 2,
        moe_intermediate_size: 3,
        norm_topk_prob: true,
        decoder_sparse_step: 1,
        mlp_only_layers: Vec::new(),
    };
    Dims { num_hidden_layers: 1, moe: Some(moe), ..support::dims() }
}

fn of(stage: Stage) -> Site {
    Site::layer(0, stage)
}

/// A capture of two rows that chose `ids`; the logits of row 0 are `moved`. What an expert computes depends on it alone.
fn capture(out: &Path, ids: [[usize; 2]; 2], moved: f32) -> Capture {
    let dims = dims();
    let sites = all_sites(&dims);
    let mut recorder =
        Recorder::create(out, provenance(), dims.clone(), RecorderOptions::new(sites)).unwrap();
    let tokens = [5, 6];
    let step = prefill(&tokens);
    recorder.begin(&step).unwrap();
    for site in recorder.wanted().iter() {
        let (shape, mut values) = support::values(&dims, &step, site);
        match site.stage {
            Stage::MoeRouter => {
                values = LOGITS.concat();
                values[5] += moved;
            }
            Stage::MoeRouterIndices => values = ids.concat().iter().map(|&id| id as f32).collect(),
            stage if stage.of_experts() == Some(true) => {
                let width = shape.get(2).copied().unwrap_or(1);
                let slots = ids.concat();
                let of_slot =
                    |slot: usize, channel| value(site, slot / 2, slots[slot] * 100 + channel);
                values = (0..slots.len() * width).map(|i| of_slot(i / width, i % width)).collect();
            }
            _ => {}
        }
        recorder.value(&step, site, View { shape: &shape, values: Values::F32(&values) }).unwrap();
    }
    recorder.end(&step).unwrap();
    Capture::open(recorder.finish().unwrap()).unwrap()
}

fn diff(a: [[usize; 2]; 2], b: [[usize; 2]; 2], moved: f32) -> Comparison {
    let dir = tempfile::tempdir().unwrap();
    let a = capture(&dir.path().join("a"), a, moved);
    let b = capture(&dir.path().join("b"), b, 0.0);
    compare(&a, &b, &Options::default()).unwrap()
}

fn stage(comparison: &Comparison, stage: Stage) -> &StageComparison {
    comparison.stages.iter().find(|found| found.site == of(stage)).unwrap()
}

#[test]
fn the_order_of_slots_is_nobodys_difference() {
    let found = diff([[1, 3], [0, 4]], [[3, 1], [0, 4]], 0.0);
    assert_eq!(found.outcome, Outcome::Match { bitwise: false });
    let ids = stage(&found, Stage::MoeRouterIndices);
    assert!(ids.within && !ids.bitwise && ids.flips.is_empty());
    assert_eq!(stage(&found, Stage::MoeExpertOut).metrics.relative_l2, Some(0.0));
    assert_eq!(
        diff([[1, 3], [0, 4]], [[1, 3], [0, 4]], 0.0).outcome,
        Outcome::Match { bitwise: true }
    );
}

#[test]
fn a_flipped_expert_is_one_difference_with_its_margin() {
    let found = diff([[1, 5], [0, 4]], [[1, 3], [0, 4]], 0.00075);
    let beyond: Vec<Site> =
        found.stages.iter().filter(|stage| !stage.within).map(|stage| stage.site).collect();
    // The logits themselves are moved by more than the tolerance.
    assert_eq!(beyond, [of(Stage::MoeRouter), of(Stage::MoeRouterIndices)]);
    let ids = stage(&found, Stage::MoeRouterIndices);
    let [flip] = &ids.flips[..] else { panic!("{:?}", ids.flips) };
    assert_eq!((flip.position, &flip.only_a[..], &flip.only_b[..]), (Some(0), &[5][..], &[3][..]));
    assert!((flip.margin.unwrap() - 0.0005).abs() < 1e-6, "{flip:?}");
    assert!((flip.logits_moved.unwrap() - 0.00075).abs() < 1e-6, "{flip:?}");
    assert_eq!(flip.is_near_tie(), Some(true));
    let out = stage(&found, Stage::MoeExpertOut);
    assert!(out.within && out.slots_left_out == 1 && !out.bitwise);
    assert!(stage(&found, Stage::MoeRouterWeights).within);
}

#[test]
fn a_choice_that_the_logits_do_not_explain_is_no_near_tie() {
    let found = diff([[1, 0], [0, 4]], [[1, 3], [0, 4]], 0.0);
    assert_eq!(found.outcome, Outcome::Differs { first: of(Stage::MoeRouterIndices).to_string() });
    let [flip] = &stage(&found, Stage::MoeRouterIndices).flips[..] else { panic!("one flip") };
    assert_eq!((flip.margin, flip.is_near_tie()), (Some(1.5), Some(false)));
}

#[test]
fn rows_without_a_common_expert_are_not_compared() {
    let found = diff([[1, 0], [2, 3]], [[3, 5], [0, 4]], 0.0);
    let reason = |stage| {
        let missing =
            found.not_compared.iter().find(|missing| missing.name == of(stage).to_string());
        missing.map(|missing| missing.reason.clone())
    };
    assert_eq!(reason(Stage::MoeExpertGate), Some(Reason::OtherExperts));
    assert_eq!(reason(Stage::FfnOut), None);
}

#[test]
fn a_difference_is_located_by_expert_and_channel() {
    let dir = tempfile::tempdir().unwrap();
    let ids = [[1, 3], [0, 4]];
    let a = capture(&dir.path().join("a"), ids, 0.0);
    let b = capture(&dir.path().join("b"), ids, 0.0);
    let mut found = compare(&a, &b, &Options::default()).unwrap();
    let place = found.stages.iter_mut().find(|s| s.site == of(Stage::MoeExpertOut)).unwrap();
    let at = place.metrics.max_abs.as_ref().unwrap().at;
    assert!(at.expert.is_some() && at.channel.is_some() && at.head.is_none(), "{at}");
}
