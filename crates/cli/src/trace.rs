//! `apr trace`: the values of the forward pass, as statistics or saved whole.

mod findings;
mod watch;

use std::{ops::ControlFlow, path::PathBuf};

use anyhow::{Result, anyhow, bail, ensure};
use apr_capture::{
    Dims, Layout, Precision, Provenance, Recorder, RecorderOptions, Rows, StepStatistics,
    Telemetry, check_space, estimate,
};
use apr_format::Checkpoint;
use apr_model::{
    Backend, Both, Error, Finish, GenerateOptions, LogitRows, Model, Observer, Sampler,
    SamplerOptions, TapSet, Unobserved, generate, prompt_chunks,
};
use apr_report::{
    plural,
    trace::{Candidate, StageStatistics, Statistics, Trace, TraceStep, site_names},
};
use clap::ValueEnum;

use crate::{
    args::{self, BackendArgs, BackendName, PromptArgs, at_least_one},
    engine::{self, Job},
    output::{self, Exit, Progress},
    prompt::Prompt,
    selection,
};
use watch::{InAndOut, StepTokens, Ticker};

const EXAMPLES: &str = "\
Examples:
  apr trace model.gguf -p 'What is 2+2?'
  apr trace model.gguf -p 'What is 2+2?' --payload --layers 0,last --decode 4
  apr trace model.gguf -p 'What is 2+2?' --save-tensor all --output cap/
  apr trace model.gguf --tokens 3838,374 --save-tensor attn_norm,ffn_out --rows last -o cap/";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A .gguf, .safetensors or .apr file, or a Hugging Face directory.
    model: PathBuf,
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    values: ValueArgs,
    #[command(flatten)]
    save: SaveArgs,
    #[command(flatten)]
    backend: BackendArgs,
}

/// What to look at.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Values")]
struct ValueArgs {
    /// Print statistics of every stage (the default, unless --save-tensor is given).
    #[arg(long)]
    payload: bool,
    /// The same as JSON.
    #[arg(long)]
    json: bool,
    /// Statistics of these stages only: names separated by commas. What is saved is chosen by --save-tensor.
    #[arg(long, value_name = "STAGES")]
    stages: Option<String>,
    /// Only these layers: numbers, ranges such as 0..4 (without 4) or 0..=4, `last`; separated by commas.
    #[arg(long, value_name = "LAYERS")]
    layers: Option<String>,
    /// Decode steps to trace after the prompt, greedily.
    #[arg(long, value_name = "N", default_value_t = 0)]
    decode: usize,
    /// How many of the likeliest next tokens to show.
    #[arg(long, value_name = "K", default_value_t = 5)]
    top_k: usize,
    /// The most prompt tokens per step; all steps get the same number, but for a token. Results do not depend on it.
    #[arg(long, value_name = "N", default_value = "512", value_parser = at_least_one)]
    chunk: usize,
}

/// What to save, and how.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Saving")]
struct SaveArgs {
    /// Save the values of these stages: `all`, or names separated by commas.
    #[arg(long, value_name = "STAGES", requires = "output")]
    save_tensor: Option<String>,
    /// Where to save; it must not exist, or be an empty directory.
    #[arg(short, long, value_name = "DIR", requires = "save_tensor")]
    output: Option<PathBuf>,
    /// Save only these rows: `all`, `last` (of each step), a position, or a range of positions.
    #[arg(long, value_name = "ROWS", default_value = "all", requires = "save_tensor")]
    rows: Rows,
    /// How to save.
    #[arg(long, value_enum, default_value_t, requires = "save_tensor")]
    format: Format,
    /// Store f64 where the backend computes in it.
    #[arg(long, requires = "save_tensor")]
    f64: bool,
    /// Replace a capture that stands at the output.
    #[arg(long, requires = "save_tensor")]
    force: bool,
    /// Hash the whole model file into the manifest.
    #[arg(long, requires = "save_tensor")]
    hash_model: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A manifest and one safetensors file per step.
    #[default]
    Capture,
    /// A tree of APRT files, one per stage.
    Aprt,
}

pub(crate) fn run(args: Args) -> Result<Exit> {
    if args.save.f64 {
        let f32_only = |which: &str| format!("--f64: {which} computes in f32; leave it out");
        let BackendArgs { backend, precision, .. } = &args.backend;
        ensure!(
            *backend == BackendName::Reference,
            "{}, or give --backend reference",
            f32_only("the cpu backend")
        );
        ensure!(
            *precision != Some(args::Precision::F32),
            "{}, or leave out --precision f32",
            f32_only("the reference backend")
        );
    }
    let checkpoint = engine::open_runnable(&args.model)?;
    let backend = args.backend.clone();
    engine::with_model(&backend, &checkpoint, || {
        let prompt = Prompt::resolve(&args.prompt, &checkpoint)?;
        Ok(Tracing { args, prompt, checkpoint: &checkpoint })
    })
}

struct Tracing<'c> {
    args: Args,
    prompt: Prompt,
    checkpoint: &'c Checkpoint,
}

impl Job for Tracing<'_> {
    type Output = Exit;

    fn run<B: Backend>(self, model: &Model<B>) -> Result<Exit> {
        let Self { args, prompt, checkpoint } = &self;
        let payload = args.values.payload
            || args.values.json
            || args.values.stages.is_some()
            || args.save.save_tensor.is_none();
        let sites = model.plan().sites();
        let shown = match payload {
            true => {
                let stages = args.values.stages.as_deref().unwrap_or("all");
                selection::select(sites, stages, args.values.layers.as_deref())?
            }
            false => TapSet::none(),
        };
        let mut cache = engine::cache_for(model, prompt.token_ids.len(), args.values.decode)?;
        let mut recorder = self.recorder(model)?;

        let mut telemetry = Telemetry::new(shown.clone());
        let mut tokens = StepTokens::new(args.values.top_k);
        let watched = match &args.save.save_tensor {
            Some(stages) => {
                shown.union(&selection::select(sites, stages, args.values.layers.as_deref())?)
            }
            None => shown,
        };
        let steps = self.step_lengths(model).count() as u64;
        let progress = Progress::new(steps * watched.iter().count() as u64, "values");
        let mut ticker = Ticker { taps: watched, progress: progress.clone() };
        let mut unobserved = Unobserved;
        let recording: &mut dyn Observer = match &mut recorder {
            Some(recorder) => recorder,
            None => &mut unobserved,
        };
        let mut statistics = Both::new(&mut telemetry, &mut tokens);
        let mut watching = Both::new(&mut statistics, &mut ticker);
        let mut observers = Both::new(recording, &mut watching);

        let options = GenerateOptions {
            // Each step but the last reads the token that its predecessor chose.
            max_tokens: match args.values.decode {
                0 => 0,
                steps => steps.saturating_add(1),
            },
            chunk: args.values.chunk,
            prompt_logits: if args.save.rows == Rows::Last {
                LogitRows::Last
            } else {
                LogitRows::All
            },
            stop: Vec::new(),
        };
        let mut token_ids = Vec::new();
        let generated = generate(
            model,
            &mut cache,
            &prompt.token_ids,
            &options,
            &mut Sampler::new(SamplerOptions::default()),
            &mut observers,
            &mut |token| {
                token_ids.push(token.id);
                ControlFlow::Continue(())
            },
        );
        progress.finish();
        let mut findings: Vec<String> =
            telemetry.steps().iter().flat_map(findings::findings).collect();
        let mut notes = Vec::new();
        match generated {
            Ok(generated) if generated.finish == Finish::Context => {
                let (asked, context) = (args.values.decode, cache.capacity());
                notes.push(format!(
                    "the context of {context} is full: not all {asked} decode steps could be traced"
                ));
            }
            Ok(_) => {}
            // What led there is the very thing that a trace is asked for.
            Err(Error::LogitsNotFinite { wrong, vocab_size }) => {
                let last = tokens.steps.len() - 1;
                findings.push(format!(
                    "the trace ends after step {last}: {wrong} of {vocab_size} logits are NaN or infinite, \
                     so there is no next token"
                ));
            }
            Err(error) => {
                let error = anyhow::Error::from(error);
                return Err(match &recorder {
                    Some(recorder) => {
                        anyhow!("{}; {}", output::one_line(&error), left_by(recorder))
                    }
                    None => error,
                });
            }
        }
        let capture = recorder.map(finish).transpose()?;
        let capture = capture.map(|path| path.display().to_string());

        if payload {
            let info = model.backend().info();
            let trace = Trace {
                schema: "apr-trace/1",
                model: checkpoint.path().display().to_string(),
                architecture: model.config().architecture.name(),
                backend: info.name,
                isa: info.isa,
                threads: info.threads,
                kv: info.kv.name(),
                plan: model.plan().fingerprint().to_owned(),
                prompt_mode: prompt.mode,
                prompt_text: prompt.text.clone(),
                prompt_token_ids: prompt.token_ids.clone(),
                prompt_tokens: prompt.token_ids.iter().map(|&id| prompt.token_text(id)).collect(),
                token_ids,
                steps: self.steps(telemetry.steps(), &tokens),
                findings,
                notes: notes.clone(),
                capture,
            };
            if args.values.json {
                output::print_json(&trace)?;
            } else {
                output::print(&trace.text())?;
            }
        } else {
            notes.extend(findings);
            if let Some(capture) = capture {
                output::print(&format!("{capture}\n"))?;
            }
        }
        notes.iter().for_each(|note| output::tell(format_args!("note: {note}")));
        Ok(Exit::Success)
    }
}

fn finish(recorder: Recorder) -> Result<PathBuf> {
    let left = left_by(&recorder);
    recorder.finish().map_err(|error| match error {
        apr_capture::Error::Write { .. } => anyhow!("{error}; {left}"),
        error => error.into(),
    })
}

/// What is left of a capture that is not completed.
fn left_by(recorder: &Recorder) -> String {
    match recorder.steps() {
        0 => "no step was whole, so nothing is kept".to_owned(),
        steps => format!(
            "{} in {}, which `apr diff --allow-partial` reads",
            plural(steps, "whole step"),
            recorder.partial_path().display()
        ),
    }
}

impl Tracing<'_> {
    /// Rows and visible positions of each step that will be run.
    fn step_lengths<B: Backend>(
        &self,
        model: &Model<B>,
    ) -> impl Iterator<Item = apr_capture::StepSize> {
        let prompt = self.prompt.token_ids.len();
        let room = model.config().max_position_embeddings - prompt;
        let chunk = self.args.values.chunk;
        let prefill = prompt_chunks(prompt, chunk).map(|chunk| (chunk.start, chunk.len()));
        let decode = (prompt..prompt + self.args.values.decode.min(room)).map(|start| (start, 1));
        let last_only = self.args.save.rows == Rows::Last;
        prefill.chain(decode).map(move |(first_position, tokens)| apr_capture::StepSize {
            first_position,
            tokens,
            logit_rows: match last_only {
                true => usize::from(first_position + tokens >= prompt),
                false => tokens,
            },
        })
    }

    /// The recorder, if values are to be saved, after checking that there is room for them.
    fn recorder<B: Backend>(&self, model: &Model<B>) -> Result<Option<Recorder>> {
        let Self { args, prompt, checkpoint } = self;
        let (Some(stages), Some(path)) = (&args.save.save_tensor, &args.save.output) else {
            return Ok(None);
        };
        let sites = selection::select(model.plan().sites(), stages, args.values.layers.as_deref())?;
        let positions: usize = self.step_lengths(model).map(|step| step.tokens).sum();
        if let Rows::Range(rows) = &args.save.rows
            && rows.end > positions
        {
            let last = positions - 1;
            bail!("--rows {} is out of range: the trace has positions 0 to {last}", args.save.rows);
        }
        let dims = Dims::from(model.config());
        let precision = if args.save.f64 { Precision::F64 } else { Precision::F32 };
        let bytes = estimate(&sites, &args.save.rows, precision, &dims, self.step_lengths(model));
        check_space(path, bytes)?;
        let mut provenance = Provenance::of(model, checkpoint, Some(prompt.manifest()));
        provenance.model.file_sha256 = args.save.hash_model.then(|| checkpoint.file_sha256());
        let options = RecorderOptions {
            rows: args.save.rows.clone(),
            precision,
            layout: match args.save.format {
                Format::Capture => Layout::Safetensors,
                Format::Aprt => Layout::Aprt,
            },
            force: args.save.force,
            ..RecorderOptions::new(sites)
        };
        let stages = options.sites.iter().count();
        let mut recorder = Recorder::create(path, provenance, dims, options)?;
        let steps = self.step_lengths(model).count();
        let (stages, steps) = (plural(stages, "stage"), plural(steps, "step"));
        let (path, bytes) = (path.display(), apr_report::bytes(bytes));
        output::tell(format_args!("saving {stages} of {steps} to {path}: {bytes}"));
        if let Some(vocabulary) = prompt.vocabulary.clone() {
            recorder = recorder.with_token_text(move |id| vocabulary.text(id).into_owned());
        }
        Ok(Some(recorder))
    }

    fn steps(&self, steps: &[StepStatistics], tokens: &StepTokens) -> Vec<TraceStep> {
        let step = |(step, tokens): (&StepStatistics, &InAndOut)| TraceStep {
            index: step.index,
            phase: step.phase.name(),
            positions: [step.positions.start, step.positions.end],
            token_ids: tokens.input.clone(),
            tokens: tokens.input.iter().map(|&id| self.prompt.token_text(id)).collect(),
            stages: step.sites.iter().map(stage).collect(),
            wrong_logits: tokens.wrong_logits,
            top: tokens
                .next
                .iter()
                .map(|&(id, logit, probability)| Candidate {
                    id,
                    text: self.prompt.token_text(id),
                    logit,
                    probability,
                })
                .collect(),
        };
        steps.iter().zip(&tokens.steps).map(step).collect()
    }
}

fn stage(s: &apr_capture::SiteStatistics) -> StageStatistics {
    let (site, layer, stage) = site_names(s.site);
    let statistics = |rows, summary| match s.site.stage.holds_ids() {
        true => Statistics::of_ids(rows, summary),
        false => Statistics::new(rows, summary),
    };
    StageStatistics {
        site,
        layer,
        stage,
        all_rows: statistics(s.positions.len(), &s.all_rows),
        last_row: statistics(s.positions.len().min(1), &s.last_row),
        zero_rows: s.dead_rows.len() as u64,
    }
}
