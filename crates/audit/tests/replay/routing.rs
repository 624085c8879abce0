//! Choices of experts: flipped, near, impossible, not captured.

use apr_audit::{Audit, Options, Verdict};
use apr_format::Checkpoint;
use apr_model::{Stage, TapSet};

use crate::engine::{Run, assert_match, assert_quiet, faults, native, open, site, tiny};

const MODEL: &str = "tiny/qwen3-moe";
const GGUF: &str = "tiny/qwen3-moe/qwen3-moe-F16.gguf";
const EXPERTS: usize = 8;
const IDS: &str = "layers.0.moe_router_indices";

fn common() -> Options {
    Options { common: true, ..Options::default() }
}

/// Every stage of `MODEL` but those of `without`.
fn all_but(checkpoint: &Checkpoint, without: &[Stage]) -> TapSet {
    let model = apr_model::Model::load(native(), checkpoint).unwrap();
    let all = model.all_taps();
    all.iter().filter(|site| !without.contains(&site.stage)).collect()
}

/// Lets slot `slot` of row `row` be an expert that the row does not go to.
fn flip(row: usize, slot: usize) -> impl Fn(&[usize], &mut [f64]) {
    move |shape, ids| {
        let k = shape[1];
        let of_row = &mut ids[row * k..][..k];
        let other = (0..EXPERTS).map(|id| id as f64).find(|id| !of_row.contains(id));
        of_row[slot] = other.expect("there are more experts than slots");
    }
}

#[test]
fn one_flipped_expert_is_one_finding_in_prefill_and_in_decoding() {
    for file in tiny().iter().filter(|file| file.contains("moe")) {
        let checkpoint = open(file);
        for (step, row) in [(0, 4), (1, 0), (2, 0)] {
            let run = Run::default().planting(step, IDS, flip(row, 1));
            let captured = run.on(native(), &checkpoint);
            let audit = captured.audited(&checkpoint);
            assert_eq!(faults(&audit), [IDS], "{file}, step {step}");
            let stage = audit.stage(site(IDS)).unwrap();
            assert_eq!(stage.rows_beyond().count(), 1);
            let routing = stage.routing.as_ref().unwrap();
            assert_eq!((routing.flipped, routing.experts, routing.per_row), (1, EXPERTS, 2));
            let flip = &routing.flips[0];
            assert_eq!(flip.step, step);
            assert!(!flip.explained && flip.margin > 100.0 * flip.slack, "{flip:?}");
            assert_eq!((flip.left_out().count(), flip.taken().count()), (1, 1), "{flip:?}");
        }
    }
}

#[test]
fn a_flip_of_one_that_is_no_row_of_the_capture_leaves_the_others_as_they_are() {
    let checkpoint = open(MODEL);
    let run = Run { rows: apr_capture::Rows::Range(3..9), ..Run::default() };
    let run = run.planting(0, IDS, flip(5, 0));
    let audit = run.on(native(), &checkpoint).audited_with(&checkpoint, &common());
    assert_eq!(faults(&audit), [IDS]);
}

#[test]
fn the_order_of_slots_is_no_fault() {
    let checkpoint = open(MODEL);
    let run = Run::default()
        .planting(0, IDS, |_, ids| ids.chunks_exact_mut(2).for_each(|row| row.swap(0, 1)));
    assert_match(&run.on(native(), &checkpoint).audited(&checkpoint), "slots in another order");
}

/// What is missed, by stage.
fn missed(audit: &Audit) -> Vec<String> {
    audit.not_measured.iter().filter_map(|gap| Some(gap.site?.to_string())).collect()
}

#[test]
fn ids_of_no_expert_are_a_fault_and_what_follows_from_them_is_not_judged() {
    let checkpoint = open(MODEL);
    for wrong in [99.0, -1.0, EXPERTS as f64] {
        let run = Run::default().miswriting(0, IDS, move |_, ids| ids[3] = wrong);
        let captured = run.on(native(), &checkpoint);
        let audit = captured.audited(&checkpoint);
        assert_eq!(faults(&audit), [IDS], "{wrong}");
        let routing = audit.stage(site(IDS)).unwrap().routing.clone().unwrap();
        assert_eq!(routing.flips[0].margin, f64::INFINITY);
        assert_eq!(routing.flips[0].captured[1], wrong);
        let missed = missed(&audit);
        assert!(missed.contains(&"layers.0.moe_expert_gate".to_owned()), "{missed:?}");
        assert!(!missed.iter().any(|site| site.starts_with("layers.1")), "{missed:?}");
        let capture = captured.open();
        let diagnoses = apr_audit::diagnose(&capture, &checkpoint, &audit, 4).unwrap();
        assert_eq!(diagnoses.len(), 1);
        let place = tempfile::tempdir().unwrap();
        let place = place.path().join("right");
        let consequence = apr_audit::consequence(&capture, &checkpoint, &audit, &place).unwrap();
        assert!(consequence.is_some(), "{wrong}");
    }
}

#[test]
fn an_expert_that_is_chosen_twice_is_one_finding() {
    let checkpoint = open(MODEL);
    let run = Run::default().planting(0, IDS, |_, ids| ids[5] = ids[4]);
    let audit = run.on(native(), &checkpoint).audited(&checkpoint);
    assert_eq!(faults(&audit), [IDS]);
    let flip = audit.stage(site(IDS)).unwrap().routing.clone().unwrap().flips[0].clone();
    assert_eq!((flip.position, flip.margin), (2, f64::INFINITY));
    assert_eq!(flip.taken().collect::<Vec<_>>(), [flip.captured[1]]);
}

#[test]
fn logits_that_are_no_numbers_choose_nothing_and_stop_nothing() {
    let checkpoint = open(MODEL);
    let run = Run::default().planting(0, "layers.0.moe_router", |_, logits| {
        logits[EXPERTS..2 * EXPERTS].fill(f64::NAN)
    });
    let audit = run.on(native(), &checkpoint).audited(&checkpoint);
    assert_eq!(faults(&audit)[0], "layers.0.moe_router");
    assert!(missed(&audit).contains(&IDS.to_owned()), "{:?}", audit.not_measured);
    let one = Run::default()
        .planting(0, "layers.0.moe_router", |_, logits| logits[3] = f64::NEG_INFINITY);
    let audit = one.on(native(), &checkpoint).audited(&checkpoint);
    assert_eq!(faults(&audit), ["layers.0.moe_router"], "{:?}", audit.not_measured);
}

#[test]
fn a_choice_that_was_not_captured_is_made_from_the_logits() {
    use Stage::*;
    let checkpoint = open(MODEL);
    for without in [
        &[MoeRouterIndices][..],
        &[MoeRouter, MoeRouterIndices],
        &[MoeRouter, MoeRouterIndices, MoeRouterWeights, MoeExpertGate, MoeExpertUp],
        &[FfnNorm, MoeRouter, MoeRouterIndices, MoeExpertSilu, MoeExpertOut, FfnOut],
    ] {
        let run = || Run { sites: Some(all_but(&checkpoint, without)), ..Run::default() };
        let audit = run().on(native(), &checkpoint).audited(&checkpoint);
        assert_match(&audit, &format!("without {without:?}"));
        if without.contains(&MoeExpertGate) {
            continue;
        }
        // What went to another expert shows where that expert's results do.
        let run = run().planting(0, IDS, flip(2, 1));
        let audit = run.on(native(), &checkpoint).audited(&checkpoint);
        let first = audit.faults().next().expect("seen");
        assert!(first.span.contains(&site(IDS)), "{}: {:?}", first.site, first.span);
    }
}

/// The model with two experts that the router cannot tell apart.
fn with_twins(a: usize, b: usize) -> Checkpoint {
    let mut draft = apr_testkit::Draft::of(&open(GGUF));
    for layer in 0..2 {
        let router = draft.tensor(&format!("blk.{layer}.ffn_gate_inp.weight"));
        let len = router.row_bytes(0).len();
        let mut bytes = router.bytes().to_vec();
        bytes.copy_within(a * len..(a + 1) * len, b * len);
        *router =
            apr_tensor::Stored::new(router.dtype(), router.shape().clone(), bytes.into()).unwrap();
    }
    draft.gguf()
}

/// A model with such twins, of which some row of the first step goes to the first only: the model, the twins and the row.
fn divided() -> (Checkpoint, [f64; 2], usize) {
    let pairs = (0..EXPERTS).flat_map(|a| (a + 1..EXPERTS).map(move |b| (a, b)));
    let found = pairs.into_iter().find_map(|(a, b)| {
        let checkpoint = with_twins(a, b);
        let captured = Run::default().on(native(), &checkpoint);
        let ids = captured.open().tensor(0, site(IDS)).unwrap().to_f64();
        let [a, b] = [a as f64, b as f64];
        let row = ids.chunks_exact(2).position(|ids| ids.contains(&a) && !ids.contains(&b))?;
        Some((checkpoint, [a, b], row))
    });
    found.expect("of some pair one is the last that is chosen")
}

/// Lets a row go to the other one of twins.
fn to_the_other([a, b]: [f64; 2], row: usize) -> impl Fn(&[usize], &mut [f64]) {
    move |_, ids| {
        for id in &mut ids[2 * row..][..2] {
            *id = if *id == a { b } else { *id };
        }
    }
}

#[test]
fn of_two_experts_that_are_as_good_either_may_be_taken() {
    let (checkpoint, twins, row) = divided();
    assert_match(&Run::default().on(native(), &checkpoint).audited(&checkpoint), "twins");
    let run = Run::default().planting(0, IDS, to_the_other(twins, row));
    let audit = run.on(native(), &checkpoint).audited(&checkpoint);
    assert_match(&audit, "the other twin");
    let routing = audit.stage(site(IDS)).unwrap().routing.clone().unwrap();
    assert_eq!((routing.flipped, routing.flips[0].explained), (1, true));
    assert_eq!(routing.nearest.map(|tie| tie.margin), Some(0.0));
}

#[test]
fn what_a_tie_leaves_open_is_not_judged_where_nobody_captured_the_choice() {
    let (checkpoint, twins, row) = divided();
    let sites = Some(all_but(&checkpoint, &[Stage::MoeRouterIndices]));
    let run = Run { sites, ..Run::default() }.planting(0, IDS, to_the_other(twins, row));
    let captured = run.on(native(), &checkpoint);
    assert_quiet(&captured.audited_with(&checkpoint, &common()), "the other twin, unseen");
    let audit = captured.audited(&checkpoint);
    assert_eq!(audit.verdict.exit_code(), 3, "{}", audit.verdict);
    assert!(matches!(audit.verdict, Verdict::Unmeasured { .. }));
    assert!(audit.verdict.to_string().contains("near-tie"), "{}", audit.verdict);
}

#[test]
fn a_damaged_expert_is_named_where_it_is_chosen() {
    let checkpoint = open(GGUF);
    let mut damaged = apr_testkit::Draft::of(&checkpoint);
    let stored = damaged.tensor("blk.1.ffn_down_exps.weight");
    let mut bytes = stored.bytes().to_vec();
    // The sign of the first weight of expert 3.
    let first = bytes.len() / EXPERTS * 3;
    bytes[first + 1] ^= 0x80;
    *stored =
        apr_tensor::Stored::new(stored.dtype(), stored.shape().clone(), bytes.into()).unwrap();
    let run = Run { lengths: vec![24, 1, 1], ..Run::default() };
    let audit = run.on(native(), &damaged.gguf()).audited(&checkpoint);
    assert_eq!(faults(&audit), ["layers.1.moe_expert_out"]);
    let stage = audit.stage(site("layers.1.moe_expert_out")).unwrap();
    let wrong: Vec<usize> =
        stage.experts.iter().filter(|expert| expert.beyond).map(|expert| expert.expert).collect();
    assert_eq!(wrong, [3], "{:?}", stage.experts);
    assert_eq!(stage.channels_total, 64, "channels are counted once for all experts");
}
