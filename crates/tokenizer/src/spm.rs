//! SentencePiece's byte-pair encoding: neighbours are merged in the order of the scores of what
//! they make, and what has no token is spelt in bytes.
//!
//! This is no byte-pair encoding by rank: a merge needs no rule, only a product in the
//! vocabulary, and among equal scores the leftmost pair wins.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use tokenizers::models::wordlevel::WordLevel;
use tokenizers::{AddedToken, Model as _, NormalizerWrapper, OffsetType, Token};

use crate::added::{Added, Specials};
use crate::error::{Error, Place, Result};
use crate::vocabulary::byte_token;

/// An encoder with a score for each token.
#[derive(Debug)]
pub(crate) struct Spm {
    ids: WordLevel,
    scores: Vec<f32>,
    bytes: Vec<Option<u32>>, // [256]
    unknown: Option<u32>,
    add_space_prefix: bool,
    added: Added,
}

/// A run of characters that is, or may become, one token; a list linked by index.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: usize,
    /// Equal to `start` once the symbol is merged into the one before.
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

/// Two neighbouring symbols that make a token.
#[derive(Debug, Clone, Copy)]
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// The extent of both when the pair was found: tells whether it still stands.
    end: usize,
}

impl Spm {
    /// `scores` has one entry per id, all finite.
    pub(crate) fn new(
        ids: WordLevel,
        scores: Vec<f32>,
        unknown: Option<u32>,
        add_space_prefix: bool,
        added_place: &Place,
        added: Vec<AddedToken>,
    ) -> Result<Self> {
        let added = Added::new(added_place, added, &ids, None)?;
        let mut bytes = vec![None; 256];
        for b in 0..=255u8 {
            let spelt = format!("<0x{b:02X}>");
            debug_assert_eq!(byte_token(&spelt), Some(b));
            let as_itself = std::str::from_utf8(&[b]).ok().and_then(|c| ids.token_to_id(c));
            bytes[usize::from(b)] = ids.token_to_id(&spelt).or(as_itself);
        }
        Ok(Self { ids, scores, bytes, unknown, add_space_prefix, added })
    }

    pub(crate) fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>> {
        let mut pieces = self.added.split(text, specials, None::<&NormalizerWrapper>);
        let tokenized = pieces.tokenize(|piece| {
            let ids = self.encode_fragment(piece.get())?;
            Ok(ids.into_iter().map(|id| Token::new(id, String::new(), (0, 0))).collect())
        });
        let ids = tokenized
            .and_then(|()| pieces.into_encoding(None, 0, OffsetType::None))
            .map(|encoding| encoding.get_ids().to_vec());
        ids.map_err(|e| match e.downcast::<Error>() {
            Ok(ours) => *ours,
            Err(source) => Error::Library { place: Place::new("the text", "encoding"), source },
        })
    }

    pub(crate) fn id_of(&self, token: &str) -> Option<u32> {
        self.ids.token_to_id(token)
    }

    /// Whether decoding must take away the space that encoding put before the text.
    pub(crate) fn add_space_prefix(&self) -> bool {
        self.add_space_prefix
    }

    /// Encodes text without added tokens.
    fn encode_fragment(&self, text: &str) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let prefix = if self.add_space_prefix { "▁" } else { "" };
        let text = format!("{prefix}{}", text.replace(' ', "▁"));
        let symbols = self.merge(&text);
        let mut ids = Vec::new();
        for symbol in symbols.iter().filter(|s| s.start < s.end) {
            let token = &text[symbol.start..symbol.end];
            match self.id_of(token) {
                Some(id) => ids.push(id),
                None => self.spell(token, &mut ids)?,
            }
        }
        Ok(ids)
    }

    fn spell(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        for b in text.bytes() {
            let id = self.bytes[usize::from(b)].or(self.unknown);
            ids.push(id.ok_or_else(|| Error::Unspellable { text: text.to_owned() })?);
        }
        Ok(())
    }

    /// Merges the best pair until no two neighbours make a token.
    fn merge(&self, text: &str) -> Vec<Symbol> {
        let count = text.chars().count();
        let mut symbols: Vec<_> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol {
                start,
                end: start + c.len_utf8(),
                previous: i.checked_sub(1),
                next: (i + 1 < count).then_some(i + 1),
            })
            .collect();
        let mut pairs: BinaryHeap<_> =
            (1..count).filter_map(|right| self.pair(text, &symbols, right - 1, right)).collect();
        while let Some(Pair { left, right, end, .. }) = pairs.pop() {
            let (a, b) = (symbols[left], symbols[right]);
            let stands = a.start < a.end && a.end == b.start && b.start < b.end && b.end == end;
            if !stands {
                continue;
            }
            symbols[left] = Symbol { end, next: b.next, ..a };
            symbols[right].end = b.start;
            if let Some(next) = b.next {
                symbols[next].previous = Some(left);
                pairs.extend(self.pair(text, &symbols, left, next));
            }
            if let Some(previous) = a.previous {
                pairs.extend(self.pair(text, &symbols, previous, left));
            }
        }
        symbols
    }

    fn pair(&self, text: &str, symbols: &[Symbol], left: usize, right: usize) -> Option<Pair> {
        let end = symbols[right].end;
        let id = self.id_of(&text[symbols[left].start..end])?;
        Some(Pair { score: *self.scores.get(id as usize)?, left, right, end })
    }
}

/// The best pair is the greatest: highest score, then leftmost.
impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_score = self.score.partial_cmp(&other.score).unwrap_or(Ordering::Equal);
        by_score.then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}
