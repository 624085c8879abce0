//! A `tokenizer.json`, for the library that this crate uses too and for transformers.

use serde_json::{Map, Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::error::{Error, Place, Result};
use crate::family::Family;
use crate::parts::{Algorithm, Parts, is_hole, merges_of_scores, tie};
use crate::vocabulary::Kind;

/// The file that says what `parts` say.
pub(crate) fn write(parts: &Parts) -> Result<Value> {
    let added = added(parts);
    let is_added = |id: u32| added.binary_search_by_key(&id, |(added, _)| *added).is_ok();
    // The library numbers what is added on from the size of the model's vocabulary, whatever the file says.
    let holes = (0..).zip(&parts.tokens).filter(|(id, token)| is_hole(*id, token)).count();
    let first = added.first().map_or(parts.tokens.len(), |(id, _)| *id as usize);
    let follows = holes == 0 && first + added.len() == parts.tokens.len();
    let vocab: Map<String, Value> = (0u32..)
        .zip(&parts.tokens)
        .filter(|(id, token)| !is_hole(*id as usize, token))
        .filter(|(id, _)| !follows || !is_added(*id))
        .map(|(id, (text, _))| (text.clone(), id.into()))
        .collect();
    let mut model = json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": null,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": false,
        "byte_fallback": false,
        "ignore_merges": false,
        "vocab": vocab,
    });
    let (normalizer, pre_tokenizer, decoder) = match &parts.algorithm {
        Algorithm::Bpe { pre, merges } => {
            let place = Place::new("tokenizer.json", "pre_tokenizer");
            let family = Family::named(&place, pre)?;
            model["ignore_merges"] = family.ignore_merges.into();
            model["merges"] = json!(merges);
            (
                library(&family.normalizer())?,
                library(&family.pre_tokenizer()?)?,
                library(&ByteLevel::default())?,
            )
        }
        Algorithm::SentencePiece { scores, adds_space } => {
            if let Some((first, second)) = tie(&parts.tokens, scores) {
                return Err(Error::Unsupported {
                    place: Place::new("tokenizer.json", "model.merges"),
                    found: format!("the tokens {first:?} and {second:?} of one score"),
                    supported: "scores that say which of two tokens is merged first".to_owned(),
                });
            }
            model["unk_token"] = json!(parts.unknown.and_then(|id| parts.text(id)));
            model["fuse_unk"] = true.into();
            model["byte_fallback"] = true.into();
            model["merges"] = json!(merges_of_scores(&parts.tokens, scores));
            let (normalizer, decoder) = spaces(*adds_space);
            (normalizer, Value::Null, decoder)
        }
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.into_iter().map(|(_, token)| token).collect::<Vec<_>>(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(parts)?,
        "decoder": decoder,
        "model": model,
    }))
}

/// A step as the library itself writes it.
fn library(step: &impl serde::Serialize) -> Result<Value> {
    let file = || "tokenizer.json".to_owned();
    serde_json::to_value(step).map_err(|source| Error::Json { file: file(), source })
}

/// The tokens that are matched whole in a text, by id.
fn added(parts: &Parts) -> Vec<(u32, Value)> {
    let added = |(id, (text, _)): (u32, &(String, Kind))| {
        let special = match parts.kind_in_use(id) {
            Kind::Control | Kind::Unknown => true,
            Kind::UserDefined => false,
            Kind::Normal | Kind::Unused | Kind::Byte => return None,
        };
        let token = json!({
            "id": id,
            "content": text,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": false,
            "special": special,
        });
        Some((id, token))
    };
    (0u32..).zip(&parts.tokens).filter_map(added).collect()
}

/// How SentencePiece marks spaces, and how the marks become spaces again.
fn spaces(adds_space: bool) -> (Value, Value) {
    let mark = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let normalizer = match adds_space {
        false => mark,
        true => {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
            let prepend = json!({"type": "Prepend", "prepend": "▁"});
            json!({"type": "Sequence", "normalizers": [prepend, mark]})
        }
    };
    (normalizer, json!({"type": "Sequence", "decoders": decoders}))
}

/// What goes around every text.
fn post_processor(parts: &Parts) -> Result<Value> {
    let named = |adds: bool, id: Option<u32>| {
        id.filter(|_| adds).and_then(|id| Some((id, parts.text(id)?)))
    };
    let (bos, eos) = (named(parts.adds_bos, parts.bos), named(parts.adds_eos, parts.eos));
    let is_bytes = matches!(parts.algorithm, Algorithm::Bpe { .. });
    let bytes = match is_bytes {
        true => library(&ByteLevel::new(false, false, false))?,
        false => Value::Null,
    };
    if bos.is_none() && eos.is_none() {
        return Ok(bytes);
    }
    let token = |part: Option<(u32, &str)>, sequence: u32| {
        part.map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": sequence}}))
    };
    let around = |name: &str, sequence: u32| -> Vec<Value> {
        let text = json!({"Sequence": {"id": name, "type_id": sequence}});
        let parts = [token(bos, sequence), Some(text), token(eos, sequence)];
        parts.into_iter().flatten().collect()
    };
    let tokens: Map<String, Value> = bos
        .into_iter()
        .chain(eos)
        .map(|(id, text)| (text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    let template = json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": ([around("A", 0), around("B", 1)].concat()),
        "special_tokens": tokens,
    });
    Ok(match is_bytes {
        true => json!({"type": "Sequence", "processors": [bytes, template]}),
        false => template,
    })
}
