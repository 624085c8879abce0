//! The tokenizer that a GGUF or `.apr` file carries in its metadata.
//!
//! The two containers differ in the names of the keys and in what may be left out; one reader
//! serves both. What a file does not say is taken from its architecture where all models of that
//! architecture agree, and is an error otherwise: a wrong guess would change ids in silence.

mod write;

use std::collections::HashSet;

use apr_format::{Metadata, Value};
use tokenizers::models::bpe::{Merges, Vocab};
use tokenizers::models::wordlevel::WordLevel;

use crate::added::added_token;
use crate::bpe::{Bpe, Rules, Unknown, insert_unique, split_merges};
use crate::error::{Error, Place, Result};
use crate::family::Family;
use crate::parts::{self, Parts};
use crate::spm::Spm;
use crate::template::ChatTemplate;
use crate::vocabulary::{Kind, MAX_IDS, Spelling, Vocabulary, byte_token, check_id};
use crate::{Model, Tokenizer, stop};

pub(crate) use write::write;

/// The names of one container's keys.
#[derive(Debug)]
pub(crate) struct Keys {
    model: &'static str,
    pre: &'static str,
    pub(crate) tokens: &'static str,
    kinds: &'static str,
    merges: &'static str,
    scores: &'static str,
    bos: &'static str,
    eos: &'static str,
    /// Further tokens that end the generation: of a turn, of a message.
    stops: [&'static str; 2],
    unknown: &'static str,
    padding: &'static str,
    adds_bos: &'static str,
    adds_eos: &'static str,
    adds_space: &'static str,
    template: &'static str,
    /// The names of further templates, each under `template` with a dot and the name.
    templates: &'static str,
    architecture: &'static [&'static str],
}

/// The keys of a GGUF file.
pub(crate) const GGUF: Keys = Keys {
    model: "tokenizer.ggml.model",
    pre: "tokenizer.ggml.pre",
    tokens: "tokenizer.ggml.tokens",
    kinds: "tokenizer.ggml.token_type",
    merges: "tokenizer.ggml.merges",
    scores: "tokenizer.ggml.scores",
    bos: "tokenizer.ggml.bos_token_id",
    eos: "tokenizer.ggml.eos_token_id",
    stops: ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"],
    unknown: "tokenizer.ggml.unknown_token_id",
    padding: "tokenizer.ggml.padding_token_id",
    adds_bos: "tokenizer.ggml.add_bos_token",
    adds_eos: "tokenizer.ggml.add_eos_token",
    adds_space: "tokenizer.ggml.add_space_prefix",
    template: "tokenizer.chat_template",
    templates: "tokenizer.chat_templates",
    architecture: &["general.architecture"],
};

/// The keys of an `.apr` file. Those that other writers of the format do not know are optional.
pub(crate) const APR: Keys = Keys {
    model: "tokenizer.model_type",
    pre: "tokenizer.pre_type",
    tokens: "tokenizer.vocabulary",
    kinds: "tokenizer.token_type",
    merges: "tokenizer.merges",
    scores: "tokenizer.scores",
    bos: "tokenizer.bos_token_id",
    eos: "tokenizer.eos_token_id",
    stops: ["tokenizer.eot_token_id", "tokenizer.eom_token_id"],
    unknown: "tokenizer.unknown_token_id",
    padding: "tokenizer.padding_token_id",
    adds_bos: "tokenizer.add_bos_token",
    adds_eos: "tokenizer.add_eos_token",
    adds_space: "tokenizer.add_space_prefix",
    template: "chat_template",
    templates: "chat_templates",
    architecture: &["architecture", "model_type"],
};

/// The two ways of merging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    Bpe,
    Spm,
}

/// One file's tokenizer keys, as they are.
struct Reader<'a> {
    file: String,
    metadata: &'a Metadata,
    keys: &'static Keys,
    tokens: Vec<&'a str>,
}

/// The names of the keys that `metadata` has a tokenizer under, if any.
pub(crate) fn keys_in(metadata: &Metadata) -> Option<&'static Keys> {
    [&GGUF, &APR].into_iter().find(|keys| metadata.get(keys.tokens).is_some())
}

/// Reads the tokenizer of a file whose metadata has `keys.tokens`.
pub(crate) fn read(metadata: &Metadata, keys: &'static Keys) -> Result<Tokenizer> {
    Reader::new(metadata, keys)?.tokenizer()
}

/// Takes the tokenizer of a file whose metadata has `keys.tokens` apart.
pub(crate) fn parts(metadata: &Metadata, keys: &'static Keys) -> Result<Parts> {
    Reader::new(metadata, keys)?.parts()
}

impl<'a> Reader<'a> {
    fn new(metadata: &'a Metadata, keys: &'static Keys) -> Result<Self> {
        let file = metadata.file().display().to_string();
        let tokens = metadata.strings(keys.tokens)?.unwrap_or_default();
        let reader = Reader { file, metadata, keys, tokens };
        if reader.tokens.is_empty() {
            let place = reader.place(keys.tokens);
            return Err(Error::Missing { place, expected: "a list of tokens, at least one" });
        }
        if reader.tokens.len() > MAX_IDS as usize {
            let (place, id) = (reader.place(keys.tokens), reader.tokens.len() as u64);
            return Err(Error::IdOutOfRange { place, id, limit: MAX_IDS.into() });
        }
        Ok(reader)
    }

    fn parts(&self) -> Result<Parts> {
        let Self { metadata, keys, .. } = self;
        let algorithm = self.algorithm()?;
        let merges = match algorithm {
            Algorithm::Bpe => self.merges()?,
            Algorithm::Spm => Vec::new(),
        };
        let kinds = self.kinds(algorithm, &merges)?;
        let mut tokens: Vec<_> =
            self.tokens.iter().map(|&token| token.to_owned()).zip(kinds).collect();
        while tokens.last().is_some_and(|token| parts::is_hole(tokens.len() - 1, token)) {
            tokens.pop();
        }
        let (algorithm, adds_bos) = match algorithm {
            Algorithm::Bpe => {
                let pre = self.family_name()?.to_owned();
                let adds_bos = Family::named(&self.place(keys.pre), &pre)?.adds_bos;
                (parts::Algorithm::Bpe { pre, merges }, adds_bos)
            }
            Algorithm::Spm => {
                let mut scores = self.scores()?;
                scores.truncate(tokens.len());
                let adds_space = self.adds_space()?;
                (parts::Algorithm::SentencePiece { scores, adds_space }, true)
            }
        };
        let id = |key| self.id(key);
        let mut named_templates = Vec::new();
        for name in metadata.strings(keys.templates)?.unwrap_or_default() {
            if let Some(template) = metadata.str(&format!("{}.{name}", keys.template))? {
                named_templates.push((name.to_owned(), template.to_owned()));
            }
        }
        Ok(Parts {
            tokens,
            algorithm,
            bos: id(keys.bos)?,
            eos: id(keys.eos)?,
            eot: id(keys.stops[0])?,
            eom: id(keys.stops[1])?,
            unknown: id(keys.unknown)?,
            padding: id(keys.padding).unwrap_or_default(),
            adds_bos: metadata.bool(keys.adds_bos)?.unwrap_or(adds_bos) && id(keys.bos)?.is_some(),
            adds_eos: metadata.bool(keys.adds_eos)?.unwrap_or(false),
            template: metadata.str(keys.template)?.map(str::to_owned),
            named_templates,
        })
    }
    fn tokenizer(&self) -> Result<Tokenizer> {
        let Self { metadata, keys, .. } = self;
        let algorithm = self.algorithm()?;
        let merges = match algorithm {
            Algorithm::Bpe => self.merges()?,
            Algorithm::Spm => Vec::new(),
        };
        let bos = self.id(keys.bos)?;
        let eos = self.id(keys.eos)?;
        // Only a name in templates, and files exist whose padding is past the last token.
        let padding = self.id(keys.padding).unwrap_or_default();
        let mut stops: Vec<u32> = eos.into_iter().collect();
        for key in keys.stops {
            stops.extend(self.id(key)?);
        }
        let mut kinds = self.kinds(algorithm, &merges)?;
        // Some converters call these normal, and then no text would ever contain them.
        for id in bos.iter().chain(&stops) {
            kinds[*id as usize] = Kind::Control;
        }
        let spelling = match algorithm {
            Algorithm::Bpe => Spelling::ByteLevel,
            Algorithm::Spm => Spelling::SentencePiece,
        };
        let mut vocabulary = Vocabulary::default();
        for (token, &kind) in self.tokens.iter().zip(&kinds) {
            vocabulary.push(token, kind, spelling);
        }
        let unknown = self.id(keys.unknown)?;
        let (model, adds_bos) = match algorithm {
            Algorithm::Bpe => {
                let family = self.family()?;
                (Model::Bpe(self.bpe(family, merges, &kinds)?.into()), family.adds_bos)
            }
            Algorithm::Spm => (Model::Spm(self.spm(&kinds, unknown)?.into()), true),
        };
        let template = metadata.str(keys.template)?.map(|source| {
            let text_of = |id: u32| self.tokens[id as usize].to_owned();
            let variables = [
                ("bos_token", bos),
                ("eos_token", eos),
                ("unk_token", unknown),
                ("pad_token", padding),
            ];
            let variables = variables.map(|(name, id)| (name, id.map(text_of)));
            ChatTemplate::new(&self.place(keys.template).to_string(), source, variables)
        });
        stop::add_known(&mut stops, &vocabulary, template.as_ref(), |t| model.id_of(t));
        Ok(Tokenizer {
            prefix: self.affix(keys.adds_bos, adds_bos, keys.bos, bos)?,
            suffix: self.affix(keys.adds_eos, false, keys.eos, eos)?,
            strips_space: matches!(&model, Model::Spm(spm) if spm.add_space_prefix()),
            vocabulary: vocabulary.into(),
            model,
            bos,
            stops,
            template,
        })
    }

    /// The id at `id_key` if the switch at `key` is on.
    fn affix(&self, key: &str, default: bool, id_key: &str, id: Option<u32>) -> Result<Vec<u32>> {
        match (self.metadata.bool(key)?.unwrap_or(default), id) {
            (false, _) => Ok(Vec::new()),
            (true, Some(id)) => Ok(vec![id]),
            (true, None) => Err(Error::Missing {
                place: self.place(id_key),
                expected: "an id, because texts begin or end with this token",
            }),
        }
    }

    fn place(&self, key: &str) -> Place {
        Place::new(&self.file, key)
    }

    fn algorithm(&self) -> Result<Algorithm> {
        let has = |key| self.metadata.get(key).is_some();
        match self.metadata.str(self.keys.model)? {
            Some("gpt2" | "bpe" | "BPE") => Ok(Algorithm::Bpe),
            Some("llama" | "spm" | "sentencepiece") => Ok(Algorithm::Spm),
            None if has(self.keys.merges) => Ok(Algorithm::Bpe),
            None if has(self.keys.scores) => Ok(Algorithm::Spm),
            None => Err(Error::Missing {
                place: self.place(self.keys.model),
                expected: "\"gpt2\" or \"llama\"",
            }),
            Some(other) => Err(Error::Unsupported {
                place: self.place(self.keys.model),
                found: other.to_owned(),
                supported: "gpt2 (byte-level BPE), llama (SentencePiece BPE)".to_owned(),
            }),
        }
    }

    fn family(&self) -> Result<&'static Family> {
        Family::named(&self.place(self.keys.pre), self.family_name()?)
    }

    fn family_name(&self) -> Result<&str> {
        let place = self.place(self.keys.pre);
        if let Some(name) = self.metadata.str(self.keys.pre)? {
            return Ok(name);
        }
        let has_token = |token: &str| self.tokens.contains(&token);
        for key in self.keys.architecture {
            let architecture = self.metadata.str(key)?.unwrap_or_default().to_ascii_lowercase();
            if let Some(name) = Family::of_architecture(&architecture, has_token) {
                return Ok(name);
            }
        }
        Err(Error::Missing {
            place,
            expected: "the name of a pre-tokenizer, such as \"llama-bpe\"",
        })
    }

    fn merges(&self) -> Result<Merges> {
        match self.metadata.strings(self.keys.merges)? {
            Some(merges) => split_merges(&self.place(self.keys.merges), merges.into_iter()),
            None => Err(Error::Missing {
                place: self.place(self.keys.merges),
                expected: "a list of merge rules, each \"left right\"",
            }),
        }
    }

    /// A list with one number per token.
    fn per_token<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let Some(values) = self.metadata.array(key)? else { return Ok(None) };
        if values.len() != self.tokens.len() {
            let (expected, found) = (self.tokens.len(), values.len());
            return Err(Error::Length { place: self.place(key), expected, found });
        }
        let read: Option<Vec<T>> = values.iter().map(|value| read(&value)).collect();
        read.map(Some).ok_or_else(|| Error::WrongType { place: self.place(key), expected })
    }

    fn kinds(&self, algorithm: Algorithm, merges: &Merges) -> Result<Vec<Kind>> {
        let kind = |value: &Value| match value.as_i64()? {
            1 => Some(Kind::Normal),
            2 => Some(Kind::Unknown),
            3 => Some(Kind::Control),
            4 => Some(Kind::UserDefined),
            0 | 5 => Some(Kind::Unused),
            6 => Some(Kind::Byte),
            _ => None,
        };
        let stated = self.per_token(self.keys.kinds, "a list of token types, 0 to 6", kind)?;
        let mut kinds = stated.unwrap_or_else(|| match algorithm {
            Algorithm::Bpe => self.kinds_by_merges(merges),
            Algorithm::Spm => self.tokens.iter().map(|token| kind_by_text(token)).collect(),
        });
        for (kind, _) in kinds.iter_mut().zip(&self.tokens).filter(|(_, t)| stop::is_end(t)) {
            *kind = Kind::Control;
        }
        Ok(kinds)
    }

    /// A token that no merge makes, and that is more than one byte, was added by hand.
    fn kinds_by_merges(&self, merges: &Merges) -> Vec<Kind> {
        let made: HashSet<String> = merges.iter().map(|(l, r)| format!("{l}{r}")).collect();
        let kind = |token: &&str| match token.chars().count() {
            0 => Kind::Unused,
            1 => Kind::Normal,
            _ if made.contains(*token) => Kind::Normal,
            _ if token.starts_with('<') && token.ends_with('>') => Kind::Control,
            _ => Kind::UserDefined,
        };
        self.tokens.iter().map(kind).collect()
    }

    fn bpe(&self, family: &Family, merges: Merges, kinds: &[Kind]) -> Result<Bpe> {
        let rules = Rules {
            vocab: self.vocab()?,
            merges,
            merges_again: &|| self.merges(),
            merges_place: self.place(self.keys.merges),
            ignore_merges: family.ignore_merges,
            unknown: Unknown::default(),
        };
        let place = self.place(self.keys.tokens);
        Bpe::new(
            rules,
            family.normalizer(),
            Some(family.pre_tokenizer()?),
            &place,
            self.added(kinds),
        )
    }

    fn spm(&self, kinds: &[Kind], unknown: Option<u32>) -> Result<Spm> {
        let scores = self.scores()?;
        let ids = WordLevel::builder().vocab(self.vocab()?).build();
        let place = self.place(self.keys.tokens);
        let ids = ids.map_err(|source| Error::Library { place: place.clone(), source })?;
        Spm::new(ids, scores, unknown, self.adds_space()?, &place, self.added(kinds))
    }

    fn scores(&self) -> Result<Vec<f32>> {
        let place = self.place(self.keys.scores);
        let scores = self.per_token(self.keys.scores, "a list of numbers", Value::as_f64)?;
        let scores = scores.ok_or_else(|| Error::Missing {
            place: place.clone(),
            expected: "one score per token",
        })?;
        if let Some((index, &score)) = scores.iter().enumerate().find(|(_, s)| !s.is_finite()) {
            return Err(Error::Score { place, index, score });
        }
        Ok(scores.into_iter().map(|score| score as f32).collect())
    }

    fn adds_space(&self) -> Result<bool> {
        Ok(self.metadata.bool(self.keys.adds_space)?.unwrap_or(true))
    }

    /// Ids by text. Tokens without text are holes that no text reaches.
    fn vocab(&self) -> Result<Vocab> {
        let place = self.place(self.keys.tokens);
        let mut vocab = Vocab::default();
        vocab.reserve(self.tokens.len());
        for (token, id) in self.tokens.iter().zip(0u32..).filter(|(token, _)| !token.is_empty()) {
            insert_unique(&mut vocab, &place, (*token).into(), id)?;
        }
        Ok(vocab)
    }

    fn added(&self, kinds: &[Kind]) -> Vec<tokenizers::AddedToken> {
        self.tokens
            .iter()
            .zip(kinds)
            .filter_map(|(token, &kind)| added_token(token, kind))
            .collect()
    }

    fn id(&self, key: &str) -> Result<Option<u32>> {
        let id = self.metadata.u64(key)?;
        id.map(|id| check_id(self.place(key), id, self.tokens.len())).transpose()
    }
}

/// The kinds of SentencePiece tokens, where a file does not say.
fn kind_by_text(token: &str) -> Kind {
    match token {
        "" => Kind::Unused,
        "<unk>" => Kind::Unknown,
        "<s>" | "</s>" | "<pad>" => Kind::Control,
        _ if byte_token(token).is_some() => Kind::Byte,
        _ if token.starts_with("<|") && token.ends_with("|>") => Kind::Control,
        _ => Kind::Normal,
    }
}
