//! `apr bisect`: whose fault it is, from the cheapest evidence that says so.

mod common;

use apr_format::{Checkpoint, Draft, Value};
use apr_tensor::{DType, Stored};
use common::{Done, Scratch, apr, fixture, ids};
use serde_json::Value as Json;

const TOKENS: [u32; 8] = [5, 600, 17, 800, 9, 1000, 11, 42];

fn bf16() -> String {
    fixture("pycoder-3m")
}

fn q4() -> String {
    fixture("pycoder-3m/pycoder-3m-Q4_K_M.gguf")
}

fn bisect(model: &str, against: &str, more: &[&str]) -> Done {
    let args = [&["bisect", model, "--against", against][..], more].concat();
    apr(args)
}

fn on_tokens(model: &str, against: &str, more: &[&str]) -> Done {
    let tokens = ids(&TOKENS);
    bisect(model, against, &[&["--tokens", &tokens, "--harm", "2"][..], more].concat())
}

/// The Q4_K_M file with a change, on disk.
fn changed(scratch: &Scratch, change: impl FnOnce(&mut Draft)) -> String {
    let mut draft = Draft::of(&Checkpoint::open(q4()).unwrap());
    change(&mut draft);
    let path = scratch.path("changed.gguf");
    let checkpoint = draft.to_gguf("changed.gguf").unwrap();
    std::fs::write(&path, &checkpoint.files()[0].bytes()[..]).unwrap();
    path
}

fn blames(found: &Json) -> Vec<(String, String)> {
    let blames =
        found["verdict"]["blames"].as_array().unwrap_or_else(|| panic!("{}", found["verdict"]));
    let text = |value: &Json| value.as_str().unwrap().to_owned();
    blames.iter().map(|blame| (text(&blame["culprit"]), text(&blame["what"]))).collect()
}

#[test]
fn a_quantised_file_drifts_from_its_source_and_no_more() {
    let found = on_tokens(&q4(), &bf16(), &["--json"]).expect(0).json();
    assert_eq!(found["verdict"]["verdict"], "drift");
    assert_eq!(found["a"]["audit"]["verdict"]["verdict"], "match");
    assert_eq!(found["b"]["audit"]["verdict"]["verdict"], "match");
    assert!(found["verdict"]["logits"].as_f64().unwrap() > 1e-3, "it does differ");
    let harm = found["harm"].as_array().unwrap();
    assert_eq!(harm.len(), 2);
    // Errors of two tensors may cancel, so that not each is harm; the worst is.
    assert!(harm[0]["error_without"].as_f64() < harm[0]["error"].as_f64(), "{harm:?}");
    assert!(harm[0]["error_without"].as_f64() <= harm[1]["error_without"].as_f64(), "{harm:?}");
    let parts = found["parts"].as_array().unwrap();
    let qkv = parts.iter().find(|part| part["site"] == "layers.2.qkv_matmul").unwrap();
    assert!(qkv["weights"].as_f64().unwrap() > 10.0 * qkv["bound"].as_f64().unwrap(), "{qkv}");

    let text = on_tokens(&q4(), &bf16(), &[]).expect(0).stdout;
    assert!(text.contains("DRIFT"), "{text}");
}

#[test]
fn a_backend_is_held_against_another() {
    let text = on_tokens(&q4(), "backend:reference", &[]).expect(0).stdout;
    assert!(text.contains("DRIFT"), "{text}");
    let exact = &["--backend", "reference", "--precision", "f32"];
    let text = on_tokens(&q4(), "backend:reference", exact).expect(0).stdout;
    assert!(text.contains("MATCH: the sides agree"), "{text}");
}

#[test]
fn captures_of_hugging_face_are_references() {
    let golden = fixture("golden/pycoder-3m-Q4_K_M/capture");
    let found = bisect(&q4(), &golden, &["--json"]).expect(0).json();
    assert_eq!(found["verdict"]["verdict"], "drift");
    assert!(!found["b"]["audit"].is_null(), "the capture is of this very file");
    // Of the source of the file, whose own file is not given: our weights are to within their steps of its.
    let golden = fixture("golden/pycoder-3m/capture");
    let found = bisect(&q4(), &golden, &["--json"]).expect(0).json();
    assert_eq!(found["verdict"]["verdict"], "drift");
    assert_eq!(found["reference_with_our_weights"]["verdict"]["verdict"], "match");
    let given = bisect(&q4(), &golden, &["--json", "--reference-model", &bf16()]).expect(0).json();
    assert!(given["reference_with_our_weights"].is_null() && !given["files"].is_null());
}

#[test]
fn tensors_exchanged_by_a_converter_are_a_fault_of_the_file_and_not_of_the_engine() {
    let scratch = Scratch::new();
    let wrong = changed(&scratch, |draft| {
        let gate = draft.tensor("blk.2.ffn_gate.weight").unwrap().clone();
        let up = std::mem::replace(draft.tensor_mut("blk.2.ffn_up.weight").unwrap(), gate);
        *draft.tensor_mut("blk.2.ffn_gate.weight").unwrap() = up;
    });
    let found = on_tokens(&wrong, &bf16(), &["--json"]).expect(1).json();
    assert_eq!(
        found["a"]["audit"]["verdict"]["verdict"], "match",
        "the engine does as its file says"
    );
    let blames = blames(&found);
    assert_eq!(blames.len(), 2, "{blames:?}");
    for (culprit, what) in &blames {
        assert_eq!(culprit, "file");
        assert!(what.contains("blk.2.ffn_"), "{what}");
    }
}

#[test]
fn a_damaged_block_is_found_in_the_file_and_without_the_references_file_in_the_stage() {
    let scratch = Scratch::new();
    let wrong = changed(&scratch, |draft| {
        let stored = draft.tensor_mut("blk.1.attn_output.weight").unwrap();
        let mut bytes = stored.bytes().to_vec();
        // The nibbles of one superblock of one row.
        bytes[16..144].fill(0xff);
        *stored = Stored::new(stored.dtype(), stored.shape().clone(), bytes.into()).unwrap();
    });
    let found = on_tokens(&wrong, &bf16(), &["--json"]).expect(1).json();
    let named = blames(&found);
    assert!(named.iter().all(|(culprit, _)| culprit == "file"), "{named:?}");
    assert!(named[0].1.contains("blk.1.attn_output.weight"), "{named:?}");

    let golden = fixture("golden/pycoder-3m/capture");
    let found = bisect(&wrong, &golden, &["--json"]).expect(1).json();
    let named = blames(&found);
    assert_eq!(named[0].0, "file_or_reference", "{named:?}");
    assert!(named[0].1.contains("layers.1.attn_out"), "{named:?}");
}

#[test]
fn a_changed_constant_is_a_fault_of_the_config() {
    let scratch = Scratch::new();
    let wrong = changed(&scratch, |draft| {
        draft.metadata.insert("qwen2.rope.freq_base", Value::F32(500_000.0));
    });
    let found = on_tokens(&wrong, &bf16(), &["--json"]).expect(1).json();
    let named = blames(&found);
    assert_eq!(named.len(), 1, "{named:?}");
    assert_eq!(named[0].0, "config");
    assert!(named[0].1.contains("rope_theta is 500000"), "{named:?}");
    assert_eq!(found["a"]["audit"]["verdict"]["verdict"], "match");
}

#[test]
fn a_bias_that_was_lost_is_named() {
    let scratch = Scratch::new();
    let wrong = changed(&scratch, |draft| {
        let stored = draft.tensor_mut("blk.0.attn_k.bias").unwrap();
        assert_eq!(stored.dtype(), DType::F32);
        let zeros = vec![0u8; stored.bytes().len()];
        *stored = Stored::new(DType::F32, stored.shape().clone(), zeros.into()).unwrap();
    });
    let found = on_tokens(&wrong, &bf16(), &["--json"]).expect(1).json();
    let named = blames(&found);
    assert!(named.iter().any(|(_, what)| what.contains("blk.0.attn_k.bias")), "{named:?}");
}

#[test]
fn a_page_is_written_whole_and_captures_are_kept_where_asked() {
    let scratch = Scratch::new();
    let (page, keep) = (scratch.path("report.html"), scratch.path("kept"));
    on_tokens(&q4(), "backend:reference", &["--html", &page, "--keep", &keep]).expect(0);
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(html.starts_with("<!DOCTYPE html>") && html.trim_end().ends_with("</html>"));
    for side in ["a", "b"] {
        apr(["diff", &format!("{keep}/{side}"), &format!("{keep}/{side}")]).expect(0);
    }
    let again = on_tokens(&q4(), "backend:reference", &["--keep", &keep]).expect(2);
    assert!(again.stderr.contains("is not empty"), "{}", again.stderr);
}

fn capture(scratch: &Scratch, name: &str, stages: &str, more: &[&str]) -> String {
    let (place, tokens) = (scratch.path(name), ids(&TOKENS));
    let model = q4();
    let args = ["trace", &model, "--tokens", &tokens, "--save-tensor", stages, "--output", &place];
    apr(args.into_iter().chain(more.iter().copied())).expect(0);
    place
}

#[test]
fn a_reference_that_is_not_whole_is_no_clean_bill() {
    let scratch = Scratch::new();
    for (name, more) in [
        ("one-layer", ["--layers", "0"]),
        ("ends", ["--layers", "0,last"]),
        ("last-row", ["--rows", "last"]),
    ] {
        let part = capture(&scratch, name, "all", &more);
        let text = bisect(&q4(), &part, &[]).expect(3).stdout;
        assert!(text.contains("UNMEASURED: the reference is not whole: "), "{name}: {text}");
    }
}

#[test]
fn a_reference_without_some_stages_is_judged_over_the_spans_between() {
    let scratch = Scratch::new();
    let some = capture(&scratch, "some", "attn_norm,attn_out,ffn_norm,ffn_out,lm_head", &[]);
    let text = bisect(&q4(), &some, &[]).expect(0).stdout;
    assert!(text.contains("not in B"), "{text}");
}

#[test]
fn a_capture_of_another_prompt_than_the_one_given_is_refused() {
    let scratch = Scratch::new();
    let reference = capture(&scratch, "reference", "all", &[]);
    let done = bisect(&q4(), &reference, &["--tokens", "5,600,18"]).expect(2);
    assert!(done.stderr.contains("do not begin with those given"), "{}", done.stderr);
    bisect(&q4(), &reference, &["--tokens", &ids(&TOKENS)]).expect(0);
}

#[test]
fn a_block_that_only_its_channel_shows_is_not_told_by_the_norm_of_the_whole() {
    let scratch = Scratch::new();
    let wrong = changed(&scratch, |draft| {
        let stored = draft.tensor_mut("blk.2.ffn_gate.weight").unwrap();
        let mut bytes = stored.bytes().to_vec();
        // Some nibbles of one superblock of row 100.
        bytes[100 * 144 + 16..100 * 144 + 48].fill(0);
        *stored = Stored::new(stored.dtype(), stored.shape().clone(), bytes.into()).unwrap();
    });
    let golden = fixture("golden/pycoder-3m-Q4_K_M/capture");
    let named = blames(&bisect(&wrong, &golden, &["--json"]).expect(1).json());
    assert_eq!(named.len(), 1, "{named:?}");
    assert!(named[0].1.contains("layers.2.ffn_gate, with the weights under test,"), "{named:?}");
    assert!(named[0].1.contains("right as a whole"), "{named:?}");
}

#[test]
fn a_mistake_in_all_layers_is_told_once() {
    let scratch = Scratch::new();
    let wrong = changed(&scratch, |draft| {
        draft.metadata.insert("qwen2.rope.freq_base", Value::F32(500_000.0));
    });
    let golden = fixture("golden/pycoder-3m-Q4_K_M/capture");
    let named = blames(&bisect(&wrong, &golden, &["--json"]).expect(1).json());
    assert_eq!(named.len(), 2, "one of q, one of k: {named:?}");
    assert!(named.iter().all(|(_, what)| what.contains("rope-theta")), "{named:?}");
}

#[test]
fn what_cannot_be_bisected_is_refused_with_what_to_do() {
    let scratch = Scratch::new();
    let empty = scratch.write("empty.gguf", "");
    let directory = scratch.path("nothing");
    std::fs::create_dir(&directory).unwrap();
    let (model, golden) = (q4(), fixture("golden/pycoder-3m/capture"));
    let tokens = ids(&TOKENS);
    let nowhere = scratch.path("no/such/directory/report.html");
    let cases: [(&[&str], &str); 8] = [
        (&[&model, "--against", &golden, "--html", &nowhere], "there is no directory"),
        (&[&model, "--against", "backend:gpu", "--tokens", &tokens], "there are: cpu, reference"),
        (&[&model, "--against", "backend:reference"], "give -p TEXT or --tokens"),
        (&[&model, "--against", &bf16()], "give -p TEXT or --tokens"),
        (&[&model, "--against", "no/such/place"], "no/such/place"),
        (&[&empty, "--against", &golden], "empty.gguf"),
        (&[&model, "--against", &directory], "neither a capture nor a model"),
        (&[&model, "--against", &golden, "--arithmetic", "exact"], "llama-cpp"),
    ];
    for (args, words) in cases {
        let done = apr(["bisect"].iter().chain(args).copied()).expect(2);
        assert!(done.stderr.contains(words), "{args:?}: {}", done.stderr);
        assert_eq!(done.stdout, "", "{args:?}");
    }
}

#[test]
fn a_reference_of_other_dimensions_is_a_difference_of_configs() {
    let tokens = ["--json", "--tokens", "5,6,7"];
    let found = bisect(&fixture("tiny/qwen2"), &fixture("tiny/llama"), &tokens).expect(1).json();
    let named = blames(&found);
    let of_config =
        |key: &str| named.iter().any(|(c, what)| c == "config" && what.starts_with(key));
    assert!(of_config("head_dim is 16") && of_config("rope_theta"), "{named:?}");
}

#[test]
fn a_bias_lost_in_a_file_shows_against_a_capture_of_the_file_as_it_was() {
    let scratch = Scratch::new();
    let wrong = changed(&scratch, |draft| {
        let stored = draft.tensor_mut("blk.0.attn_q.bias").unwrap();
        let zeros = vec![0u8; stored.bytes().len()];
        *stored = Stored::new(DType::F32, stored.shape().clone(), zeros.into()).unwrap();
    });
    let golden = fixture("golden/pycoder-3m-Q4_K_M/capture");
    let found = bisect(&wrong, &golden, &["--json"]).expect(1).json();
    let named = blames(&found);
    assert_eq!(named[0].0, "file_or_reference", "{named:?}");
    assert!(named[0].1.contains("layers.0.qkv_bias"), "{named:?}");
}
