//! What cannot be done ends with exit code 2 and one line that names the culprit and says what to do.

mod common;

use std::{fs, path::Path};

use common::{Scratch, apr, apr_reading, fixture};

/// Runs `apr`, which has to refuse with these words.
#[track_caller]
fn refused<'a>(args: impl IntoIterator<Item = &'a str>, words: &[&str]) {
    let args: Vec<&str> = args.into_iter().collect();
    let done = apr_reading("", args.iter().copied());
    let stderr = &done.stderr;
    assert_eq!(done.code, 2, "{args:?}: {stderr}");
    assert_eq!(done.stdout, "", "{args:?}");
    assert!(stderr.starts_with("error: "), "{args:?}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{args:?} does not say {word:?}: {stderr}");
    }
    // What clap says of misused options comes with the usage; all else is one line.
    let ours = !stderr.contains("For more information, try '--help'");
    assert!(!ours || stderr.lines().count() == 1, "{args:?}: {stderr}");
    for leak in ["panicked", "RUST_BACKTRACE", "Some(", "Err(", "Os {"] {
        assert!(!stderr.contains(leak), "{args:?} leaks {leak}: {stderr}");
    }
}

#[test]
fn what_is_no_model_is_refused_by_every_command() {
    let scratch = Scratch::new();
    let gguf = fs::read(fixture("tiny/qwen2/qwen2-F16.gguf")).unwrap();
    let no_config = scratch.copy(&fixture("tiny/qwen2"), "no-config");
    fs::remove_file(format!("{no_config}/config.json")).unwrap();
    fs::create_dir(scratch.path("empty-directory")).unwrap();
    let cases = [
        (scratch.path("missing.gguf"), "os error 2"),
        (scratch.path("empty-directory"), "config.json"),
        (scratch.write("empty.gguf", ""), "expected a GGUF, safetensors or .apr file"),
        (scratch.write("text.gguf", "this is no model"), "expected a GGUF, safetensors or .apr"),
        (scratch.write("cut-3.gguf", &gguf[..3]), "expected"),
        (scratch.write("cut-10.gguf", &gguf[..10]), "offset"),
        (scratch.write("cut-header.gguf", &gguf[..5000]), "expected"),
        (scratch.write("cut-data.gguf", &gguf[..gguf.len() / 2]), "tensor `"),
        (scratch.write("cut-last-byte.gguf", &gguf[..gguf.len() - 1]), "tensor `"),
    ];
    for (path, word) in &cases {
        let name = Path::new(path).file_name().unwrap().to_str().unwrap();
        refused(["run", path, "-p", "x"], &[name, word]);
        refused(["trace", path, "-p", "x"], &[name, word]);
        refused(["bench", path], &[name, word]);
        refused(["inspect", path], &[name, word]);
    }
    refused(["run", &no_config, "-p", "x"], &["config.json"]);
}

#[test]
fn a_model_of_another_architecture_is_refused_by_name_and_can_be_inspected() {
    let scratch = Scratch::new();
    let mut gguf = fs::read(fixture("tiny/qwen2/qwen2-F16.gguf")).unwrap();
    let key = b"general.architecture";
    let at = gguf.windows(key.len()).position(|window| window == key).unwrap();
    // After the key: the type and the length of the value.
    let value = at + key.len() + 4 + 8;
    assert_eq!(&gguf[value..value + 5], b"qwen2");
    gguf[value..value + 5].copy_from_slice(b"mamba");
    let model = scratch.write("mamba.gguf", gguf);
    for command in ["run", "trace"] {
        let words = ["mamba.gguf", "architecture `mamba`", "supported: ", "apr inspect"];
        refused([command, &model, "--tokens", "1"], &words);
    }
    assert!(apr(["inspect", &model]).expect(0).stdout.contains("no: "));
}

#[test]
fn inspect_says_that_a_model_runs_only_if_run_does() {
    let scratch = Scratch::new();
    let changed = |name: &str, file: &str, from: &str, to: &str| {
        assert_eq!(from.len(), to.len(), "offsets stay as they are");
        let model = scratch.copy(&fixture("tiny/qwen2"), name);
        let path = Path::new(&model).join(file);
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(&path, bytes).unwrap();
        model
    };
    let norm = "model.layers.1.input_layernorm.weight";
    let unknown = "model.layers.1.input_layernorm.wright";
    let models = [
        changed("tensor", "model.safetensors", norm, unknown),
        changed("heads", "config.json", "\"num_attention_heads\": 4", "\"num_attention_heads\": 2"),
        changed("layers", "config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"),
    ];
    for model in &models {
        let why = apr(["inspect", model, "--json"]).expect(0).json()["not_runnable"].clone();
        let why = why.as_str().unwrap_or_else(|| panic!("{model} is said to run"));
        refused(["run", model, "--tokens", "1"], &[why]);
        assert!(apr(["inspect", model]).expect(0).stdout.contains(&format!("no: {why}")), "{why}");
    }

    let sound = apr(["inspect", &fixture("tiny/qwen2"), "--json"]).expect(0).json();
    assert!(sound["not_runnable"].is_null());
}

#[test]
fn the_config_shown_is_the_resolved_one_and_the_same_from_either_container() {
    let of = |file: &str| apr(["inspect", &fixture(file), "--json"]).expect(0).json();
    let (directory, gguf) = (of("tiny/qwen2"), of("tiny/qwen2/qwen2-F16.gguf"));
    let config = &directory["config"];
    assert_eq!(config["model_type"], "qwen2");
    assert_eq!(config["attention_bias"], true, "of the architecture, not of the file");
    for key in ["head_dim", "rms_norm_eps", "rope_theta"] {
        assert!(config[key].as_f64().unwrap() > 0.0, "{key}");
        // GGUF keeps constants as f32.
        let shown = |config: &serde_json::Value| config[key].as_f64().unwrap() as f32;
        assert_eq!(shown(config), shown(&gguf["config"]), "{key}");
    }
    let text = apr(["inspect", &fixture("tiny/qwen2")]).expect(0).stdout;
    for (key, value) in config.as_object().unwrap() {
        assert!(text.contains(&format!("\n{key} = {value}\n")), "{key}");
    }
}

#[test]
fn prompts_that_make_no_sense_are_refused() {
    let scratch = Scratch::new();
    let model = fixture("tiny/qwen2");
    let bare = scratch.copy(&model, "bare");
    fs::remove_file(format!("{bare}/tokenizer.json")).unwrap();
    let plain = scratch.copy(&model, "plain");
    let config = format!("{plain}/tokenizer_config.json");
    let json = fs::read_to_string(&config).unwrap().replace("\"chat_template\"", "\"no_template\"");
    fs::write(&config, json).unwrap();
    let long = vec!["5"; 513].join(",");

    let cases: &[(&str, &[&str], &[&str])] = &[
        (&model, &[], &["--prompt", "--tokens"]),
        (&model, &["-p", ""], &["the prompt is empty"]),
        (&model, &["-p", "-"], &["the prompt is empty"]),
        (&model, &["-p", "x", "--tokens", "1"], &["cannot be used with"]),
        (&model, &["--tokens", "1", "--chat"], &["cannot be used with"]),
        (&model, &["-p", "x", "--system", "y"], &["--chat"]),
        (&model, &["--tokens", "1,x"], &["`x` is no token id"]),
        (&model, &["--tokens", "1,-2"], &["`-2` is no token id"]),
        (&model, &["--tokens", ""], &["is no token id"]),
        (&model, &["--tokens", "1,320"], &["token id 320", "vocabulary of 320"]),
        (&model, &["--tokens", &long], &["513 tokens", "context holds 512"]),
        (&bare, &["-p", "x"], &["tokenizer.json", "--tokens"]),
        (&plain, &["-p", "x", "--chat"], &["no chat template", "--chat"]),
    ];
    for (model, prompt, words) in cases {
        for command in ["run", "trace"] {
            refused([command, model].into_iter().chain(prompt.iter().copied()), words);
        }
    }
}

/// Options that save to where nothing is ever written, because the others are refused.
const SAVE: [&str; 4] = ["--save-tensor", "all", "-o", "never-written"];

#[test]
fn options_out_of_range_or_in_conflict_are_refused() {
    let model = fixture("tiny/qwen2");
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("run", &["--temperature", "-1"], &["--temperature", "0 or more"]),
        ("run", &["--temperature", "nan"], &["--temperature", "0 or more"]),
        ("run", &["--temperature", "1", "--top-p", "0"], &["--top-p", "up to 1"]),
        ("run", &["--temperature", "1", "--top-p", "1.1"], &["--top-p", "up to 1"]),
        ("run", &["--top-k", "4"], &["--temperature"]),
        ("run", &["--logprobs", "4"], &["--json"]),
        ("run", &["-n", "many"], &["--max-tokens"]),
        ("run", &["--chunk", "0"], &["--chunk", "1 or more"]),
        ("run", &["--threads", "0"], &["--threads", "1 or more"]),
        ("run", &["--isa", "sse9"], &["--isa"]),
        ("run", &["--backend", "gpu"], &["--backend", "reference"]),
        ("run", &["--backend", "reference", "--threads", "2"], &["--threads", "cpu"]),
        ("run", &["--precision", "f32"], &["--precision", "reference"]),
        ("run", &["--kv", "f64"], &["f16 or f32"]),
        ("run", &["--activations", "llama-cpp"], &["--backend reference"]),
        ("trace", &["--layers", "2"], &["layer 2", "0 to 1"]),
        ("trace", &["--layers", "0..3"], &["layer 3", "0 to 1"]),
        ("trace", &["--layers", "1..1"], &["empty"]),
        ("trace", &["--layers", "x"], &["`x` is no layer"]),
        ("trace", &["--layers", "0,4294967295"], &["layer 4294967295", "0 to 1"]),
        ("trace", &["--stages", "q_norm"], &["no stage `q_norm`", "it has: embedding"]),
        ("trace", &["--save-tensor", "all"], &["--output"]),
        ("trace", &["--output", "x"], &["--save-tensor"]),
        ("trace", &["--rows", "last"], &["--save-tensor"]),
        ("trace", &[&SAVE[..], &["--f64"]].concat(), &["--f64", "cpu backend computes in f32"]),
        (
            "trace",
            &[&SAVE[..], &["--f64", "--backend", "reference", "--precision", "f32"]].concat(),
            &["--f64", "--precision f32"],
        ),
    ];
    for (command, options, words) in cases {
        let args = [*command, &model, "--tokens", "1,2"];
        refused(args.into_iter().chain(options.iter().copied()), words);
    }
}

#[test]
fn selections_of_nothing_are_refused_and_leave_nothing() {
    let scratch = Scratch::new();
    let (model, output) = (fixture("tiny/qwen2"), scratch.path("cap"));
    let cases: &[(&[&str], &[&str])] = &[
        (&["--save-tensor", ""], &["no stage named"]),
        (&["--save-tensor", "nonsense"], &["unknown stage `nonsense`"]),
        (&["--save-tensor", "q_norm"], &["no stage `q_norm`", "it has: embedding"]),
        (&["--save-tensor", "all", "--rows", "3..4"], &["--rows 3..4", "positions 0 to 2"]),
        (&["--save-tensor", "all", "--rows", "0..9"], &["--rows 0..9", "positions 0 to 2"]),
        (&["--save-tensor", "all", "--rows", "2..2"], &["--rows", "2..2"]),
        (
            &["--save-tensor", "all", "--format", "aprt", "--f64", "--backend", "reference"],
            &["F32 only"],
        ),
    ];
    for (options, words) in cases {
        let args = ["trace", &model, "--tokens", "1,2,3", "--output", &output];
        refused(args.into_iter().chain(options.iter().copied()), words);
    }
    let left: Vec<_> = fs::read_dir(scratch.path("")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn outputs_that_stand_in_the_way_are_refused_and_untouched() {
    let scratch = Scratch::new();
    let model = fixture("tiny/qwen2");
    let file = scratch.write("file", "precious");
    fs::create_dir(scratch.path("full")).unwrap();
    scratch.write("full/precious", "precious");
    let full = scratch.path("full");
    let below_a_file = scratch.path("file/cap");
    let save = |output: &str, more: &[&str], words: &[&str]| {
        let args = ["trace", &model, "--tokens", "1", "--save-tensor", "all", "-o", output];
        refused(args.into_iter().chain(more.iter().copied()), words);
    };
    save(&file, &[], &["file", "is not a directory"]);
    save(&full, &[], &["full", "is not empty", "--force"]);
    save(&full, &["--force"], &["full", "no manifest.json"]);
    save(&below_a_file, &[], &["file", "os error"]);
    save("/proc/nowhere/cap", &[], &["/proc/nowhere"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    assert_eq!(fs::read_dir(&full).unwrap().count(), 1);
    assert_eq!(fs::read_dir(scratch.path("")).unwrap().count(), 2, "nothing else was left");
}

#[test]
fn nan_weights_stop_a_run_and_are_traced_to_where_they_begin() {
    let scratch = Scratch::new();
    let model = scratch.model_with_nan("model.layers.1.mlp.gate_proj.weight");
    for options in [&[][..], &["--backend", "reference"]] {
        let args = ["run", &model, "-p", "def f("].into_iter().chain(options.iter().copied());
        refused(args, &["NaN", "apr trace"]);

        let args = ["trace", &model, "-p", "def f(", "--decode", "2"];
        let json = apr(args.into_iter().chain(options.iter().copied()).chain(["--json"]));
        let json = json.expect(0).json();
        let findings = json["findings"].as_array().unwrap();
        let first = findings[0].as_str().unwrap();
        assert!(first.contains("NaN or Inf first seen at layers.1.ffn_gate"), "{first}");
        let last = findings.last().unwrap().as_str().unwrap();
        assert!(last.contains("the trace ends after step 0"), "{last}");
        // NaN is not the likeliest token, nor is what happens to come first.
        assert_eq!(json["steps"][0]["top"].as_array().unwrap().len(), 0);
        assert_eq!(json["steps"][0]["wrong_logits"], 320);
        // All else is there: 17 stages of 2 layers and 3 of the whole model.
        assert_eq!(json["steps"][0]["stages"].as_array().unwrap().len(), 2 * 17 + 3);
    }
    let output = scratch.path("cap");
    let args = ["trace", &model, "-p", "x", "--decode", "1", "--save-tensor", "all", "-o", &output];
    assert!(apr(args).expect(0).stderr.contains("note: the trace ends after step 0"));
}

#[test]
fn a_prompt_that_is_no_text_is_refused() {
    let model = fixture("tiny/qwen2");
    let done = apr_reading(b"def \xFF", ["run", &model, "-p", "-"]).expect(2);
    let stderr = done.stderr;
    assert!(stderr.contains("the prompt on stdin is no UTF-8 text"), "{stderr}");
    assert!(stderr.contains("from index 4") && stderr.lines().count() == 1, "{stderr}");
}

#[test]
#[cfg(unix)]
fn a_trace_that_cannot_be_written_to_its_end_says_what_is_left() {
    use common::apr_with_file_limit;

    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let (output, tokens) = (scratch.path("cap"), vec!["5"; 32].join(","));
    // The steps have 1 and 16 rows of 320 logits.
    let trace = ["trace", &model, "--tokens", &tokens, "--chunk", "16", "--save-tensor", "lm_head"];
    let left = || fs::read_dir(scratch.path("")).unwrap().map(|entry| entry.unwrap().path());

    let whole = [&trace[..], &["--rows", "all", "-o", &output]].concat();
    let stderr = apr_with_file_limit("24", &whole).expect(2).stderr;
    assert!(stderr.ends_with("no step was whole, so nothing is kept\n"), "{stderr}");
    assert_eq!(left().count(), 0);

    let uneven = [&trace[..], &["--rows", "15..32", "-o", &output]].concat();
    let stderr = apr_with_file_limit("24", &uneven).expect(2).stderr;
    let partial = left().next().unwrap();
    let partial = partial.to_str().unwrap();
    assert!(stderr.contains("1 whole step in ") && stderr.contains(partial), "{stderr}");
    apr(["diff", partial, partial, "--allow-partial"]).expect(0);
}

#[test]
#[cfg(unix)]
fn a_capture_whose_manifest_cannot_be_completed_keeps_its_steps() {
    use common::apr_with_file_limit;

    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let output = scratch.path("cap");
    let trace = ["trace", &model, "--tokens", "5,6,7,8,9,10,11,12", "--chunk", "1"];
    let trace = [&trace[..], &["--save-tensor", "attn_norm", "-o", &output]].concat();
    apr(trace.iter().copied()).expect(0);
    let size = fs::metadata(format!("{output}/manifest.json")).unwrap().len();
    fs::remove_dir_all(&output).unwrap();

    let limit = ((size - 1) / 512).to_string();
    let stderr = apr_with_file_limit(&limit, &trace).expect(2).stderr;
    assert!(stderr.contains("manifest.json") && stderr.contains("8 whole steps in "), "{stderr}");
    let partial = fs::read_dir(scratch.path("")).unwrap().next().unwrap().unwrap().path();
    let partial = partial.to_str().unwrap();
    apr(["diff", partial, partial, "--allow-partial"]).expect(0);
}

#[test]
fn comparisons_of_what_cannot_be_compared_are_refused() {
    let scratch = Scratch::new();
    let (model, golden) = (fixture("tiny/qwen2"), fixture("golden/tiny-qwen2/capture"));
    let text = scratch.write("note.txt", "no capture");
    let file =
        scratch.write("a.bin", [b"APRT".as_slice(), &[0; 4], &[1, 0, 0, 0], &[0; 4]].concat());
    let cut =
        scratch.write("cut.bin", [b"APRT".as_slice(), &[0; 4], &[2, 0, 0, 0], &[0; 4]].concat());
    let trailing =
        scratch.write("trailing.bin", [b"APRT".as_slice(), &[0; 8], b"trailing"].concat());
    let map = scratch.write("names.toml", "x = = 1\ny");
    fs::create_dir(scratch.path("empty")).unwrap();
    let empty = scratch.path("empty");
    let missing = scratch.path("missing");
    let cases: &[(&[&str], &[&str])] = &[
        (&[&missing, &golden], &["missing", "os error 2"]),
        (&[&golden, &missing], &["missing", "os error 2"]),
        (&[&golden, &model], &["a capture", "a model"]),
        (&[&file, &golden], &["an APRT file", "a capture"]),
        (&[&golden, &text], &["note.txt", "not a capture"]),
        (&[&empty, &golden], &["empty", "not a capture"]),
        (&[&file, &cut], &["cut.bin"]),
        (&[&file, &trailing], &["trailing.bin"]),
        (&[&golden, &golden, "--stages", "q_norm"], &["no stage `q_norm`"]),
        (&[&golden, &golden, "--layers", "2"], &["layer 2"]),
        (&[&golden, &golden, "--tolerance", "nan"], &["--tolerance"]),
        (&[&golden, &golden, "--tolerance", "-1"], &["--tolerance"]),
        (&[&golden, &golden, "--top-k", "0"], &["--top-k", "1 or more"]),
        (&[&golden, &golden, "--map", &map], &["names.toml"]),
        (&[&golden, &golden, "--values"], &["--values", "two APRT files"]),
        (&[&golden, &golden, "--filter", "x"], &["--filter", "two models"]),
        (&[&file, &file, "--stages", "ffn_out"], &["--stages", "two captures"]),
    ];
    for (args, words) in cases {
        refused(["diff"].into_iter().chain(args.iter().copied()), words);
    }
}

#[test]
fn a_tensor_that_is_not_there_is_refused_with_names_that_are() {
    let model = fixture("tiny/qwen2");
    let args = ["inspect", &model, "--tensor", "model.embed_tokens.weigth"];
    refused(args, &["no tensor `model.embed_tokens.weigth`", "model.embed_tokens.weight`"]);
}

#[test]
fn without_arguments_help_is_shown() {
    let done = apr([]).expect(2);
    for command in ["run", "trace", "diff", "inspect", "demo", "completions"] {
        assert!(done.stderr.contains(&format!("\n  {command}")), "{}", done.stderr);
    }
    assert!(apr(["--version"]).expect(0).stdout.starts_with("apr "));
    for command in ["run", "trace", "diff", "inspect"] {
        assert!(apr([command, "--help"]).expect(0).stdout.contains("Usage: apr "), "{command}");
        assert!(apr(["man", command]).expect(0).stdout.contains(".TH"), "{command}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(apr(["completions", shell]).expect(0).stdout.contains("apr"), "{shell}");
    }
    refused(["man", "nonsense"], &["no command `nonsense`", "trace"]);
}
