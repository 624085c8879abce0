//! `apr trace`: every stage, the same numbers whoever looks, and captures that are whole or refused.

mod common;

use std::{fs, path::Path};

use apr_format::Checkpoint;
use apr_report::number;
use apr_testkit::{TINY, golden};
use common::{Scratch, apr, fixture, ids, numbers};
use serde_json::Value;

/// The sites that a model of `layers` layers has, in the order of computation.
fn sites(model: &str, layers: usize) -> Vec<String> {
    let all = "attn_norm qkv_matmul qkv_bias q_norm k_norm q_post_rope k_post_rope attn_scores \
               attn_softmax attention attn_out post_attn_residual ffn_norm ffn_gate ffn_up \
               ffn_silu ffn_swigl moe_router moe_router_indices moe_router_weights \
               moe_expert_gate moe_expert_up moe_expert_silu moe_expert_swigl moe_expert_out \
               ffn_out post_ffn_residual";
    let has = |stage: &&str| match *stage {
        "qkv_bias" => model == "qwen2",
        "q_norm" | "k_norm" => model.starts_with("qwen3"),
        "ffn_gate" | "ffn_up" | "ffn_silu" | "ffn_swigl" => model != "qwen3-moe",
        stage if stage.starts_with("moe_") => model == "qwen3-moe",
        _ => true,
    };
    let layer = |i| all.split_whitespace().filter(has).map(move |s| format!("layers.{i}.{s}"));
    let mut sites = vec!["embedding".to_owned()];
    sites.extend((0..layers).flat_map(layer));
    sites.extend(["final_norm", "lm_head"].map(str::to_owned));
    sites
}

fn names(entries: &Value, key: &str) -> Vec<String> {
    let entries = entries.as_array().unwrap();
    entries.iter().map(|entry| entry[key].as_str().unwrap().to_owned()).collect()
}

fn manifest(capture: &str) -> Value {
    let text = fs::read_to_string(Path::new(capture).join("manifest.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn every_stage_of_every_architecture_is_shown_and_saved_from_either_container() {
    for name in TINY {
        for file in [format!("tiny/{name}"), format!("tiny/{name}/{name}-F16.gguf")] {
            let scratch = Scratch::new();
            let (model, output) = (fixture(&file), scratch.path("cap"));
            let args = ["trace", &model, "-p", "def f(", "--json", "--decode", "1"];
            let save = ["--save-tensor", "all", "-o", &output];
            let json = apr(args.into_iter().chain(save)).expect(0).json();
            let manifest = manifest(&output);
            let layers = manifest["model"]["config"]["num_hidden_layers"].as_u64().unwrap();
            let expected = sites(name, layers as usize);
            assert_eq!(json["steps"].as_array().unwrap().len(), 2, "{file}");
            for step in 0..2 {
                let shown = &json["steps"][step];
                assert_eq!(names(&shown["stages"], "site"), expected, "{file}");
                assert_eq!(names(&manifest["steps"][step]["tensors"], "name"), expected, "{file}");
                for stage in shown["stages"].as_array().unwrap() {
                    assert_eq!(stage["all_rows"]["nan"], 0);
                    match stage["stage"].as_str() {
                        Some("moe_router_indices") => assert!(stage["all_rows"]["mean"].is_null()),
                        _ => {
                            assert!(
                                stage["all_rows"]["std"].as_f64() > Some(0.0),
                                "{file}: {stage}"
                            );
                        }
                    }
                }
            }
            assert_eq!(manifest["plan"]["fingerprint"], json["plan"], "{file}");
        }
    }
}

#[test]
fn a_traced_run_writes_the_ids_of_an_untraced_one() {
    for name in TINY {
        let (model, scratch) = (fixture(&format!("tiny/{name}")), Scratch::new());
        let prompt = ["-p", "def f(", "--json"];
        let untraced = ["run", &model, "-n", "7", "--ignore-eos"].into_iter().chain(prompt);
        let untraced = apr(untraced).expect(0).json();
        let output = scratch.path("cap");
        let save = ["--save-tensor", "all", "-o", &output];
        let traced = ["trace", &model, "--decode", "6"].into_iter().chain(prompt).chain(save);
        let traced = apr(traced).expect(0).json();
        assert_eq!(numbers(&traced["token_ids"]), numbers(&untraced["token_ids"]), "{name}");
        assert_eq!(traced["plan"], untraced["plan"], "{name}");
    }
}

#[test]
fn json_holds_every_number_of_the_text() {
    let scratch = Scratch::new();
    // NaN and Inf are numbers of the text too.
    let nan = scratch.model_with_nan("model.layers.1.mlp.gate_proj.weight");
    for model in [fixture("tiny/qwen3"), nan] {
        let args = ["trace", &model, "-p", "def f(", "--decode", "1"];
        let text = apr(args).expect(0).stdout;
        let json = apr(args.into_iter().chain(["--json"])).expect(0).json();

        let mut lines = text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "));
        for row in rows(&json) {
            assert!(lines.any(|line| line.ends_with(&row)), "missing or out of order: {row}");
        }
        let header = text.lines().next().unwrap();
        for key in ["model", "architecture", "backend", "isa", "kv"] {
            assert!(header.contains(json[key].as_str().unwrap()), "{key}: {header}");
        }
        assert!(header.contains(&json["plan"].as_str().unwrap()[..12]), "{header}");
        for finding in names_of(&json["findings"]) {
            assert!(text.contains(&finding), "{finding}");
        }
    }
}

/// The ends of the rows of a trace's tables, as its JSON says they should be.
fn rows(json: &Value) -> Vec<String> {
    let shown = |value: &Value| match value {
        Value::Null => "-".to_owned(),
        Value::String(name) => name.clone(),
        value => number(value.as_f64().unwrap()),
    };
    let mut rows = Vec::new();
    for step in json["steps"].as_array().unwrap() {
        for stage in step["stages"].as_array().unwrap() {
            let several = stage["all_rows"]["rows"].as_u64().unwrap() > 1;
            let samples = if several { &["all_rows", "last_row"][..] } else { &["all_rows"] };
            for sample in samples.iter().map(|sample| &stage[*sample]) {
                let mut cells = vec![sample["count"].to_string()];
                cells.extend(["min", "max", "mean", "std"].map(|key| shown(&sample[key])));
                cells.extend(["nan", "inf", "zeros"].map(|key| sample[key].to_string()));
                rows.push(cells.join(" "));
            }
        }
        for candidate in step["top"].as_array().unwrap() {
            let probability = match candidate["probability"].as_f64() {
                Some(probability) => format!("{probability:.4}"),
                None => shown(&candidate["probability"]),
            };
            rows.push(format!("{} {} {probability}", candidate["id"], shown(&candidate["logit"])));
        }
    }
    rows
}

fn names_of(values: &Value) -> Vec<String> {
    values.as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_owned()).collect()
}

#[test]
fn statistics_name_their_sample_and_do_not_depend_on_chunks() {
    let model = fixture("tiny/qwen2");
    let args = ["trace", &model, "--tokens", "5,6,7,8", "--layers", "last"];
    let text = apr(args).expect(0).stdout;
    assert!(text.contains("prompt: 4 tokens (tokens): 5:"), "{text}");
    assert!(text.contains("step 0: prefill, 4 rows at positions 0..4"), "{text}");
    assert!(text.contains("layer 1") && !text.contains("layer 0"), "{text}");
    assert!(text.contains("4 rows") && text.contains("last row"), "{text}");

    let last_row = |more: &[&str]| {
        let json = apr(args.into_iter().chain(["--json"]).chain(more.iter().copied()));
        let json = json.expect(0).json();
        let step = json["steps"].as_array().unwrap().last().unwrap().clone();
        let stages = step["stages"].as_array().unwrap();
        let rows: Vec<Value> = stages.iter().map(|stage| stage["last_row"].clone()).collect();
        (rows, step["top"].clone())
    };
    assert_eq!(last_row(&["--chunk", "3"]), last_row(&[]));
}

#[test]
fn a_capture_is_bit_for_bit_itself_and_that_of_other_chunks_threads_and_instruction_sets() {
    let scratch = Scratch::new();
    for name in TINY {
        let (model, prompt) = (fixture(&format!("tiny/{name}")), "5,6,7,8,9,10,11");
        let capture = |of: &str, more: &[&str]| {
            let options = ["--tokens", prompt].into_iter().chain(more.iter().copied());
            scratch.capture(&format!("{name}-{of}"), &model, &options.collect::<Vec<_>>())
        };
        let whole = capture("whole", &[]);
        let others = [
            capture("chunked", &["--chunk", "3"]),
            capture("alone", &["--threads", "1", "--isa", "scalar", "--chunk", "1"]),
            whole.clone(),
        ];
        for other in others {
            let done = apr(["diff", &other, &whole]).expect(0);
            assert!(done.stdout.contains("MATCH: equal bit for bit"), "{other}: {}", done.stdout);
        }
    }
}

#[test]
fn decoding_computes_the_bits_of_reading_the_same_tokens() {
    let scratch = Scratch::new();
    for name in TINY {
        let (model, prompt) = (fixture(&format!("tiny/{name}")), vec![5, 6, 7]);
        let output = scratch.path(&format!("{name}-decoded"));
        let args = ["trace", &model, "--tokens", &ids(&prompt), "--decode", "4", "--json"];
        let save = ["--save-tensor", "all", "-o", &output];
        let json = apr(args.into_iter().chain(save)).expect(0).json();
        let tokens = [prompt, numbers(&json["token_ids"])[..4].to_vec()].concat();
        let read = scratch.capture(&format!("{name}-read"), &model, &["--tokens", &ids(&tokens)]);
        let done = apr(["diff", &output, &read, "--json"]).expect(0).json();
        assert_eq!(done["outcome"]["bitwise"], true, "{name}");
        assert_eq!(done["stages"][0]["rows"].as_array().unwrap().len(), 7, "{name}");
        assert_eq!(done["alignment"], "positions", "{name}");
    }
}

/// The model of a directory as an `.apr` file, every tensor stored as it is.
fn as_apr(scratch: &Scratch, model: &str) -> String {
    let checkpoint = Checkpoint::open(model).unwrap();
    let config = apr_model::read_config(&checkpoint).unwrap();
    let mut writer = apr_format::apr::Writer::new();
    writer.set("architecture", config.architecture.name());
    for (key, value) in [
        ("hidden_size", config.hidden_size),
        ("num_layers", config.num_hidden_layers),
        ("num_heads", config.num_attention_heads),
        ("num_kv_heads", config.num_key_value_heads),
        ("head_dim", config.head_dim),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
        ("max_position_embeddings", config.max_position_embeddings),
    ] {
        writer.set(key, value as u64);
    }
    writer.set("rms_norm_eps", config.rms_norm_eps).set("rope_theta", config.rope_theta);
    for (name, tensor) in checkpoint.tensors() {
        writer.tensor(name, tensor.dtype(), tensor.shape().clone()).unwrap();
    }
    let mut body = writer.begin(Vec::new()).unwrap();
    while let Some((name, _)) = body.next_tensor() {
        let name = name.to_owned();
        body.tensor(&name, checkpoint.require(&name).unwrap().bytes()).unwrap();
    }
    scratch.write("model.apr", body.finish().unwrap())
}

#[test]
fn the_container_decides_nothing() {
    for name in ["qwen2", "qwen3", "llama"] {
        let scratch = Scratch::new();
        let directory = fixture(&format!("tiny/{name}"));
        let gguf = fixture(&format!("tiny/{name}/{name}-F16.gguf"));
        let apr_file = as_apr(&scratch, &directory);
        let of = |model: &str| {
            let args = ["trace", model, "--tokens", "5,6,7", "--decode", "2", "--json"];
            apr(args).expect(0).json()
        };
        let expected = of(&directory);
        for model in [&gguf, &apr_file] {
            let found = of(model);
            assert_eq!(found["token_ids"], expected["token_ids"], "{model}");
            assert_eq!(found["architecture"], expected["architecture"], "{model}");
            assert_eq!(found["steps"][0]["stages"], expected["steps"][0]["stages"], "{model}");
        }
    }
}

#[test]
fn rows_and_stages_select_what_is_saved() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let tensors = |name: &str, stages: &str, more: &[&str], size: &str| {
        let output = scratch.path(name);
        let args = ["trace", &model, "--tokens", "5,6,7,8,9", "--save-tensor", stages];
        let done = apr(args.into_iter().chain(["-o", &output]).chain(more.iter().copied()));
        let done = done.expect(0);
        assert_eq!(done.stdout, output.clone() + "\n");
        assert!(done.stderr.ends_with(&format!(": {size}\n")), "{}", done.stderr);
        let manifest = manifest(&output);
        let steps = manifest["steps"].as_array().unwrap().clone();
        steps.iter().flat_map(|s| s["tensors"].as_array().unwrap().clone()).collect::<Vec<_>>()
    };
    let one =
        tensors("one", "layer_output,logits", &["--layers", "last", "--rows", "1..3"], "3.0 KiB");
    assert_eq!(names(&Value::from(one.clone()), "name"), ["layers.1.post_ffn_residual", "lm_head"]);
    assert_eq!(one[0]["positions"], serde_json::json!([1, 2]));
    let last = tensors("last", "attn_norm,lm_head", &["--rows", "last", "--chunk", "2"], "2.8 KiB");
    let positions: Vec<_> = last.iter().map(|t| t["positions"].to_string()).collect();
    // Of each chunk, but logits after the prompt only.
    assert_eq!(positions, ["[1]", "[1]", "[3]", "[3]", "[4]", "[4]", "[4]"]);
}

#[test]
fn a_trace_that_saves_the_last_rows_of_chunks_still_shows_every_step() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let output = scratch.path("cap");
    let args = ["trace", &model, "--tokens", "5,6,7,8,9", "--chunk", "2", "--json"];
    let save = ["--save-tensor", "attn_norm", "--rows", "last", "-o", &output];
    let json = apr(args.into_iter().chain(save)).expect(0).json();
    let steps = json["steps"].as_array().unwrap();
    let top: Vec<usize> = steps.iter().map(|s| s["top"].as_array().unwrap().len()).collect();
    assert_eq!(top, [0, 0, 5]);
}

#[test]
fn a_changed_byte_is_refused() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let capture = scratch.capture("cap", &model, &["--tokens", "5,6"]);
    let damaged = scratch.copy(&capture, "damaged");
    let path = Path::new(&damaged).join("step-0000.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let done = apr(["diff", &damaged, &capture]).expect(2);
    assert!(done.stderr.contains("were changed after they were written"), "{}", done.stderr);
    assert!(done.stderr.contains("damaged/step-0000.safetensors"), "{}", done.stderr);
}

#[test]
fn an_interrupted_capture_is_refused_and_its_whole_steps_can_be_asked_for() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let capture = scratch.capture("cap", &model, &["--tokens", "5,6,7,8", "--chunk", "2"]);
    let partial = scratch.copy(&capture, "cap.partial-1");
    // What a writer that is killed in its second step has left.
    let mut manifest = manifest(&partial);
    let first = manifest["steps"][0].clone();
    manifest["steps"] = Value::Array(Vec::new());
    manifest["complete"] = false.into();
    fs::write(Path::new(&partial).join("manifest.json"), manifest.to_string()).unwrap();
    fs::write(Path::new(&partial).join("steps.jsonl"), format!("{first}\n")).unwrap();
    let done = apr(["diff", &partial, &capture]).expect(2);
    assert!(done.stderr.contains("incomplete") && done.stderr.contains("--allow-partial"));
    let read = apr(["diff", &partial, &capture, "--allow-partial", "--json"]).expect(0).json();
    assert_eq!(read["stages"][0]["rows"].as_array().unwrap().len(), 2);
    assert_eq!((&read["a"]["complete"], &read["b"]["complete"]), (&false.into(), &true.into()));
    let text = apr(["diff", &partial, &capture, "--allow-partial"]).expect(0).stdout;
    assert!(text.contains("note: A is incomplete") && text.contains("only in B"), "{text}");
}

#[test]
fn force_replaces_a_capture_and_nothing_is_left_of_the_old_one() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let capture = scratch.capture("cap", &model, &["--tokens", "5,6,7,8", "--chunk", "2"]);
    assert!(Path::new(&capture).join("step-0001.safetensors").exists());
    assert_eq!(scratch.capture("cap", &model, &["--tokens", "9", "--force"]), capture);
    assert!(!Path::new(&capture).join("step-0001.safetensors").exists());
    assert_eq!(manifest(&capture)["steps"][0]["token_ids"], serde_json::json!([9]));
    assert_eq!(fs::read_dir(scratch.path("")).unwrap().count(), 1);
}

#[test]
fn statistics_can_be_of_other_stages_than_what_is_saved() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let output = scratch.path("cap");
    let args = ["trace", &model, "--tokens", "5,6", "--stages", "ffn_out,attn_out", "--json"];
    let save = ["--save-tensor", "lm_head", "-o", &output];
    let json = apr(args.into_iter().chain(save)).expect(0).json();
    let expected =
        ["layers.0.attn_out", "layers.0.ffn_out", "layers.1.attn_out", "layers.1.ffn_out"];
    assert_eq!(names(&json["steps"][0]["stages"], "site"), expected);
    assert_eq!(names(&manifest(&output)["steps"][0]["tensors"], "name"), ["lm_head"]);
}

#[test]
fn a_step_says_which_tokens_it_reads() {
    let model = fixture("tiny/qwen2");
    let args = ["trace", &model, "--tokens", "5,6,7", "--decode", "2", "--layers", "0"];
    let json = apr(args.into_iter().chain(["--json"])).expect(0).json();
    let text = apr(args).expect(0).stdout;
    let steps = json["steps"].as_array().unwrap();
    assert_eq!(numbers(&steps[0]["token_ids"]), [5, 6, 7]);
    for (i, step) in steps.iter().enumerate().skip(1) {
        let id = &json["token_ids"][i - 1];
        assert_eq!(step["token_ids"][0], *id);
        let line = format!("step {i}: decode, 1 row at position {}, token {id} \"", i + 2);
        assert!(text.contains(&line), "no {line:?} in {text}");
    }
}

#[test]
fn a_token_that_is_part_of_a_character_is_shown_as_its_bytes() {
    let model = fixture("tiny/qwen2");
    let json = apr(["trace", &model, "-p", "\u{20AC}", "--layers", "0", "--json"]).expect(0).json();
    let tokens = names_of(&json["prompt_tokens"]);
    assert_eq!(tokens, ["<0xE2>", "<0x82>", "<0xAC>"]);
    let text = apr(["trace", &model, "-p", "\u{20AC}", "--layers", "0"]).expect(0).stdout;
    assert!(text.contains("\"<0xE2>\"") && !text.contains('\u{FFFD}'), "{text}");
}

#[test]
fn decode_steps_beyond_the_context_are_not_silently_left_out() {
    let model = fixture("tiny/qwen2");
    let prompt = vec!["5"; 510].join(",");
    for decode in ["9", "18446744073709551615"] {
        let args = ["trace", &model, "--tokens", &prompt, "--decode", decode, "--layers", "0"];
        let json = apr(args.into_iter().chain(["--json"])).expect(0).json();
        assert_eq!(json["steps"].as_array().unwrap().len(), 3);
        let notes = names_of(&json["notes"]);
        assert!(notes[0].contains("the context of 512 is full"), "{notes:?}");
        assert_eq!(json["findings"].as_array().unwrap().len(), 0, "it is nothing wrong");
        let text = apr(args).expect(0);
        assert!(text.stdout.contains(&format!("\nNotes\n  {}", notes[0])), "{}", text.stdout);
        assert!(text.stderr.contains(&format!("note: {}", notes[0])), "{}", text.stderr);
    }
}

#[test]
fn the_prompt_of_a_trace_is_that_of_a_run() {
    let golden = golden("tiny-llama");
    let model = fixture("tiny/llama");
    for options in [&["-p", golden.prompt.as_str()][..], &["-p", "x", "--chat"]] {
        let ids = |command: &str| {
            let args =
                [command, model.as_str(), "--json"].into_iter().chain(options.iter().copied());
            numbers(&apr(args).expect(0).json()["prompt_token_ids"])
        };
        assert_eq!(ids("trace"), ids("run"));
    }
}
