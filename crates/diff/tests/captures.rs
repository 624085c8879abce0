//! What a comparison of captures must see, and what it must never call equal.

#[path = "../../capture/tests/support/mod.rs"]
mod support;

use std::path::Path;

use apr_capture::{Capture, Dims, Layout, OpenOptions, Recorder, RecorderOptions, Rows};
use apr_diff::*;
use apr_model::{Observer, Site, Stage, Step, TapSet, Values, View};
use support::*;

/// Records `steps` with values that `change` may alter; it is told the site and the first position.
fn capture_of(
    out: &Path,
    steps: &[Step<'_>],
    options: RecorderOptions,
    change: impl Fn(Site, &Step<'_>, &mut Vec<f32>),
) -> Capture {
    let dims = dims();
    let mut recorder = Recorder::create(out, provenance(), dims.clone(), options).unwrap();
    for step in steps {
        recorder.begin(step).unwrap();
        for site in recorder.wanted().iter() {
            let (shape, mut values) = values(&dims, step, site);
            change(site, step, &mut values);
            let view = View { shape: &shape, values: Values::F32(&values) };
            recorder.value(step, site, view).unwrap();
        }
        recorder.end(step).unwrap();
    }
    Capture::open(recorder.finish().unwrap()).unwrap()
}

fn all() -> RecorderOptions {
    RecorderOptions::new(all_sites(&dims()))
}

fn only(sites: impl IntoIterator<Item = Site>) -> RecorderOptions {
    RecorderOptions::new(sites.into_iter().collect())
}

fn same(_: Site, _: &Step<'_>, _: &mut Vec<f32>) {}

fn diff(a: &Capture, b: &Capture) -> Comparison {
    compare(a, b, &Options::default()).unwrap()
}

fn stage(comparison: &Comparison, site: Site) -> &StageComparison {
    comparison.stages.iter().find(|stage| stage.site == site).unwrap()
}

#[test]
fn identical_captures_match_bit_for_bit_with_every_stage_compared() {
    let dir = tempfile::tempdir().unwrap();
    let a = capture_of(&dir.path().join("a"), &[prefill(&[5, 6, 7])], all(), same);
    let b = capture_of(&dir.path().join("b"), &[prefill(&[5, 6, 7])], all(), same);
    let found = diff(&a, &b);
    assert_eq!(found.outcome, Outcome::Match { bitwise: true });
    let sites: Vec<Site> = found.stages.iter().map(|stage| stage.site).collect();
    assert_eq!(sites, a.sites(), "every stage, in the order of computation");
    for stage in &found.stages {
        assert_eq!(stage.metrics.relative_l2, Some(0.0));
        let rows = if stage.site.stage == Stage::LmHead { 1 } else { 3 };
        assert_eq!(stage.rows.len(), rows);
    }
    let logits = found.stages.last().unwrap().logits.as_ref().unwrap();
    assert_eq!((logits.rows, logits.argmax_agree, logits.kl_max), (1, 1, Some(0.0)));
}

#[test]
fn prefill_chunks_and_decode_steps_are_compared_position_by_position() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = [5, 6, 7, 8, 9];
    let every_row = |tokens, first, index| Step {
        first_position: first,
        logit_rows: 0..(tokens as &[u32]).len(),
        index,
        ..prefill(tokens)
    };
    let whole = capture_of(&dir.path().join("a"), &[every_row(&tokens, 0, 0)], all(), same);
    let steps =
        [every_row(&tokens[..2], 0, 0), every_row(&tokens[2..4], 2, 1), decode(2, &tokens[4..], 4)];
    let parts = capture_of(&dir.path().join("b"), &steps, all(), same);
    let found = diff(&whole, &parts);
    assert_eq!(found.outcome, Outcome::Match { bitwise: true });
    for stage in &found.stages {
        let positions: Vec<_> = stage.rows.iter().map(|row| row.position.unwrap()).collect();
        assert_eq!(positions, [0, 1, 2, 3, 4], "{}", stage.site);
    }
    let scores = stage(&found, Site::layer(0, Stage::AttnScores));
    assert_eq!(scores.metrics.count, 4 * (1 + 2 + 3 + 4 + 5), "masked keys are not compared");
}

#[test]
fn one_changed_element_of_any_stage_is_found_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let step = prefill(&[5, 6, 7]);
    let clean = capture_of(&dir.path().join("clean"), std::slice::from_ref(&step), all(), same);
    for (index, planted) in clean.sites().into_iter().enumerate() {
        let (_, before) = values(&dims(), &step, planted);
        // Behind a masked entry there is nothing to find; the last row sees all keys.
        let element = before.len() - 1 - index % 2;
        let options = only(clean.sites());
        let out = dir.path().join(format!("{index}"));
        let faulty = capture_of(&out, std::slice::from_ref(&step), options, |site, _, values| {
            if site == planted {
                values[element] += 0.5;
            }
        });
        let found = diff(&faulty, &clean);
        assert_eq!(found.outcome, Outcome::Differs { first: planted.to_string() });
        assert_eq!(found.stages.iter().filter(|stage| !stage.within).count(), 1);
        let stage = stage(&found, planted);
        let worst = stage.metrics.max_abs.unwrap();
        assert_eq!((worst.a, worst.b), ((before[element] + 0.5).into(), before[element].into()));
        assert_eq!(worst.at.position, Some(2), "{planted}");
        let shape = dims().shape(planted.stage, 1, 3);
        let back = index % 2;
        let (head, channel, key) = match planted.stage {
            Stage::AttnScores | Stage::AttnSoftmax => (Some(3), None, Some(2 - back)),
            Stage::QPostRope => (Some(3), Some(1 - back), None),
            Stage::KPostRope => (Some(1), Some(1 - back), None),
            _ => (None, Some(shape[1] - 1 - back), None),
        };
        assert_eq!((worst.at.head, worst.at.channel, worst.at.key), (head, channel, key));
        assert_eq!(stage.worst_row().unwrap().position, Some(2));
    }
}

#[test]
fn a_nan_on_one_side_never_passes_whatever_the_tolerance() {
    let dir = tempfile::tempdir().unwrap();
    let step = [prefill(&[5, 6, 7])];
    let site = Site::layer(1, Stage::FfnOut);
    let clean = capture_of(&dir.path().join("a"), &step, all(), same);
    for (name, everywhere) in [("one", false), ("all", true)] {
        let sick = capture_of(&dir.path().join(name), &step, all(), |s, _, values| {
            if s == site {
                let end = if everywhere { values.len() } else { 1 };
                values[..end].fill(f32::NAN);
            }
        });
        let options = Options { tolerance: f64::INFINITY, ..Options::default() };
        for (a, b) in [(&sick, &clean), (&clean, &sick)] {
            let found = compare(a, b, &options).unwrap();
            assert_eq!(found.outcome, Outcome::Differs { first: site.to_string() });
            let categories = &stage(&found, site).metrics.categories;
            assert_eq!(categories.first.unwrap().at.position, Some(0));
        }
    }
}

#[test]
fn nan_against_nan_is_nothing_measured() {
    let dir = tempfile::tempdir().unwrap();
    let site = Site::layer(0, Stage::FfnOut);
    let nan = |name: &str| {
        let out = dir.path().join(name);
        capture_of(&out, &[prefill(&[5])], only([site]), |_, _, values| values.fill(f32::NAN))
    };
    let found = diff(&nan("a"), &nan("b"));
    assert_eq!(found.outcome.exit_code(), 3);
    assert_eq!(found.not_compared[0].reason, Reason::NothingFinite);
}

#[test]
fn a_row_of_zeros_on_one_side_is_no_match_however_small_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let site = Site::layer(0, Stage::FfnOut);
    let record = |name: &str, first: f32| {
        capture_of(&dir.path().join(name), &[prefill(&[5, 6])], only([site]), |_, _, values| {
            values[..8].fill(first);
            values[8..].fill(1.0);
        })
    };
    let found = diff(&record("a", 0.0), &record("b", 1e-9));
    let stage = stage(&found, site);
    assert!(stage.metrics.relative_l2.unwrap() < 1e-8);
    assert_eq!((stage.within, stage.rows[0].dead), (false, Some(Side::A)));
    assert_eq!(found.outcome.exit_code(), 1);
}

#[test]
fn a_row_that_is_wrong_throughout_does_not_hide_beside_a_large_one() {
    let dir = tempfile::tempdir().unwrap();
    let site = Site::layer(0, Stage::FfnOut);
    let record = |name: &str, second: f32| {
        capture_of(&dir.path().join(name), &[prefill(&[5, 6])], only([site]), |_, _, values| {
            values[..8].fill(5e5);
            values[8..].fill(second);
        })
    };
    let found = diff(&record("a", -1.0), &record("b", 1.0));
    let stage = stage(&found, site);
    assert!(stage.metrics.relative_l2.unwrap() < 1e-5);
    assert_eq!((stage.within, stage.worst_row().unwrap().relative_l2), (false, Some(2.0)));
    assert_eq!(found.outcome.exit_code(), 1);
}

#[test]
fn one_wrong_row_among_many_is_not_diluted_and_says_from_which_token_on() {
    let dir = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (0..430).map(|i| i % 9).collect();
    let (early, late) = (Site::layer(0, Stage::FfnOut), Site::layer(1, Stage::FfnOut));
    let record = |name: &str, wrong: &[(Site, usize)]| {
        let sites = only([early, late]);
        capture_of(&dir.path().join(name), &[prefill(&tokens)], sites, |site, _, values| {
            values.fill(1.0);
            for (_, row) in wrong.iter().filter(|(of, _)| *of == site) {
                values[row * 8..][..8].fill(1.01);
            }
        })
    };
    let options = Options { tolerance: 1e-3, ..Options::default() };
    let wrong = record("a", &[(early, 401), (late, 322)]);
    let found = compare(&wrong, &record("b", &[]), &options).unwrap();
    let stage = stage(&found, late);
    assert!(stage.metrics.relative_l2.unwrap() < 1e-3, "the stage as a whole is within");
    assert!(!stage.within);
    assert!((stage.worst_row().unwrap().relative_l2.unwrap() - 1e-2).abs() < 1e-6);
    let (site, row) = found.first_row_beyond().unwrap();
    assert_eq!((site, row.position), (late, Some(322)), "the earliest position of all stages");
}

#[test]
fn a_row_of_almost_nothing_is_measured_by_the_norm_of_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let site = Site::layer(0, Stage::FfnOut);
    let record = |name: &str, first: f32| {
        capture_of(&dir.path().join(name), &[prefill(&[5, 6])], only([site]), |_, _, values| {
            values[..8].fill(first);
            values[8..].fill(1.0);
        })
    };
    let tiny = record("tiny", 1e-9);
    assert_eq!(diff(&record("twice", 2e-9), &tiny).outcome, Outcome::Match { bitwise: false });
    let found = diff(&record("much", 1e-2), &tiny);
    let row = &stage(&found, site).rows[0];
    assert!((row.relative_l2.unwrap() - 1e-2 * 2f64.sqrt()).abs() < 1e-6, "{row:?}");
    assert_eq!(found.outcome.exit_code(), 1);
}

#[test]
fn rows_after_another_token_are_named_and_not_scored() {
    let dir = tempfile::tempdir().unwrap();
    let a = capture_of(&dir.path().join("a"), &[prefill(&[5, 6, 7, 8])], all(), same);
    let b = capture_of(&dir.path().join("b"), &[prefill(&[5, 6, 3, 8])], all(), same);
    let found = diff(&a, &b);
    let difference = TokenDifference { slot: 0, position: 2, a: 7, b: 3 };
    assert_eq!(found.token_differences, [difference]);
    let norm = stage(&found, Site::layer(0, Stage::AttnNorm));
    assert_eq!((norm.rows.len(), norm.rows_other_tokens), (2, 2));
    assert_eq!(found.not_compared.len(), 1, "the logits are of the last row only");
    assert_eq!(found.not_compared[0].reason, Reason::OtherTokens);
    assert_eq!(found.outcome.exit_code(), 3, "equal rows before it are no match of the rest");
}

#[test]
fn one_row_is_compared_with_the_row_of_its_position() {
    let dir = tempfile::tempdir().unwrap();
    let step = [prefill(&[1, 2, 3, 4, 5, 6, 7])];
    let whole = capture_of(&dir.path().join("a"), &step, all(), same);
    let last = RecorderOptions { rows: Rows::Last, ..all() };
    let last = capture_of(&dir.path().join("b"), &step, last, same);
    let found = diff(&last, &whole);
    assert_eq!(found.outcome, Outcome::Match { bitwise: true });
    for stage in found.stages.iter().filter(|stage| stage.site.stage != Stage::LmHead) {
        assert_eq!(stage.rows.len(), 1);
        assert_eq!((stage.rows[0].position, stage.rows_only_b), (Some(6), 6));
    }
}

#[test]
fn a_stage_that_one_side_lacks_is_missed_unless_only_common_ones_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (norm, out) = (Site::layer(0, Stage::AttnNorm), Site::layer(0, Stage::FfnOut));
    let both = capture_of(&dir.path().join("a"), &[prefill(&[5])], only([norm, out]), same);
    let one = capture_of(&dir.path().join("b"), &[prefill(&[5])], only([norm]), same);
    let found = diff(&both, &one);
    assert_eq!(found.outcome.exit_code(), 3);
    assert_eq!(found.not_compared[0].name, out.to_string());
    assert_eq!(found.not_compared[0].reason, Reason::Missing { side: Side::B });

    let common = Options { common: true, ..Options::default() };
    let matched = Outcome::Match { bitwise: true };
    let found = compare(&both, &one, &common).unwrap();
    assert_eq!((found.outcome, found.not_compared), (matched.clone(), Vec::new()));
    let reason = Reason::Missing { side: Side::B };
    assert_eq!(found.left_out, [NotCompared { name: out.to_string(), reason }]);
    let sites = Some(TapSet::from_iter([norm]));
    let asked = Options { sites, ..Options::default() };
    assert_eq!(compare(&both, &one, &asked).unwrap().outcome, matched);
}

#[test]
fn nothing_in_common_is_unmeasured_and_never_a_match() {
    let dir = tempfile::tempdir().unwrap();
    let (norm, out) = (Site::layer(0, Stage::AttnNorm), Site::layer(0, Stage::FfnOut));
    let a = capture_of(&dir.path().join("a"), &[prefill(&[5])], only([norm]), same);
    let b = capture_of(&dir.path().join("b"), &[prefill(&[5])], only([out]), same);
    let later = Step { first_position: 7, ..prefill(&[5]) };
    let c = capture_of(&dir.path().join("c"), &[later], only([norm]), same);
    let common = Options { common: true, ..Options::default() };
    let found = compare(&a, &b, &common).unwrap();
    assert_eq!((found.stages.len(), found.outcome.exit_code()), (0, 3));
    let found = compare(&a, &c, &common).unwrap();
    assert_eq!(found.not_compared[0].reason, Reason::NoCommonRows);
    assert_eq!(found.outcome.exit_code(), 3);
    let elsewhere = Some(TapSet::from_iter([Site::whole(Stage::FinalNorm)]));
    let found = compare(&a, &a, &Options { sites: elsewhere, ..Options::default() }).unwrap();
    assert_eq!(found.not_compared[0].reason, Reason::MissingOnBoth);
    assert_eq!(found.outcome.exit_code(), 3);
}

#[test]
fn rows_of_different_widths_are_named_with_both_shapes_and_not_scored() {
    let dir = tempfile::tempdir().unwrap();
    let site = Site::whole(Stage::FinalNorm);
    let record = |name: &str, hidden_size| {
        let dims = Dims { hidden_size, ..dims() };
        let out = dir.path().join(name);
        let mut recorder =
            Recorder::create(&out, provenance(), dims.clone(), only([site])).unwrap();
        run(&mut recorder, &dims, &prefill(&[5])).unwrap();
        Capture::open(recorder.finish().unwrap()).unwrap()
    };
    let found = diff(&record("a", 8), &record("b", 9));
    assert_eq!(found.not_compared[0].reason, Reason::Shape { a: vec![1, 8], b: vec![1, 9] });
    assert_eq!(found.outcome.exit_code(), 3);
}

#[test]
fn a_difference_outweighs_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let (norm, out) = (Site::layer(0, Stage::AttnNorm), Site::layer(0, Stage::FfnOut));
    let both = capture_of(&dir.path().join("a"), &[prefill(&[5])], only([norm, out]), same);
    let one = capture_of(&dir.path().join("b"), &[prefill(&[5])], only([norm]), |_, _, values| {
        values[0] += 1.0;
    });
    assert_eq!(diff(&both, &one).outcome.exit_code(), 1);
}

#[test]
fn noise_within_the_tolerance_matches_and_is_not_bitwise() {
    let dir = tempfile::tempdir().unwrap();
    let step = [prefill(&[5, 6, 7])];
    let a = capture_of(&dir.path().join("a"), &step, all(), same);
    let b = capture_of(&dir.path().join("b"), &step, all(), |_, _, values| {
        values.iter_mut().for_each(|v| *v *= 1.0 + 2e-6);
    });
    assert_eq!(diff(&a, &b).outcome, Outcome::Match { bitwise: false });
    let strict = Options { tolerance: 1e-7, ..Options::default() };
    assert_eq!(compare(&a, &b, &strict).unwrap().outcome.exit_code(), 1);
}

#[test]
fn a_comparison_is_plain_json_with_its_verdict() {
    let dir = tempfile::tempdir().unwrap();
    let a = capture_of(&dir.path().join("a"), &[prefill(&[5, 6])], all(), same);
    let json = serde_json::to_value(diff(&a, &a)).unwrap();
    assert_eq!(json["outcome"]["verdict"], "match");
    assert_eq!(json["stages"][0]["site"], "embedding");
    assert_eq!(json["stages"][0]["relative_l2"], 0.0);
    assert_eq!(json["alignment"], "positions");
}

#[test]
fn a_tree_without_positions_is_aligned_on_its_last_row_which_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let step = [prefill(&[1, 2, 3, 4, 5, 6, 7])];
    let whole = capture_of(&dir.path().join("a"), &step, all(), same);
    let out = dir.path().join("b");
    let options = RecorderOptions { rows: Rows::Last, layout: Layout::Aprt, ..all() };
    capture_of(&out, &step, options, same);
    std::fs::remove_file(out.join("manifest.json")).unwrap();
    let open = OpenOptions { dims: Some(dims()), ..OpenOptions::default() };
    let bare = Capture::open_with(&out, &open).unwrap();

    let common = Options { common: true, ..Options::default() };
    let found = compare(&bare, &whole, &common).unwrap();
    assert_eq!(found.alignment, Alignment::LastRow);
    assert_eq!(found.outcome, Outcome::Match { bitwise: true });
    let norm = stage(&found, Site::layer(1, Stage::FfnNorm));
    assert_eq!((norm.rows.len(), norm.rows_only_b, norm.rows[0].position), (1, 6, None));
}
