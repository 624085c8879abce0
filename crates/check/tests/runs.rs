//! A backend that breaks one promise is told which, and at which value it breaks.

#![allow(clippy::print_stderr, reason = "a skipped case is reported")]

mod support;

use apr_check::{Break, Check, Checkup, Outcome, Place};
use apr_cpu::Isa;
use support::{Mischief, checked, open};

/// The checks that are broken, each with the first place it names.
fn broken(checkup: &Checkup) -> Vec<(Check, &Break)> {
    let broken = checkup.checks.iter().filter_map(|checked| match &checked.outcome {
        Outcome::Broken { breaks } => Some((checked.name, &breaks[0])),
        _ => None,
    });
    broken.collect()
}

/// The one break of a backend that ought to break one promise only.
#[track_caller]
fn only_break(mischief: Mischief, check: Check) -> Break {
    let checkup = checked(&open("tiny/qwen2"), mischief, &[]);
    let broken = broken(&checkup);
    assert_eq!(broken.len(), 1, "{mischief:?}: {broken:?}");
    assert_eq!(broken[0].0, check, "{mischief:?}");
    assert_eq!(checkup.exit_code(), 1);
    broken[0].1.clone()
}

#[test]
fn a_backend_that_keeps_its_promises_passes_every_check() {
    for file in apr_testkit::invariants::tiny_files() {
        let checkup = checked(&open(&file), Mischief::None, &[]);
        for checked in &checkup.checks {
            let is_absent = matches!(checked.outcome, Outcome::NotApplicable { .. });
            let expected = match checked.name {
                // Of the containers, only .apr states one.
                Check::Checksum => true,
                Check::Routing => !file.contains("moe"),
                _ => false,
            };
            assert_eq!(is_absent, expected, "{file}: {}", checked.name);
            assert!(is_absent || checked.outcome == Outcome::Held, "{file}: {}", checked.name);
            assert_eq!(checked.notes, [], "{file}: {}", checked.name);
        }
        assert_eq!(checkup.exit_code(), 0, "{file}");
        assert_eq!(checkup.checks.len(), Check::all().count());
    }
}

/// The reference backend, of which there is one kind.
struct ReferenceFactory;

impl apr_check::Factory for ReferenceFactory {
    type Backend = apr_reference::Reference<f64>;

    fn build(&self, _: apr_check::Way) -> Result<Self::Backend, apr_check::FactoryError> {
        Ok(apr_reference::Reference::new(apr_reference::Arithmetic::EXACT))
    }
}

#[test]
fn what_a_backend_has_no_choice_of_does_not_apply_to_it_unless_asked_for() {
    let check = |only: Option<Vec<Check>>| {
        let tokens = apr_testkit::invariants::tokens(9);
        let options = apr_check::Options { tokens, only, quick: true };
        let (file, watch) = (open("tiny/llama3-rope"), &apr_check::Unwatched);
        apr_check::check_model(&file, &ReferenceFactory, &options, watch).unwrap()
    };
    let checkup = check(None);
    for checked in &checkup.checks {
        use Check::{Checksum, Isa, Plan, Routing, Threads};
        let is_choice = matches!(checked.name, Checksum | Plan | Routing | Threads | Isa);
        match &checked.outcome {
            Outcome::NotApplicable { .. } => assert!(is_choice, "{}", checked.name),
            outcome => {
                assert_eq!((outcome, is_choice), (&Outcome::Held, false), "{}", checked.name)
            }
        }
    }
    assert_eq!(checkup.exit_code(), 0);
    assert_eq!(check(Some(vec![Check::Decode, Check::Threads])).exit_code(), 3);
}

/// The place, the run, and both values, which are neighbours, of a break by one bit.
#[track_caller]
fn one_bit(found: &Break) -> (Place, &str) {
    let Break::Bits { run, at, expected, found, elements, rows } = found else {
        panic!("{found:?} is not about bits");
    };
    let (expected, found) = (expected.unwrap() as f32, *found as f32);
    assert_eq!(expected.to_bits() ^ 1, found.to_bits(), "the bit that was turned");
    assert_eq!(elements, rows, "one element in each row");
    (*at, run)
}

#[test]
fn the_first_stage_that_breaks_a_promise_is_named() {
    let foreign = Isa::available().map(Isa::name).find(|&isa| isa != Isa::best().name());
    let mut cases = vec![
        (Mischief::DecodeLinear, Check::Decode, "layers.1.ffn_out", "token by token"),
        (Mischief::DecodeRope, Check::Decode, "layers.1.k_post_rope", "token by token"),
        (Mischief::LaterChunks, Check::Chunks, "layers.1.attention", "chunks of 3"),
        (Mischief::Threads(2), Check::Threads, "layers.1.ffn_out", "2 threads"),
        (Mischief::Others, Check::Interleaved, "layers.1.attention", "another sequence"),
        (Mischief::Copied, Check::Snapshot, "layers.1.attention", "copy"),
        (Mischief::Cut, Check::Rewind, "layers.1.attention", "astray"),
    ];
    match foreign {
        Some(isa) => cases.push((Mischief::Isa(isa), Check::Isa, "layers.1.ffn_out", isa)),
        None => eprintln!("skipped: this machine has one instruction set only"),
    }
    for (mischief, check, site, run) in cases {
        let found = only_break(mischief, check);
        let (at, said) = one_bit(&found);
        assert_eq!(at.site.to_string(), site, "{mischief:?}");
        assert!(said.contains(run), "{mischief:?}: {said}");
    }
}

#[test]
fn row_head_and_channel_are_those_of_the_spoilt_element() {
    // What is spoilt is the sixth element of the last row of a step.
    let found = only_break(Mischief::DecodeLinear, Check::Decode);
    let (at, _) = one_bit(&found);
    assert_eq!((at.position, at.head, at.channel), (0, None, Some(5)));
    let found = only_break(Mischief::LaterChunks, Check::Chunks);
    assert_eq!(one_bit(&found).0.position, 5, "the last row of the second chunk");
    let found = only_break(Mischief::Cut, Check::Rewind);
    assert_eq!(one_bit(&found).0.position, 23);
    let found = only_break(Mischief::DecodeRope, Check::Decode);
    let (at, _) = one_bit(&found);
    assert_eq!((at.head, at.channel, at.key), (Some(0), Some(5), None));
    let Break::Bits { elements: 24, rows: 24, .. } = found else { panic!("{found:?}") };
}

#[test]
fn the_site_that_must_not_be_looked_at_is_named() {
    let found = only_break(Mischief::Spilled, Check::Traced);
    let Break::Looking { observed: Some(site), at, expected, found, elements } = found else {
        panic!("{found:?}");
    };
    assert_eq!(site.to_string(), "layers.1.attn_scores");
    assert_eq!(at.site.to_string(), "lm_head");
    assert!(expected != found && elements > 0);
}

#[test]
fn a_run_that_differs_once_is_told_from_one_that_never_repeats() {
    let repeat = |mischief| {
        let checkup = checked(&open("tiny/qwen2"), mischief, &[Check::Repeat]);
        broken(&checkup)[0].1.clone()
    };
    let once = repeat(Mischief::Once);
    assert_eq!(one_bit(&once).0.site.to_string(), "layers.1.ffn_out");
    let Break::Bits { at, expected: None, .. } = repeat(Mischief::Always) else {
        panic!("there is nothing to expect of runs that never repeat");
    };
    assert_eq!(at.site.to_string(), "layers.1.ffn_out");
}

#[test]
fn logits_that_depend_on_the_rows_asked_for_break_two_promises() {
    let checkup = checked(&open("tiny/qwen2"), Mischief::OneLogitRow, &[]);
    let broken = broken(&checkup);
    let names: Vec<Check> = broken.iter().map(|(check, _)| *check).collect();
    assert_eq!(names, [Check::LogitRows, Check::Decode]);
    for (_, found) in broken {
        assert_eq!(one_bit(found).0.site.to_string(), "lm_head");
    }
}

#[test]
fn the_first_value_that_is_not_finite_is_named_and_is_no_difference_of_bits() {
    let found = only_break(Mischief::Nan, Check::FiniteValues);
    let Break::NotFinite { at, found, elements: 24, sites } = found else { panic!("{found:?}") };
    assert_eq!(at.site.to_string(), "layers.1.ffn_out");
    assert_eq!((at.position, at.channel), (0, Some(5)));
    // The residual, the final norm and the logits carry it on.
    assert!(found.is_nan() && sites == 4);
}

#[test]
fn another_plan_is_named_by_its_first_kernel() {
    let found = only_break(Mischief::PlanOfThree, Check::Plan);
    let Break::Other { what } = found else { panic!("{found:?}") };
    let words = ["3 threads", "layers.0.ffn_silu", "swiglu_by_three instead of "];
    assert!(words.iter().all(|word| what.contains(word)), "{what}");
}

#[test]
fn a_prompt_of_one_token_leaves_unmeasured_what_needs_two() {
    let only = vec![Check::Decode, Check::Repeat];
    let options = apr_check::Options { tokens: vec![7], only: Some(only), quick: false };
    let factory = support::SpoiltFactory(Mischief::None);
    let watch = &apr_check::Unwatched;
    let checkup = apr_check::check_model(&open("tiny/qwen2"), &factory, &options, watch).unwrap();
    let [repeat, decode] = &checkup.checks[..] else { panic!("two checks were asked for") };
    assert_eq!(repeat.outcome, Outcome::Held);
    assert!(matches!(&decode.outcome, Outcome::NotMeasured { why } if why.contains("one token")));
    assert_eq!(checkup.exit_code(), 3);
}

#[test]
fn prompts_that_no_run_can_read_are_refused() {
    let refused = |tokens: Vec<u32>| {
        let options = apr_check::Options { tokens, ..Default::default() };
        let factory = support::SpoiltFactory(Mischief::None);
        let watch = &apr_check::Unwatched;
        let checkup = apr_check::check_model(&open("tiny/qwen2"), &factory, &options, watch);
        checkup.unwrap_err().to_string()
    };
    assert!(refused(vec![]).contains("no tokens"));
    assert!(refused(vec![1, 320]).contains("vocabulary of 320"));
    assert!(refused(vec![1; 513]).contains("context holds 512"));
}

#[test]
fn experts_are_routed_as_the_router_says() {
    let checkpoint = open("tiny/qwen3-moe");
    let routing = |mischief| {
        let checkup = checked(&checkpoint, mischief, &[Check::Routing]);
        let [checked] = &checkup.checks[..] else { panic!("one was asked for") };
        (checked.outcome.clone(), checked.looked_at.clone())
    };
    let (outcome, looked_at) = routing(Mischief::None);
    assert_eq!(outcome, Outcome::Held);
    let looked_at = looked_at.unwrap();
    assert!(looked_at.starts_with("48 choices; the closest is "), "{looked_at}");
    for (mischief, words) in [
        (
            Mischief::SameExpertTwice,
            ["layer 0, position 0", "chosen twice", "(47 more such choices)"],
        ),
        (Mischief::NotNormalised, ["layer 0, position 0", "sum to", "(47 more such choices)"]),
    ] {
        let Outcome::Broken { breaks } = routing(mischief).0 else { panic!("{mischief:?}") };
        let [Break::Other { what }] = &breaks[..] else { panic!("{breaks:?}") };
        assert!(words.iter().all(|word| what.contains(word)), "{what}");
    }
    let dense = checked(&open("tiny/qwen3"), Mischief::None, &[Check::Routing]);
    assert!(matches!(dense.checks[0].outcome, Outcome::NotApplicable { .. }));
}
