//! The shape of `tokenizer.json` and of the files beside it.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use tokenizers::models::bpe::Merges;
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper};

use crate::error::{Error, Place, Result};
use crate::vocabulary::{Vocabulary, check_id};

#[derive(Deserialize)]
pub(super) struct TokenizerJson {
    #[serde(default)]
    pub(super) added_tokens: Vec<AddedTokenJson>,
    pub(super) normalizer: Option<NormalizerWrapper>,
    pub(super) pre_tokenizer: Option<PreTokenizerWrapper>,
    pub(super) post_processor: Option<Value>,
    pub(super) decoder: Option<Value>,
    /// Texts are cut, or filled up, to one length.
    pub(super) truncation: Option<IgnoredAny>,
    pub(super) padding: Option<IgnoredAny>,
    pub(super) model: ModelJson,
}

#[derive(Deserialize)]
pub(super) struct AddedTokenJson {
    pub(super) id: u32,
    #[serde(flatten)]
    pub(super) token: AddedToken,
}

#[derive(Deserialize)]
pub(super) struct ModelJson {
    pub(super) vocab: Entries,
    pub(super) merges: MergesJson,
    pub(super) unk_token: Option<String>,
    pub(super) continuing_subword_prefix: Option<String>,
    pub(super) end_of_word_suffix: Option<String>,
    #[serde(default)]
    pub(super) fuse_unk: bool,
    #[serde(default)]
    pub(super) byte_fallback: bool,
    #[serde(default)]
    pub(super) ignore_merges: bool,
}

/// Merge rules, as pairs or in the older spelling.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum MergesJson {
    Pairs(Merges),
    Strings(Vec<String>),
}

/// The vocabulary in the order of the file, duplicates and all.
pub(super) struct Entries(pub(super) Vec<(String, u32)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tokens and ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// Just enough of a `tokenizer.json` to name the model that cannot be read.
#[derive(Deserialize)]
struct Outline {
    model: ModelOutline,
}

#[derive(Deserialize)]
struct ModelOutline {
    #[serde(rename = "type")]
    name: String,
    #[serde(flatten)]
    _rest: std::collections::HashMap<String, IgnoredAny>,
}

impl TokenizerJson {
    pub(super) fn parse(file: &str, bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes).map_err(|source| {
            match serde_json::from_slice::<Outline>(bytes) {
                Ok(outline) if outline.model.name != "BPE" => Error::Unsupported {
                    place: Place::new(file, "model.type"),
                    found: outline.model.name,
                    supported: "BPE".to_owned(),
                },
                _ => Error::Json { file: file.to_owned(), source },
            }
        })
    }
}

/// A small JSON file of settings; absent is as good as empty.
pub(super) struct Settings {
    pub(super) file: String,
    values: Value,
}

impl Settings {
    pub(super) fn parse(file: Option<&apr_format::File>) -> Result<Self> {
        let Some(file) = file else { return Ok(Self { file: String::new(), values: Value::Null }) };
        let name = file.path().display().to_string();
        match serde_json::from_slice(file.bytes()) {
            Ok(values) => Ok(Self { file: name, values }),
            Err(source) => Err(Error::Json { file: name, source }),
        }
    }

    pub(super) fn get(&self, key: &str) -> &Value {
        &self.values[key]
    }

    /// A token, as its text or as an object with its text.
    pub(super) fn token(&self, key: &str) -> Option<&str> {
        let value = &self.values[key];
        value.as_str().or_else(|| value["content"].as_str())
    }

    /// One id or a list of ids; none if absent.
    pub(super) fn ids(&self, key: &str, vocabulary: &Vocabulary) -> Result<Vec<u32>> {
        let place = || Place::new(&self.file, key);
        let id = |value: &Value| match value.as_u64() {
            Some(id) => check_id(place(), id, vocabulary.len()),
            None => Err(Error::WrongType { place: place(), expected: "an id or a list of ids" }),
        };
        match &self.values[key] {
            Value::Null => Ok(Vec::new()),
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => Ok(vec![id(one)?]),
        }
    }
}
