//! `tokenizer.json` and the files beside it.
//!
//! The steps before merging are the `tokenizers` crate's own; the model is read here, so that
//! duplicate tokens, bad ids and merges of unknown tokens are errors with a name, not a panic or a
//! guess.

mod parts;
mod processor;
mod shape;
mod write;

use apr_format::{Checkpoint, Companions, Metadata};
use serde_json::Value;
use tokenizers::models::bpe::Vocab;
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper};

use crate::bpe::{Bpe, Rules, Unknown, insert_unique, split_merges};
use crate::error::{Error, Place, Result};
use crate::template::ChatTemplate;
use crate::vocabulary::{Kind, MAX_IDS, Spelling, Vocabulary, byte_token, check_id};
use crate::{Model, Tokenizer, stop};
pub(crate) use parts::parts;
use processor::Affixes;
use shape::{AddedTokenJson, MergesJson, ModelJson, Settings, TokenizerJson};
pub(crate) use write::write;

/// Reads the tokenizer that lies beside a checkpoint.
pub(crate) fn read(checkpoint: &Checkpoint) -> Result<Tokenizer> {
    let companions = checkpoint.companions();
    let Some(file) = &companions.tokenizer else {
        return Err(Error::NoTokenizer { file: checkpoint.path().display().to_string() });
    };
    let name = file.path().display().to_string();
    let source = Source { name: &name };
    source.tokenizer(file.bytes(), companions, Some(checkpoint.metadata()))
}

/// Reads a `tokenizer.json` that stands alone.
pub(crate) fn read_json(name: &str, bytes: &[u8]) -> Result<Tokenizer> {
    Source { name }.tokenizer(bytes, &Companions::default(), None)
}

/// A `tokenizer.json` by name.
struct Source<'a> {
    name: &'a str,
}

impl Source<'_> {
    fn place(&self, key: &str) -> Place {
        Place::new(self.name, key)
    }

    fn tokenizer(
        &self,
        bytes: &[u8],
        companions: &Companions,
        model_config: Option<&Metadata>,
    ) -> Result<Tokenizer> {
        let TokenizerJson {
            added_tokens,
            normalizer,
            pre_tokenizer,
            post_processor,
            decoder,
            model,
            // For batches; nothing here makes any.
            truncation: _,
            padding: _,
        } = TokenizerJson::parse(self.name, bytes)?;
        let (spelling, strips_space) = self.spelling(decoder.as_ref())?;
        let (bpe, vocabulary) =
            self.model(model, added_tokens, spelling, normalizer, pre_tokenizer)?;
        let model = Model::Bpe(bpe.into());
        // `add_bos_token` in tokenizer_config.json is for slow tokenizers: transformers does not
        // obey it where there is a tokenizer.json, which says by itself what goes around a text.
        let place = self.place("post_processor");
        let Affixes { prefix, suffix } =
            Affixes::of(&place, post_processor.as_ref(), vocabulary.len())?;

        let config = Settings::parse(companions.tokenizer_config.as_ref())?;
        let map = Settings::parse(companions.special_tokens_map.as_ref())?;
        let generation = Settings::parse(companions.generation_config.as_ref())?;
        let token = |key: &str| config.token(key).or_else(|| map.token(key));
        let eos = token("eos_token").and_then(|t| model.id_of(t));
        let mut bos = token("bos_token").and_then(|t| model.id_of(t));
        let mut stops = generation.ids("eos_token_id", &vocabulary)?;
        stops.extend(eos);
        if let Some(model_config) = model_config {
            stops.extend(config_ids(model_config, "eos_token_id", &vocabulary)?);
            bos = bos.or(config_ids(model_config, "bos_token_id", &vocabulary)?.first().copied());
        }
        // What every text begins with is BOS, also where no file gives it that name.
        bos = bos.or(prefix.first().copied());

        let template = template_source(companions, &config)?.map(|(file, source)| {
            let names = ["bos_token", "eos_token", "unk_token", "pad_token"];
            let variables = names.map(|name| (name, token(name).map(str::to_owned)));
            ChatTemplate::new(&file, &source, variables)
        });
        stop::add_known(&mut stops, &vocabulary, template.as_ref(), |t| model.id_of(t));
        let vocabulary = vocabulary.into();
        Ok(Tokenizer { vocabulary, model, prefix, suffix, strips_space, bos, stops, template })
    }

    /// How the decoder says that tokens spell bytes, and whether it takes away a leading space.
    fn spelling(&self, decoder: Option<&Value>) -> Result<(Spelling, bool)> {
        let steps = match decoder {
            Some(decoder) => match decoder["decoders"].as_array() {
                Some(steps) => steps.as_slice(),
                None => std::slice::from_ref(decoder),
            },
            None => &[],
        };
        let mut spelling = None;
        let mut strips = false;
        for step in steps {
            match step["type"].as_str().unwrap_or_default() {
                "ByteLevel" => spelling = Some(Spelling::ByteLevel),
                "Metaspace" => {
                    spelling = Some(Spelling::SentencePiece);
                    strips = step["prepend_scheme"] != "never" && step["add_prefix_space"] != false;
                }
                "Replace" if step["pattern"]["String"] == "▁" && step["content"] == " " => {
                    spelling = Some(Spelling::SentencePiece);
                }
                "Strip" if step["content"] == " " && step["stop"] == 0 => {
                    strips = step["start"] == 1;
                }
                "ByteFallback" | "Fuse" => {}
                _ => {
                    return Err(Error::Unsupported {
                        place: self.place("decoder"),
                        found: step.to_string(),
                        supported: "ByteLevel, Metaspace, or the Replace, ByteFallback, Fuse and \
                                    Strip of SentencePiece models"
                            .to_owned(),
                    });
                }
            }
        }
        let spelling = spelling.ok_or_else(|| Error::Missing {
            place: self.place("decoder"),
            expected: "ByteLevel, Metaspace or Replace, which say how tokens spell text",
        })?;
        Ok((spelling, strips))
    }

    /// Added tokens join the vocabulary of the model, so that their ids are those of the file.
    fn model(
        &self,
        json: ModelJson,
        added: Vec<AddedTokenJson>,
        spelling: Spelling,
        normalizer: Option<NormalizerWrapper>,
        pre_tokenizer: Option<PreTokenizerWrapper>,
    ) -> Result<(Bpe, Vocabulary)> {
        for (key, affix) in [
            ("model.continuing_subword_prefix", &json.continuing_subword_prefix),
            ("model.end_of_word_suffix", &json.end_of_word_suffix),
        ] {
            if let Some(found) = affix.clone().filter(|affix| !affix.is_empty()) {
                let (place, supported) = (self.place(key), "none".to_owned());
                return Err(Error::Unsupported { place, found, supported });
            }
        }
        // GPT-2's own file has an empty one, and means none.
        let unknown = json.unk_token.filter(|token| !token.is_empty());
        let kind_of = |token: &String| match () {
            () if unknown.as_ref() == Some(token) => Kind::Unknown,
            () if json.byte_fallback && byte_token(token).is_some() => Kind::Byte,
            () => Kind::Normal,
        };
        let kind_of_added = |added: &AddedTokenJson| match added.token.special {
            true => Kind::Control,
            false => Kind::UserDefined,
        };
        let mut tokens = ById::new(self.place("model.vocab"));
        for (token, id) in &json.vocab.0 {
            tokens.set(*id, token, kind_of(token))?;
        }
        tokens.place = self.place("added_tokens");
        for added in &added {
            tokens.set(added.id, &added.token.content, kind_of_added(added))?;
        }
        let vocabulary = tokens.vocabulary(spelling);

        let place = self.place("model.vocab");
        let mut vocab = Vocab::default();
        vocab.reserve(json.vocab.0.len() + added.len());
        for (token, id) in json.vocab.0 {
            insert_unique(&mut vocab, &place, token.into(), id)?;
        }
        let place = self.place("added_tokens");
        for added in &added {
            insert_unique(&mut vocab, &place, added.token.content.as_str().into(), added.id)?;
        }
        if let Some(token) = unknown.as_ref().filter(|token| !vocab.contains_key(*token)) {
            let place = self.place(&format!("model.vocab[{token:?}]"));
            return Err(Error::Missing { place, expected: "the id of the unknown token" });
        }
        let merges_place = self.place("model.merges");
        let merges = || match &json.merges {
            MergesJson::Pairs(merges) => Ok(merges.clone()),
            MergesJson::Strings(merges) => {
                split_merges(&merges_place, merges.iter().map(String::as_str))
            }
        };
        let unknown =
            Unknown { token: unknown, fuse: json.fuse_unk, byte_fallback: json.byte_fallback };
        let ignore_merges = json.ignore_merges;
        let rules = Rules {
            vocab,
            merges: merges()?,
            merges_again: &merges,
            merges_place: merges_place.clone(),
            ignore_merges,
            unknown,
        };
        let added = added.into_iter().map(|a| a.token).collect();
        Ok((Bpe::new(rules, normalizer, pre_tokenizer, &place, added)?, vocabulary))
    }
}

/// Tokens in the order of their ids.
struct ById<'a> {
    place: Place,
    slots: Vec<Option<(&'a str, Kind)>>,
}

impl<'a> ById<'a> {
    fn new(place: Place) -> Self {
        Self { place, slots: Vec::new() }
    }

    /// A token may be set twice, with the better known kind last: `<s>` is often both in the
    /// model and among the added tokens.
    fn set(&mut self, id: u32, token: &'a str, kind: Kind) -> Result<()> {
        if id >= MAX_IDS {
            let place = self.place.clone();
            return Err(Error::IdOutOfRange { place, id: id.into(), limit: MAX_IDS.into() });
        }
        let index = id as usize;
        if index >= self.slots.len() {
            self.slots.resize(index + 1, None);
        }
        match self.slots[index].replace((token, kind)) {
            Some((first, _)) if first != token => Err(Error::DuplicateId {
                place: self.place.clone(),
                id,
                first: first.to_owned(),
                second: token.to_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn vocabulary(self, spelling: Spelling) -> Vocabulary {
        let mut vocabulary = Vocabulary::default();
        for slot in self.slots {
            let (token, kind) = slot.unwrap_or(("", Kind::Unused));
            vocabulary.push(token, kind, spelling);
        }
        vocabulary
    }
}

/// One id or a list of ids from the model's own config.
fn config_ids(config: &Metadata, key: &str, vocabulary: &Vocabulary) -> Result<Vec<u32>> {
    let place = || Place::new(&config.file().display().to_string(), key);
    let ids: Option<Vec<u64>> = match config.get(key) {
        None => Some(Vec::new()),
        Some(apr_format::Value::Array(ids)) => ids.iter().map(|id| id.as_u64()).collect(),
        Some(id) => id.as_u64().map(|id| vec![id]),
    };
    let expected = "an id or a list of ids";
    let ids = ids.ok_or_else(|| Error::WrongType { place: place(), expected })?;
    ids.into_iter().map(|id| check_id(place(), id, vocabulary.len())).collect()
}

/// The chat template and the file that it is in: its own file, else the tokenizer's settings.
fn template_source(companions: &Companions, config: &Settings) -> Result<Option<(String, String)>> {
    if let Some(file) = &companions.chat_template {
        let name = file.path().display().to_string();
        return match std::str::from_utf8(file.bytes()) {
            Ok(source) => Ok(Some((name, source.to_owned()))),
            Err(_) => Err(Error::WrongType { place: Place::new(&name, "text"), expected: "UTF-8" }),
        };
    }
    let source = match config.get("chat_template") {
        Value::String(source) => Some(source.as_str()),
        // Several by name: the one for plain conversations.
        Value::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .or(named.first())
            .and_then(|entry| entry["template"].as_str()),
        _ => None,
    };
    Ok(source.map(|source| (format!("{}: chat_template", config.file), source.to_owned())))
}
