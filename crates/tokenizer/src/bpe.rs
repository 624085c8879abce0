//! Byte-pair encoding, by the `tokenizers` crate.
//!
//! Everything that this crate would panic on or resolve in silence is checked here first.

use std::borrow::Cow;
use std::collections::hash_map::Entry;

use tokenizers::models::bpe::{self, BPE, Merges, Vocab};
use tokenizers::{
    AddedToken, Model as _, NormalizerWrapper, OffsetType, PreTokenizer as _, PreTokenizerWrapper,
};

use crate::added::{Added, Specials};
use crate::error::{Error, Place, Result};

/// A byte-pair encoder with everything that happens before the merging.
#[derive(Debug)]
pub(crate) struct Bpe {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    model: BPE,
    added: Added,
}

/// What to do with characters that the vocabulary does not have.
#[derive(Debug, Default)]
pub(crate) struct Unknown {
    pub(crate) token: Option<String>,
    pub(crate) fuse: bool,
    pub(crate) byte_fallback: bool,
}

/// Merge rules and vocabulary, not yet checked.
pub(crate) struct Rules<'a> {
    pub(crate) vocab: Vocab,
    pub(crate) merges: Merges,
    /// The same merges anew: the library uses them up, and then it says which token it does not know, not where.
    pub(crate) merges_again: &'a dyn Fn() -> Result<Merges>,
    pub(crate) merges_place: Place,
    /// A word that is a token is taken whole, whatever the merges would make of it.
    pub(crate) ignore_merges: bool,
    pub(crate) unknown: Unknown,
}

impl Bpe {
    pub(crate) fn new(
        rules: Rules<'_>,
        normalizer: Option<NormalizerWrapper>,
        pre_tokenizer: Option<PreTokenizerWrapper>,
        added_place: &Place,
        added: Vec<AddedToken>,
    ) -> Result<Self> {
        let model = rules.build()?;
        let added = Added::new(added_place, added, &model, normalizer.as_ref())?;
        Ok(Self { normalizer, pre_tokenizer, model, added })
    }

    pub(crate) fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>> {
        check_space(text)?;
        self.try_encode(text, specials).map_err(Error::while_encoding)
    }

    fn try_encode(&self, text: &str, specials: Specials) -> tokenizers::Result<Vec<u32>> {
        let mut pieces = self.added.split(text, specials, self.normalizer.as_ref());
        if let Some(pre_tokenizer) = &self.pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        pieces.tokenize(|piece| {
            let tokens = self.model.tokenize(piece.get())?;
            // Without an unknown token the library drops what it cannot spell.
            let spelt = tokens.last().map_or(0, |last| last.offsets.1);
            if spelt < piece.get().len() {
                return Err(Error::Unspellable { text: piece.get_original().to_owned() }.into());
            }
            Ok(tokens)
        })?;
        Ok(pieces.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
    }

    pub(crate) fn id_of(&self, token: &str) -> Option<u32> {
        self.model.token_to_id(token)
    }
}

/// The patterns' `\s*[\r\n]+` steps back through a run of white space one by one; the regular
/// expressions stop after a million steps, and the library takes that for the end of the text.
fn check_space(text: &str) -> Result<()> {
    const LIMIT: usize = 500_000;
    let mut run = 0;
    for c in text.chars() {
        run = if c.is_whitespace() { run + 1 } else { 0 };
        if run > LIMIT {
            return Err(Error::TooMuchSpace { limit: LIMIT });
        }
    }
    Ok(())
}

impl Rules<'_> {
    fn build(self) -> Result<BPE> {
        let Self { vocab, merges, merges_again, merges_place: place, ignore_merges, unknown } =
            self;
        // Of a token that is longer than all others the library makes a panic.
        let longest = vocab.keys().map(String::len).max().unwrap_or(0);
        for (index, (left, right)) in merges.iter().enumerate() {
            if left.len() + right.len() > longest {
                let unknown = [left, right].into_iter().find(|&token| !vocab.contains_key(token));
                let unknown = unknown.cloned().unwrap_or_else(|| format!("{left}{right}"));
                return Err(Error::UnknownMergeToken { place, index, unknown });
            }
        }
        let mut builder = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .fuse_unk(unknown.fuse)
            .byte_fallback(unknown.byte_fallback)
            .ignore_merges(ignore_merges);
        if let Some(token) = unknown.token {
            builder = builder.unk_token(token);
        }
        builder.build().or_else(|source| match source.downcast_ref() {
            Some(bpe::Error::MergeTokenOutOfVocabulary(unknown)) => {
                let unknown = unknown.clone();
                let needs = |(left, right): &(String, String)| {
                    *left == unknown || *right == unknown || format!("{left}{right}") == unknown
                };
                let index = merges_again()?.iter().position(needs).unwrap_or_default();
                Err(Error::UnknownMergeToken { place, index, unknown })
            }
            _ => Err(Error::Library { place, source }),
        })
    }
}

/// Adds a token to a vocabulary in which every text has one id.
pub(crate) fn insert_unique(
    vocab: &mut Vocab,
    place: &Place,
    token: Cow<'_, str>,
    id: u32,
) -> Result<()> {
    match vocab.entry(token.into_owned()) {
        Entry::Occupied(old) if *old.get() != id => Err(Error::DuplicateToken {
            place: place.clone(),
            first: *old.get(),
            token: old.remove_entry().0,
            second: id,
        }),
        entry => {
            entry.insert_entry(id);
            Ok(())
        }
    }
}

/// Reads merge rules written as one string, `left right`.
///
/// The space is looked for after the first byte: a token may begin with one.
pub(crate) fn split_merges<'a>(
    place: &Place,
    merges: impl ExactSizeIterator<Item = &'a str>,
) -> Result<Merges> {
    let mut pairs = Vec::with_capacity(merges.len());
    for (index, merge) in merges.enumerate() {
        let first = merge.chars().next().map_or(0, char::len_utf8);
        match merge[first..].split_once(' ') {
            Some((left, right)) if !right.is_empty() => {
                pairs.push((merge[..first + left.len()].to_owned(), right.to_owned()));
            }
            _ => {
                let (place, merge) = (place.clone(), merge.to_owned());
                return Err(Error::MalformedMerge { place, index, merge });
            }
        }
    }
    Ok(pairs)
}
