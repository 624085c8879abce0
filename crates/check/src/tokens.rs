//! What must hold of a tokenizer and a chat template.

use apr_format::Container;
use apr_tokenizer::{Message, Specials, Tokenizer};

use crate::{Break, Check, Note, Outcome, file::FileSession, outcome::Verdict};

/// Texts that a tokenizer must give back: letters, digits, white space at all ends, code, several scripts, characters beyond
/// the basic plane, composed emoji. All are in normal form C, which some tokenizers bring texts to.
const TEXTS: [&str; 12] = [
    "Hello, world!",
    " leading and trailing ",
    "a  b   c    d",
    "tabs\tand\r\nline ends\n",
    "\n\n\n\n three empty lines\n\n",
    "1234567890 3.14159 -1e-7 0xFF",
    "def f(x):\n    return {\"a\": [x ** 2 for _ in range(3)]}  # done\n",
    "Grüße aus Köln, señor Ångström; naïve café",
    "Привет мир. Γειά σου Κόσμε. שלום עולם",
    "日本語の文章。中文句子。한국어 문장",
    "👍🏽 👩‍👩‍👧‍👦 🇩🇪 𝒳 ∑ → ≠ “quotes” … —",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~\\",
];

/// The keys of the one special token that a tokenizer is read without, since only templates name it.
const PADDING: [&str; 2] = ["tokenizer.ggml.padding_token_id", "tokenizer.padding_token_id"];

impl FileSession<'_> {
    pub(crate) fn vocabulary(&self) -> Result<Verdict, Outcome> {
        self.watch.begin(Check::Vocabulary, 0);
        let tokenizer = self.tokenizer()?;
        let (ids, rows) = (tokenizer.vocab_size(), self.embedding()?.shape().rows());
        let mut breaks = Vec::new();
        // Elsewhere rows without a token are padding, which GGUF has tokens for.
        let is_gguf = matches!(self.checkpoint.container(), Container::Gguf { .. });
        if ids > rows {
            let what = format!("the tokenizer has {ids} ids, but the embedding only {rows} rows");
            breaks.push(Break::Other { what });
        } else if ids < rows && is_gguf {
            let what = format!(
                "the tokenizer has only {ids} ids for {rows} rows of the embedding; in GGUF each has one"
            );
            breaks.push(Break::Other { what });
        }
        let named = tokenizer.eos_ids().iter().map(|&id| ("end", id));
        for (what, id) in named.chain(tokenizer.bos_id().map(|id| ("begin", id))) {
            if id as usize >= rows {
                let what = format!("the token {id} that {what}s a text has no row among {rows}");
                breaks.push(Break::Other { what });
            }
        }
        let mut verdict = Verdict::new(breaks, format!("{ids} ids, {rows} rows"));
        for key in PADDING {
            let id = self.checkpoint.metadata().u64(key).ok().flatten();
            if let Some(id) = id.filter(|&id| id >= ids as u64) {
                verdict.notes.push(Note::new(format!("{key} is {id}, which is no token")));
            }
        }
        Ok(verdict)
    }

    pub(crate) fn round_trip(&self) -> Result<Verdict, Outcome> {
        self.watch.begin(Check::Tokenizer, 0);
        let tokenizer = self.read_tokenizer()?;
        let wrong = |text: &&str| match tokenizer.encode_fragment(text, Specials::Literal) {
            Ok(ids) => difference(text, &tokenizer.decode(&ids)),
            Err(error) => Some(error.to_string()),
        };
        let breaks = TEXTS.iter().filter_map(wrong).map(|what| Break::Other { what });
        Ok(Verdict::new(breaks.collect(), format!("{} texts", TEXTS.len())))
    }

    pub(crate) fn special_tokens(&self) -> Result<Verdict, Outcome> {
        self.watch.begin(Check::SpecialTokens, 0);
        let tokenizer = self.tokenizer()?;
        let special = ids(tokenizer).filter(|&id| tokenizer.is_special(id));
        let special: Vec<u32> =
            special.filter(|&id| !tokenizer.token_bytes(id).is_empty()).collect();
        if special.is_empty() {
            return Err(Outcome::not_applicable("the tokenizer has no special tokens"));
        }
        let wrong = |&id: &u32| {
            let text = tokenizer.token_text(id);
            let what = not_whole(id, &text, tokenizer.encode_fragment(&text, Specials::Parse))?;
            Some(Break::Other { what })
        };
        let breaks = special.iter().filter_map(wrong).collect();
        Ok(Verdict::new(breaks, format!("{} special tokens", special.len())))
    }

    pub(crate) fn token_ids(&self) -> Result<Verdict, Outcome> {
        let tokenizer = self.tokenizer()?;
        self.watch.begin(Check::TokenIds, tokenizer.vocab_size() as u64);
        let (mut breaks, mut lost, mut nameless) = (Vec::new(), Vec::new(), Vec::new());
        let mut texts = 0;
        for id in ids(tokenizer) {
            self.watch.advance(1);
            match std::str::from_utf8(tokenizer.token_bytes(id)) {
                // Part of a character is no text, and a special token is no text either.
                Err(_) => continue,
                Ok(_) if tokenizer.is_special(id) => continue,
                Ok("") => nameless.push(id),
                Ok(text) => {
                    texts += 1;
                    match tokenizer.encode_fragment(text, Specials::Literal) {
                        Ok(ids)
                            if without_space(&tokenizer.decode(&ids)) == without_space(text) => {}
                        Ok(_) => lost.push(id),
                        Err(error) => {
                            let what = format!("{text:?}, the text of token {id}: {error}");
                            breaks.push(Break::Other { what });
                        }
                    }
                }
            }
        }
        let mut verdict = Verdict::new(breaks, format!("the texts of {texts} tokens"));
        for (ids, what) in [
            (lost, "have a text that comes back changed when encoded"),
            (nameless, "stand for no text at all"),
        ] {
            if !ids.is_empty() {
                let what = format!("{} tokens {what}: {}", ids.len(), listed(&ids));
                verdict.notes.push(Note::new(what));
            }
        }
        Ok(verdict)
    }

    pub(crate) fn chat_template(&self) -> Result<Verdict, Outcome> {
        self.watch.begin(Check::ChatTemplate, 0);
        let tokenizer = self.tokenizer()?;
        let none = || Outcome::not_applicable("the model has no chat template");
        let template = tokenizer.chat_template().ok_or_else(none)?;
        let messages = [
            Message::new("user", "What is 2+2?"),
            Message::new("assistant", "4."),
            Message::new("user", "And 3+3?"),
        ];
        let text = template.render(&messages, true).map_err(Outcome::broken)?;
        let ids = tokenizer.encode_fragment(&text, Specials::Parse).map_err(Outcome::broken)?;
        let mut breaks = Vec::new();
        if let Some(lost) = messages.iter().find(|message| !text.contains(&message.content)) {
            let what = format!("the text of {:?} is not in what it writes", lost.content);
            breaks.push(Break::Other { what });
        }
        let changed = difference(&text, &tokenizer.decode(&ids));
        breaks.extend(changed.map(|what| Break::Other { what }));
        let (messages, tokens) = (messages.len(), ids.len());
        Ok(Verdict::new(breaks, format!("{messages} messages in {tokens} tokens")))
    }
}

fn ids(tokenizer: &Tokenizer) -> impl Iterator<Item = u32> {
    0..tokenizer.vocab_size() as u32
}

/// How `encoded`, the ids of the text of the special token `id`, are not that token.
fn not_whole(id: u32, text: &str, encoded: apr_tokenizer::Result<Vec<u32>>) -> Option<String> {
    match encoded {
        Ok(ids) if ids == [id] => None,
        Ok(ids) => Some(format!("{text:?}, which is token {id}, is encoded as {}", listed(&ids))),
        Err(error) => Some(format!("{text:?}, which is token {id}: {error}")),
    }
}

/// The text of a lone token may or may not keep the space that SentencePiece puts before a text.
fn without_space(text: &str) -> &str {
    text.strip_prefix(' ').unwrap_or(text)
}

/// Where `back`, decoded from the ids of `text`, is another text.
fn difference(text: &str, back: &str) -> Option<String> {
    if text == back {
        return None;
    }
    let same = text.chars().zip(back.chars()).take_while(|(a, b)| a == b).count();
    let rest = |text: &str| text.chars().skip(same).take(12).collect::<String>();
    Some(format!(
        "{text:?} comes back changed: {:?} instead of {:?} at character {same}",
        rest(back),
        rest(text)
    ))
}

/// The first of many ids.
fn listed(ids: &[u32]) -> String {
    const SHOWN: usize = 8;
    let first: Vec<_> = ids.iter().take(SHOWN).map(u32::to_string).collect();
    let more = if ids.len() > SHOWN { ", ..." } else { "" };
    format!("{}{more}", first.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_special_token_in_pieces_or_under_another_id_is_not_whole() {
        assert_eq!(not_whole(7, "<|end|>", Ok(vec![7])), None);
        for ids in [vec![], vec![8], vec![7, 7], (0..20).collect()] {
            let what = not_whole(7, "<|end|>", Ok(ids)).expect("not that token");
            assert!(what.contains("\"<|end|>\", which is token 7"), "{what}");
        }
    }

    #[test]
    fn the_first_change_in_a_text_is_shown_beside_what_it_was() {
        assert_eq!(difference("Ab", "Ab"), None);
        let what = difference("Grüße aus Köln", "Grüße  aus Köln").expect("a space more");
        assert!(what.ends_with("\" aus Köln\" instead of \"aus Köln\" at character 6"), "{what}");
        assert!(difference("ab", "a").is_some(), "what is missing at the end is a change");
    }
}
