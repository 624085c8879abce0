//! Another container's own words, taken along in an `.apr` file, so that the way back loses nothing.
//!
//! A GGUF file's keys are an object under [`GGUF`], a Hugging Face directory's files under [`FILES`]. What follows from
//! the `.apr` file's own keys is not said twice: its place says that it is derived. What is said twice all the same, such as a
//! `config.json`, must agree with the file's own keys when it is used (`check`).

use std::collections::BTreeSet;

use apr_format::{Checkpoint, Container, Map, Value};
use apr_tokenizer::{Algorithm, Kind, Parts};
use serde_json::json;

use super::{
    Facts, gguf,
    hugging_face::{Content, Files, files_of},
    json,
};
use crate::{Error, Result, Target};

/// The keys of the GGUF file that an `.apr` file was made from, each with its type.
pub(super) const GGUF: &str = "gguf.metadata";

/// The files of the Hugging Face directory that an `.apr` file was made from.
pub(super) const FILES: &str = "hugging_face.files";

/// What stands for a value that follows from the file's own keys.
const DERIVED: &str = "derived";

/// What a container said in its own words: the source itself, or the copy that it carries.
pub(super) enum Original {
    /// The whole metadata of a source in the target's container.
    Own(Map),
    /// The files of a source that is a Hugging Face directory.
    OwnFiles(Files),
    /// An `.apr` file's copy.
    Copy(Map),
}

impl Original {
    /// What `source` has in the words of `target`.
    pub(super) fn of(source: &Checkpoint, target: Target) -> Result<Option<Self>> {
        let metadata = source.metadata();
        let own = || metadata.iter().map(|(key, value)| (key, value.clone())).collect();
        let copy = |key: &str| metadata.get(key).and_then(Value::as_object).cloned();
        Ok(match (source.container(), target) {
            (Container::Gguf { .. }, Target::Gguf) | (Container::Apr, Target::Apr) => {
                Some(Self::Own(own()))
            }
            (Container::Safetensors, Target::Safetensors) => {
                Some(Self::OwnFiles(files_of(source)?))
            }
            (Container::Apr, Target::Gguf) => copy(GGUF).map(Self::Copy),
            (Container::Apr, Target::Safetensors) => copy(FILES).map(Self::Copy),
            _ => None,
        })
    }

    /// As `.apr` keys: only a source of that container has them.
    pub(super) fn apr(self) -> Map {
        match self {
            Self::Own(map) | Self::Copy(map) => map,
            Self::OwnFiles(_) => Map::default(),
        }
    }

    /// As GGUF keys.
    pub(super) fn gguf(self, facts: &Facts<'_>) -> Result<Map> {
        let copy = match self {
            Self::Copy(copy) => copy,
            own => return Ok(own.apr()),
        };
        let derived = gguf::write(facts)?;
        let restore = |(key, entry): (&str, &Value)| {
            let value = match is_derived(entry) {
                true => derived.get(key).cloned(),
                false => typed(entry),
            };
            let expected = "a type and a value, or a key that follows from the file's own";
            value
                .map(|value| (key.to_owned(), value))
                .ok_or_else(|| damaged(facts, GGUF, key, expected))
        };
        copy.iter().map(restore).collect()
    }

    /// As files of a Hugging Face directory.
    pub(super) fn files(self, facts: &Facts<'_>) -> Result<Files> {
        let copy = match self {
            Self::OwnFiles(files) => return Ok(files),
            Self::Own(copy) | Self::Copy(copy) => copy,
        };
        let mut files = Vec::new();
        for (name, value) in copy.iter() {
            let is_plain = !name.contains(['/', '\\', '\0']) && !name.starts_with('.');
            let content = match value {
                Value::String(text) if is_plain => Content::Text(text.clone()),
                Value::Object(_) if is_plain => Content::Json(value.into()),
                _ => {
                    return Err(damaged(
                        facts,
                        FILES,
                        name,
                        "a JSON object or a text, under a plain name",
                    ));
                }
            };
            files.push((name.to_owned(), content));
        }
        let mut files = Files(files);
        if let (Some(tokenizer), Some(parts)) = (files.json_mut("tokenizer.json"), &facts.tokenizer)
        {
            let added = added_ids(tokenizer);
            let model = &mut tokenizer["model"];
            if let Some(with) = model["vocab"][DERIVED].as_array() {
                let with = with.iter().filter_map(id_of).collect();
                model["vocab"] = vocab(parts, &added, &with);
            }
            if let Some(form) = model["merges"][DERIVED].as_str() {
                model["merges"] = merges(parts, form);
            }
        }
        Ok(files)
    }
}

/// Takes the words of the source along in `map`, the metadata of an `.apr` file.
pub(super) fn carry(facts: &Facts<'_>, map: &mut Map) -> Result<()> {
    let source = facts.source;
    match source.container() {
        Container::Gguf { .. } => {
            // What GGUF could not say today is all the more to be kept as it was said.
            let derived = gguf::write(facts).unwrap_or_default();
            let entry = |(key, value): (&str, &Value)| {
                let follows = derived.get(key) == Some(value) && !gguf::is_of_layout(key);
                let entry: Map = match follows {
                    true => [(DERIVED, Value::from(true))].into_iter().collect(),
                    false => [("type", type_of(value).into()), ("value", value.clone())]
                        .into_iter()
                        .collect(),
                };
                (key.to_owned(), Value::from(entry))
            };
            map.insert(GGUF, source.metadata().iter().map(entry).collect::<Map>());
        }
        Container::Safetensors => {
            let mut files = files_of(source)?;
            if let (Some(tokenizer), Some(parts)) =
                (files.json_mut("tokenizer.json"), &facts.tokenizer)
            {
                derive(tokenizer, parts);
            }
            let entry = |(name, content)| {
                let value = match content {
                    Content::Json(json) => json::value_of(json),
                    Content::Text(text) => text.into(),
                };
                (name, value)
            };
            map.insert(FILES, files.0.into_iter().map(entry).collect::<Map>());
        }
        Container::Apr => {}
    }
    Ok(())
}

/// Leaves out of a `tokenizer.json` what `parts` say: vocabulary and merges, which are nearly all of it.
fn derive(tokenizer: &mut serde_json::Value, parts: &Parts) {
    let added = added_ids(tokenizer);
    let model = &mut tokenizer["model"];
    let listed: BTreeSet<u32> = model["vocab"]
        .as_object()
        .into_iter()
        .flat_map(|vocab| vocab.values().filter_map(id_of))
        .collect();
    let with = added.intersection(&listed).copied().collect();
    if model["vocab"] == vocab(parts, &added, &with) {
        model["vocab"] = json!({ DERIVED: with });
    }
    if let Some(form) =
        ["pairs", "texts"].into_iter().find(|form| model["merges"] == merges(parts, form))
    {
        model["merges"] = json!({ DERIVED: form });
    }
}

/// The model's vocabulary: all tokens but the added ones that are not listed `with` it.
fn vocab(parts: &Parts, added: &BTreeSet<u32>, with: &BTreeSet<u32>) -> serde_json::Value {
    let is_listed = |(id, (_, kind)): &(u32, &(String, Kind))| {
        *kind != Kind::Unused && (!added.contains(id) || with.contains(id))
    };
    let tokens = (0u32..).zip(&parts.tokens).filter(is_listed);
    tokens
        .map(|(id, (text, _))| (text.clone(), json!(id)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// The merge rules, as pairs or in the older form.
fn merges(parts: &Parts, form: &str) -> serde_json::Value {
    let pairs = match &parts.algorithm {
        Algorithm::Bpe { merges, .. } => merges,
        Algorithm::SentencePiece { scores, .. } => &parts.merges_of_scores(scores),
    };
    match form {
        "pairs" => json!(pairs),
        _ => pairs.iter().map(|(left, right)| json!(format!("{left} {right}"))).collect(),
    }
}

fn added_ids(tokenizer: &serde_json::Value) -> BTreeSet<u32> {
    let added = tokenizer["added_tokens"].as_array();
    added.into_iter().flatten().filter_map(|token| id_of(&token["id"])).collect()
}

fn id_of(value: &serde_json::Value) -> Option<u32> {
    value.as_u64().and_then(|id| id.try_into().ok())
}

fn is_derived(entry: &Value) -> bool {
    entry.as_object().is_some_and(|entry| entry.get(DERIVED) == Some(&Value::Bool(true)))
}

/// The type of a GGUF value, which JSON does not tell: `[f32]` is a list of f32.
fn type_of(value: &Value) -> String {
    match value {
        Value::Null | Value::Object(_) => "json".to_owned(),
        Value::Bool(_) => "bool".to_owned(),
        Value::U64(_) => "unsigned".to_owned(),
        Value::I64(_) => "signed".to_owned(),
        Value::F32(_) => "f32".to_owned(),
        Value::F64(_) => "f64".to_owned(),
        Value::String(_) => "string".to_owned(),
        Value::Array(values) => {
            format!("[{}]", values.iter().next().as_ref().map(type_of).unwrap_or_default())
        }
    }
}

/// The value of an entry, in the type that it states.
fn typed(entry: &Value) -> Option<Value> {
    let entry = entry.as_object()?;
    as_type(entry.get("type")?.as_str()?, entry.get("value")?)
}

fn as_type(kind: &str, value: &Value) -> Option<Value> {
    // JSON has no NaN and no infinities: they are texts.
    let number = |value: &Value| match value {
        Value::String(text) => text.parse().ok(),
        number => number.as_f64(),
    };
    Some(match kind {
        "bool" => value.as_bool()?.into(),
        "unsigned" => value.as_u64()?.into(),
        "signed" => value.as_i64()?.into(),
        "f32" => (number(value)? as f32).into(),
        "f64" => number(value)?.into(),
        "string" => value.as_str()?.into(),
        list => {
            let inner = list.strip_prefix('[')?.strip_suffix(']')?;
            Value::Array(
                value.as_array()?.iter().map(|v| as_type(inner, &v)).collect::<Option<_>>()?,
            )
        }
    })
}

fn damaged(facts: &Facts<'_>, copy: &'static str, key: &str, expected: &'static str) -> Error {
    Error::Carried { file: facts.source.path().to_owned(), copy, key: key.to_owned(), expected }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typed_values_come_back_through_json_as_they_were() {
        let values = [
            Value::from(true),
            7u64.into(),
            7i64.into(),
            (-7i64).into(),
            1e-6f32.into(),
            f32::INFINITY.into(),
            0.1f64.into(),
            "text".into(),
            vec![1i64, -1].into(),
            vec![0.1f32, 3.0].into(),
            Vec::<Value>::new().into(),
            vec![vec![1u64]].into(),
        ];
        for value in values {
            let text = serde_json::Value::from(&value).to_string();
            let read = json::value_of(serde_json::from_str(&text).unwrap());
            assert_eq!(as_type(&type_of(&value), &read), Some(value), "{text}");
        }
        assert_eq!(as_type("unsigned", &"7".into()), None);
        assert_eq!(as_type("[unsigned", &vec![7u64].into()), None);
    }
}
