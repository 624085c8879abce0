//! A recorded run of the reference backend against what Hugging Face's implementation computed.

use std::path::Path;

use apr_capture::{
    Capture, Dims, Provenance, Recorder, RecorderOptions,
    manifest::{Model as ModelInfo, Plan, Tool},
};
use apr_diff::{Alignment, Options, Outcome, compare};
use apr_format::Checkpoint;
use apr_model::{LogitRows, Model, Phase, StepInput};
use apr_reference::{Arithmetic, Reference};
use apr_testkit::{TINY, fixture, golden};

/// Records `tokens` through the model in `file`, in chunks of these lengths.
fn record(file: &Path, tokens: &[u32], chunks: &[usize], output: &Path) -> Capture {
    let checkpoint = Checkpoint::open(file).unwrap();
    let model = Model::load(Reference::<f64>::new(Arithmetic::EXACT), &checkpoint).unwrap();
    let provenance = Provenance {
        tool: Tool { name: "test".into(), version: "0".into() },
        model: ModelInfo {
            path: file.display().to_string(),
            format: checkpoint.container().to_string(),
            architecture: None,
            index_sha256: None,
            file_sha256: None,
            config: None,
        },
        prompt: None,
        backend: None,
        plan: Some(Plan::from(model.plan())),
        kv: None,
    };
    let options = RecorderOptions::new(model.all_taps());
    let dims = Dims::from(model.config());
    let mut recorder = Recorder::create(output, provenance, dims, options).unwrap();
    let mut cache = model.cache(tokens.len()).unwrap();
    let mut rest = tokens;
    for (chunk, &len) in chunks.iter().enumerate() {
        let (tokens, after) = rest.split_at(len);
        let input = StepInput { tokens, phase: Phase::Prefill, chunk, logits: LogitRows::All };
        model.step(input, &mut cache, &mut recorder).unwrap();
        rest = after;
    }
    assert!(rest.is_empty(), "the chunks are the whole prompt");
    Capture::open(recorder.finish().unwrap()).unwrap()
}

#[test]
fn recordings_match_hugging_face_in_every_stage_whatever_the_container() {
    for name in TINY {
        let dir = tempfile::tempdir().unwrap();
        let reference = Capture::open(golden(&format!("tiny-{name}")).capture).unwrap();
        let steps = reference.steps().iter().map(|step| step.token_ids.clone().unwrap());
        let steps: Vec<Vec<u32>> = steps.collect();
        let chunks: Vec<usize> = steps.iter().map(Vec::len).collect();
        for file in [format!("tiny/{name}"), format!("tiny/{name}/{name}-F16.gguf")] {
            let output = dir.path().join(file.replace('/', "-"));
            let ours = record(&fixture(&file), &steps.concat(), &chunks, &output);
            let found = compare(&ours, &reference, &Options::default()).unwrap();
            assert_eq!(found.outcome, Outcome::Match { bitwise: false }, "{file}");
            assert_eq!(
                (found.alignment, found.stages.len()),
                (Alignment::Positions, ours.sites().len())
            );
            assert!(found.stages.iter().all(|stage| stage.metrics.finite == stage.metrics.count));
        }
    }
}

#[test]
fn chunks_of_a_prompt_are_bit_for_bit_the_whole_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let file = fixture("tiny/qwen2");
    let tokens = [5, 6, 7, 8, 9, 10, 11];
    let whole = record(&file, &tokens, &[7], &dir.path().join("whole"));
    let parts = record(&file, &tokens, &[3, 1, 3], &dir.path().join("parts"));
    let found = compare(&parts, &whole, &Options::default()).unwrap();
    assert_eq!(found.outcome, Outcome::Match { bitwise: true });
}
