//! There and back: what is moved is moved bit by bit, whatever the containers between.

mod common;

use std::fs;

use apr_convert::{Options, Output, Plan, Recipe, Settings, Target, convert};
use apr_model::{LayerRole, Role, role_of};
use apr_tensor::DType;
use common::{MODELS, converted, fixture, open};

#[test]
fn f32_goes_through_all_containers_and_comes_back_bit_by_bit() {
    for name in MODELS {
        let scratch = tempfile::tempdir().unwrap();
        let path = |file: &str| scratch.path().join(file);
        let source = converted(&fixture(name), path("source"), Some(Recipe::F32));
        let gguf = converted(&source, path("model.gguf"), None);
        let apr = converted(&gguf, path("model.apr"), None);
        converted(&apr, path("back"), None);
        let weights = |directory| fs::read(path(directory).join("model.safetensors")).unwrap();
        assert!(weights("source") == weights("back"), "{name}");
    }
}

#[test]
fn without_a_recipe_matrices_keep_their_type_and_every_number_its_value() {
    for name in MODELS {
        let scratch = tempfile::tempdir().unwrap();
        let source = fixture(name);
        let gguf = converted(&source, scratch.path().join("model.gguf"), None);
        let back = converted(&gguf, scratch.path().join("back"), None);
        assert_eq!(back.tensors().len(), source.tensors().len(), "{name}");
        for (tensor, stored) in source.tensors() {
            let there = back.require(tensor).unwrap();
            assert_eq!(there.to_f32().unwrap(), stored.to_f32().unwrap(), "{name}, {tensor}");
            let router = matches!(role_of(tensor), Some(Role::Layer(_, LayerRole::FfnGateInp)));
            if stored.shape().dims().len() > 1 && !router {
                assert_eq!(there.dtype(), stored.dtype(), "{name}, {tensor}");
            }
        }
    }
}

#[test]
fn a_gguf_of_a_directory_is_that_of_llama_cpp_s_converter() {
    for name in &MODELS[1..] {
        let scratch = tempfile::tempdir().unwrap();
        let theirs = fixture(&format!("{name}/{}-F16.gguf", name.trim_start_matches("tiny/")));
        let path = scratch.path().join("model.gguf");
        let ours = converted(&fixture(name), path, Some(Recipe::F16));
        assert_eq!(ours.tensors().len(), theirs.tensors().len(), "{name}");
        for (tensor, stored) in theirs.tensors() {
            let own = ours.require(tensor).unwrap();
            assert_eq!((own.dtype(), own.shape()), (stored.dtype(), stored.shape()), "{tensor}");
            if role_of(tensor) == Some(Role::RopeFreqs) {
                // Theirs are computed in f32.
                let pairs = own.to_f32().unwrap().into_iter().zip(stored.to_f32().unwrap());
                assert!(pairs.into_iter().all(|(x, y)| (x / y - 1.0).abs() < 1e-5), "{tensor}");
            } else {
                assert!(own.bytes()[..] == stored.bytes()[..], "{name}, {tensor}");
            }
        }
    }
}

#[test]
fn the_types_of_a_quantised_gguf_go_to_an_apr_file_as_far_as_it_has_them() {
    let scratch = tempfile::tempdir().unwrap();
    let source = fixture("pycoder-3m/pycoder-3m-Q4_K_M.gguf");
    let apr = converted(&source, scratch.path().join("model.apr"), None);
    let back = converted(&apr, scratch.path().join("back.gguf"), None);
    for (tensor, stored) in source.tensors() {
        let there = back.require(tensor).unwrap();
        assert_eq!(there.dtype(), stored.dtype(), "{tensor}");
        assert!(there.bytes()[..] == stored.bytes()[..], "{tensor}");
    }
    let q8 = fixture("pycoder-3m/pycoder-3m-Q8_0.gguf");
    let exact = converted(&q8, scratch.path().join("exact.apr"), None);
    for (tensor, stored) in q8.tensors() {
        let name = role_of(tensor).unwrap().hf_name();
        let there = exact.require(&name).unwrap();
        assert_eq!(there.dtype(), DType::F32, "{tensor}");
        assert_eq!(there.to_f32().unwrap(), stored.to_f32().unwrap(), "{tensor}");
    }
}

#[test]
fn recipes_for_apr_take_the_next_better_type_that_it_has() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("model.apr");
    let apr = converted(&fixture("pycoder-3m"), path, Some(Recipe::Q4_K_S));
    let dtype = |name: &str| apr.require(name).unwrap().dtype();
    // Q5_K in llama.cpp's mix.
    assert_eq!(dtype("model.layers.0.self_attn.v_proj.weight"), DType::Q6_K);
    assert_eq!(dtype("model.layers.0.self_attn.q_proj.weight"), DType::Q4_K);
    assert_eq!(dtype("model.norm.weight"), DType::F32);
}

#[test]
fn weights_beyond_a_size_go_to_several_files_with_an_index() {
    let scratch = tempfile::tempdir().unwrap();
    let source = fixture("tiny/qwen3");
    let path = scratch.path().join("sharded");
    let output = Output::new(&path, Target::Safetensors, &source, false).unwrap();
    let plan = Plan::new(&source, Target::Safetensors, Options::default()).unwrap();
    let settings = Settings { shard_size: 100_000, verify: true };
    let mut seen = 0;
    convert(&plan, &output, &settings, &mut |_, bytes| seen += bytes).unwrap();
    assert_eq!(seen, 2 * plan.source_bytes(), "all of it is written, and all of it verified");
    let sharded = open(&path);
    assert!(sharded.files().len() > 2);
    for file in sharded.files() {
        assert!(file.size() < 110_000, "{}", file.path().display());
    }
    for (tensor, stored) in source.tensors() {
        assert!(sharded.require(tensor).unwrap().bytes()[..] == stored.bytes()[..], "{tensor}");
    }
    assert!(!path.join("model.safetensors").exists());
}

#[test]
fn nothing_is_left_beside_what_was_asked_for() {
    let scratch = tempfile::tempdir().unwrap();
    converted(&fixture("tiny/qwen2"), scratch.path().join("model.gguf"), None);
    converted(&fixture("tiny/qwen2"), scratch.path().join("model"), None);
    let mut names: Vec<_> = fs::read_dir(scratch.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["model", "model.gguf"]);
}
