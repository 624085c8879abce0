//! Tokenizers and templates that lose text are found out.

mod support;

use std::{fs, path::Path};

use apr_check::{Break, Check, Checked, Outcome};
use apr_format::Checkpoint;
use serde_json::{Value, json};
use support::{Mischief, checked};

/// A copy of a tiny model with changes to its JSON files.
fn changed(file: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(apr_testkit::fixture("tiny/qwen2")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = copy.path().join(file);
    let mut json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    fs::write(&path, json.to_string()).unwrap();
    copy
}

fn of(model: &Path, check: Check) -> Checked {
    checked(&Checkpoint::open(model).unwrap(), Mischief::None, &[check]).checks.remove(0)
}

/// What is broken, in words.
#[track_caller]
fn said(checked: &Checked) -> &str {
    match &checked.outcome {
        Outcome::Broken { breaks } => match &breaks[0] {
            Break::Other { what } => what,
            other => panic!("{other:?}"),
        },
        outcome => panic!("{} is {outcome:?}", checked.name),
    }
}

#[test]
fn a_tokenizer_that_loses_capitals_does_not_give_texts_back() {
    let model = changed("tokenizer.json", |json| json["normalizer"] = json!({"type": "Lowercase"}));
    let found = of(model.path(), Check::Tokenizer);
    let what = said(&found);
    assert!(what.contains("\"Hello, world!\" comes back changed: \"hello"), "{what}");
    let ids = of(model.path(), Check::TokenIds);
    assert_eq!(ids.outcome, Outcome::Held);
    assert!(ids.notes[0].what.contains("comes back changed"), "{:?}", ids.notes);
}

#[test]
fn a_token_whose_own_text_cannot_be_spelt_is_named() {
    let model = changed("tokenizer.json", |json| {
        let vocab = json["model"]["vocab"].as_object_mut().unwrap();
        let id = vocab.remove("~").expect("every byte has a token");
        vocab.insert("~q".to_owned(), id);
    });
    let found = of(model.path(), Check::TokenIds);
    assert!(said(&found).starts_with("\"~q\", the text of token "), "{}", said(&found));
    assert!(said(&of(model.path(), Check::Tokenizer)).contains("would lose text"));
}

#[test]
fn a_tokenizer_of_another_model_has_ids_that_the_embedding_lacks() {
    let model = changed("config.json", |_| {});
    let other = apr_testkit::fixture("pycoder-3m/tokenizer.json");
    fs::copy(other, model.path().join("tokenizer.json")).unwrap();
    let found = of(model.path(), Check::Vocabulary);
    assert_eq!(said(&found), "the tokenizer has 2048 ids, but the embedding only 320 rows");
}

#[test]
fn a_tokenizer_that_cannot_be_read_is_broken_and_none_at_all_does_not_apply() {
    let model = changed("tokenizer.json", |json| json["model"]["merges"] = json!(["no such"]));
    assert!(said(&of(model.path(), Check::Tokenizer)).contains("tokenizer.json"));
    fs::remove_file(model.path().join("tokenizer.json")).unwrap();
    for check in [Check::Vocabulary, Check::Tokenizer, Check::SpecialTokens, Check::ChatTemplate] {
        let found = of(model.path(), check);
        assert!(matches!(found.outcome, Outcome::NotApplicable { .. }), "{check}");
    }
}

#[test]
fn a_template_that_fails_or_drops_what_was_said_is_broken() {
    let with = |template: &str| {
        changed("tokenizer_config.json", |json| json["chat_template"] = json!(template))
    };
    let found = of(with("{{ raise_exception('never') }}").path(), Check::ChatTemplate);
    assert!(said(&found).contains("never"));
    let forgetful = with("{{ messages[-1].content }}");
    let found = of(forgetful.path(), Check::ChatTemplate);
    assert!(said(&found).contains("\"What is 2+2?\" is not in what it writes"));
    let none = changed("tokenizer_config.json", |json| {
        json.as_object_mut().unwrap().remove("chat_template");
    });
    let found = of(none.path(), Check::ChatTemplate);
    assert!(matches!(found.outcome, Outcome::NotApplicable { .. }));
}
