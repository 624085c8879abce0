//! The cheapest evidence: are both sides of the same tokens, and would both make them of the same text?

use apr_format::Checkpoint;
use apr_tokenizer::{Specials, Tokenizer};
use serde::Serialize;

use crate::{Against, Script};

/// A difference before the first number is computed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum PromptDifference {
    /// The text of the reference's prompt gives other tokens here.
    Tokens {
        /// The text.
        text: String,
        /// The first index at which they differ.
        at: usize,
        /// The token of the side under test there, if it has one, and its text.
        ours: Option<(u32, String)>,
        /// The reference's.
        theirs: Option<(u32, String)>,
    },
    /// The chat templates differ.
    ChatTemplate {
        /// The first character at which they do.
        at: usize,
    },
    /// The token that ends a text differs.
    EndOfText {
        /// Those of the side under test.
        ours: Vec<u32>,
        /// The reference's.
        theirs: Vec<u32>,
    },
}

/// A text in which tokenizers that differ are likely to show it.
const PROBE: &str = "def f(x):\n\treturn  'Straße 東京' + \"12345\"  # it's  \r\n\r\n";

pub(super) fn differences(
    a: &Checkpoint,
    against: &Against<'_>,
    script: &Script,
) -> Vec<PromptDifference> {
    // Without a tokenizer there is nothing that could differ: ids were given.
    let Ok(ours) = Tokenizer::from_checkpoint(a) else { return Vec::new() };
    let mut differences = Vec::new();
    match against {
        Against::Capture { capture, .. } => {
            let text = capture.provenance().and_then(|p| p.prompt.as_ref()?.text.clone());
            let steps = match script {
                Script::Steps(steps) => steps.iter(),
                Script::Greedy { .. } => [].iter(),
            };
            let captured: Vec<u32> = steps.flatten().copied().collect();
            if let Some(text) = text
                && let Ok(tokens) = ours.encode(&text, Specials::Parse)
            {
                // The capture may go on beyond its prompt.
                let prompt = &captured[..captured.len().min(tokens.len())];
                differences.extend(first_difference(&text, (&ours, &tokens), (&ours, prompt)));
            }
        }
        Against::Model { checkpoint, .. } => {
            let Ok(theirs) = Tokenizer::from_checkpoint(checkpoint) else { return Vec::new() };
            let encode = |t: &Tokenizer| t.encode(PROBE, Specials::Parse);
            if let (Ok(our_ids), Ok(their_ids)) = (encode(&ours), encode(&theirs)) {
                let (ours, theirs) = ((&ours, &our_ids[..]), (&theirs, &their_ids[..]));
                differences.extend(first_difference(PROBE, ours, theirs));
            }
            let template = |t: &Tokenizer| t.chat_template().map(|t| t.source().to_owned());
            if let (Some(ours), Some(theirs)) = (template(&ours), template(&theirs))
                && ours != theirs
            {
                let same = ours.chars().zip(theirs.chars()).take_while(|(a, b)| a == b);
                differences.push(PromptDifference::ChatTemplate { at: same.count() });
            }
            if ours.eos_ids() != theirs.eos_ids() {
                differences.push(PromptDifference::EndOfText {
                    ours: ours.eos_ids().to_vec(),
                    theirs: theirs.eos_ids().to_vec(),
                });
            }
        }
    }
    differences
}

fn first_difference(
    text: &str,
    (our_tokenizer, ours): (&Tokenizer, &[u32]),
    (their_tokenizer, theirs): (&Tokenizer, &[u32]),
) -> Option<PromptDifference> {
    let at = (0..ours.len().max(theirs.len())).find(|&i| ours.get(i) != theirs.get(i))?;
    let token = |tokenizer: &Tokenizer, ids: &[u32]| {
        ids.get(at).map(|&id| (id, tokenizer.token_text(id).into_owned()))
    };
    Some(PromptDifference::Tokens {
        text: text.to_owned(),
        at,
        ours: token(our_tokenizer, ours),
        theirs: token(their_tokenizer, theirs),
    })
}
