//! From prompt options to token ids, the same way on every command.

use std::{io::Read, sync::Arc};

use anyhow::{Context, Result, bail};
use apr_capture::manifest;
use apr_format::Checkpoint;
use apr_tokenizer::{Message, Specials, Tokenizer, Vocabulary};

use crate::{args::PromptArgs, output};

/// A prompt as the model will see it.
#[derive(Debug)]
pub(crate) struct Prompt {
    /// `text`, `chat` or `tokens`.
    pub(crate) mode: &'static str,
    /// The text that was tokenized, template applied; `None` for bare ids.
    pub(crate) text: Option<String>,
    pub(crate) token_ids: Vec<u32>,
    /// How to show ids as text; a prompt of bare ids can do without.
    ///
    /// Of the tokenizer this is all that is kept: the rest takes tens of megabytes, beside a model for which there may just be room.
    pub(crate) vocabulary: Option<Arc<Vocabulary>>,
    /// The tokens that end a text.
    pub(crate) stop_ids: Vec<u32>,
}

impl Prompt {
    /// Resolves `args` with the tokenizer of `checkpoint`.
    pub(crate) fn resolve(args: &PromptArgs, checkpoint: &Checkpoint) -> Result<Self> {
        if let Some(ids) = &args.tokens {
            if ids.is_empty() {
                bail!("--tokens names no token");
            }
            let tokenizer = Tokenizer::from_checkpoint(checkpoint).inspect_err(|error| {
                output::tell(format_args!("note: tokens are shown as ids only: {error}"));
            });
            return Ok(Self::new("tokens", None, ids.clone(), tokenizer.ok().as_ref()));
        }
        let tokenizer = Tokenizer::from_checkpoint(checkpoint)
            .context("this model has no usable tokenizer; give ids with --tokens instead")?;
        let typed = match args.prompt.as_deref() {
            Some("-") => {
                let mut bytes = Vec::new();
                std::io::stdin()
                    .read_to_end(&mut bytes)
                    .context("the prompt cannot be read from stdin")?;
                String::from_utf8(bytes).context("the prompt on stdin is no UTF-8 text")?
            }
            Some(text) => text.to_owned(),
            None => bail!("no prompt: give -p TEXT or --tokens"),
        };
        let (mode, text, token_ids) = if args.chat {
            let text = chat(&tokenizer, args.system.as_deref(), &typed)?;
            // A template writes its own begin-of-text.
            let token_ids = tokenizer.encode_fragment(&text, Specials::Parse)?;
            ("chat", text, token_ids)
        } else {
            let token_ids = tokenizer.encode(&typed, Specials::Parse)?;
            ("text", typed, token_ids)
        };
        if token_ids.is_empty() {
            bail!("the prompt is empty: it has no tokens to start from");
        }
        Ok(Self::new(mode, Some(text), token_ids, Some(&tokenizer)))
    }

    fn new(
        mode: &'static str,
        text: Option<String>,
        token_ids: Vec<u32>,
        tokenizer: Option<&Tokenizer>,
    ) -> Self {
        let vocabulary = tokenizer.map(|t| Arc::clone(t.vocabulary()));
        let stop_ids = tokenizer.map_or_else(Vec::new, |t| t.eos_ids().to_vec());
        Self { mode, text, token_ids, vocabulary, stop_ids }
    }

    /// What a capture's manifest says of it.
    pub(crate) fn manifest(&self) -> manifest::Prompt {
        manifest::Prompt { mode: self.mode.to_owned(), text: self.text.clone() }
    }

    /// The text of one token, or its bytes if they are only a part of a character: `<0xE2 0x80>`. `None` if there is
    /// no tokenizer to tell.
    pub(crate) fn token_text(&self, id: u32) -> Option<String> {
        let bytes = self.vocabulary.as_ref()?.bytes(id);
        Some(str::from_utf8(bytes).map_or_else(|_| in_hex(bytes), str::to_owned))
    }
}

fn in_hex(bytes: &[u8]) -> String {
    let bytes: Vec<_> = bytes.iter().map(|byte| format!("0x{byte:02X}")).collect();
    format!("<{}>", bytes.join(" "))
}

fn chat(tokenizer: &Tokenizer, system: Option<&str>, user: &str) -> Result<String> {
    let template = tokenizer
        .chat_template()
        .context("this model has no chat template; leave out --chat to give the text as it is")?;
    let message =
        |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    let mut messages: Vec<Message> =
        system.map(|text| message("system", text)).into_iter().collect();
    messages.push(message("user", user));
    Ok(template.render(&messages, true)?)
}
