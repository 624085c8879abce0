//! `apr diff`: what its exit codes and words say.

mod common;

use std::{fs, path::Path};

use apr_testkit::{TINY, golden};
use common::{Done, Scratch, apr, fixture, ids, text};

/// An APRT file of layer 0.
fn aprt(scratch: &Scratch, name: &str, values: &[f32]) -> String {
    let mut bytes = b"APRT\0\0\0\0".to_vec();
    bytes.extend((values.len() as u32).to_le_bytes());
    bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    scratch.write(name, bytes)
}

#[track_caller]
fn says(done: &Done, words: &[&str]) {
    for word in words {
        assert!(done.stdout.contains(word), "{word:?} is not in:\n{}", done.stdout);
    }
}

#[test]
fn the_reference_backend_matches_hugging_face_in_every_stage() {
    let scratch = Scratch::new();
    for name in TINY {
        let golden = golden(&format!("tiny-{name}"));
        let model = fixture(&format!("tiny/{name}"));
        // The golden capture continues the prompt by a chunk that the prompt's record does not have.
        let tokens: Vec<u32> = {
            let capture = apr_capture::Capture::open(&golden.capture).unwrap();
            capture.steps().iter().flat_map(|step| step.token_ids.clone().unwrap()).collect()
        };
        let options = ["--tokens", &ids(&tokens), "--backend", "reference"];
        let ours = scratch.capture(name, &model, &options);
        let done = apr(["diff", &ours, &text(&golden.capture)]).expect(0);
        says(&done, &["MATCH: all within the tolerance", "rows aligned by token position"]);
        assert!(!done.stdout.contains("note:"), "both are exact: {}", done.stdout);
    }
}

#[test]
fn different_arithmetics_are_said_and_the_difference_is_still_scored() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let fast = scratch.capture("fast", &model, &["--tokens", "5,6,7"]);
    let exact = scratch.capture("exact", &model, &["--tokens", "5,6,7", "--backend", "reference"]);
    let done = apr(["diff", &fast, &exact]).expect(1);
    says(&done, &["note: A keeps its cache in f16; B rounds neither", "tracing A again with"]);
    let turned = apr(["diff", &exact, &fast]).expect(1);
    says(&turned, &["B keeps its cache in f16", "tracing B again with"]);
    says(
        &done,
        &[
            "DIFFERS: first beyond the tolerance is layers.0.",
            "DIFFERS\n",
            "first row beyond the tolerance: position 0 (layers.0.",
            "where the difference becomes visible",
        ],
    );
    let json = apr(["diff", &fast, &exact, "--json"]).expect(1).json();
    assert_eq!(json["a"]["arithmetic"], serde_json::json!({ "activations": [], "kv": "f16" }));
    assert_eq!(json["b"]["arithmetic"], serde_json::json!({ "activations": [], "kv": null }));

    let options = ["--tokens", "5,6,7", "--kv", "f32"];
    let unrounded = scratch.capture("unrounded", &model, &options);
    assert!(!apr(["diff", &unrounded, &exact]).expect(0).stdout.contains("note:"));
    assert!(apr(["diff", &fast, &exact, "--tolerance", "0.01"]).expect(0).stdout.contains("MATCH"));
}

#[test]
fn what_is_not_compared_is_named_and_unmeasured() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let whole = scratch.capture("whole", &model, &["--tokens", "5,6,7"]);
    let part = scratch.path("part");
    let args = ["trace", &model, "--tokens", "5,6,7", "--save-tensor", "attn_norm", "-o", &part];
    apr(args).expect(0);
    let done = apr(["diff", &part, &whole]).expect(3);
    says(&done, &["UNMEASURED", "not compared, and not scored", "embedding: not in A"]);
    says(&apr(["diff", &whole, &part]).expect(3), &["embedding: not in B"]);
    let done = apr(["diff", &part, &whole, "--common"]).expect(0);
    says(&done, &["MATCH", "compared: 2 stages", "left out, since only common stages"]);
    says(&done, &["embedding: not in A"]);
    let json = apr(["diff", &part, &whole, "--common", "--json"]).expect(0).json();
    assert_eq!(json["left_out"][0]["name"], "embedding");
    assert_eq!(json["not_compared"], serde_json::json!([]));
    says(&apr(["diff", &part, &whole, "--stages", "attn_norm"]).expect(0), &["MATCH"]);
    says(&apr(["diff", &part, &whole, "--stages", "ffn_out"]).expect(3), &["compared: 0 stages"]);
    let layers = ["--stages", "ffn_out", "--layers", "last"];
    let done = apr(["diff", &part, &whole].into_iter().chain(layers)).expect(3);
    says(&done, &["layers.1.ffn_out: not in A"]);
}

#[test]
fn rows_of_other_tokens_are_not_scored() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let a = scratch.capture("a", &model, &["--tokens", "5,6,7,8"]);
    let b = scratch.capture("b", &model, &["--tokens", "5,6,9,8"]);
    let done = apr(["diff", &a, &b]).expect(3);
    says(&done, &["tokens differ from position 2 on: 7 in A, 9 in B", "UNMEASURED"]);
    says(&done, &["74 rows of 37 stages: the tokens up to there differ"]);
    let c = scratch.capture("c", &model, &["--tokens", "1,6,9,8"]);
    says(
        &apr(["diff", &a, &c]).expect(3),
        &["compared: 0 stages", "the tokens differ from the first"],
    );
}

#[test]
fn rows_that_one_side_lacks_are_counted() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let long = scratch.capture("long", &model, &["--tokens", "5,6,7,8"]);
    let short = scratch.capture("short", &model, &["--tokens", "5,6,7"]);
    let done = apr(["diff", &long, &short]).expect(0);
    says(&done, &["37 rows of 37 stages: only in A"]);
}

#[test]
fn a_nan_in_a_capture_differs_and_is_located() {
    let scratch = Scratch::new();
    let nan = scratch.model_with_nan("model.layers.1.mlp.gate_proj.weight");
    let nan = scratch.capture("nan", &nan, &["--tokens", "5,6"]);
    let good = scratch.capture("good", &fixture("tiny/qwen2"), &["--tokens", "5,6"]);
    for (a, b, pair) in [(&nan, &good, "NaN in A"), (&good, &nan, "NaN in B")] {
        let done = apr(["diff", a, b]).expect(1);
        says(&done, &["first beyond the tolerance is layers.1.ffn_gate", "2 MISMATCHED", pair]);
        says(&done, &["NaN/Inf on one side only: first layers.1.ffn_gate, position 0, channel 0"]);
        says(&apr(["diff", a, b, "--tolerance", "1e30"]).expect(1), &["DIFFERS"]);
    }
    // The same NaN on both sides is no difference, but stages of nothing else are not measured.
    let done = apr(["diff", &nan, &nan]).expect(3);
    says(&done, &["final_norm: no finite value on either side"]);
}

#[test]
fn files_of_values_are_compared_one_by_one() {
    let scratch = Scratch::new();
    let reference = aprt(&scratch, "reference.bin", &[1.0, 2.0, 3.0, 4.0]);
    let other = aprt(&scratch, "other.bin", &[1.0, 2.5, 3.0, 4.0]);
    let done = apr(["diff", &other, &reference, "--values", "--limit", "2"]).expect(1);
    says(
        &done,
        &[
            "other.bin",
            "reference.bin (what A is measured against)",
            "0.5000 at element 1",
            "DIFFERS",
        ],
    );
    let shown: Vec<&str> = done.stdout.lines().filter(|line| line.starts_with('1')).collect();
    assert_eq!(shown.len(), 1, "{}", done.stdout);
    assert_eq!(shown[0].split_whitespace().collect::<Vec<_>>(), ["1", "2.500", "2.000", "0.5000"]);
    let args = ["diff", &other, &reference, "--values", "--limit", "2", "--json"];
    let json = apr(args).expect(1).json();
    assert_eq!(json["values"][0], serde_json::json!({ "at": 1, "a": 2.5, "b": 2.0 }));
    assert_eq!((json["values"].as_array().unwrap().len(), &json["a"]), (2, &other.clone().into()));

    let done = apr(["diff", &reference, &reference]).expect(0);
    says(&done, &["MATCH: equal bit for bit", "4 elements", "max |diff|      0\n"]);
    let nan = aprt(&scratch, "nan.bin", &[1.0, f32::NAN, 3.0, 4.0]);
    let done = apr(["diff", &nan, &reference]).expect(1);
    says(&done, &["1 MISMATCHED", "element 1: A NaN, B 2"]);
    apr(["diff", &reference, &nan]).expect(1);
    apr(["diff", &nan, &nan]).expect(0);
    let all_nan = aprt(&scratch, "all-nan.bin", &[f32::NAN; 4]);
    apr(["diff", &all_nan, &all_nan]).expect(3);
    let empty = aprt(&scratch, "empty.bin", &[]);
    says(&apr(["diff", &empty, &empty]).expect(3), &["UNMEASURED"]);
    let zeros = aprt(&scratch, "zeros.bin", &[0.0; 4]);
    says(&apr(["diff", &zeros, &reference]).expect(1), &["A is zero"]);
    says(&apr(["diff", &zeros, &zeros]).expect(0), &["both zero"]);
    let done = apr(["diff", &empty, &reference]).expect(2);
    assert!(done.stderr.contains("holds 0 values"), "{}", done.stderr);
}

#[test]
fn files_of_different_stages_are_refused() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let tree = scratch.capture("tree", &model, &["--tokens", "5,6", "--format", "aprt"]);
    let file = |name: &str| text(&Path::new(&tree).join(name));
    let done = apr(["diff", &file("layer-0/ffn_up.bin"), &file("layer-0/ffn_gate.bin")]).expect(2);
    assert!(done.stderr.contains("ffn_up of layer 0"), "{}", done.stderr);
    apr(["diff", &file("layer-0/ffn_up.bin"), &file("layer-1/ffn_up.bin")]).expect(2);
    apr(["diff", &file("layer-1/ffn_up.bin"), &file("layer-1/ffn_up.bin")]).expect(0);
}

#[test]
fn a_tree_of_files_is_the_capture_it_holds() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen3"));
    let tree = scratch.capture("tree", &model, &["--tokens", "5,6,7", "--format", "aprt"]);
    let capture = scratch.capture("capture", &model, &["--tokens", "5,6,7"]);
    says(&apr(["diff", &tree, &capture]).expect(0), &["MATCH: equal bit for bit"]);

    // Without its manifest, the tree does not know its positions, and has the dimensions that the other side states.
    fs::remove_file(Path::new(&tree).join("manifest.json")).unwrap();
    for sides in [[&tree, &capture], [&capture, &tree]] {
        let done = apr(["diff", sides[0], sides[1]]).expect(0);
        says(&done, &["rows aligned on the LAST row", "MATCH"]);
    }
    let done = apr(["diff", &tree, &tree]).expect(2);
    assert!(done.stderr.contains("--model"), "{}", done.stderr);
    let done = apr(["diff", &tree, &tree, "--model", &model]).expect(0);
    says(&done, &["rows aligned on the LAST row", "MATCH"]);
}

#[test]
fn model_files_are_compared_tensor_by_tensor_whatever_their_containers() {
    let (model, gguf) = (fixture("tiny/qwen2"), fixture("tiny/qwen2/qwen2-F16.gguf"));
    says(
        &apr(["diff", &model, &model]).expect(0),
        &["MATCH: equal bit for bit", "compared: 26 tensors"],
    );
    let done = apr(["diff", &gguf, &model]).expect(0);
    says(&done, &["MATCH: all within the tolerance", "config: the same", "same values"]);
    // Llama's GGUF stores rows of heads in another order, which is no difference.
    let (llama, gguf) = (fixture("tiny/llama"), fixture("tiny/llama/llama-F16.gguf"));
    let done = apr(["diff", &gguf, &llama]).expect(0);
    assert!(!done.stdout.contains("TRANSPOSED") && !done.stdout.contains("INTERLEAVED"));
    says(&done, &["compared: 30"]);
    apr(["diff", &model, &llama]).expect(1);

    let done = apr(["diff", &model, &model, "--filter", "no such name"]).expect(2);
    assert!(done.stderr.contains("no tensor of either file has `no such name`"));
    says(&apr(["diff", &model, &model, "--filter", "attn_q"]).expect(0), &["compared: 4"]);
}

#[test]
fn a_transposed_weight_in_the_last_layer_is_found_and_called_that() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let transposed = scratch.model_with("model.layers.1.self_attn.q_proj.weight", |elements| {
        for row in 0..64 {
            for column in row + 1..64 {
                elements.swap(row * 64 + column, column * 64 + row);
            }
        }
    });
    let done = apr(["diff", &transposed, &model]).expect(1);
    says(&done, &["DIFFERS: 1 of 26 tensors, first: blk.1.attn_q.weight, TRANSPOSED"]);
    says(&done, &["TRANSPOSED (leaves rel L2 0)"]);
    assert_eq!(done.stdout.matches("TRANSPOSED").count(), 2, "{}", done.stdout);

    // Statistics of values look healthy; the comparison of values does not.
    let a = scratch.capture("a", &transposed, &["--tokens", "5,6,7"]);
    let b = scratch.capture("b", &model, &["--tokens", "5,6,7"]);
    let done = apr(["diff", &a, &b]).expect(1);
    says(&done, &["DIFFERS: first beyond the tolerance is layers.1.qkv_matmul"]);
}

#[test]
fn a_quantised_model_drifts_from_its_source_and_a_damaged_one_differs() {
    let (scratch, source) = (Scratch::new(), fixture("pycoder-3m"));
    let quantised = fixture("pycoder-3m/pycoder-3m-Q8_0.gguf");
    let done = apr(["diff", &quantised, &source]).expect(0);
    says(&done, &["explained by quantisation: 29 of 50 tensors; ", "\nDRIFT: ", "compared: 50"]);
    let json = apr(["diff", &quantised, &source, "--json"]).expect(0).json();
    assert_eq!(json["outcome"]["verdict"], "drift");
    assert!(json["tensors"][0]["steps"]["rms"].as_f64().unwrap() < 0.5);

    let mut bytes = fs::read(&quantised).unwrap();
    // The last matrix lies before the last norm of 256 floats: v of the last layer, eight blocks to a row.
    let matrix = bytes.len() - 4 * 256 - 128 * 8 * 34;
    bytes[matrix + 34 * (8 * 5 + 2)..][..34].fill(0);
    let damaged = scratch.write("damaged.gguf", bytes);
    let done = apr(["diff", &damaged, &source]).expect(1);
    says(&done, &["DIFFERS: 1 of 50 tensors, first: blk.3.attn_v.weight"]);
    says(
        &done,
        &["no simple relation fits; off by more than rounding: row 5, columns 64 to 95 (1 of"],
    );
}

#[test]
fn models_of_equal_tensors_and_other_configs_differ_in_the_keys_that_are_named() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let other = scratch.copy(&model, "other");
    let config = Path::new(&other).join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"rope_theta\": 1000000.0", "\"rope_theta\": 10000.0"))
        .unwrap();
    let done = apr(["diff", &other, &model]).expect(1);
    says(
        &done,
        &["config: rope_theta DIFFERS: 10000.0 in A, 1000000.0 in B (on it depends: the rotation"],
    );
    says(&done, &["DIFFERS: the config in rope_theta\n"]);
    let json = apr(["diff", &other, &model, "--json"]).expect(1).json();
    assert_eq!(json["config"]["differences"][0]["key"], "rope_theta");

    fs::write(&config, text.replace("\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": \"small\""))
        .unwrap();
    let done = apr(["diff", &other, &model]).expect(3);
    says(&done, &["config: not compared, since that of A", "UNMEASURED: the config of A: "]);
    says(&done, &["compared: 26 tensors"]);
}

#[test]
fn a_nan_in_a_weight_differs_and_is_located() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let nan = scratch.model_with_nan("model.layers.1.mlp.gate_proj.weight");
    let done = apr(["diff", &model, &nan]).expect(1);
    says(&done, &["1 MISMATCHED", "first blk.1.ffn_gate.weight, [0, 0]: ", "NaN in B"]);
}

#[test]
fn the_header_and_the_verdict_say_what_was_compared_with_what() {
    let (scratch, model) = (Scratch::new(), fixture("tiny/qwen2"));
    let capture = scratch.capture("cap", &model, &["--tokens", "5,6"]);
    let done = apr(["diff", &capture, &capture]).expect(0);
    let lines: Vec<&str> = done.stdout.lines().collect();
    let tool = format!("A  {capture}: apr {}, cpu, {model}, plan ", env!("CARGO_PKG_VERSION"));
    assert!(lines[0].starts_with(&tool), "{}", lines[0]);
    assert!(
        lines[1].starts_with("B  ") && lines[1].ends_with("(what A is measured against)"),
        "{}",
        lines[1]
    );
    assert_eq!(lines[2], "rows aligned by token position");
    let columns: Vec<&str> =
        lines[4].split("  ").filter(|c| !c.is_empty()).map(str::trim).collect();
    let expected = [
        "stage",
        "rows",
        "rel L2",
        "worst row",
        "max |diff|",
        "at",
        "A",
        "B",
        "RMS diff",
        "cosine",
        "|A|/|B|",
    ];
    assert_eq!(columns[..11], expected);
    says(&done, &["\n(p5 h2 c17 k3: position, head, channel, key)\n", "\nnext token: "]);
    assert!(lines[2..].iter().all(|line| line.chars().count() <= 120), "{}", done.stdout);
    assert_eq!(lines[lines.len() - 2], "MATCH: equal bit for bit");
    assert_eq!(lines[lines.len() - 1], "(compared: 37 stages; tolerance: relative L2 up to 1e-5)");
}
