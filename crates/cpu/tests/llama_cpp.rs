//! The text that llama.cpp writes from the same files.

#![allow(
    clippy::print_stdout,
    reason = "the distances measured, for those who ask with --nocapture"
)]

use apr_cpu::{Cpu, CpuOptions};
use apr_format::Checkpoint;
use apr_model::{Backend, LogitRows, Model, Phase, StepInput, Unobserved, top_k};
use apr_reference::{Arithmetic, Reference};
use apr_testkit::{Draft, fixture};
use serde_json::Value;

/// What llama.cpp said of one file: `fixtures/llama_greedy.py` wrote it.
struct Run {
    name: String,
    flash_attention: String,
    tokens: Vec<u32>,
}

fn runs() -> (Vec<u32>, Vec<Run>) {
    let path = fixture("pycoder-3m/llama_cpp_greedy.json");
    let json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let number = |value: &Value| value.as_u64().expect("ids are numbers") as u32;
    let run = |run: &Value| Run {
        name: run["model"].as_str().unwrap().to_owned(),
        flash_attention: run["flash_attention"].to_string(),
        tokens: run["steps"].as_array().unwrap().iter().map(|s| number(&s["token"])).collect(),
    };
    let prompt = json["prompt_ids"].as_array().unwrap().iter().map(number).collect();
    (prompt, json["runs"].as_array().unwrap().iter().map(run).collect())
}

fn checkpoint(name: &str) -> Checkpoint {
    let open = |file: &str| Checkpoint::open(fixture("pycoder-3m").join(file)).unwrap();
    match name {
        "pycoder-3m-F16.gguf" => Draft::f16_gguf(&open(""), &open("pycoder-3m-Q8_0.gguf")).gguf(),
        name => open(name),
    }
}

/// The logits after each of `tokens`, given `prompt`.
fn logits<B: Backend>(model: &Model<B>, prompt: &[u32], tokens: &[u32]) -> Vec<Vec<f32>> {
    let all: Vec<u32> = prompt.iter().chain(tokens).copied().collect();
    let input = StepInput {
        tokens: &all[..all.len() - 1],
        phase: Phase::Prefill,
        chunk: 0,
        logits: LogitRows::All,
    };
    let mut cache = model.cache(all.len()).unwrap();
    let logits = model.step(input, &mut cache, &mut Unobserved).unwrap();
    logits.rows().skip(prompt.len() - 1).map(<[f32]>::to_vec).collect()
}

#[test]
fn greedy_tokens_are_llama_cpps_up_to_ties_of_the_arithmetic() {
    let (prompt, runs) = runs();
    assert!(runs.iter().any(|run| run.name.contains("Q4_K_M")), "the record is complete");
    for Run { name, flash_attention, tokens } in runs {
        let checkpoint = checkpoint(&name);
        let cpu = Model::load(Cpu::new(CpuOptions::default()).unwrap(), &checkpoint).unwrap();
        let ours = logits(&cpu, &prompt, &tokens);
        assert!(tokens.len() == 32 && ours.len() == tokens.len());
        let mut exact = None;
        for (step, (ours, &theirs)) in ours.iter().zip(&tokens).enumerate() {
            let mine = top_k(ours, 1)[0];
            if mine == theirs {
                continue;
            }
            // A tie: rounding activations moves the two logits by more than what separates them.
            let exact = exact.get_or_insert_with(|| {
                let reference = Reference::<f64>::new(Arithmetic::EXACT);
                logits(&Model::load(reference, &checkpoint).unwrap(), &prompt, &tokens)
            });
            let moved = |id: u32| (ours[id as usize] - exact[step][id as usize]).abs();
            let margin = ours[mine as usize] - ours[theirs as usize];
            assert!(
                margin <= moved(mine) + moved(theirs),
                "{name}, flash attention {flash_attention}: token {step} is {mine}, llama.cpp's {theirs}, \
                 and a margin of {margin} is no tie"
            );
            println!(
                "{name}, flash attention {flash_attention}: token {step} is a tie ({margin:e})"
            );
        }
    }
}
