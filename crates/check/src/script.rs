//! Ways to have a model read a prompt, as data.

use apr_model::{Backend, Cache, LogitRows, Model, Observer, Phase, Result, StepInput, Unobserved};

/// One act of a script. Together the `Read`s read the prompt once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Reads the next tokens of the prompt in one step, in front of the observer.
    Read(usize),
    /// Reads so many tokens of another text after what was read.
    Stray(usize),
    /// Another sequence reads its next tokens.
    Other(usize),
    /// Copies the cache.
    Copy,
    /// Goes on from the copy.
    Resume,
    /// Cuts the sequence back to so many positions.
    Rewind(usize),
}

impl Act {
    /// Tokens read, or positions kept.
    pub(crate) fn len(self) -> usize {
        match self {
            Self::Read(len) | Self::Stray(len) | Self::Other(len) | Self::Rewind(len) => len,
            Self::Copy | Self::Resume => 0,
        }
    }
}

/// The prompt and a text that is nothing like it.
#[derive(Debug)]
pub(crate) struct Texts {
    pub(crate) prompt: Vec<u32>,
    pub(crate) other: Vec<u32>,
}

impl Texts {
    pub(crate) fn new(prompt: &[u32], vocab_size: usize) -> Self {
        let next = |&id: &u32| id.wrapping_add(1) % vocab_size as u32;
        Self { prompt: prompt.to_vec(), other: prompt.iter().rev().map(next).collect() }
    }

    /// Reads of `chunk` tokens each; the last takes what is left.
    pub(crate) fn chunks(&self, chunk: usize) -> Vec<Act> {
        self.prompt.chunks(chunk).map(|tokens| Act::Read(tokens.len())).collect()
    }

    /// The first half at once, the rest token by token: both ways in one run.
    pub(crate) fn mixed(&self) -> Vec<Act> {
        let n = self.prompt.len();
        let first = n.div_ceil(2);
        [first].into_iter().chain(vec![1; n - first]).map(Act::Read).collect()
    }
}

/// The steps that a script's reads make, whatever happens between them.
pub(crate) fn reads(acts: &[Act]) -> Vec<Act> {
    acts.iter().copied().filter(|act| matches!(act, Act::Read(_))).collect()
}

/// Plays `acts` and returns the logits of the prompt's rows.
pub(crate) fn play<B: Backend>(
    model: &Model<B>,
    texts: &Texts,
    acts: &[Act],
    logits: LogitRows,
    observer: &mut dyn Observer,
) -> Result<Vec<f32>> {
    let capacity = texts.prompt.len();
    let mut cache = model.cache(capacity)?;
    let (mut other, mut copy) = (None, None);
    let (mut all, mut chunk) = (Vec::new(), 0);
    for &act in acts {
        match act {
            Act::Read(len) => {
                let step = step(model, &mut cache, &texts.prompt, (chunk, len), logits, observer)?;
                all.extend(step);
                chunk += 1;
            }
            Act::Stray(len) => {
                stray(model, &mut cache, &texts.other, len)?;
            }
            Act::Other(len) => {
                if other.is_none() {
                    other = Some(model.cache(capacity)?);
                }
                let cache = other.as_mut().expect("just made");
                stray(model, cache, &texts.other, len)?;
            }
            Act::Copy => copy = Some(cache.clone()),
            Act::Resume => cache = copy.take().expect("a script copies before it resumes"),
            Act::Rewind(len) => cache.truncate(len),
        }
    }
    Ok(all)
}

fn stray<B: Backend>(
    model: &Model<B>,
    cache: &mut Cache<B>,
    text: &[u32],
    len: usize,
) -> Result<Vec<f32>> {
    step(model, cache, text, (0, len), LogitRows::None, &mut Unobserved)
}

/// Reads the `len` tokens of `text` that follow what `cache` has seen, as chunk number `chunk`.
fn step<B: Backend>(
    model: &Model<B>,
    cache: &mut Cache<B>,
    text: &[u32],
    (chunk, len): (usize, usize),
    logits: LogitRows,
    observer: &mut dyn Observer,
) -> Result<Vec<f32>> {
    let tokens = &text[cache.len()..cache.len() + len];
    let (phase, chunk) = match len {
        1 if !cache.is_empty() => (Phase::Decode, 0),
        _ => (Phase::Prefill, chunk),
    };
    let input = StepInput { tokens, phase, chunk, logits };
    Ok(model.step(input, cache, observer)?.as_slice().to_vec())
}
