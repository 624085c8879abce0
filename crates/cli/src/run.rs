//! `apr run`: text in, text out.

use std::{ops::ControlFlow, path::PathBuf, time::Duration};

use anyhow::Result;
use apr_format::Checkpoint;
use apr_model::{
    Backend, Finish, GenerateOptions, Model, NewToken, Sampler, SamplerOptions, Unobserved,
    generate, top_k,
};
use apr_report::plural;
use apr_tokenizer::TextStream;
use serde::Serialize;

use crate::{
    args::{BackendArgs, PromptArgs, at_least_one, at_least_zero, probability},
    engine::{self, Job},
    output::{self, Exit},
    prompt::Prompt,
};

const EXAMPLES: &str = "\
Examples:
  apr run model.gguf -p 'def fibonacci(n):' -n 40
  apr run model.gguf -p 'What is 2+2?' --chat --temperature 0.7 --seed 1
  cat prompt.txt | apr run model.gguf -p - --json --logprobs 5";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A .gguf, .safetensors or .apr file, or a Hugging Face directory.
    model: PathBuf,
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    backend: BackendArgs,
}

#[derive(Clone, Copy, Debug, clap::Args)]
#[command(next_help_heading = "Generation")]
struct Sampling {
    /// The most tokens to generate.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// 0 takes the most likely token.
    #[arg(long, default_value = "0", value_name = "T", value_parser = at_least_zero)]
    #[arg(allow_negative_numbers = true)]
    temperature: f64,
    /// Only the K most likely tokens; 0 for all.
    #[arg(long, default_value_t = 0, value_name = "K", requires = "temperature")]
    top_k: usize,
    /// Only the most likely tokens that together reach this probability.
    #[arg(long, default_value = "1", value_name = "P", value_parser = probability)]
    #[arg(requires = "temperature", allow_negative_numbers = true)]
    top_p: f64,
    /// Where the random sequence starts.
    #[arg(long, default_value_t = 0, value_name = "N", requires = "temperature")]
    seed: u64,
    /// Do not stop at end-of-text tokens.
    #[arg(long)]
    ignore_eos: bool,
    /// The most prompt tokens per step; all steps get the same number, but for a token. Results do not depend on it.
    #[arg(long, value_name = "N", default_value = "512", value_parser = at_least_one)]
    chunk: usize,
}

#[derive(Clone, Copy, Debug, clap::Args)]
#[command(next_help_heading = "Output")]
struct Output {
    /// Print one JSON object when done instead of streaming text.
    #[arg(long)]
    json: bool,
    /// Show the K most likely tokens of each step, with --json.
    #[arg(long, value_name = "K", requires = "json")]
    logprobs: Option<usize>,
}

/// The result of a run, as `--json` prints it.
#[derive(Debug, Serialize)]
struct RunReport {
    schema: &'static str,
    model: String,
    backend: &'static str,
    isa: &'static str,
    threads: usize,
    plan: String,
    prompt_mode: &'static str,
    prompt_text: Option<String>,
    prompt_token_ids: Vec<u32>,
    token_ids: Vec<u32>,
    text: Option<String>,
    finish: String,
    prefill_seconds: f64,
    /// The memory set aside for keys and values.
    cache_bytes: usize,
    tokens: Vec<TokenReport>,
}

#[derive(Debug, Serialize)]
struct TokenReport {
    id: u32,
    text: Option<String>,
    /// How long the step took whose logits chose this token.
    seconds: f64,
    logprob: f64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top: Vec<Candidate>,
}

#[derive(Debug, Serialize)]
struct Candidate {
    id: u32,
    text: Option<String>,
    logprob: f64,
}

pub(crate) fn run(args: Args) -> Result<Exit> {
    let checkpoint = engine::open_runnable(&args.model)?;
    let backend = args.backend.clone();
    engine::with_model(&backend, &checkpoint, || {
        let prompt = Prompt::resolve(&args.prompt, &checkpoint)?;
        Ok(Run { args, prompt, checkpoint: &checkpoint })
    })
}

struct Run<'c> {
    args: Args,
    prompt: Prompt,
    checkpoint: &'c Checkpoint,
}

impl Job for Run<'_> {
    type Output = Exit;

    fn run<B: Backend>(self, model: &Model<B>) -> Result<Exit> {
        let Self { args, prompt, checkpoint } = self;
        let options = GenerateOptions {
            max_tokens: args.sampling.max_tokens,
            chunk: args.sampling.chunk,
            stop: if args.sampling.ignore_eos { Vec::new() } else { prompt.stop_ids.clone() },
            ..GenerateOptions::default()
        };
        let mut cache = engine::cache_for(model, prompt.token_ids.len(), options.max_tokens)?;
        let mut sampler = Sampler::new(SamplerOptions {
            temperature: args.sampling.temperature,
            top_k: args.sampling.top_k,
            top_p: args.sampling.top_p,
            seed: args.sampling.seed,
        });

        let mut text = prompt.vocabulary.clone().map(TextStream::new);
        let mut tokens: Vec<TokenReport> = Vec::new();
        // The first token is chosen from the prompt's logits.
        let (mut count, mut decode) = (0, Duration::ZERO);
        let mut written = String::new();
        let mut failure = None;
        let streaming = !args.output.json;
        let mut write = |piece: &str| {
            written.push_str(piece);
            if streaming && let Err(error) = output::print(piece) {
                failure = Some(error);
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        };
        let generated = generate(
            model,
            &mut cache,
            &prompt.token_ids,
            &options,
            &mut sampler,
            &mut Unobserved,
            &mut |token| {
                if args.output.json {
                    tokens.push(prompt.report(token, args.output.logprobs.unwrap_or(0)));
                }
                if count > 0 {
                    decode += token.elapsed;
                }
                count += 1;
                match &mut text {
                    Some(stream) => {
                        stream.push(token.id).map_or(ControlFlow::Continue(()), |s| write(&s))
                    }
                    None => write(&format!("{}{}", if count > 1 { "," } else { "" }, token.id)),
                }
            },
        )?;
        if let Some(rest) = text.and_then(|stream| stream.finish()) {
            let _ = write(&rest);
        }
        if let Some(error) = failure {
            return Err(error);
        }

        if args.output.json {
            let info = model.backend().info();
            output::print_json(&RunReport {
                schema: "apr-run/1",
                model: checkpoint.path().display().to_string(),
                backend: info.name,
                isa: info.isa,
                threads: info.threads,
                plan: model.plan().fingerprint().to_owned(),
                prompt_mode: prompt.mode,
                prompt_text: prompt.text.clone(),
                prompt_token_ids: prompt.token_ids.clone(),
                token_ids: generated.token_ids.clone(),
                text: prompt.vocabulary.is_some().then_some(written),
                finish: finish_name(generated.finish).to_owned(),
                prefill_seconds: generated.prefill.as_secs_f64(),
                cache_bytes: cache.bytes(),
                tokens,
            })?;
        } else {
            output::print("\n")?;
            output::tell(summary(prompt.token_ids.len(), generated.prefill, count, decode));
            if generated.finish == Finish::Context {
                let context = cache.capacity();
                output::tell(format_args!("note: stopped: the context of {context} is full"));
            }
        }
        Ok(Exit::Success)
    }
}

impl Prompt {
    /// What `--json` says of `token`, with the `top` likeliest in its place.
    fn report(&self, token: NewToken<'_>, top: usize) -> TokenReport {
        let normalizer = log_sum_exp(token.logits);
        let logprob = |id: u32| f64::from(token.logits[id as usize]) - normalizer;
        let candidate = |id| Candidate { id, text: self.token_text(id), logprob: logprob(id) };
        TokenReport {
            id: token.id,
            text: self.token_text(token.id),
            seconds: token.elapsed.as_secs_f64(),
            logprob: logprob(token.id),
            top: top_k(token.logits, top).into_iter().map(candidate).collect(),
        }
    }
}

fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop(_) => "stop",
        Finish::Length => "length",
        Finish::Context => "context",
        Finish::Interrupted => "interrupted",
    }
}

fn summary(prompt: usize, prefill: Duration, generated: usize, decode: Duration) -> String {
    let one = |what: &str, n: usize, time: Duration| {
        let seconds = time.as_secs_f64();
        let (tokens, rate) = (plural(n, "token"), n as f64 / seconds.max(1e-9));
        format!("{what}: {tokens} in {seconds:.3} s ({rate:.1} tokens/s)")
    };
    let prompt = one("prompt", prompt, prefill);
    match generated {
        0 | 1 => prompt,
        n => format!("{prompt}; {}", one("decode", n - 1, decode)),
    }
}

/// `log(sum(exp(logits)))`, stable.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    max + sum.ln()
}
