//! What a `tokenizer.json` puts around every text.
//!
//! The library's own post-processors take the file at its word and panic where it contradicts
//! itself; what they add to a single text is read here instead.

use serde_json::Value;

use crate::error::{Error, Place, Result};
use crate::vocabulary::check_id;

/// The ids before and after a text.
#[derive(Debug, Default)]
pub(super) struct Affixes {
    pub(super) prefix: Vec<u32>,
    pub(super) suffix: Vec<u32>,
}

impl Affixes {
    /// Reads the `post_processor` of a tokenizer with `vocab_size` ids.
    pub(super) fn of(place: &Place, processor: Option<&Value>, vocab_size: usize) -> Result<Self> {
        let Some(processor) = processor else { return Ok(Self::default()) };
        let list = |key: &str| match processor[key].as_array() {
            Some(list) => Ok(list.as_slice()),
            None => Err(Error::Missing {
                place: Place::new(&place.file, &format!("{}.{key}", place.key)),
                expected: "a list",
            }),
        };
        match processor["type"].as_str().unwrap_or_default() {
            "ByteLevel" => Ok(Self::default()),
            "Sequence" => {
                let mut all = Self::default();
                for inner in list("processors")? {
                    let Self { prefix, suffix } = Self::of(place, Some(inner), vocab_size)?;
                    all.prefix.splice(0..0, prefix);
                    all.suffix.extend(suffix);
                }
                Ok(all)
            }
            "TemplateProcessing" => {
                let tokens = &processor["special_tokens"];
                Self::of_template(place, list("single")?, tokens, vocab_size)
            }
            other => Err(Error::Unsupported {
                place: place.clone(),
                found: other.to_owned(),
                supported: "ByteLevel, Sequence, TemplateProcessing".to_owned(),
            }),
        }
    }

    fn of_template(
        place: &Place,
        template: &[Value],
        tokens: &Value,
        vocab_size: usize,
    ) -> Result<Self> {
        let malformed = |expected| Error::WrongType { place: place.clone(), expected };
        let is_text = |piece: &&Value| !piece["Sequence"].is_null();
        if template.iter().filter(is_text).count() != 1 {
            return Err(malformed("a template in which the text occurs exactly once"));
        }
        let mut affixes = Self::default();
        let mut target = &mut affixes.prefix;
        for piece in template {
            if is_text(&piece) {
                target = &mut affixes.suffix;
                continue;
            }
            let name = piece["SpecialToken"]["id"].as_str();
            let ids = name.and_then(|name| tokens[name]["ids"].as_array());
            for id in ids.ok_or_else(|| malformed("a template whose tokens have ids"))? {
                let id =
                    id.as_u64().ok_or_else(|| malformed("a template whose ids are numbers"))?;
                target.push(check_id(place.clone(), id, vocab_size)?);
            }
        }
        Ok(affixes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tokens_go_before_and_after_the_text_as_the_template_has_them() {
        let processor = json!({"type": "Sequence", "processors": [
            {"type": "ByteLevel"},
            {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "A", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "B", "type_id": 0}}
                ],
                "special_tokens": {"A": {"ids": [1, 2]}, "B": {"ids": [3]}}
            }
        ]});
        let place = Place::new("f", "post_processor");
        let affixes = Affixes::of(&place, Some(&processor), 4).unwrap();
        assert_eq!((affixes.prefix, affixes.suffix), (vec![1, 2], vec![3]));
        let error = Affixes::of(&place, Some(&processor), 3).unwrap_err();
        assert_eq!(error.to_string(), "f: post_processor is 3, but ids must be below 3");
        assert!(Affixes::of(&place, Some(&json!({"type": "BertProcessing"})), 4).is_err());
    }
}
