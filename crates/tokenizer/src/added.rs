//! Tokens that are matched whole in the text before anything else is done to it.

use tokenizers::{AddedToken, AddedVocabulary, NormalizerWrapper, PreTokenizedString};

use crate::error::{Error, Place, Result};
use crate::vocabulary::Kind;

/// What to do with control tokens, such as `<|im_end|>`, that are written out in a text.
///
/// Text from a chat template needs [`Specials::Parse`]; text from a user needs
/// [`Specials::Literal`], or the user could end the turn. Tokens that a model's authors added for
/// use within text (`<think>`, runs of spaces) are matched in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// `<|im_end|>` in the text is the control token.
    Parse,
    /// `<|im_end|>` in the text is ten characters.
    Literal,
}

/// The added tokens of a vocabulary, ready to be found.
#[derive(Debug)]
pub(crate) struct Added {
    parse: AddedVocabulary,
    literal: AddedVocabulary,
}

impl Added {
    /// `model` must know every token of `tokens` already: that is where their ids come from.
    pub(crate) fn new(
        place: &Place,
        tokens: Vec<AddedToken>,
        model: &impl tokenizers::Model,
        normalizer: Option<&NormalizerWrapper>,
    ) -> Result<Self> {
        let mut parse = AddedVocabulary::new();
        parse
            .add_tokens(tokens, model, normalizer)
            .map_err(|source| Error::Library { place: place.clone(), source })?;
        let mut literal = parse.clone();
        literal.set_encode_special_tokens(true);
        Ok(Self { parse, literal })
    }

    /// Splits `text` around the added tokens and normalises the rest.
    pub(crate) fn split(
        &self,
        text: &str,
        specials: Specials,
        normalizer: Option<&NormalizerWrapper>,
    ) -> PreTokenizedString {
        let added = match specials {
            Specials::Parse => &self.parse,
            Specials::Literal => &self.literal,
        };
        added.extract_and_normalize(normalizer, text)
    }
}

/// How a token of this kind is matched in text, if it is.
pub(crate) fn added_token(text: &str, kind: Kind) -> Option<AddedToken> {
    let special = match kind {
        Kind::Control | Kind::Unknown => true,
        Kind::UserDefined => false,
        Kind::Normal | Kind::Unused | Kind::Byte => return None,
    };
    (!text.is_empty()).then(|| AddedToken::from(text, special).normalized(false))
}
