//! Tokenizer keys for a GGUF or `.apr` file.

use apr_format::Map;

use super::Keys;
use crate::error::{Error, Place, Result};
use crate::parts::{Algorithm, Parts, hole};
use crate::vocabulary::Kind;

/// The keys that say what `parts` say, with holes up to `vocab_size` ids.
pub(crate) fn write(parts: &Parts, keys: &Keys, vocab_size: usize) -> Result<Map> {
    let mut map = Map::default();
    let size = parts.tokens.len().max(vocab_size);
    let padding = (parts.tokens.len()..size).map(|id| (hole(id), Kind::Unused));
    let tokens: Vec<_> = parts.tokens.iter().cloned().chain(padding).collect();
    let name = match &parts.algorithm {
        Algorithm::Bpe { .. } => "gpt2",
        Algorithm::SentencePiece { .. } => "llama",
    };
    map.insert(keys.model, name);
    // llama.cpp asks for a name here, and has one for those who need none.
    let pre = match &parts.algorithm {
        Algorithm::Bpe { pre, .. } => pre.as_str(),
        Algorithm::SentencePiece { .. } => "default",
    };
    map.insert(keys.pre, pre);
    map.insert(keys.tokens, tokens.iter().map(|token| token.0.as_str()).collect::<Vec<_>>());
    match &parts.algorithm {
        Algorithm::Bpe { merges, .. } => {
            map.insert(keys.merges, joined(keys, merges)?);
        }
        Algorithm::SentencePiece { scores, adds_space } => {
            let none = std::iter::repeat_n(0.0, size - parts.tokens.len());
            map.insert(keys.scores, scores.iter().copied().chain(none).collect::<Vec<f32>>());
            map.insert(keys.adds_space, *adds_space);
        }
    }
    map.insert(keys.kinds, tokens.iter().map(|token| number_of(token.1)).collect::<Vec<i32>>());
    for (key, id) in [
        (keys.bos, parts.bos),
        (keys.eos, parts.eos),
        (keys.stops[0], parts.eot),
        (keys.stops[1], parts.eom),
        (keys.unknown, parts.unknown),
        (keys.padding, parts.padding),
    ] {
        if let Some(id) = id {
            map.insert(key, id);
        }
    }
    map.insert(keys.adds_bos, parts.adds_bos);
    map.insert(keys.adds_eos, parts.adds_eos);
    if !parts.named_templates.is_empty() {
        let names: Vec<_> = parts.named_templates.iter().map(|named| named.0.as_str()).collect();
        map.insert(keys.templates, names);
        for (name, template) in &parts.named_templates {
            map.insert(format!("{}.{name}", keys.template), template.as_str());
        }
    }
    if let Some(template) = &parts.template {
        map.insert(keys.template, template.as_str());
    }
    Ok(map)
}

/// Merge rules as `left right`. Neither may have a space, which would be taken for the one between them.
fn joined(keys: &Keys, merges: &[(String, String)]) -> Result<Vec<String>> {
    let join = |(index, (left, right)): (usize, &(String, String))| {
        if left.contains(' ') || right.contains(' ') {
            let merge = format!("{left:?}, {right:?}");
            return Err(Error::MalformedMerge { place: Place::new("", keys.merges), index, merge });
        }
        Ok(format!("{left} {right}"))
    };
    merges.iter().enumerate().map(join).collect()
}

/// The number of a kind in GGUF, which `.apr` borrows.
fn number_of(kind: Kind) -> i32 {
    match kind {
        Kind::Normal => 1,
        Kind::Unknown => 2,
        Kind::Control => 3,
        Kind::UserDefined => 4,
        Kind::Unused => 5,
        Kind::Byte => 6,
    }
}
