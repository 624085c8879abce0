//! A `tokenizer.json` taken apart.
//!
//! What decides ids and cannot be said otherwise is an error that names it; what decides them in rare texts only is an
//! [`Omission`].

use apr_format::Checkpoint;
use serde_json::Value;
use tokenizers::AddedToken;

use super::shape::{MergesJson, Settings, TokenizerJson};
use super::{Affixes, Source, read, template_source};
use crate::bpe::split_merges;
use crate::error::{Error, Result};
use crate::family::{Family, GPT2};
use crate::parts::{Algorithm, Omission, Parts, hole, is_hole, scores_of_merges};
use crate::stop;
use crate::vocabulary::{Kind, Spelling, byte_token};

/// Takes the tokenizer beside `checkpoint` apart; there is one.
pub(crate) fn parts(checkpoint: &Checkpoint) -> Result<(Parts, Vec<Omission>)> {
    // What makes a tokenizer sound is checked here.
    let tokenizer = read(checkpoint)?;
    let companions = checkpoint.companions();
    let file = companions.tokenizer.as_ref().expect("the caller has seen it");
    let name = file.path().display().to_string();
    let source = Source { name: &name };
    let json = TokenizerJson::parse(&name, file.bytes())?;
    let mut omissions = Vec::new();

    let (spelling, _) = source.spelling(json.decoder.as_ref())?;
    let normalizer = serde_json::to_value(&json.normalizer).unwrap_or_default();
    let pre_tokenizer = serde_json::to_value(&json.pre_tokenizer).unwrap_or_default();
    for (key, is_set) in
        [("truncation", json.truncation.is_some()), ("padding", json.padding.is_some())]
    {
        if is_set {
            omissions.push(Omission {
                key: format!("tokenizer.json: {key}"),
                why: "texts of any length are encoded as they are".to_owned(),
            });
        }
    }
    note_flags(json.added_tokens.iter().map(|added| &added.token), &normalizer, &mut omissions);

    let config = Settings::parse(companions.tokenizer_config.as_ref())?;
    let map = Settings::parse(companions.special_tokens_map.as_ref())?;
    let stated = |key: &str| config.token(key).or_else(|| map.token(key));
    let id = |key: &str| stated(key).and_then(|token| tokenizer.token_id(token));

    let unknown = json.model.unk_token.as_deref().filter(|token| !token.is_empty());
    let unknown = id("unk_token").or_else(|| unknown.and_then(|token| tokenizer.token_id(token)));
    let mut tokens: Vec<_> =
        (0..tokenizer.vocab_size()).map(|id| (hole(id), Kind::Unused)).collect();
    for (token, id) in &json.model.vocab.0 {
        let is_byte = json.model.byte_fallback && byte_token(token).is_some();
        let kind = if is_byte { Kind::Byte } else { Kind::Normal };
        tokens[*id as usize] = (token.clone(), kind);
    }
    for added in &json.added_tokens {
        let kind = if added.token.special { Kind::Control } else { Kind::UserDefined };
        tokens[added.id as usize] = (added.token.content.clone(), kind);
    }
    while tokens.last().is_some_and(|token| is_hole(tokens.len() - 1, token)) {
        tokens.pop();
    }
    if let (Spelling::SentencePiece, Some(id)) = (spelling, unknown) {
        tokens[id as usize].1 = Kind::Unknown;
    }
    let merges = match json.model.merges {
        MergesJson::Pairs(merges) => merges,
        MergesJson::Strings(merges) => {
            split_merges(&source.place("model.merges"), merges.iter().map(String::as_str))?
        }
    };
    let algorithm = match spelling {
        Spelling::ByteLevel => {
            let steps = ByteLevelSteps { source: &source, ignore_merges: json.model.ignore_merges };
            let pre = steps.family(&normalizer, &pre_tokenizer, &mut omissions)?;
            Algorithm::Bpe { pre: pre.to_owned(), merges }
        }
        Spelling::SentencePiece => {
            if !json.model.byte_fallback {
                return Err(Error::Unsupported {
                    place: source.place("model.byte_fallback"),
                    found: "false".to_owned(),
                    supported: "SentencePiece vocabularies that fall back on bytes".to_owned(),
                });
            }
            let adds_space = adds_space(&source, &normalizer, &pre_tokenizer, &mut omissions)?;
            let scores = scores_of_merges(&tokens, &merges).ok_or_else(|| Error::Unsupported {
                place: source.place("model.merges"),
                found: "merge rules that no scores of tokens give".to_owned(),
                supported: "for each token all splits into two tokens, token by token, as \
                                transformers makes them from SentencePiece models"
                    .to_owned(),
            })?;
            Algorithm::SentencePiece { scores, adds_space }
        }
    };

    let stops = tokenizer.eos_ids();
    let eos = id("eos_token").or_else(|| stops.first().copied());
    let (eot, eom) = further_ends(&tokens, stops, eos, &mut omissions);
    let bos = tokenizer.bos_id();
    let place = source.place("post_processor");
    let affixes = Affixes::of(&place, json.post_processor.as_ref(), tokenizer.vocab_size())?;
    let adds = |ids: &[u32], id: Option<u32>| ids.len() == 1 && ids.first().copied() == id;
    let (adds_bos, adds_eos) = (adds(&affixes.prefix, bos), adds(&affixes.suffix, eos));
    if adds_bos == affixes.prefix.is_empty() || adds_eos == affixes.suffix.is_empty() {
        omissions.push(Omission {
            key: "tokenizer.json: post_processor".to_owned(),
            why: "puts other tokens around a text than bos before and eos after it".to_owned(),
        });
    }
    let padding = id("pad_token").or_else(|| config_padding(checkpoint));
    let template = template_source(companions, &config)?.map(|(_, source)| source);
    let named_templates = match (&companions.chat_template, config.get("chat_template")) {
        (None, Value::Array(named)) => named.iter().filter_map(named_template).collect(),
        _ => Vec::new(),
    };
    let parts = Parts {
        tokens,
        algorithm,
        bos,
        eos,
        eot,
        eom,
        unknown,
        padding,
        adds_bos,
        adds_eos,
        template,
        named_templates,
    };
    Ok((parts, omissions))
}

/// A template that goes by another name than `default`.
fn named_template(entry: &Value) -> Option<(String, String)> {
    let name = entry["name"].as_str().filter(|&name| name != "default")?;
    Some((name.to_owned(), entry["template"].as_str()?.to_owned()))
}

fn config_padding(checkpoint: &Checkpoint) -> Option<u32> {
    let id = checkpoint.metadata().u64("pad_token_id").ok().flatten()?;
    u32::try_from(id).ok()
}

/// The end of a turn and the end of a message among `stops`, beside `eos` and what ends a generation by its name.
fn further_ends(
    tokens: &[(String, Kind)],
    stops: &[u32],
    eos: Option<u32>,
    omissions: &mut Vec<Omission>,
) -> (Option<u32>, Option<u32>) {
    let text = |id: u32| tokens[id as usize].0.as_str();
    let mut rest = stops.iter().copied().filter(|&id| Some(id) != eos);
    let is_message = |id: &u32| text(*id) == "<|eom_id|>";
    let eom = rest.clone().find(is_message);
    let mut turns = rest.by_ref().filter(|id| !is_message(id) && !stop::ends_documents(text(*id)));
    let eot = turns.next();
    for id in turns.filter(|&id| !stop::is_end(text(id))) {
        omissions.push(Omission {
            key: format!("eos_token_id {id} ({:?})", text(id)),
            why: "there is room for one end of text, of turn and of message each".to_owned(),
        });
    }
    (eot, eom)
}

/// How added tokens are matched, beyond that they are matched whole.
fn note_flags<'a>(
    added: impl Iterator<Item = &'a AddedToken>,
    normalizer: &Value,
    omissions: &mut Vec<Omission>,
) {
    for token in added {
        // Normalizers change these: they compose characters, or mark spaces.
        let changes = !token.content.is_ascii() || token.content.contains(' ');
        for (flag, set) in [
            ("lstrip", token.lstrip),
            ("rstrip", token.rstrip),
            ("single_word", token.single_word),
            ("normalized", token.normalized && !normalizer.is_null() && changes),
        ] {
            if set {
                omissions.push(Omission {
                    key: format!("tokenizer.json: added_tokens[{:?}].{flag}", token.content),
                    why: "the token will be matched exactly as it is written".to_owned(),
                });
            }
        }
    }
}

/// The steps of a `Sequence`, or the only step.
fn steps<'a>(value: &'a Value, list: &str) -> Vec<&'a Value> {
    match (value, value["type"].as_str()) {
        (Value::Null, _) => Vec::new(),
        (_, Some("Sequence")) => value[list]
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|inner| steps(inner, list))
            .collect(),
        _ => vec![value],
    }
}

struct ByteLevelSteps<'a> {
    source: &'a Source<'a>,
    ignore_merges: bool,
}

impl ByteLevelSteps<'_> {
    /// The name of the family that does what these steps do.
    fn family(
        &self,
        normalizer: &Value,
        pre_tokenizer: &Value,
        omissions: &mut Vec<Omission>,
    ) -> Result<&'static str> {
        let unsupported = |key: &str, found: &Value| Error::Unsupported {
            place: self.source.place(key),
            found: found.to_string(),
            supported: format!("the steps of {}", Family::names()),
        };
        let mut composes = false;
        for step in steps(normalizer, "normalizers") {
            match step["type"] == "NFC" {
                true => composes = true,
                false => return Err(unsupported("normalizer", step)),
            }
        }
        let mut patterns = Vec::new();
        for step in steps(pre_tokenizer, "pretokenizers") {
            match step["type"].as_str().unwrap_or_default() {
                "Split" if step["behavior"] == "Isolated" && step["invert"] == false => {
                    match step["pattern"]["Regex"].as_str() {
                        Some(pattern) => patterns.push(pattern.to_owned()),
                        None => return Err(unsupported("pre_tokenizer", step)),
                    }
                }
                "Digits" if step["individual_digits"] == true => patterns.push(r"\p{N}".to_owned()),
                "ByteLevel" if step["add_prefix_space"] == false => {
                    if step["use_regex"] == true {
                        patterns.push(GPT2.to_owned());
                    }
                }
                _ => return Err(unsupported("pre_tokenizer", step)),
            }
        }
        let name = Family::name_of(&patterns, composes, self.ignore_merges)
            .ok_or_else(|| unsupported("pre_tokenizer", pre_tokenizer))?;
        let family = Family::named(&self.source.place("pre_tokenizer"), name)?;
        let mut differs = |key: &str, ours: bool, theirs: bool, why: &str| {
            if ours != theirs {
                let key = format!("tokenizer.json: {key}");
                omissions.push(Omission { key, why: format!("is {theirs}; {name:?} {why}") });
            }
        };
        let why = "is where characters are composed, and no other family is";
        differs("normalizer NFC", family.composes(), composes, why);
        let why = "decides whether a word that is a token is taken whole";
        differs("model.ignore_merges", family.ignore_merges, self.ignore_merges, why);
        Ok(name)
    }
}

/// Whether the steps before the merging put a space before a text; they must do nothing else but mark spaces.
fn adds_space(
    source: &Source<'_>,
    normalizer: &Value,
    pre_tokenizer: &Value,
    omissions: &mut Vec<Omission>,
) -> Result<bool> {
    let (mut adds, mut marks) = (false, false);
    let normalizers = steps(normalizer, "normalizers");
    let pre_tokenizers = steps(pre_tokenizer, "pretokenizers");
    for step in normalizers.into_iter().chain(pre_tokenizers) {
        match step["type"].as_str().unwrap_or_default() {
            "Prepend" if step["prepend"] == "▁" => adds = true,
            "Replace" if step["pattern"]["String"] == " " && step["content"] == "▁" => {
                marks = true
            }
            "Metaspace" if step["replacement"] == "▁" && step["split"] == false => {
                marks = true;
                match step["prepend_scheme"].as_str().unwrap_or_default() {
                    "never" => {}
                    "always" => adds = true,
                    _ => {
                        adds = true;
                        omissions.push(Omission {
                            key: "tokenizer.json: pre_tokenizer.prepend_scheme".to_owned(),
                            why: "a space will go before text after special tokens too, not only \
                                  before the first"
                                .to_owned(),
                        });
                    }
                }
            }
            _ => {
                return Err(Error::Unsupported {
                    place: source.place("normalizer, pre_tokenizer"),
                    found: step.to_string(),
                    supported: "Prepend and Replace, or Metaspace that does not split, with \"▁\""
                        .to_owned(),
                });
            }
        }
    }
    match marks {
        true => Ok(adds),
        false => Err(Error::Missing {
            place: source.place("normalizer"),
            expected: "Replace or Metaspace, which write spaces as \"▁\"",
        }),
    }
}
