//! The tokens themselves: which bytes each stands for, and what kind it is.

use std::borrow::Cow;

use crate::error::{Error, Place, Result};

/// No vocabulary in use has more ids; a larger one in a file is an error, not an allocation.
pub(crate) const MAX_IDS: u32 = 1 << 22;

/// What a token is for. The distinctions are those of GGUF's `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Made by merging.
    Normal,
    /// Stands for text that has no token.
    Unknown,
    /// Structure, such as an end of turn: matched in text only when asked for.
    Control,
    /// Added by hand, always matched whole.
    UserDefined,
    /// A hole, or a token that is never produced.
    Unused,
    /// One raw byte, spelt `<0xNN>`.
    Byte,
}

/// How the text of a normal token spells the bytes that it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// GPT-2's alphabet: one printable character per byte.
    ByteLevel,
    /// SentencePiece: `▁` is a space, all else is itself.
    SentencePiece,
}

/// The bytes and kinds of all tokens, in one allocation each.
///
/// It is a small part of a [`Tokenizer`](crate::Tokenizer), and all that is needed to read ids.
#[derive(Debug, Default)]
pub struct Vocabulary {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    kinds: Vec<Kind>,
}

impl Vocabulary {
    /// Appends the token with the next id.
    pub(crate) fn push(&mut self, text: &str, kind: Kind, spelling: Spelling) {
        let raw = |b: &mut Vec<u8>| b.extend_from_slice(text.as_bytes());
        match (kind, spelling) {
            (Kind::Control | Kind::UserDefined | Kind::Unknown, _) => raw(&mut self.bytes),
            (Kind::Byte, _) => match byte_token(text) {
                Some(b) => self.bytes.push(b),
                None => raw(&mut self.bytes),
            },
            (_, Spelling::ByteLevel) => {
                let start = self.bytes.len();
                for c in text.chars() {
                    match byte_of(c) {
                        Some(b) => self.bytes.push(b),
                        // Not spelt in the alphabet after all: such a token stands for itself.
                        None => {
                            self.bytes.truncate(start);
                            raw(&mut self.bytes);
                            break;
                        }
                    }
                }
            }
            (_, Spelling::SentencePiece) => {
                self.bytes.extend_from_slice(text.replace('▁', " ").as_bytes());
            }
        }
        self.ends.push(self.bytes.len());
        self.kinds.push(kind);
    }

    /// The number of ids.
    #[allow(clippy::len_without_is_empty, reason = "no tokenizer is without tokens")]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes that a token stands for; none for an id outside the vocabulary.
    pub fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..end]
    }

    /// The text of one token: ` is`. Part of a character reads as U+FFFD.
    pub fn text(&self, id: u32) -> Cow<'_, str> {
        String::from_utf8_lossy(self.bytes(id))
    }

    /// What a token is for; `None` for an id outside the vocabulary.
    pub fn kind(&self, id: u32) -> Option<Kind> {
        self.kinds.get(id as usize).copied()
    }
}

/// An id from a file, if a vocabulary of this size has it.
pub(crate) fn check_id(place: Place, id: u64, size: usize) -> Result<u32> {
    match u32::try_from(id) {
        Ok(small) if (small as usize) < size => Ok(small),
        _ => Err(Error::IdOutOfRange { place, id, limit: size as u64 }),
    }
}

/// The byte that a character of GPT-2's alphabet spells.
///
/// Printable Latin-1 characters spell themselves; the 68 other bytes are spelt, in order, by the
/// characters from U+0100 on.
pub(crate) fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8), // 0x00..=0x20
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8), // 0x7f..=0xa0
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The byte that a token spelt `<0xNN>` stands for.
pub(crate) fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_canonical =
        hex.len() == 2 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
    is_canonical.then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_spells_every_byte_exactly_once() {
        let mut spelt: Vec<u8> =
            (0..=0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        spelt.sort_unstable();
        assert_eq!(spelt, (0..=255).collect::<Vec<u8>>());
        assert_eq!(
            (byte_of('Ġ'), byte_of('Ċ'), byte_of('A')),
            (Some(b' '), Some(b'\n'), Some(b'A'))
        );
    }

    #[test]
    fn the_byte_alphabet_is_the_one_the_encoder_uses() {
        use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
        let text: String = (1..0x250).filter_map(char::from_u32).collect();
        let mut pieces = PreTokenizedString::from(text.as_str());
        let encoder = tokenizers::pre_tokenizers::byte_level::ByteLevel::new(false, false, false);
        encoder.pre_tokenize(&mut pieces).unwrap();
        let spelt =
            pieces.get_splits(OffsetReferential::Original, OffsetType::Byte)[0].0.to_owned();
        let bytes: Option<Vec<u8>> = spelt.chars().map(byte_of).collect();
        assert_eq!(bytes.as_deref(), Some(text.as_bytes()));
    }

    #[test]
    fn tokens_keep_their_own_bytes_and_foreign_ids_have_none() {
        let mut v = Vocabulary::default();
        v.push("Ġis", Kind::Normal, Spelling::ByteLevel);
        v.push("<|Ġ|>", Kind::Control, Spelling::ByteLevel);
        v.push("", Kind::Unused, Spelling::ByteLevel);
        v.push("日", Kind::Normal, Spelling::ByteLevel);
        v.push("▁is", Kind::Normal, Spelling::SentencePiece);
        v.push("<0x0A>", Kind::Byte, Spelling::SentencePiece);
        v.push("<0x0A>", Kind::Normal, Spelling::SentencePiece);
        let texts: Vec<_> = (0..8).map(|id| String::from_utf8_lossy(v.bytes(id))).collect();
        assert_eq!(texts, [" is", "<|Ġ|>", "", "日", " is", "\n", "<0x0A>", ""]);
        assert_eq!((v.kind(1), v.kind(7)), (Some(Kind::Control), None));
    }
}
