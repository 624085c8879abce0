//! Text out of a stream of tokens, never half a character.

use std::sync::Arc;

use crate::Vocabulary;

/// Turns generated tokens into text as they come. It leaves a leading space in place: generated text continues a prompt.
///
/// A token may end in the middle of a UTF-8 character; what is incomplete waits for the tokens
/// that complete it. All pieces together are what [`String::from_utf8_lossy`] makes of all bytes.
#[derive(Debug)]
pub struct TextStream {
    vocabulary: Arc<Vocabulary>,
    pending: Vec<u8>,
}

impl TextStream {
    /// A stream of the tokens of `vocabulary`.
    pub fn new(vocabulary: Arc<Vocabulary>) -> Self {
        Self { vocabulary, pending: Vec::new() }
    }

    /// Takes the next token and returns the text that is now complete, if any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        self.pending.extend_from_slice(self.vocabulary.bytes(id));
        let text = take_complete(&mut self.pending);
        (!text.is_empty()).then_some(text)
    }

    /// Ends the stream: a character that stayed incomplete becomes U+FFFD.
    pub fn finish(self) -> Option<String> {
        (!self.pending.is_empty()).then(|| String::from_utf8_lossy(&self.pending).into_owned())
    }
}

/// Removes the complete characters from the front of `bytes`; what can never become one is U+FFFD.
fn take_complete(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut done = 0;
    loop {
        match std::str::from_utf8(&bytes[done..]) {
            Ok(rest) => {
                text.push_str(rest);
                done = bytes.len();
                break;
            }
            Err(e) => {
                let valid = done + e.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[done..valid]));
                done = valid;
                let Some(bad) = e.error_len() else { break };
                text.push(char::REPLACEMENT_CHARACTER);
                done += bad;
            }
        }
    }
    bytes.drain(..done);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn half_a_character_waits_for_its_other_half() {
        let mut pending = "né".as_bytes()[..2].to_vec();
        assert_eq!(take_complete(&mut pending), "n");
        assert_eq!(take_complete(&mut pending), "");
        pending.push("é".as_bytes()[1]);
        assert_eq!(take_complete(&mut pending), "é");
        assert!(pending.is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_read_as_they_do_at_once(
            chunks in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..5),
                    "\\PC{0,3}".prop_map(String::into_bytes),
                ],
                0..12,
            ),
            cut in 1usize..4,
        ) {
            let all = chunks.concat();
            let mut pending = Vec::new();
            let mut text = String::new();
            for piece in all.chunks(cut) {
                pending.extend_from_slice(piece);
                text += &take_complete(&mut pending);
                prop_assert!(pending.len() < 4);
            }
            text += &String::from_utf8_lossy(&pending);
            prop_assert_eq!(text, String::from_utf8_lossy(&all));
        }
    }
}
