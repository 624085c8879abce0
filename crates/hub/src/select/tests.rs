//! Repositories as they are found on the hub.

use super::*;
use crate::Revision;

fn listing(files: &[&str]) -> Listing {
    let file = |path: &&str| RemoteFile { path: path.to_string(), size: 10, checksum: None };
    Listing {
        model: "org/name".parse().unwrap(),
        revision: Revision::default(),
        commit: "0".repeat(40),
        files: files.iter().map(file).collect(),
    }
}

fn chosen(files: &[&str], want: Want<'_>) -> (Vec<String>, Option<String>) {
    let selection = choose(&listing(files), want).unwrap();
    (selection.files.into_iter().map(|file| file.path).collect(), selection.entry)
}

#[test]
fn a_directory_is_weights_config_and_tokenizer_and_not_the_same_weights_again() {
    let needed = [
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "chat_template.jinja",
    ];
    let not_needed = [
        ".gitattributes",
        "README.md",
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
        "pytorch_model-00001-of-00002.bin",
        "sub/tokenizer.json",
    ];
    let all: Vec<&str> = needed.iter().chain(&not_needed).copied().collect();
    assert_eq!(chosen(&all, Want::Model), (needed.map(str::to_owned).to_vec(), None));
}

#[test]
fn a_single_file_goes_before_an_index_of_shards() {
    let files = [
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
    ];
    assert_eq!(chosen(&files, Want::Model).0, ["config.json", "model.safetensors"]);
}

#[test]
fn among_several_quantisations_none_is_guessed_and_any_is_found_by_its_label() {
    let files = [
        "README.md",
        "m-7b-instruct-q4_k_m.gguf",
        "m-7b-instruct-q8_0-00001-of-00002.gguf",
        "m-7b-instruct-q8_0-00002-of-00002.gguf",
        "mmproj-m-f16.gguf",
        "M-7B.IQ2_XXS.gguf",
        "M-UD-Q3_K_XL.gguf",
        "BF16/M-BF16-00001-of-00001.gguf",
    ];
    match choose(&listing(&files), Want::Model) {
        Err(error @ Error::Choose { .. }) => {
            let text = error.to_string();
            for label in ["Q4_K_M", "Q8_0", "IQ2_XXS", "UD-Q3_K_XL", "BF16"] {
                assert!(text.contains(label), "{label}: {text}");
            }
            assert!(!text.contains("mmproj"), "{text}");
        }
        other => panic!("{other:?}"),
    }
    let (found, entry) = chosen(&files, Want::Label("q8_0"));
    assert_eq!(found, files[2..4]);
    assert_eq!(entry.as_deref(), Some(files[2]));
    assert_eq!(chosen(&files, Want::Label("UD-Q3_K_XL")).0, ["M-UD-Q3_K_XL.gguf"]);
    match choose(&listing(&files), Want::Label("Q5_0")) {
        Err(Error::NoCandidate { label, candidates, .. }) => {
            assert_eq!((label.as_str(), candidates.len()), ("Q5_0", 5));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn two_files_of_one_type_are_told_apart_by_their_paths() {
    let files = ["a-Q8_0.gguf", "b-Q8_0.gguf"];
    assert!(matches!(
        choose(&listing(&files), Want::Label("Q8_0")),
        Err(Error::NoCandidate { .. })
    ));
    assert_eq!(chosen(&files, Want::Label("b-Q8_0.gguf")).0, ["b-Q8_0.gguf"]);
}

#[test]
fn a_model_that_lacks_a_part_is_refused() {
    let files = ["m-Q8_0-00001-of-00003.gguf", "m-Q8_0-00003-of-00003.gguf"];
    match choose(&listing(&files), Want::Model) {
        Err(Error::MissingPart { part: 2, parts: 3, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn patterns_choose_files_and_one_that_matches_nothing_is_an_error() {
    let files = ["a-Q4_0.gguf", "a-Q8_0.gguf", "config.json", "x/y.json"];
    let patterns = |texts: &[&str]| texts.iter().map(|t| t.to_string()).collect::<Vec<_>>();
    let (found, entry) = chosen(&files, Want::Files(&patterns(&["*Q4_0*", "*.json"])));
    assert_eq!(found, ["a-Q4_0.gguf", "config.json", "x/y.json"]);
    assert_eq!(entry.as_deref(), Some("a-Q4_0.gguf"));
    assert_eq!(chosen(&files, Want::Files(&patterns(&["*.gguf"]))).1, None);
    match choose(&listing(&files), Want::Files(&patterns(&["*.json", "*.bin"]))) {
        Err(Error::NoMatch { pattern, .. }) => assert_eq!(pattern, "*.bin"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_repository_without_readable_weights_says_what_it_has() {
    match choose(&listing(&["config.json", "pytorch_model.bin"]), Want::Model) {
        Err(error @ Error::NoWeights { .. }) => {
            assert!(error.to_string().contains("pytorch_model.bin"), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn stars_and_question_marks_match_as_in_a_shell_that_knows_no_folders() {
    for (pattern, text, expected) in [
        ("*", "", true),
        ("a*c", "abbc", true),
        ("a*c", "abbcd", false),
        ("*b*b*", "abab", true),
        ("?.gguf", "x.gguf", true),
        ("?.gguf", "xy.gguf", false),
        ("*.json", "a/b.json", true),
        ("a", "ab", false),
    ] {
        assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
    }
}
