//! Captures without some of the stages.

use apr_audit::Options;
use apr_model::{Model, Site, Stage, TapSet};

use crate::engine::{Q4, Run, assert_quiet, faults, native, open, site, tiny};

fn common() -> Options {
    Options { common: true, ..Options::default() }
}

fn sites(file: &str) -> Vec<Site> {
    Model::load(native(), &open(file)).unwrap().plan().sites().to_vec()
}

/// The sites of these stages.
fn only(file: &str, keep: impl Fn(Stage) -> bool) -> Option<TapSet> {
    Some(sites(file).into_iter().filter(|site| keep(site.stage)).collect())
}

#[test]
fn a_capture_of_one_stage_is_quiet() {
    for file in ["tiny/qwen3", "tiny/llama/llama-F16.gguf", Q4] {
        let checkpoint = open(file);
        for stage in Stage::all() {
            let run = Run { sites: only(file, |s| s == stage), ..Run::default() };
            if run.sites.as_ref().is_some_and(TapSet::is_empty) {
                continue;
            }
            let audit = run.on(native(), &checkpoint).audited_with(&checkpoint, &common());
            assert_quiet(&audit, &format!("{file}, only {stage}"));
        }
    }
}

#[test]
fn a_capture_of_any_stages_is_quiet() {
    // A linear congruential generator: the same subsets in every run.
    let mut state = 7u64;
    let mut coin = move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 63 == 0
    };
    for file in tiny().iter().map(String::as_str).chain([Q4, Q4, Q4]) {
        let checkpoint = open(file);
        let sites: TapSet = sites(file).into_iter().filter(|_| coin()).collect();
        let run = Run { sites: Some(sites), ..Run::default() };
        let audit = run.on(native(), &checkpoint).audited_with(&checkpoint, &common());
        assert_quiet(&audit, &format!("{file}, about half of the sites"));
    }
}

#[test]
fn a_fault_between_two_captured_stages_is_named_with_the_stages_between() {
    let checkpoint = open(Q4);
    let streams = |stage| matches!(stage, Stage::Embedding | Stage::PostFfnResidual);
    for planted in ["attn_norm", "qkv_bias", "attn_out", "ffn_gate", "ffn_out"] {
        let planted = format!("layers.2.{planted}");
        let run = Run { sites: only(Q4, streams), lengths: vec![9], ..Run::default() };
        let run = run.planting(0, &planted, |_, values| values.iter_mut().for_each(|x| *x *= -1.0));
        let audit = run.on(native(), &checkpoint).audited_with(&checkpoint, &common());
        assert_eq!(faults(&audit), ["layers.2.post_ffn_residual"], "{planted}");
        let span = &audit.stage(site("layers.2.post_ffn_residual")).unwrap().span;
        assert!(span.contains(&site(&planted)), "{span:?}");
        assert!(span.iter().all(|site| site.layer == Some(2)), "{span:?}");
    }
}

#[test]
fn a_bias_on_a_captured_product_is_judged_by_itself_whatever_led_to_the_product() {
    let checkpoint = open(Q4);
    let sites = only(Q4, |stage| matches!(stage, Stage::QkvMatmul | Stage::QkvBias));
    let run = Run { sites, ..Run::default() };
    // Far below what eight bits do to the product.
    let run = run.planting(0, "layers.2.qkv_bias", |_, values| {
        values.iter_mut().for_each(|x| *x *= 1.0 + 1e-5);
    });
    let audit = run.on(native(), &checkpoint).audited_with(&checkpoint, &common());
    assert_eq!(faults(&audit), ["layers.2.qkv_bias"]);
}

#[test]
fn what_could_as_well_be_accumulation_is_not_measured() {
    let checkpoint = open(Q4);
    let run = Run { sites: only(Q4, |stage| stage == Stage::LmHead), ..Run::default() };
    let captured = run.on(native(), &checkpoint);
    let exit_code = |options| captured.audited_with(&checkpoint, &options).verdict.exit_code();
    assert_eq!(exit_code(common()), 0);
    // Each of the weights may be off by half a step: through all layers that explains any logits.
    assert_eq!(exit_code(Options { rounded_weights: true, ..common() }), 3);
}
