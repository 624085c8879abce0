//! What a checkpoint says about itself, in every other container's words, and back.
#![allow(clippy::print_stdout, reason = "a skipped test says so")]

use std::path::Path;

use apr_convert::{
    Layout, Loss, Recipe, Target,
    metadata::{Translated, translate},
};
use apr_format::{Checkpoint, Draft, Map, Value};
use apr_model::{Config, HeadRows, Role, RopeScaling, head_rows, read_config};
use apr_tensor::{Bytes, DType, Stored};
use apr_tokenizer::{Specials, Tokenizer};

/// Hugging Face directories, each of a way of its own to be a model.
const DIRECTORIES: [&str; 6] =
    ["pycoder-3m", "tiny/llama", "tiny/llama3-rope", "tiny/qwen2", "tiny/qwen3", "tiny/qwen3-moe"];

/// The same models as GGUF files.
const FILES: [&str; 6] = [
    "pycoder-3m/pycoder-3m-Q4_K_M.gguf",
    "tiny/llama/llama-F16.gguf",
    "tiny/llama3-rope/llama3-rope-F16.gguf",
    "tiny/qwen2/qwen2-F16.gguf",
    "tiny/qwen3/qwen3-F16.gguf",
    "tiny/qwen3-moe/qwen3-moe-F16.gguf",
];

const TEXTS: &[&str] = &[
    "",
    "Hello, world! I'm 12345 and it's 3.14",
    "  leading\n\n\ttabs \r\n and trailing  ",
    "def f(x):\n    return x ** 2  # square\n",
    "naïve café e\u{301}cole 日本語 🦀 مرحبا",
    "<|im_start|>user\nhi<|im_end|>\n<|eot_id|><|begin_of_text|>",
];

fn fixture(name: &str) -> Checkpoint {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    Checkpoint::open(folder.join(name)).unwrap()
}

/// The config that `checkpoint` runs with, were all its tensors there.
fn config_of(checkpoint: &Checkpoint) -> Config {
    let mut config = read_config(checkpoint).unwrap();
    if let Some(stored) = checkpoint.tensor("rope_freqs.weight") {
        assert_eq!(config.rope_scaling, RopeScaling::None, "scaled twice");
        config.rope_scaling = RopeScaling::Factors(stored.to_f32().unwrap());
    }
    config
}

/// `source` translated, with its own tensors' types; else what is wrong with it.
fn translated(source: &Checkpoint, target: Target) -> Result<Translated, String> {
    let config = config_of(source);
    let rows = match target {
        Target::Gguf if config.architecture == apr_model::Architecture::Llama => {
            HeadRows::Interleaved
        }
        _ => HeadRows::Halves,
    };
    let layout = Layout {
        head_rows: rows,
        dtype: source.tensors().next().unwrap().1.dtype(),
        recipe: None,
        head: !config.tie_word_embeddings,
    };
    translate(source, &config, target, &layout).map_err(|error| error.to_string())
}

/// The target of a translation as a checkpoint: of its tensors those whose presence says something.
fn opened(source: &Checkpoint, target: Target, translated: &Translated) -> Checkpoint {
    let config = read_config(source).unwrap();
    let kept = |name: &str| {
        ["token_embd.weight", "model.embed_tokens.weight", "output.weight", "lm_head.weight"]
            .contains(&name)
            || name.contains("0.attn_q.")
            || name.contains("0.self_attn.q_proj.")
            || name == "rope_freqs.weight"
    };
    let mut tensors: Vec<(String, Stored)> = source
        .tensors()
        .filter(|(name, _)| kept(name))
        .map(|(name, stored)| (target.name_of(apr_model::role_of(name).unwrap()), stored.clone()))
        .filter(|(name, _)| target != Target::Safetensors || name != "rope_freqs.weight")
        .collect();
    if let (Target::Gguf, RopeScaling::Llama3(_)) = (target, &config.rope_scaling) {
        let plain = apr_model::RopeFrequencies::new(config.rope_theta, config.rotary_dim);
        let scaled = config.rope_frequencies();
        let pairs = plain.as_slice().iter().zip(scaled.as_slice());
        let bytes: Vec<u8> = pairs.flat_map(|(p, s)| ((p / s) as f32).to_le_bytes()).collect();
        let stored = Stored::new(DType::F32, [config.rotary_dim / 2].into(), bytes.into()).unwrap();
        tensors.push((Role::RopeFreqs.gguf_name(), stored));
    }
    // What these are made of is not looked at, where a container has no such types.
    for (_, stored) in &mut tensors {
        let has_type = match target {
            Target::Gguf => true,
            Target::Apr => [DType::F16, DType::F32, DType::BF16, DType::Q4_K, DType::Q6_K]
                .contains(&stored.dtype()),
            Target::Safetensors => !stored.dtype().is_quantized(),
        };
        if !has_type {
            let numbers = stored.to_f32().unwrap();
            let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
            *stored = Stored::new(DType::F32, stored.shape().clone(), bytes.into()).unwrap();
        }
    }
    let mut draft = Draft { metadata: translated.map.clone(), tensors };
    match target {
        Target::Gguf => draft.to_gguf("memory.gguf").unwrap(),
        Target::Apr => draft.to_apr("memory.apr").unwrap(),
        Target::Safetensors => {
            draft.metadata = Map::default();
            let weights = Bytes::from(draft.safetensors().unwrap());
            let files =
                translated.files.iter().map(|(name, text)| (name.clone(), text.clone().into()));
            let files = files.chain([("model.safetensors".to_owned(), weights)]);
            Checkpoint::from_files("memory", &files.collect::<Vec<_>>()).unwrap()
        }
    }
}

fn converted(source: &Checkpoint, target: Target) -> Checkpoint {
    let translated = translated(source, target).unwrap();
    assert_eq!(translated.losses, [], "{target} of {}", source.path().display());
    opened(source, target, &translated)
}

/// The frequencies as they are used: scaled by the config, or by a tensor.
fn frequencies(checkpoint: &Checkpoint) -> Vec<f64> {
    config_of(checkpoint).rope_frequencies().as_slice().to_vec()
}

fn says_the_same(source: &Checkpoint, target: &Checkpoint) {
    let place = format!("{} as {}", source.path().display(), target.path().display());
    let rounded = |checkpoint: &Checkpoint| {
        let mut config = read_config(checkpoint).unwrap();
        // GGUF has no other numbers than f32.
        config.rms_norm_eps = f64::from(config.rms_norm_eps as f32);
        config.rope_scaling = RopeScaling::None;
        config
    };
    assert_eq!(rounded(source), rounded(target), "{place}");
    for (a, b) in frequencies(source).iter().zip(frequencies(target)) {
        assert!((a - b).abs() <= 1e-6 * a, "{place}: frequency {a} as {b}");
    }
    let (a, b) =
        (Tokenizer::from_checkpoint(source).unwrap(), Tokenizer::from_checkpoint(target).unwrap());
    let singles = (0..a.vocab_size() as u32).map(|id| a.token_text(id).into_owned());
    for text in TEXTS.iter().map(|&text| text.to_owned()).chain(singles) {
        for specials in [Specials::Parse, Specials::Literal] {
            let ids = a.encode(&text, specials).unwrap();
            assert_eq!(ids, b.encode(&text, specials).unwrap(), "{place}: {text:?}");
        }
    }
    let sorted = |tokenizer: &Tokenizer| {
        let mut ids = tokenizer.eos_ids().to_vec();
        ids.sort_unstable();
        ids
    };
    assert_eq!((sorted(&a), a.bos_id()), (sorted(&b), b.bos_id()), "{place}");
    let template = |t: &Tokenizer| t.chat_template().map(|t| t.source().to_owned());
    assert_eq!(template(&a), template(&b), "{place}");
}

fn metadata(checkpoint: &Checkpoint) -> Map {
    checkpoint.metadata().iter().map(|(key, value)| (key, value.clone())).collect()
}

/// The JSON files of a directory, by name.
fn files(checkpoint: &Checkpoint) -> Vec<(&'static str, serde_json::Value)> {
    let companions = checkpoint.companions();
    let mut files = vec![("config.json", serde_json::Value::from(checkpoint.metadata()))];
    files[0].1.as_object_mut().unwrap().remove("__metadata__");
    for (name, file) in [
        ("tokenizer.json", &companions.tokenizer),
        ("tokenizer_config.json", &companions.tokenizer_config),
        ("generation_config.json", &companions.generation_config),
    ] {
        if let Some(file) = file {
            files.push((name, serde_json::from_slice(file.bytes()).unwrap()));
        }
    }
    files
}

#[test]
fn every_model_says_the_same_in_every_container() {
    for name in DIRECTORIES.iter().chain(&FILES) {
        let source = fixture(name);
        for target in Target::ALL {
            let first = converted(&source, target);
            says_the_same(&source, &first);
            for target in Target::ALL {
                says_the_same(&source, &converted(&first, target));
            }
        }
    }
}

#[test]
fn gguf_by_way_of_apr_is_the_same_key_by_key() {
    for name in FILES {
        let source = fixture(name);
        let apr = converted(&source, Target::Apr);
        assert_eq!(metadata(&converted(&apr, Target::Gguf)), metadata(&source), "{name}");
        assert_eq!(metadata(&converted(&source, Target::Gguf)), metadata(&source), "{name}");
    }
}

#[test]
fn a_directory_by_way_of_apr_is_the_same_key_by_key() {
    for name in DIRECTORIES {
        let source = fixture(name);
        let apr = converted(&source, Target::Apr);
        assert_eq!(files(&converted(&apr, Target::Safetensors)), files(&source), "{name}");
        assert_eq!(files(&converted(&source, Target::Safetensors)), files(&source), "{name}");
    }
}

#[test]
fn apr_files_say_nothing_large_twice() {
    for name in ["pycoder-3m", "pycoder-3m/pycoder-3m-Q8_0.gguf"] {
        let apr = metadata(&converted(&fixture(name), Target::Apr));
        let all = serde_json::Value::from(&apr).to_string().len();
        let own = ["tokenizer.vocabulary", "tokenizer.merges", "tokenizer.token_type"];
        let own: usize = own
            .iter()
            .map(|key| serde_json::Value::from(apr.get(key).unwrap()).to_string().len())
            .sum();
        assert!(all - own < 8000, "{name}: {all} bytes of metadata, {own} of them the tokenizer's");
    }
}

#[test]
fn llama3_scaling_is_found_in_the_factors_of_a_gguf() {
    let directory =
        converted(&fixture("tiny/llama3-rope/llama3-rope-F16.gguf"), Target::Safetensors);
    let original = fixture("tiny/llama3-rope");
    assert_eq!(read_config(&directory).unwrap(), read_config(&original).unwrap());
}

/// A GGUF fixture with other metadata.
fn altered(name: &str, change: impl FnOnce(&mut Draft)) -> Checkpoint {
    let mut draft = Draft::of(&fixture(name));
    change(&mut draft);
    draft.to_gguf("altered.gguf").unwrap()
}

fn whats(losses: &[Loss]) -> Vec<&str> {
    losses.iter().map(|loss| loss.what.as_str()).collect()
}

#[test]
fn factors_of_another_rule_are_a_loss() {
    let source = altered("tiny/llama3-rope/llama3-rope-F16.gguf", |draft| {
        let factors = draft.tensor_mut("rope_freqs.weight").unwrap();
        let mut numbers = factors.to_f32().unwrap();
        numbers[3] *= 1.01;
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        *factors = Stored::new(DType::F32, factors.shape().clone(), bytes.into()).unwrap();
    });
    let losses = translated(&source, Target::Safetensors).unwrap().losses;
    assert_eq!(whats(&losses), ["tensor `rope_freqs.weight`"]);
    assert_eq!(translated(&source, Target::Apr).unwrap().losses, [], "it holds the tensor");
}

#[test]
fn unknown_keys_are_lost_known_ones_are_noted_and_apr_takes_both() {
    let source = altered("tiny/qwen2/qwen2-F16.gguf", |draft| {
        draft.metadata.insert("general.url", "https://example.org");
        draft.metadata.insert("qwen2.made_up", 0.1f32);
        draft.metadata.insert("made.up", vec![-1i64, 7]);
    });
    let direct = translated(&source, Target::Safetensors).unwrap();
    assert_eq!(whats(&direct.losses), ["key `qwen2.made_up`", "key `made.up`"]);
    assert_eq!(whats(&direct.notes), ["key `general.url`"]);
    let apr = converted(&source, Target::Apr);
    let by_way_of_apr = translated(&apr, Target::Safetensors).unwrap();
    assert_eq!(whats(&by_way_of_apr.losses), ["key `qwen2.made_up`", "key `made.up`"]);
    assert_eq!(metadata(&converted(&apr, Target::Gguf)), metadata(&source));
}

#[test]
fn an_apr_file_whose_copy_contradicts_it_is_refused() {
    let apr = converted(&fixture("tiny/qwen2"), Target::Apr);
    let change = |key: &str, value: Value| {
        let mut draft = Draft::of(&apr);
        draft.metadata.insert(key, value);
        translated(&draft.to_apr("changed.apr").unwrap(), Target::Safetensors)
    };
    let message = change("rope_theta", 5000.0.into()).unwrap_err();
    assert!(message.contains("hugging_face.files") && message.contains("rope_theta"), "{message}");
    let message = change("tokenizer.bos_token_id", 3u32.into()).unwrap_err();
    assert!(message.contains("hugging_face.files") && message.contains("bos"), "{message}");
    let copy: Map = [("../config.json", Map::default())].into_iter().collect();
    let message = change("hugging_face.files", copy.into()).unwrap_err();
    assert!(message.contains("../config.json"), "{message}");
}

#[test]
fn an_apr_file_that_changed_is_converted_back_as_it_is_now() {
    let apr = converted(&fixture("tiny/qwen2/qwen2-F16.gguf"), Target::Apr);
    let mut draft = Draft::of(&apr);
    draft.metadata.insert("rope_theta", 5000.0);
    let gguf = converted(&draft.to_apr("changed.apr").unwrap(), Target::Gguf);
    assert_eq!(gguf.metadata().f64("qwen2.rope.freq_base").unwrap(), Some(5000.0));
}

#[test]
fn experts_that_are_not_renormalised_are_a_loss_for_llama_cpp_only() {
    let source = converted(&fixture("tiny/qwen3-moe"), Target::Apr);
    let mut draft = Draft::of(&source);
    draft.metadata.remove("hugging_face.files");
    draft.metadata.insert("norm_topk_prob", false);
    let source = draft.to_apr("changed.apr").unwrap();
    let gguf = translated(&source, Target::Gguf).unwrap();
    assert_eq!(whats(&gguf.losses), ["norm_topk_prob = false"]);
    says_the_same(&source, &opened(&source, Target::Gguf, &gguf));
    says_the_same(&source, &converted(&source, Target::Safetensors));
}

#[test]
fn what_a_container_computes_otherwise_is_refused() {
    let sparse = |checkpoint: Checkpoint| {
        let mut draft = Draft::of(&converted(&checkpoint, Target::Apr));
        draft.metadata.remove("hugging_face.files");
        draft.metadata.insert("decoder_sparse_step", 2u32);
        draft.to_apr("changed.apr").unwrap()
    };
    let error = translated(&sparse(fixture("tiny/qwen3-moe")), Target::Gguf).unwrap_err();
    assert!(error.contains("decoder_sparse_step"), "{error}");

    let partial = altered("tiny/qwen2/qwen2-F16.gguf", |draft| {
        draft.metadata.insert("qwen2.rope.dimension_count", 8u32);
    });
    for target in [Target::Apr, Target::Safetensors] {
        let error = translated(&partial, target).unwrap_err();
        assert!(error.contains("8 of 16 rotated channels"), "{error}");
    }
    assert_eq!(head_rows(&partial, &read_config(&partial).unwrap()).unwrap(), HeadRows::Halves);
}

#[test]
fn keys_that_an_apr_file_was_given_later_are_judged_on_the_way_back() {
    let mut draft = Draft::of(&converted(&fixture("tiny/qwen2/qwen2-F16.gguf"), Target::Apr));
    draft.metadata.insert("made_up", 7u32);
    draft.metadata.insert("license", "MIT");
    let source = draft.to_apr("changed.apr").unwrap();
    let gguf = translated(&source, Target::Gguf).unwrap();
    assert_eq!(whats(&gguf.losses), ["key `made_up`"]);
    assert_eq!(whats(&gguf.notes), ["key `original_format`", "key `license`"]);
}

/// As aprender writes them: no copies of other containers' words, and of the tokenizer only the essential.
#[test]
fn an_apr_file_of_another_writer_says_the_same_elsewhere() {
    let mut draft = Draft::of(&converted(&fixture("tiny/qwen2"), Target::Apr));
    for key in [
        "hugging_face.files",
        "tokenizer.pre_type",
        "tokenizer.token_type",
        "tokenizer.add_bos_token",
        "tokenizer.add_eos_token",
        "tokenizer.eot_token_id",
        "tie_word_embeddings",
    ] {
        assert!(draft.metadata.remove(key).is_some(), "{key}");
    }
    let source = draft.to_apr("foreign.apr").unwrap();
    for target in Target::ALL {
        says_the_same(&source, &converted(&source, target));
    }
}

#[test]
fn an_apr_file_with_rows_in_pairs_is_told_that_they_are_in_halves_now() {
    let mut draft = Draft::of(&converted(&fixture("tiny/llama"), Target::Apr));
    draft.metadata.insert("rope_type", 0u32);
    let source = draft.to_apr("pairs.apr").unwrap();
    assert_eq!(converted(&source, Target::Apr).metadata().u64("rope_type").unwrap(), Some(2));
}

#[test]
fn a_file_type_goes_with_the_types_of_the_tensors() {
    let source = fixture("pycoder-3m/pycoder-3m-Q4_K_M.gguf");
    let config = read_config(&source).unwrap();
    let layout = |dtype, recipe| Layout {
        head_rows: HeadRows::Halves,
        dtype,
        recipe,
        head: !config.tie_word_embeddings,
    };
    let file_type = |source: &Checkpoint, layout: &Layout| {
        let translated = translate(source, &config, Target::Gguf, layout).unwrap();
        translated.map.get("general.file_type").and_then(Value::as_u64)
    };
    let recipe = Some(Recipe::Q5_K_M);
    assert_eq!(file_type(&source, &layout(DType::Q4_K, None)), Some(15));
    assert_eq!(file_type(&source, &layout(DType::Q5_K, recipe)), Some(17));
    // `.apr` has no Q8_0: tensors become something else there, and are no Q8_0 on the way back.
    let apr = converted(&fixture("pycoder-3m/pycoder-3m-Q8_0.gguf"), Target::Apr);
    assert_eq!(file_type(&apr, &layout(DType::F32, None)), Some(0));
}

#[test]
fn a_vocabulary_of_151_thousand_is_padded_for_gguf_and_fits_into_apr() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/qwen2-tokenizer");
    let read = |name: &str| std::fs::read(folder.join(name)).ok().map(Bytes::from);
    let (Some(tokenizer), Some(settings)) = (read("tokenizer.json"), read("tokenizer_config.json"))
    else {
        println!("skipped: there is no tokenizer in {}", folder.display());
        return;
    };
    let mut config = serde_json::Value::from(fixture("tiny/qwen2").metadata());
    for (key, number) in
        [("vocab_size", 151_936), ("bos_token_id", 151_643), ("eos_token_id", 151_645)]
    {
        config[key] = number.into();
    }
    config.as_object_mut().unwrap().remove("__metadata__");
    let rows = Stored::new(DType::BF16, [151_936, 1].into(), vec![0; 2 * 151_936].into()).unwrap();
    let bias = Stored::new(DType::BF16, [1].into(), vec![0; 2].into()).unwrap();
    let tensors = vec![
        ("model.embed_tokens.weight".to_owned(), rows),
        ("model.layers.0.self_attn.q_proj.bias".to_owned(), bias),
    ];
    let weights = Draft { metadata: Map::default(), tensors }.safetensors().unwrap();
    let contents = [
        ("config.json".to_owned(), config.to_string().into_bytes().into()),
        ("tokenizer.json".to_owned(), tokenizer),
        ("tokenizer_config.json".to_owned(), settings),
        ("model.safetensors".to_owned(), weights.into()),
    ];
    let source = Checkpoint::from_files("memory", &contents).unwrap();
    let apr = converted(&source, Target::Apr);
    let gguf = converted(&source, Target::Gguf);
    for target in [&gguf, &converted(&apr, Target::Gguf)] {
        let tokens = target.metadata().strings("tokenizer.ggml.tokens").unwrap().unwrap();
        assert_eq!((tokens.len(), tokens[151_646]), (151_936, "[PAD151646]"));
    }
    assert_eq!(files(&source), files(&converted(&apr, Target::Safetensors)));
    let by_way_of_gguf = converted(&gguf, Target::Safetensors);
    same_ids(&source, &by_way_of_gguf);
    let sizes =
        [&source, &by_way_of_gguf].map(|c| Tokenizer::from_checkpoint(c).unwrap().vocab_size());
    assert_eq!(sizes, [151_646; 2], "without padding");
}

/// Every place of a copy, replaced by what does not belong there: converted or refused, and never a panic.
#[test]
fn a_damaged_copy_is_refused_or_does_not_matter() {
    let mut refused = 0;
    for (name, key, target) in [
        ("tiny/qwen3", "hugging_face.files", Target::Safetensors),
        ("tiny/qwen3/qwen3-F16.gguf", "gguf.metadata", Target::Gguf),
    ] {
        let apr = converted(&fixture(name), Target::Apr);
        let copy = serde_json::Value::from(apr.metadata().get(key).unwrap());
        let mut paths = Vec::new();
        collect_paths(&copy, String::new(), 0, &mut paths);
        assert!(paths.len() > 20, "{name}");
        for path in paths {
            for junk in [
                Value::Null,
                7u32.into(),
                "x".into(),
                Vec::<Value>::new().into(),
                Map::default().into(),
            ] {
                let mut damaged = apr.metadata().get(key).unwrap().clone();
                replace(&mut damaged, &path, junk);
                let mut draft = Draft::of(&apr);
                draft.metadata.insert(key, damaged);
                let result = translated(&draft.to_apr("damaged.apr").unwrap(), target);
                refused += usize::from(result.is_err());
            }
        }
    }
    assert!(refused > 100, "{refused}");
}

/// JSON pointers to the values of objects, down to the third level.
fn collect_paths(value: &serde_json::Value, path: String, level: usize, paths: &mut Vec<String>) {
    let Some(map) = value.as_object().filter(|_| level < 3) else { return };
    for (key, inner) in map {
        let path = format!("{path}/{key}");
        paths.push(path.clone());
        collect_paths(inner, path, level + 1, paths);
    }
}

fn replace(value: &mut Value, path: &str, junk: Value) {
    let (key, rest) = path[1..].split_once('/').unwrap_or((&path[1..], ""));
    let Value::Object(map) = value else { return };
    match rest {
        "" => {
            map.insert(key, junk);
        }
        rest => {
            let mut inner = map.get(key).unwrap().clone();
            replace(&mut inner, &format!("/{rest}"), junk);
            map.insert(key, inner);
        }
    }
}

#[test]
fn a_sentencepiece_vocabulary_says_the_same_in_every_container() {
    let words = [
        "▁t", "he", "▁the", "ll", "lo", "llo", "hello", "▁hello", "▁", "h", "e", "l", "o", "t", "é",
    ];
    let mut pieces =
        vec![("<unk>".to_owned(), 0.0, 2), ("<s>".to_owned(), 0.0, 3), ("</s>".to_owned(), 0.0, 3)];
    pieces.extend((0..=255u8).map(|byte| (format!("<0x{byte:02X}>"), 0.0, 6)));
    let scores = (0..words.len()).map(|rank| 0.0 - rank as f32);
    pieces.extend(words.iter().zip(scores).map(|(word, score)| (word.to_string(), score, 1)));
    pieces.extend((pieces.len()..320).map(|id| (format!("[PAD{id}]"), 0.0, 5)));
    let source = altered("tiny/llama/llama-F16.gguf", |draft| {
        let tokens: Vec<_> = pieces.iter().map(|piece| piece.0.as_str()).collect();
        let scores: Vec<f32> = pieces.iter().map(|piece| piece.1).collect();
        let kinds: Vec<i32> = pieces.iter().map(|piece| piece.2).collect();
        for key in ["merges", "padding_token_id"] {
            draft.metadata.remove(&format!("tokenizer.ggml.{key}"));
        }
        draft.metadata.remove("tokenizer.chat_template");
        for (key, value) in [
            ("model", Value::from("llama")),
            ("pre", "default".into()),
            ("tokens", tokens.into()),
            ("scores", scores.into()),
            ("token_type", kinds.into()),
            ("bos_token_id", 1u32.into()),
            ("eos_token_id", 2u32.into()),
            ("unknown_token_id", 0u32.into()),
        ] {
            draft.metadata.insert(format!("tokenizer.ggml.{key}"), value);
        }
    });
    let ids = Tokenizer::from_checkpoint(&source).unwrap().encode("the hello", Specials::Literal);
    assert_eq!(ids.unwrap(), [1, 261, 266]);
    for target in Target::ALL {
        let first = converted(&source, target);
        for target in Target::ALL {
            same_ids(&source, &converted(&first, target));
        }
    }
    let by_way_of_apr = converted(&converted(&source, Target::Apr), Target::Gguf);
    assert_eq!(metadata(&by_way_of_apr), metadata(&source));
}

fn same_ids(source: &Checkpoint, target: &Checkpoint) {
    let tokenizers = [source, target].map(|c| Tokenizer::from_checkpoint(c).unwrap());
    for text in TEXTS.iter().chain(&["hello the llo", " <s>hello</s> thé"]) {
        for specials in [Specials::Parse, Specials::Literal] {
            let [a, b] = tokenizers.each_ref().map(|t| t.encode(text, specials).unwrap());
            assert_eq!(a, b, "{}: {text:?}", target.path().display());
        }
    }
}

#[test]
fn files_of_a_directory_that_are_not_read_are_a_loss() {
    let folder = tempfile::tempdir().unwrap();
    let original = fixture("tiny/qwen2");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(original.path().join(name), folder.path().join(name)).unwrap();
    }
    let losses = || {
        let source = Checkpoint::open(folder.path()).unwrap();
        Target::ALL.map(|target| translated(&source, target).unwrap().losses)
    };
    assert_eq!(losses(), [const { Vec::new() }; 3], "a model may have no tokenizer");
    for name in ["tokenizer.model", "adapter_config.json", "README.md"] {
        std::fs::write(folder.path().join(name), "").unwrap();
    }
    for losses in losses() {
        assert_eq!(whats(&losses), ["adapter_config.json", "tokenizer.model"]);
    }
}
