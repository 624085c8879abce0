//! The reference backend against Hugging Face's implementation: every stage of every layer, and the text.

#![allow(
    clippy::print_stdout,
    reason = "the distances measured, for those who ask with --nocapture"
)]

use std::ops::ControlFlow;

use apr_capture::Capture;
use apr_format::Checkpoint;
use apr_model::{
    GenerateOptions, LogitRows, Model, Phase, Sampler, SamplerOptions, StepInput, Unobserved,
    generate,
};
use apr_reference::{Arithmetic, Reference};
use apr_testkit::{Collect, TINY, fixture, golden, relative_l2};

/// What Hugging Face's float32 may differ from exact arithmetic by: the sums of a few layers, of some hundred products
/// each, keep about seven digits less two; rotary angles in f32 cost as much again.
const FLOAT32: f64 = 1e-5;

/// Every model file and the golden record made from the same stored weights.
fn models() -> Vec<(String, String)> {
    let mut models = Vec::new();
    for name in TINY {
        models.push((format!("tiny/{name}"), format!("tiny-{name}")));
        models.push((format!("tiny/{name}/{name}-F16.gguf"), format!("tiny-{name}")));
    }
    for (file, record) in [
        ("pycoder-3m", "pycoder-3m"),
        ("pycoder-3m/pycoder-3m-Q4_K_M.gguf", "pycoder-3m-Q4_K_M"),
        ("pycoder-3m/pycoder-3m-Q8_0.gguf", "pycoder-3m-Q8_0"),
    ] {
        models.push((file.to_owned(), record.to_owned()));
    }
    models
}

fn load(file: &str) -> Model<Reference<f64>> {
    let checkpoint = Checkpoint::open(fixture(file)).unwrap();
    Model::load(Reference::new(Arithmetic::EXACT), &checkpoint).unwrap()
}

#[test]
fn every_stage_agrees_with_the_golden_capture() {
    for (file, record) in models() {
        let model = load(&file);
        let capture = Capture::open(golden(&record).capture).unwrap();
        let mut cache = model.cache(64).unwrap();
        let mut seen = Collect::new(model.all_taps());
        let mut worst = (0.0, String::new());
        for (index, step) in capture.steps().iter().enumerate() {
            let input = StepInput {
                tokens: step.token_ids.as_ref().unwrap(),
                phase: Phase::Prefill,
                chunk: 0,
                logits: LogitRows::All,
            };
            model.step(input, &mut cache, &mut seen).unwrap();
            for &site in model.plan().sites() {
                let info = capture.info(index, site);
                let info = info.unwrap_or_else(|| panic!("{record} has no {site}"));
                let rows = info.positions().unwrap();
                let ours = seen.get(index, site).at(site.stage.axes().row_axis(), rows);
                let theirs = capture.tensor(index, site).unwrap();
                assert_eq!(ours.shape, info.shape(), "{file} {site}");
                let distance = relative_l2(&ours.values, &theirs.to_f64());
                assert!(distance <= FLOAT32, "{file}: {site} of step {index} is {distance:e} off");
                if distance > worst.0 {
                    worst = (distance, site.to_string());
                }
            }
        }
        println!(
            "{file}: {} sites, at most {:.1e} ({})",
            model.plan().sites().len(),
            worst.0,
            worst.1
        );
    }
}

#[test]
fn greedy_text_agrees_with_hugging_face() {
    for (file, record) in models() {
        let model = load(&file);
        let golden = golden(&record);
        let mut cache = model.cache(golden.prompt_ids.len() + golden.greedy_ids.len()).unwrap();
        let options =
            GenerateOptions { max_tokens: golden.greedy_ids.len(), ..GenerateOptions::default() };
        let generated = generate(
            &model,
            &mut cache,
            &golden.prompt_ids,
            &options,
            &mut Sampler::new(SamplerOptions::default()),
            &mut Unobserved,
            &mut |_| ControlFlow::Continue(()),
        );
        assert_eq!(generated.unwrap().token_ids, golden.greedy_ids, "{file}");
    }
}
