//! The decode loop: when it ends, what it shows, and that how the prompt is cut does not matter.

use std::ops::ControlFlow;

use apr_model::{
    Both, Error, Finish, GenerateOptions, Generated, LogitRows, Model, Observer, Sampler,
    SamplerOptions, Site, Stage, Unobserved, generate,
};
use apr_reference::{Arithmetic, Reference};
use apr_testkit::{Collect, Draft, fixture, invariants};

type Exact = Reference<f64>;

fn model() -> Model<Exact> {
    invariants::load(Reference::new(Arithmetic::EXACT), "tiny/qwen2")
}

/// Continues six tokens greedily in a cache of `capacity`, for as long as `more` says.
fn run(
    model: &Model<Exact>,
    capacity: usize,
    options: &GenerateOptions,
    observer: &mut dyn Observer,
    mut more: impl FnMut(usize) -> bool,
) -> Result<Generated, Error> {
    let mut seen = 0;
    generate(
        model,
        &mut model.cache(capacity)?,
        &invariants::tokens(6),
        options,
        &mut Sampler::new(SamplerOptions::default()),
        observer,
        &mut |_| {
            seen += 1;
            if more(seen) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        },
    )
}

fn options(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_tokens, ..GenerateOptions::default() }
}

#[test]
fn generation_ends_for_a_stated_reason() {
    let model = model();
    let all = run(&model, 64, &options(9), &mut Unobserved, |_| true).unwrap();
    assert_eq!((all.token_ids.len(), all.finish), (9, Finish::Length));

    let stop = GenerateOptions { stop: vec![all.token_ids[2]], ..options(9) };
    let stopped = run(&model, 64, &stop, &mut Unobserved, |_| true).unwrap();
    let first = all.token_ids.iter().position(|&id| id == all.token_ids[2]).unwrap();
    assert_eq!(stopped.token_ids, all.token_ids[..first]);
    assert_eq!(stopped.finish, Finish::Stop(all.token_ids[2]));

    let full = run(&model, 8, &options(9), &mut Unobserved, |_| true).unwrap();
    // Two more positions fit, and the token after the last of them is known too.
    assert_eq!((full.token_ids.len(), full.finish), (3, Finish::Context));
    assert_eq!(full.token_ids, all.token_ids[..3]);

    let interrupted = run(&model, 64, &options(9), &mut Unobserved, |seen| seen < 4).unwrap();
    assert_eq!((interrupted.token_ids.len(), interrupted.finish), (4, Finish::Interrupted));

    let nothing = run(&model, 64, &options(0), &mut Unobserved, |_| true).unwrap();
    assert_eq!((nothing.token_ids.len(), nothing.finish), (0, Finish::Length));

    let long = run(&model, 5, &options(1), &mut Unobserved, |_| true);
    assert!(matches!(long, Err(Error::ContextFull { needed: 6, capacity: 5 })));
}

#[test]
fn the_text_does_not_depend_on_chunks_or_on_which_prompt_rows_get_logits() {
    let model = model();
    let expected = run(&model, 64, &options(12), &mut Unobserved, |_| true).unwrap().token_ids;
    for chunk in [1, 2, 5, 6, 100] {
        for prompt_logits in [LogitRows::None, LogitRows::Last, LogitRows::All] {
            let options = GenerateOptions { chunk, prompt_logits, ..options(12) };
            let found = run(&model, 64, &options, &mut Unobserved, |_| true).unwrap();
            assert_eq!(found.token_ids, expected, "chunks of {chunk}, {prompt_logits:?}");
        }
    }
}

#[test]
fn every_step_is_shown_with_its_positions() {
    let model = model();
    let site = Site::layer(0, Stage::AttnNorm);
    let mut seen = Collect::new([site].into_iter().collect());
    let options = GenerateOptions { chunk: 4, ..options(3) };
    run(&model, 64, &options, &mut seen, |_| true).unwrap();
    let positions: Vec<_> = seen.shown.values().map(|shown| shown.positions.clone()).collect();
    assert_eq!(positions, [0..3, 3..6, 6..7, 7..8]);
}

#[test]
fn two_observers_each_see_what_they_want() {
    let model = model();
    let norm = Site::layer(0, Stage::AttnNorm);
    let head = Site::whole(Stage::LmHead);
    let mut one = Collect::new([norm].into_iter().collect());
    let mut two = Collect::new([norm, head].into_iter().collect());
    run(&model, 64, &options(1), &mut Both::new(&mut one, &mut two), |_| true).unwrap();
    assert_eq!(one.order, [norm]);
    assert_eq!(two.order, [norm, head]);
    assert_eq!(one.get(0, norm), two.get(0, norm));
}

#[test]
fn a_weight_that_is_no_number_ends_generation_with_an_error_and_not_with_text() {
    let checkpoint = apr_format::Checkpoint::open(fixture("tiny/qwen2")).unwrap();
    let mut draft = Draft::f16_gguf(
        &checkpoint,
        &apr_format::Checkpoint::open(fixture("tiny/qwen2/qwen2-F16.gguf")).unwrap(),
    );
    let norm = draft.tensor("blk.1.ffn_norm.weight");
    let mut bytes = norm.bytes().to_vec();
    bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    *norm = apr_tensor::Stored::new(norm.dtype(), norm.shape().clone(), bytes.into()).unwrap();
    let model = Model::load(Exact::new(Arithmetic::EXACT), &draft.gguf()).unwrap();
    let error = run(&model, 64, &options(4), &mut Unobserved, |_| true).unwrap_err();
    assert!(matches!(error, Error::LogitsNotFinite { .. }), "{error}");
    assert!(error.to_string().contains("apr trace"), "{error}");
}
