//! The one decode loop: read the prompt in chunks, then sample, append, repeat.

use std::{
    ops::{ControlFlow, Range},
    time::{Duration, Instant},
};

use crate::{Backend, Cache, Error, LogitRows, Model, Observer, Phase, Result, Sampler, StepInput};

/// What to generate.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// The most tokens to generate. 0 reads the prompt and stops.
    pub max_tokens: usize,
    /// The most prompt tokens per step, see [`prompt_chunks`]. Bits do not depend on it.
    pub chunk: usize,
    /// Which prompt rows get logits; the last one does whenever a token is to be generated.
    pub prompt_logits: LogitRows,
    /// Tokens that end the text.
    pub stop: Vec<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_tokens: 128, chunk: 512, prompt_logits: LogitRows::Last, stop: Vec::new() }
    }
}

/// A token, as soon as it is known.
#[derive(Clone, Copy, Debug)]
pub struct NewToken<'a> {
    /// Its id.
    pub id: u32,
    /// The logits it was sampled from.
    pub logits: &'a [f32],
    /// How long the step took that computed them.
    pub elapsed: Duration,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token, which is not part of the text.
    Stop(u32),
    /// `max_tokens` were generated.
    Length,
    /// The cache is full.
    Context,
    /// The receiver of tokens asked for it.
    Interrupted,
}

/// What was generated.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The new tokens, without the stop token.
    pub token_ids: Vec<u32>,
    /// Why there are no more.
    pub finish: Finish,
    /// How long the prompt took.
    pub prefill: Duration,
}

/// The steps in which a prompt of so many `tokens` is read: as few as can be of at most `most` each (of 1 for 0), and all of one length, but for
/// a token.
///
/// A short one at the end would read all weights for next to nothing, and take memory of another size.
pub fn prompt_chunks(tokens: usize, most: usize) -> impl ExactSizeIterator<Item = Range<usize>> {
    let count = tokens.div_ceil(most.max(1));
    let start = move |i: usize| (tokens * i).div_ceil(count);
    (0..count).map(move |i| start(i)..start(i + 1))
}

/// Continues `prompt`, handing each new token to `on_token`.
///
/// Every step, of the prompt and of the continuation, runs in front of `observer`.
pub fn generate<B: Backend>(
    model: &Model<B>,
    cache: &mut Cache<B>,
    prompt: &[u32],
    options: &GenerateOptions,
    sampler: &mut Sampler,
    observer: &mut dyn Observer,
    on_token: &mut dyn FnMut(NewToken<'_>) -> ControlFlow<()>,
) -> Result<Generated> {
    let needed = cache.len() + prompt.len();
    if prompt.is_empty() {
        return Err(Error::NoTokens);
    }
    if needed > cache.capacity() {
        return Err(Error::ContextFull { needed, capacity: cache.capacity() });
    }

    let start = Instant::now();
    let chunks = prompt_chunks(prompt.len(), options.chunk);
    let last = chunks.len() - 1;
    for (chunk, range) in chunks.enumerate() {
        let rows = match options.prompt_logits {
            LogitRows::All => LogitRows::All,
            LogitRows::Last if chunk == last => LogitRows::Last,
            _ if chunk == last && options.max_tokens > 0 => LogitRows::Last,
            _ => LogitRows::None,
        };
        let tokens = &prompt[range];
        let input = StepInput { tokens, phase: Phase::Prefill, chunk, logits: rows };
        model.step(input, cache, observer)?;
    }
    let prefill = start.elapsed();

    let mut elapsed = prefill;
    let mut token_ids = Vec::new();
    let finish = loop {
        if token_ids.len() == options.max_tokens {
            break Finish::Length;
        }
        let row = cache.logits().last().expect("the last row has logits");
        let id = sampler.sample(row)?;
        if options.stop.contains(&id) {
            break Finish::Stop(id);
        }
        token_ids.push(id);
        if on_token(NewToken { id, logits: row, elapsed }).is_break() {
            break Finish::Interrupted;
        }
        if token_ids.len() == options.max_tokens {
            break Finish::Length;
        }
        if cache.len() == cache.capacity() {
            break Finish::Context;
        }
        let start = Instant::now();
        let input =
            StepInput { tokens: &[id], phase: Phase::Decode, chunk: 0, logits: LogitRows::Last };
        model.step(input, cache, observer)?;
        elapsed = start.elapsed();
    };
    Ok(Generated { token_ids, finish, prefill })
}

#[cfg(test)]
mod tests {
    use super::prompt_chunks;

    #[test]
    fn chunks_are_few_and_equal_and_cover_the_prompt() {
        let lengths =
            |tokens, most| prompt_chunks(tokens, most).map(|chunk| chunk.len()).collect::<Vec<_>>();
        assert_eq!(lengths(512, 512), [512]);
        assert_eq!(lengths(513, 512), [257, 256]);
        assert_eq!(lengths(10, 4), [4, 3, 3]);
        assert_eq!(lengths(3, 1), [1, 1, 1]);
        assert_eq!(lengths(2, 0), [1, 1]);
        assert_eq!(lengths(1, usize::MAX), [1]);
        assert!(lengths(0, 512).is_empty());
        for (tokens, most) in (1..60).flat_map(|tokens| (1..60).map(move |most| (tokens, most))) {
            let chunks: Vec<_> = prompt_chunks(tokens, most).collect();
            assert_eq!(chunks.len(), tokens.div_ceil(most));
            assert!(chunks.iter().all(|chunk| (1..=most).contains(&chunk.len())));
            assert_eq!(
                chunks.into_iter().flatten().collect::<Vec<_>>(),
                (0..tokens).collect::<Vec<_>>()
            );
        }
    }
}
