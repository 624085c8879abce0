//! The one decode loop: read the prompt in chunks, then sample, append, repeat.

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

use crate::{Backend, Cache, Error, LogitRows, Model, Observer, Phase, Result, Sampler, StepInput};

/// What to generate.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// The most tokens to generate. 0 reads the prompt and stops.
    pub max_tokens: usize,
    /// Prompt tokens per step. Bits do not depend on it.
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
    let chunks = prompt.chunks(options.chunk.max(1));
    let last = chunks.len() - 1;
    for (chunk, tokens) in chunks.enumerate() {
        let rows = match options.prompt_logits {
            LogitRows::All => LogitRows::All,
            LogitRows::Last if chunk == last => LogitRows::Last,
            _ if chunk == last && options.max_tokens > 0 => LogitRows::Last,
            _ => LogitRows::None,
        };
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
