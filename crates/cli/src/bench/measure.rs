//! The runs that are timed, and what each of them has to do.

use std::{
    ops::{ControlFlow, Range},
    time::Instant,
};

use anyhow::{Result, ensure};
use apr_capture::StepSize;
use apr_cpu::{Cpu, Reader};
use apr_model::{
    Backend, Cache, Config, Cost, Costs, GenerateOptions, LogitRows, Model, NewToken, Observer,
    Phase, Sampler, SamplerOptions, StepInput, Unobserved, generate, prompt_chunks,
};
use apr_report::bench::{Peaks, ResultLine, Work};

use crate::output::Progress;

/// What is to be measured.
#[derive(Clone, Debug)]
pub(super) struct Runs {
    /// Lengths of prompts.
    pub(super) prefill: Vec<usize>,
    /// Numbers of tokens to generate.
    pub(super) decode: Vec<usize>,
    /// What the cache holds before, in ascending order.
    pub(super) depths: Vec<usize>,
    /// The most prompt tokens per step.
    pub(super) chunk: usize,
    /// How often each run is timed.
    pub(super) repetitions: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Prefill,
    Decode,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Prefill => Phase::Prefill.name(),
            Self::Decode => Phase::Decode.name(),
        }
    }
}

impl Runs {
    /// All runs at one depth.
    fn each(&self) -> impl Iterator<Item = (Kind, usize)> {
        let prefill = self.prefill.iter().map(|&n| (Kind::Prefill, n));
        prefill.chain(self.decode.iter().map(|&n| (Kind::Decode, n)))
    }

    /// The positions that the longest run needs.
    pub(super) fn positions(&self) -> usize {
        let depth = self.depths.last().copied().unwrap_or(0);
        depth.saturating_add(self.each().map(|(_, n)| n).max().unwrap_or(0))
    }

    /// The tokens of all runs, uncounted ones and those that fill the cache included.
    pub(super) fn tokens(&self) -> usize {
        let of_depth = self.each().map(|(_, n)| n).sum::<usize>() * (1 + self.repetitions);
        of_depth * self.depths.len() + self.depths.last().copied().unwrap_or(0)
    }

    /// Refuses, by name, what is longer than the model's context.
    pub(super) fn refuse_what_does_not_fit(&self, config: &Config) -> Result<()> {
        let context = config.max_position_embeddings;
        for &depth in &self.depths {
            for (kind, n) in self.each() {
                let option = if kind == Kind::Prefill { "-p" } else { "-n" };
                ensure!(
                    depth.saturating_add(n) <= context,
                    "{option} {n} with -d {depth} needs {} positions, but the model's context holds {context}; \
                     give smaller ones",
                    depth.saturating_add(n)
                );
            }
        }
        Ok(())
    }

    /// The steps of a run that follows `depth` positions.
    pub(super) fn steps(&self, kind: Kind, tokens: usize, depth: usize) -> Vec<StepSize> {
        let most = if kind == Kind::Prefill { self.chunk } else { 1 };
        let step = |chunk: Range<usize>| StepSize {
            first_position: depth + chunk.start,
            tokens: chunk.len(),
            logit_rows: usize::from(kind == Kind::Decode || chunk.end == tokens),
        };
        prompt_chunks(tokens, most).map(step).collect()
    }
}

/// One run and how long each repetition took.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    kind: Kind,
    tokens: usize,
    depth: usize,
    threads: usize,
    seconds: Vec<f64>,
    /// Bytes per second that the weights could be read at before the first repetition and after each.
    read_peaks: Vec<f64>,
    steps: usize,
    cost: Cost,
}

/// Times all `runs` on `model`, and between them how fast its weights can be read if there is a `reader`. The cache is filled once, and shortened
/// again after each run.
pub(super) fn measure(
    model: &Model<Cpu>,
    costs: &Costs,
    runs: &Runs,
    reader: Option<&Reader<'_>>,
    progress: &Progress,
) -> Result<Vec<Measured>> {
    let mut cache = model.cache(runs.positions())?;
    let mut all = Vec::new();
    for &depth in &runs.depths {
        let filled = cache.len();
        for (chunk, step) in runs.steps(Kind::Prefill, depth - filled, filled).iter().enumerate() {
            let step = StepSize { logit_rows: 0, ..*step };
            self::step(model, Kind::Prefill, chunk, step, &mut cache, &mut Unobserved)?;
            progress.advance_by(step.tokens as u64);
        }
        for (kind, tokens) in runs.each() {
            let steps = runs.steps(kind, tokens, depth);
            let (mut seconds, mut read_peaks) = (Vec::with_capacity(runs.repetitions), Vec::new());
            for repetition in 0..=runs.repetitions {
                cache.truncate(depth);
                let start = Instant::now();
                run(model, kind, &steps, &mut cache, &mut Unobserved)?;
                // The first brings the weights into memory, and is not counted.
                if repetition > 0 {
                    seconds.push(start.elapsed().as_secs_f64());
                }
                if let Some(reader) = reader {
                    read_peaks.push(reader.rate()?);
                }
                progress.advance_by(tokens as u64);
            }
            cache.truncate(depth);
            let cost =
                |step: &StepSize| costs.step(step.first_position, step.tokens, step.logit_rows);
            all.push(Measured {
                kind,
                tokens,
                depth,
                threads: model.backend().info().threads,
                seconds,
                read_peaks,
                steps: steps.len(),
                cost: steps.iter().map(cost).sum(),
            });
        }
    }
    Ok(all)
}

/// The seconds until a short prompt has its first token.
pub(super) fn first_token<B: Backend>(model: &Model<B>, tokens: usize) -> Result<f64> {
    let prompt: Vec<u32> = (0..tokens).map(|i| token(i, model)).collect();
    let start = Instant::now();
    let mut cache = model.cache(tokens)?;
    let options = GenerateOptions { max_tokens: 1, ..GenerateOptions::default() };
    let mut sampler = Sampler::new(SamplerOptions::default());
    let done = &mut |_: NewToken<'_>| ControlFlow::Continue(());
    generate(model, &mut cache, &prompt, &options, &mut sampler, &mut Unobserved, done)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Runs `steps` in front of `observer`.
pub(super) fn run<B: Backend>(
    model: &Model<B>,
    kind: Kind,
    steps: &[StepSize],
    cache: &mut Cache<B>,
    observer: &mut dyn Observer,
) -> Result<()> {
    let mut steps = steps.iter().enumerate();
    steps.try_for_each(|(i, &size)| step(model, kind, i, size, cache, observer))
}

fn step<B: Backend>(
    model: &Model<B>,
    kind: Kind,
    index: usize,
    size: StepSize,
    cache: &mut Cache<B>,
    observer: &mut dyn Observer,
) -> Result<()> {
    let StepSize { first_position, tokens, logit_rows } = size;
    let tokens: Vec<u32> =
        (first_position..first_position + tokens).map(|i| token(i, model)).collect();
    let (phase, chunk) = match kind {
        Kind::Prefill => (Phase::Prefill, index),
        Kind::Decode => (Phase::Decode, 0),
    };
    let logits = if logit_rows == 0 { LogitRows::None } else { LogitRows::Last };
    model.step(StepInput { tokens: &tokens, phase, chunk, logits }, cache, observer)?;
    Ok(())
}

/// The token at position `i`: any, but always the same, and spread over the vocabulary so that a mixture uses all its experts.
fn token<B: Backend>(i: usize, model: &Model<B>) -> u32 {
    let spread = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    (spread % model.config().vocab_size.max(1) as u64) as u32
}

impl Measured {
    /// The fastest that the weights could be read on so many threads, beside any of these runs.
    pub(super) fn best_read(all: &[Self], threads: usize) -> f64 {
        let of_threads = all.iter().filter(|measured| measured.threads == threads);
        of_threads.flat_map(|measured| &measured.read_peaks).copied().fold(0.0, f64::max)
    }

    /// The time that reading `bytes` takes as fast as it can, as a share of the time that a repetition took: of each at the speed just before and
    /// after it, of these the median.
    fn read_share(&self, bytes: f64) -> Option<f64> {
        let share =
            |(seconds, peaks): (&f64, &[f64])| bytes / f64::midpoint(peaks[0], peaks[1]) / seconds;
        let shares: Vec<f64> =
            self.seconds.iter().zip(self.read_peaks.windows(2)).map(share).collect();
        (!shares.is_empty()).then(|| median(&shares))
    }

    /// As the report has it, with shares of `peaks`.
    pub(super) fn line(&self, peaks: Option<&Peaks>) -> ResultLine {
        let samples: Vec<f64> = self.seconds.iter().map(|&s| self.tokens as f64 / s).collect();
        let median = median(&samples);
        let seconds = self.tokens as f64 / median;
        let Cost { weight_bytes, kv_bytes, integer_multiply_adds, float_multiply_adds } = self.cost;
        let work = Work {
            steps: self.steps,
            weight_bytes,
            kv_bytes,
            int8_ops: 2 * integer_multiply_adds,
            float_ops: 2 * float_multiply_adds,
        };
        let bytes = (weight_bytes + kv_bytes) as f64;
        let (int8_ops, float_ops) = (work.int8_ops as f64, work.float_ops as f64);
        let peaks = peaks.and_then(|peaks| peaks.of(self.threads));
        let share = |at_peak: f64| at_peak / seconds;
        ResultLine {
            kind: self.kind.name(),
            tokens: self.tokens,
            depth: self.depth,
            threads: self.threads,
            median,
            min: samples.iter().copied().fold(f64::INFINITY, f64::min),
            max: samples.iter().copied().fold(0.0, f64::max),
            samples,
            work,
            read_bytes_per_second: bytes / seconds,
            int8_ops_per_second: int8_ops / seconds,
            float_ops_per_second: float_ops / seconds,
            read_share: self.read_share(bytes),
            read_peaks: (!self.read_peaks.is_empty()).then(|| self.read_peaks.clone()),
            compute_share: peaks.map(|peak| {
                share(int8_ops / peak.int8_ops_per_second + float_ops / peak.f32_ops_per_second)
            }),
        }
    }
}

/// The middle value, or the mean of the middle two.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n => f64::midpoint(sorted[(n - 1) / 2], sorted[n / 2]),
    }
}
