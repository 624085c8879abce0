//! Which tokens end the generation.

use crate::template::ChatTemplate;
use crate::vocabulary::{Kind, Vocabulary};

/// Tokens that end a document in every vocabulary that has them.
const END_OF_TEXT: &[&str] = &["<|endoftext|>", "<|end_of_text|>"];

/// Tokens that end a turn, in models whose chat template writes them.
const END_OF_TURN: &[&str] =
    &["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>"];

/// Whether a token is one of those that end texts or turns.
pub(crate) fn is_end(token: &str) -> bool {
    ends_documents(token) || END_OF_TURN.contains(&token)
}

/// Whether a token is one of those that end texts.
pub(crate) fn ends_documents(token: &str) -> bool {
    END_OF_TEXT.contains(&token)
}

/// Adds the control tokens that end the generation by what they are, and removes duplicates.
///
/// Files often state one id only: a base model's end of text although the chat template ends its
/// turns with another token, or the reverse.
pub(crate) fn add_known(
    stops: &mut Vec<u32>,
    vocabulary: &Vocabulary,
    template: Option<&ChatTemplate>,
    id_of: impl Fn(&str) -> Option<u32>,
) {
    let ends_turns = |token: &&&str| template.is_some_and(|t| t.source().contains(**token));
    let known = END_OF_TEXT.iter().chain(END_OF_TURN.iter().filter(ends_turns));
    let is_control = |id: &u32| vocabulary.kind(*id) == Some(Kind::Control);
    stops.extend(known.filter_map(|token| id_of(token)).filter(is_control));
    let mut seen = Vec::new();
    stops.retain(|id| {
        let is_new = !seen.contains(id);
        seen.push(*id);
        is_new
    });
}
