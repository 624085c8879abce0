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
        pieces
            .tokenize(|piece| {
                let ids = self.encode_fragment(piece.get())?;
                Ok(ids.into_iter().map(|id| Token::new(id, String::new(), (0, 0))).collect())
            })
            .and_then(|()| pieces.into_encoding(None, 0, OffsetType::None))
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(Error::while_encoding)
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::models::bpe::Vocab;

    fn spm(tokens: &[(&str, f32)], add_space_prefix: bool) -> Spm {
        let vocab: Vocab = tokens.iter().zip(0..).map(|((t, _), id)| (t.to_string(), id)).collect();
        let ids = WordLevel::builder().vocab(vocab).build().unwrap();
        let scores = tokens.iter().map(|t| t.1).collect();
        let place = Place::new("test", "tokens");
        let added = vec![AddedToken::from("<s>", true).normalized(false)];
        Spm::new(ids, scores, None, add_space_prefix, &place, added).unwrap()
    }

    /// All bytes, so that every text can be spelt, and `<s>`.
    fn with_bytes<'a>(tokens: &[(&'a str, f32)], bytes: &'a [String]) -> Vec<(&'a str, f32)> {
        let bytes = bytes.iter().map(|b| (b.as_str(), -1e9));
        [("<s>", 0.0)].into_iter().chain(bytes).chain(tokens.iter().copied()).collect()
    }

    fn byte_tokens() -> Vec<String> {
        (0..=255).map(|b| format!("<0x{b:02X}>")).collect()
    }

    /// The definition: look at all neighbours, merge the best pair, start again.
    fn naive(tokens: &[(&str, f32)], text: &str) -> Vec<String> {
        let score = |piece: &str| tokens.iter().find(|t| t.0 == piece).map(|t| t.1);
        let mut pieces: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let mut best: Option<(f32, usize)> = None;
            for i in 1..pieces.len() {
                if let Some(s) = score(&format!("{}{}", pieces[i - 1], pieces[i]))
                    && best.is_none_or(|(top, _)| s > top)
                {
                    best = Some((s, i));
                }
            }
            let Some((_, right)) = best else { break };
            let piece = pieces.remove(right);
            pieces[right - 1] += &piece;
        }
        let spell = |piece: String| match score(&piece) {
            Some(_) => vec![piece],
            None => piece.bytes().map(|b| format!("<0x{b:02X}>")).collect(),
        };
        pieces.into_iter().flat_map(spell).collect()
    }

    #[test]
    fn the_best_score_wins_and_ties_go_left() {
        let bytes = byte_tokens();
        let tokens = with_bytes(
            &[("▁", -9.0), ("a", -9.0), ("b", -9.0), ("ab", -2.0), ("ba", -1.0)],
            &bytes,
        );
        let spm = spm(&tokens, false);
        let text = |text: &str| -> Vec<&str> {
            let ids = spm.encode(text, Specials::Parse).unwrap();
            ids.iter().map(|&id| tokens[id as usize].0).collect()
        };
        assert_eq!(text("aba"), ["a", "ba"], "the better pair, although it is on the right");
        assert_eq!(text("ababa"), ["a", "ba", "ba"]);
        assert_eq!(text("a é"), ["a", "▁", "<0xC3>", "<0xA9>"], "no token: bytes");
        assert_eq!(text("<s>a<s>"), ["<s>", "a", "<s>"]);
        assert!(text("").is_empty());
    }

    #[test]
    fn a_space_goes_before_every_stretch_of_text_if_the_model_asks_for_it() {
        let bytes = byte_tokens();
        let tokens = with_bytes(&[("▁", -9.0), ("a", -9.0), ("▁a", -1.0)], &bytes);
        let ids = |add, specials| spm(&tokens, add).encode("a<s>a", specials).unwrap();
        let (mark, a, spaced) = (0, 258, 259);
        assert_eq!(ids(true, Specials::Parse), [spaced, mark, spaced]);
        assert_eq!(ids(false, Specials::Parse), [a, mark, a]);
        assert_eq!(ids(false, Specials::Literal).len(), 5);
    }

    #[test]
    fn text_that_cannot_be_spelt_is_an_error_and_not_a_hole() {
        let error = spm(&[("<s>", 0.0), ("a", -1.0)], false).encode("ab", Specials::Parse);
        assert!(matches!(error, Err(Error::Unspellable { text }) if text == "b"));
    }

    proptest! {
        #[test]
        fn the_queue_finds_what_the_definition_finds(
            pieces in prop::collection::hash_map("[ab▁é]{1,4}", -4i8..0, 1..24),
            text in "[ab é日]{0,24}",
        ) {
            let bytes = byte_tokens();
            let tokens: Vec<_> = pieces.iter().map(|(p, &s)| (p.as_str(), f32::from(s))).collect();
            let tokens = with_bytes(&tokens, &bytes);
            let ids = spm(&tokens, false).encode(&text, Specials::Parse).unwrap();
            let found: Vec<_> = ids.iter().map(|&id| tokens[id as usize].0).collect();
            prop_assert_eq!(found, naive(&tokens, &text.replace(' ', "▁")));
        }
    }
}
