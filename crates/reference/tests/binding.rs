//! From checkpoints to decoders: the same model in any container is the same model, and a file that contradicts
//! itself is refused by name.

use apr_format::{Checkpoint, Map, Value};
use apr_model::{Model, Unobserved, read_config, role_of};
use apr_reference::{Arithmetic, Reference};
use apr_tensor::{Bytes, DType, Stored};
use apr_testkit::{
    Draft, TINY, fixture,
    invariants::{logits, tokens},
};

fn open(file: &str) -> Checkpoint {
    Checkpoint::open(fixture(file)).unwrap()
}

fn load(checkpoint: &Checkpoint) -> apr_model::Result<Model<Reference<f64>>> {
    Model::load(Reference::new(Arithmetic::EXACT), checkpoint)
}

fn bits(checkpoint: &Checkpoint) -> Vec<u32> {
    let model = load(checkpoint).unwrap_or_else(|e| panic!("{e}"));
    logits(&model, &tokens(6), &[6], &mut Unobserved)
}

/// The `.apr` metadata of a Hugging Face config.
fn apr_metadata(config: &Map) -> Map {
    let mut metadata = Map::default();
    let mut take = |theirs: &str, ours: &str| {
        if let Some(value) = config.get(theirs) {
            metadata.insert(ours, value.clone());
        }
    };
    for key in ["hidden_size", "vocab_size", "intermediate_size", "head_dim", "rms_norm_eps"] {
        take(key, key);
    }
    for key in ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"] {
        take(key, key);
    }
    take("max_position_embeddings", "max_position_embeddings");
    take("model_type", "architecture");
    take("num_hidden_layers", "num_layers");
    take("num_attention_heads", "num_heads");
    take("num_key_value_heads", "num_kv_heads");
    take("rope_scaling", "rope_scaling");
    take("rope_parameters", "rope_parameters");
    let theta = config.get("rope_theta").cloned().or_else(|| {
        let parameters = config.get("rope_parameters")?.as_object()?;
        parameters.get("rope_theta").cloned()
    });
    metadata.insert("rope_theta", theta.expect("a config has a theta"));
    metadata
}

#[test]
fn an_apr_file_is_the_model_it_was_made_from() {
    for name in TINY {
        let original = open(&format!("tiny/{name}"));
        let mut draft = Draft::of(&original);
        draft.metadata = apr_metadata(&draft.metadata);
        draft.metadata.insert("rope_type", 2u64);
        assert!(bits(&draft.apr()) == bits(&original), "{name}");
    }
}

#[test]
fn rows_stored_as_pairs_are_the_same_model() {
    let pairs = open("tiny/llama/llama-F16.gguf");
    let mut draft = Draft::of(&pairs);
    draft.metadata = apr_metadata(&Draft::of(&open("tiny/llama")).metadata);
    // GGUF keeps it as f32.
    let eps = read_config(&pairs).unwrap().rms_norm_eps;
    draft.metadata.insert("rms_norm_eps", eps);
    draft.metadata.insert("rope_type", 0u64);
    assert!(bits(&draft.apr()) == bits(&pairs));

    // Pairs read as halves are another model; not saying which they are is no answer.
    draft.metadata.insert("rope_type", 2u64);
    assert!(bits(&draft.apr()) != bits(&pairs));
    draft.metadata.remove("rope_type");
    let message = load(&draft.apr()).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(message.contains("rope_type"), "{message}");
}

#[test]
fn gguf_and_hugging_face_agree_where_f16_holds_the_weights() {
    let weights = open("tiny/qwen2");
    let file = open("tiny/qwen2/qwen2-F16.gguf");
    assert!(bits(&Draft::f16_gguf(&weights, &file).gguf()) == bits(&file));
}

/// What loading says of the tiny model `name`'s GGUF file after `alter`.
fn refusal(name: &str, alter: impl FnOnce(&mut Draft)) -> String {
    let mut draft = Draft::of(&open(&format!("tiny/{name}/{name}-F16.gguf")));
    alter(&mut draft);
    let error = load(&draft.gguf()).err();
    error
        .map(|e| e.to_string())
        .unwrap_or_else(|| panic!("{name} was altered and loaded all the same"))
}

#[test]
fn an_expert_too_few_or_too_many_is_refused_by_its_name() {
    let weights = open("tiny/qwen3-moe");
    let name = |expert: usize| format!("model.layers.1.mlp.experts.{expert}.up_proj.weight");
    let mut draft = Draft::of(&weights);
    draft.metadata = Draft::of(&open("tiny/qwen3-moe/qwen3-moe-F16.gguf")).metadata.clone();
    let stored = draft.remove_tensor(&name(5)).unwrap();
    let message = load(&draft.gguf()).err().expect("one is missing").to_string();
    let words = ["`blk.1.ffn_up_exps.weight` or `", &name(5), "is missing"];
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
    draft.tensors.extend([(name(5), stored.clone()), (name(8), stored)]);
    let message = load(&draft.gguf()).err().expect("one is of no use").to_string();
    assert!(message.contains(&name(8)), "{message}");
}

#[test]
fn metadata_that_would_change_the_numbers_is_refused_by_key() {
    let cases: [(&str, Value, &str); 13] = [
        ("general.architecture", Value::from("gpt9"), "`gpt9` is not supported; supported: qwen2"),
        ("qwen2.rope.scaling.type", Value::from("yarn"), "supported: none, linear"),
        ("qwen2.attention.sliding_window", Value::from(128u64), "attention.sliding_window"),
        ("qwen2.expert_count", Value::from(8u64), "expert_count"),
        (
            "qwen2.attention.head_count_kv",
            Value::from(3u64),
            "`qwen2.attention.head_count_kv` is 3; it must divide the 4 query heads",
        ),
        ("qwen2.block_count", Value::from(0u64), "at least 1"),
        ("qwen2.block_count", Value::from(u64::MAX / 2), "at most"),
        ("qwen2.embedding_length", Value::from("wide"), "qwen2.embedding_length"),
        ("qwen2.attention.value_length", Value::from(7u64), "value_length"),
        ("qwen2.attention.causal", Value::from(false), "attention.causal"),
        ("qwen2.attention.key_length", Value::from(0u64), "an even number from 2"),
        ("qwen2.rope.dimension_count", Value::from(0u64), "an even number from 2"),
        ("qwen2.rope.scaling.factor", Value::from(f32::NAN), "it must be positive"),
    ];
    for (key, value, expected) in cases {
        let message = refusal("qwen2", |draft| {
            draft.metadata.insert(key, value);
        });
        assert!(message.contains(expected) && message.contains("draft.gguf"), "{key}: {message}");
    }
    for (key, value, expected) in [
        ("qwen3moe.expert_used_count", 9u64, "there are 8 experts"),
        ("qwen3moe.expert_count", 0, "at least 1"),
        ("qwen3moe.expert_shared_count", 1, "expert_shared_count"),
        ("qwen3moe.expert_gating_func", 2, "expert_gating_func"),
        // The tensors have as many as they have.
        ("qwen3moe.expert_count", 7, "`blk.0.ffn_gate_inp.weight` has shape"),
        ("qwen3moe.expert_feed_forward_length", 16, "`blk.0.ffn_gate_exps.weight` has shape"),
    ] {
        let message = refusal("qwen3-moe", |draft| {
            draft.metadata.insert(key, value);
        });
        assert!(message.contains(expected), "{key}: {message}");
    }
    let message = refusal("llama3-rope", |draft| {
        draft.metadata.insert("llama.rope.scaling.type", "linear");
        draft.metadata.insert("llama.rope.scaling.factor", 2.0);
    });
    assert!(message.contains("rope_freqs.weight"), "{message}");
    let message = refusal("qwen2", |draft| {
        draft.metadata.remove("qwen2.block_count");
    });
    assert!(message.contains("`qwen2.block_count`"), "{message}");
}

#[test]
fn a_factor_of_rotary_scaling_counts_under_either_name_and_without_a_type() {
    let mut draft = Draft::of(&open("tiny/qwen2/qwen2-F16.gguf"));
    let plain = bits(&draft.gguf());
    draft.metadata.insert("qwen2.rope.scaling.factor", 4.0f32);
    draft.metadata.insert("qwen2.rope.scaling.type", "linear");
    let scaled = bits(&draft.gguf());
    assert!(scaled != plain);

    draft.metadata.remove("qwen2.rope.scaling.type");
    assert!(bits(&draft.gguf()) == scaled, "linear is what llama.cpp takes no type for");
    draft.metadata.remove("qwen2.rope.scaling.factor");
    draft.metadata.insert("qwen2.rope.scale_linear", 4.0f32);
    assert!(bits(&draft.gguf()) == scaled, "the old name");
    draft.metadata.insert("qwen2.rope.scaling.type", "none");
    assert!(bits(&draft.gguf()) == plain);
}

#[test]
fn tensors_that_do_not_fit_the_config_are_refused_by_name() {
    let message = refusal("qwen2", |draft| {
        draft.metadata.insert("qwen2.feed_forward_length", 64u64);
    });
    assert!(message.contains("blk.0.ffn_gate.weight") && message.contains("64"), "{message}");

    let message = refusal("qwen2", |draft| {
        draft.tensors.retain(|(name, _)| name != "blk.1.attn_k.bias");
    });
    assert!(message.contains("`blk.1.attn_k.bias`") && message.contains("missing"), "{message}");

    let message = refusal("llama", |draft| {
        let bias = Stored::new(DType::F32, [4].into(), Bytes::from(vec![0; 16])).unwrap();
        draft.tensors.push(("blk.0.attn_output.bias".to_owned(), bias));
    });
    assert!(message.contains("`blk.0.attn_output.bias`"), "{message}");

    let message = refusal("qwen2", |draft| {
        let norm = draft.tensor("output_norm.weight").clone();
        draft.tensors.push(("model.norm.weight".to_owned(), norm));
    });
    assert!(message.contains("model.norm.weight"), "{message}");

    let message = refusal("qwen2", |draft| {
        draft.metadata.insert("qwen2.block_count", 1u64);
    });
    assert!(message.contains("blk.1.") && message.contains("more"), "{message}");

    let message = refusal("qwen2", |draft| {
        let rows = draft.tensor("blk.0.attn_q.weight").shape().rows();
        let bytes = Bytes::from(vec![0; rows * 50]);
        let stored = Stored::new(DType::IQ1_S, [rows, 256].into(), bytes).unwrap();
        *draft.tensor("blk.0.attn_q.weight") = stored;
    });
    assert!(message.contains("blk.0.attn_q.weight"), "{message}");
}

#[test]
fn a_tied_head_that_is_stored_too_must_be_the_embedding() {
    let directory = tempfile::tempdir().unwrap();
    let original = open("tiny/qwen2");
    let mut draft = Draft::of(&original);
    let head = draft.tensor("model.embed_tokens.weight").clone();
    draft.tensors.push(("lm_head.weight".to_owned(), head.clone()));
    assert!(bits(&draft.hugging_face(directory.path())) == bits(&original));

    *draft.tensor("lm_head.weight") = head.permute_rows(|row| row ^ 1);
    let message = load(&draft.hugging_face(directory.path())).err().map(|e| e.to_string());
    let message = message.unwrap_or_default();
    assert!(message.contains("tie_word_embeddings") && message.contains("lm_head"), "{message}");

    draft.metadata.insert("tie_word_embeddings", false);
    assert!(bits(&draft.hugging_face(directory.path())) != bits(&original));
}

#[test]
fn config_json_that_would_change_the_numbers_is_refused_by_key() {
    let directory = tempfile::tempdir().unwrap();
    let object = |key: &str, value: Value| Value::from([(key, value)].into_iter().collect::<Map>());
    let cases: [(&str, Value); 6] = [
        ("use_sliding_window", true.into()),
        ("layer_types", vec!["full_attention", "sliding_attention"].into()),
        ("is_causal", false.into()),
        ("hidden_act", "gelu".into()),
        ("rope_parameters", object("factor", 2.0.into())),
        ("rope_parameters", object("rope_type", "yarn".into())),
    ];
    for (key, value) in cases {
        let mut draft = Draft::of(&open("tiny/qwen2"));
        draft.metadata.insert(key, value.clone());
        let error = load(&draft.hugging_face(directory.path())).err();
        let message = error.map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains(key), "{key} = {value}: {message}");
    }
}

#[test]
fn a_tensor_of_an_unknown_type_is_refused_and_not_passed_over() {
    let mut file = std::fs::read(fixture("tiny/llama/llama-F16.gguf")).unwrap();
    let name = [&13u64.to_le_bytes()[..], b"output.weight"].concat();
    let at = file.windows(name.len()).position(|bytes| bytes == name).expect("it has a head");
    // After the name: the number of dimensions, two of them, the type.
    file[at + name.len() + 4 + 2 * 8..][..4].copy_from_slice(&9999u32.to_le_bytes());
    let checkpoint = Checkpoint::from_bytes("llama.gguf", Bytes::from(file)).unwrap();
    let message = load(&checkpoint).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(message.contains("`output.weight`") && message.contains("9999"), "{message}");
}

#[test]
fn every_tensor_of_the_fixtures_has_a_role() {
    for name in TINY {
        for file in [format!("tiny/{name}"), format!("tiny/{name}/{name}-F16.gguf")] {
            for (tensor, _) in open(&file).tensors() {
                assert!(role_of(tensor).is_some(), "{file}: {tensor}");
            }
        }
    }
}
