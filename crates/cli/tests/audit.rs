//! `apr audit`: which stage of a capture is wrong, and never a verdict from missing data.

#![allow(clippy::print_stderr, reason = "a skipped test says so")]

mod common;

use std::{fs, path::Path};

use apr_capture::{Capture, Dims, Provenance, Recorder, RecorderOptions};
use apr_cpu::{Cpu, CpuOptions};
use apr_format::Checkpoint;
use apr_model::{
    HostTensor, LogitRows, Model, Observer, ObserverError, Phase, Site, Stage, Step, StepInput,
    TapSet, Values, View,
};
use apr_testkit::{TINY, golden};
use common::{Done, Scratch, apr, fixture, ids, text};

const TOKENS: [u32; 6] = [5, 6, 7, 8, 9, 10];

#[track_caller]
fn says(done: &Done, words: &[&str]) {
    for word in words {
        assert!(done.stdout.contains(word), "{word:?} is not in:\n{}", done.stdout);
    }
}

#[track_caller]
fn refused(args: &[&str], words: &[&str]) {
    let done = apr(args.iter().copied()).expect(2);
    assert_eq!(done.stdout, "", "{args:?}");
    assert_eq!(done.stderr.trim_end().lines().count(), 1, "{}", done.stderr);
    for word in words {
        assert!(done.stderr.contains(word), "{args:?} does not say {word:?}: {}", done.stderr);
    }
}

/// Q4_K_M, so that activations are rounded.
fn quantised() -> String {
    fixture("pycoder-3m/pycoder-3m-Q4_K_M.gguf")
}

/// Records an engine that computes one stage otherwise than it should, and goes on with what it got.
struct Faulty {
    recorder: Recorder,
    site: Site,
    fault: fn(&mut [f32]),
    wrong: Option<HostTensor>,
}

impl Observer for Faulty {
    fn wanted(&self) -> TapSet {
        self.recorder.wanted()
    }

    fn begin(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        self.recorder.begin(step)
    }

    fn value(&mut self, step: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError> {
        if site != self.site {
            return self.recorder.value(step, site, view);
        }
        let Values::F32(values) = view.values else { panic!("the cpu backend computes in f32") };
        let mut values = values.to_vec();
        (self.fault)(&mut values);
        let shape = view.shape.to_vec();
        self.recorder.value(step, site, View { shape: &shape, values: Values::F32(&values) })?;
        let values = values.into_iter().map(f64::from).collect();
        self.wrong = Some(HostTensor { shape, values });
        Ok(())
    }

    fn replace(&mut self, site: Site) -> Result<Option<HostTensor>, ObserverError> {
        Ok(if site == self.site { self.wrong.take() } else { None })
    }

    fn end(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        self.recorder.end(step)
    }
}

/// A capture of the cpu backend with `fault` at `site`.
fn faulty(scratch: &Scratch, name: &str, site: Site, fault: fn(&mut [f32])) -> String {
    let checkpoint = Checkpoint::open(quantised()).unwrap();
    let model = Model::load(Cpu::new(CpuOptions::default()).unwrap(), &checkpoint).unwrap();
    let output = scratch.path(name);
    let recorder = Recorder::create(
        Path::new(&output),
        Provenance::of(&model, &checkpoint, None),
        Dims::from(model.config()),
        RecorderOptions::new(model.all_taps()),
    );
    let mut observer = Faulty { recorder: recorder.unwrap(), site, fault, wrong: None };
    let mut cache = model.cache(TOKENS.len()).unwrap();
    let input =
        StepInput { tokens: &TOKENS, phase: Phase::Prefill, chunk: 0, logits: LogitRows::All };
    model.step(input, &mut cache, &mut observer).unwrap();
    observer.recorder.finish().unwrap();
    output
}

#[test]
fn a_faultless_engine_matches_stage_by_stage() {
    let scratch = Scratch::new();
    let model = quantised();
    for options in
        [&["--decode", "2"][..], &["--activations", "f32", "--kv", "f32"], &["--chunk", "2"]]
    {
        let name = options.join("");
        let capture =
            scratch.capture(&name, &model, &[&["--tokens", &ids(&TOKENS)], options].concat());
        let done = apr(["audit", &capture, "--model", &model]).expect(0);
        says(
            &done,
            &["MATCH: all of 71 stages do what the arithmetic says", "the capture declares it"],
        );
        assert!(!done.stdout.contains("✗"), "{}", done.stdout);
        assert!(!done.stdout.contains('\x1b'), "colour is for terminals");
    }
}

#[test]
fn captures_of_hugging_face_match_whatever_the_architecture() {
    for name in TINY {
        let capture = text(&golden(&format!("tiny-{name}")).capture);
        let done = apr(["audit", &capture, "--model", &fixture(&format!("tiny/{name}"))]).expect(0);
        says(&done, &["MATCH", "by apr-oracle"]);
    }
}

#[test]
fn a_capture_held_against_another_arithmetic_than_its_own_is_not_called_right() {
    let scratch = Scratch::new();
    let model = quantised();
    let options = ["--tokens", &ids(&TOKENS), "--activations", "f32"];
    let capture = scratch.capture("plain", &model, &options);
    let done = apr(["audit", &capture, "--model", &model, "--arithmetic", "llama-cpp"]).expect(1);
    // Products that nobody rounded are nearer to exact than rounded ones need to be; scores are off in every layer.
    says(&done, &["[as given]", "≈ close", "DIVERGES at layers.0.attn_scores"]);
    says(&done, &["Every layer's attn_scores is wrong: is the arithmetic the engine's?"]);
    apr(["audit", &capture, "--model", &model]).expect(0);
}

#[test]
fn a_wrong_tile_edge_is_found_with_its_rows_and_channels() {
    let scratch = Scratch::new();
    let site = Site::layer(2, Stage::FfnGate);
    let capture = faulty(&scratch, "edge", site, |values| {
        for row in [3, 4] {
            values[row * 768 + 752..][..16].fill(0.0);
        }
    });
    let done = apr(["audit", &capture, "--model", &quantised()]).expect(1);
    says(
        &done,
        &[
            "with layers.2.ffn_gate and what follows from it done right, the favourite token is another one in",
            "DIVERGES at layers.2.ffn_gate, the gate projection of layer 2: off by ",
            "2 of 6 rows are wrong: positions 3, 4",
            "16 of 768 channels are wrong: 752-767",
            "captured 0, expected ",
            "ffn_gate            ··✗·\n",
        ],
    );
    assert_eq!(done.stdout.matches("FAULT").count(), 1, "one stage is wrong:\n{}", done.stdout);

    let json = apr(["audit", &capture, "--model", &quantised(), "--json"]).expect(1).json();
    assert_eq!(json["schema"], "apr-audit/1");
    let verdict = serde_json::json!({
        "verdict": "diverges", "first": "layers.2.ffn_gate", "all": ["layers.2.ffn_gate"]
    });
    assert_eq!(json["verdict"], verdict);
    assert_eq!(json["diagnoses"][0]["site"], "layers.2.ffn_gate");
    assert!(json["made_by"].as_str().unwrap().starts_with("apr "), "{}", json["made_by"]);
}

#[test]
fn two_faults_are_both_found_and_no_third() {
    let scratch = Scratch::new();
    let site = Site::layer(1, Stage::AttnOut);
    let one = faulty(&scratch, "one", site, |values| values[5] += 1.0);
    let json = apr(["audit", &one, "--model", &quantised(), "--json"]).expect(1).json();
    assert_eq!(json["verdict"]["all"], serde_json::json!(["layers.1.attn_out"]));
    // The same engine, the other file: its embedding is wrong as well.
    let other = fixture("pycoder-3m/pycoder-3m-Q8_0.gguf");
    let done = apr(["audit", &one, "--model", &other]).expect(1);
    says(&done, &["DIVERGES at embedding", "layers.1.attn_out"]);
}

#[test]
fn one_element_of_one_row_is_enough() {
    let scratch = Scratch::new();
    let site = Site::layer(3, Stage::FfnOut);
    // A hundredth of a typical value, in one of 1536.
    let capture = faulty(&scratch, "element", site, |values| values[2 * 256 + 100] += 0.01);
    let done = apr(["audit", &capture, "--model", &quantised()]).expect(1);
    says(&done, &["DIVERGES at layers.3.ffn_out", "position 2", "channel 100"]);
}

#[test]
fn a_nan_is_a_fault_where_it_arises_and_no_match_where_it_stays() {
    let scratch = Scratch::new();
    let site = Site::layer(1, Stage::FfnUp);
    let capture = faulty(&scratch, "nan", site, |values| values[768 + 3] = f32::NAN);
    let done = apr(["audit", &capture, "--model", &quantised()]).expect(1);
    says(&done, &["DIVERGES at layers.1.ffn_up", "1 element NaN or infinite on one side only"]);
    says(&done, &["1 of 6 rows is wrong: position 1", "captured NaN, expected "]);

    // All NaN, and the same NaN by replay: nothing was compared there.
    let all =
        faulty(&scratch, "all-nan", Site::whole(Stage::Embedding), |values| values.fill(f32::NAN));
    let done = apr(["audit", &all, "--model", &quantised()]).expect(1);
    says(&done, &["DIVERGES at embedding", "no finite value on either side"]);
    assert!(!done.stdout.contains("MATCH"), "{}", done.stdout);
}

#[test]
fn stages_that_nobody_captured_are_judged_over_the_span_they_end_in() {
    let scratch = Scratch::new();
    let model = quantised();
    let save = |name: &str, stages: &str| {
        let output = scratch.path(name);
        let args =
            ["trace", &model, "--tokens", &ids(&TOKENS), "--save-tensor", stages, "-o", &output];
        apr(args).expect(0);
        output
    };
    let head = save("head", "lm_head");
    let done = apr(["audit", &head, "--model", &model]).expect(0);
    says(&done, &["MATCH: all of 1 stage", "1 stage judged over a span", "- judged only together"]);

    let norms = save("norms", "attn_norm");
    let done = apr(["audit", &norms, "--model", &model]).expect(3);
    says(
        &done,
        &["UNMEASURED", "not captured, nor any stage that follows", "not measured, and not judged"],
    );
    says(
        &apr(["audit", &norms, "--model", &model, "--common"]).expect(0),
        &["MATCH: all of 4 stages"],
    );
}

#[test]
fn a_tree_of_files_is_judged_with_the_tokens_that_are_given() {
    let scratch = Scratch::new();
    let model = fixture("tiny/qwen2");
    let options = ["--tokens", "5,6,7", "--format", "aprt", "--kv", "f32"];
    let tree = scratch.capture("tree", &model, &options);
    fs::remove_file(Path::new(&tree).join("manifest.json")).unwrap();
    let done = apr(["audit", &tree, "--model", &model]).expect(3);
    says(&done, &["UNMEASURED: step 0 does not say its tokens", "--tokens"]);
    let done = apr(["audit", &tree, "--model", &model, "--tokens", "5,6,7"]).expect(0);
    says(&done, &["MATCH", "f32", "nobody declares it: the best of "]);
    let done = apr(["audit", &tree, "--model", &model, "--tokens", "5,6,8"]).expect(1);
    says(&done, &["DIVERGES at embedding", "position 2"]);
    let done = apr(["audit", &tree, "--model", &model, "--tokens", "5,6"]).expect(3);
    says(&done, &["UNMEASURED"]);
}

#[test]
fn what_of_a_capture_was_not_understood_is_told() {
    let scratch = Scratch::new();
    let model = fixture("tiny/qwen2");
    let tree = scratch.capture("tree", &model, &["--tokens", "5,6,7", "--format", "aprt"]);
    let (known, unknown) = ("layer-0/attn_norm.bin", "layer-0/attention_rms.bin");
    fs::rename(Path::new(&tree).join(known), Path::new(&tree).join(unknown)).unwrap();
    fs::remove_file(Path::new(&tree).join("manifest.json")).unwrap();
    let done = apr(["audit", &tree, "--model", &model, "--tokens", "5,6,7"]);
    assert!(done.stderr.contains("attention_rms") && done.stderr.contains("--map"), "{done:?}");
}

#[test]
fn a_capture_of_another_file_is_judged_and_that_is_told() {
    let scratch = Scratch::new();
    let capture = scratch.capture("capture", &quantised(), &["--tokens", "5,6,7"]);
    let other = fixture("pycoder-3m/pycoder-3m-Q8_0.gguf");
    let done = apr(["audit", &capture, "--model", &other]).expect(1);
    let words = "says that it was made of";
    assert!(done.stderr.contains(words), "{}", done.stderr);
    let done = apr(["audit", &capture, "--model", &quantised()]).expect(0);
    assert!(!done.stderr.contains(words), "{}", done.stderr);
}

#[test]
fn a_capture_that_says_its_tokens_is_taken_at_its_word() {
    let scratch = Scratch::new();
    let model = fixture("tiny/qwen2");
    let capture = scratch.capture("cap", &model, &["--tokens", "5,6,7"]);
    apr(["audit", &capture, "--model", &model, "--tokens", "5,6,7"]).expect(0);
    refused(
        &["audit", &capture, "--model", &model, "--tokens", "5,6"],
        &["says itself that it is of 3 tokens", "leave out"],
    );
}

#[test]
fn what_cannot_be_audited_is_refused_with_the_reason() {
    let scratch = Scratch::new();
    let model = fixture("tiny/qwen2");
    let capture = scratch.capture("cap", &model, &["--tokens", "5,6,7"]);
    refused(&["audit", &capture], &["no model", "--model"]);
    refused(&["audit", "--model", &model], &["no capture"]);
    refused(
        &["audit", &capture, "--model", &fixture("tiny/llama")],
        &["the capture is of a model with num_hidden_layers = 2", "has 3"],
    );
    refused(
        &["audit", &capture, "--model", &model, "--arithmetic", "f8"],
        &["there is no `f8`", "f32 (nothing rounded)", "llama-cpp ("],
    );
    refused(&["audit", &model, "--model", &model], &["not a capture"]);
    refused(&["audit", &scratch.write("text.txt", "no capture"), "--model", &model], &["text.txt"]);
    fs::create_dir(scratch.path("empty")).unwrap();
    refused(&["audit", &scratch.path("empty"), "--model", &model], &["empty"]);
    refused(&["audit", &scratch.path("missing"), "--model", &model], &["missing", "os error 2"]);
    let nowhere = scratch.path("no-directory/page.html");
    let done = apr(["audit", &capture, "--model", &model, "--html", &nowhere]).expect(2);
    assert!(done.stderr.contains("cannot write"), "{}", done.stderr);
}

#[test]
fn arithmetics_are_listed_with_what_they_mean() {
    let done = apr(["audit", "--arithmetic", "list"]).expect(0);
    says(&done, &["f32 ", "nothing rounded\n", "llama-cpp "]);
}

#[test]
fn the_table_has_as_many_stages_as_asked_for() {
    let scratch = Scratch::new();
    let model = fixture("tiny/qwen2");
    let capture = scratch.capture("cap", &model, &["--tokens", "5,6,7"]);
    let rows = |options: &[&str]| {
        let args = ["audit", &capture, "--model", &model];
        let done = apr(args.into_iter().chain(options.iter().copied())).expect(0);
        done.stdout.matches("✓ explained").count()
    };
    assert_eq!(rows(&["--limit", "3"]), 3);
    assert_eq!(rows(&["--all"]), Capture::open(&capture).unwrap().sites().len());
}

#[test]
fn a_browser_shows_the_page_as_it_was_written() {
    let scratch = Scratch::new();
    let site = Site::layer(2, Stage::FfnGate);
    let capture = faulty(&scratch, "wrong", site, |values| values[7] = 3.0);
    let page = scratch.path("page.html");
    apr(["audit", &capture, "--model", &quantised(), "--html", &page]).expect(1);
    let written = fs::read_to_string(&page).unwrap();
    assert!(written.contains("DIVERGES at layers.2.ffn_gate"), "the verdict comes first");
    let beside = fs::read_dir(Path::new(&page).parent().unwrap()).unwrap().count();
    assert_eq!(beside, 2, "the capture and the page, and nothing else");

    let browsers = ["chromium", "chromium-browser", "google-chrome"];
    let shown = browsers.into_iter().find_map(|browser| {
        let flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"];
        let url = format!("file://{page}");
        let done = std::process::Command::new(browser).args(flags).arg(url).output().ok()?;
        Some(String::from_utf8(done.stdout).unwrap())
    });
    let Some(shown) = shown else {
        eprintln!("skipped: there is no Chromium to show the page");
        return;
    };
    // A browser that had to mend the page would have other elements.
    for tag in ["<td", "<tr", "<rect", "<polyline", "<section", "<details", "<li", "<p"] {
        assert_eq!(shown.matches(tag).count(), written.matches(tag).count(), "{tag}");
    }
}
