//! `apr bench`: how fast a model runs, and how near that is to this machine's limits.

mod compare;
mod machine;
mod measure;
mod observers;

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use apr_cpu::{Cpu, Isa, Reader};
use apr_format::{Checkpoint, File};
use apr_model::{Backend, Config, Costs, Model, read_config};
use apr_report::bench::{BenchReport, Load, Memory, Peaks, PeaksLine, ResultLine};
use apr_tokenizer::Tokenizer;

use crate::{
    args::{ActivationsArg, BackendArgs, BackendName, KvArg, at_least_one},
    engine,
    output::{self, Exit, Progress},
};
use compare::LlamaBench;
use machine::Moment;
use measure::{Measured, Runs};

const EXAMPLES: &str = "\
Examples:
  apr bench model.gguf
  apr bench model.gguf -p 128,512 -n 64 -d 0,2048 -t 1,2
  apr bench model.gguf -p 512 -n 0 -r 1 --no-probe --json
  llama-bench -m model.gguf -p 512 -n 64 -o json > llama.json; apr bench model.gguf --compare llama.json
  apr bench model.gguf --observers

Exit codes: 0 measured, 2 error, 3 with --compare: a row of either side has no partner.";

/// Tokens of the prompt whose first token is waited for.
const SHORT_PROMPT: usize = 8;

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A .gguf, .safetensors or .apr file, or a Hugging Face directory.
    model: PathBuf,
    #[command(flatten)]
    lengths: LengthArgs,
    #[command(flatten)]
    backend: CpuArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What is measured.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Measurements")]
struct LengthArgs {
    /// Lengths of prompts to read; 0 measures none.
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', default_value = "512")]
    prompt_tokens: Vec<usize>,
    /// Numbers of tokens to generate; 0 measures none.
    #[arg(short = 'n', long, value_name = "N,...", value_delimiter = ',', default_value = "64")]
    generate: Vec<usize>,
    /// Positions that the context holds before each measurement.
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,
    /// Threads [default: all cores].
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', value_parser = at_least_one)]
    threads: Vec<usize>,
    /// How often each is measured, after a run that does not count.
    #[arg(short, long, value_name = "N", default_value = "5", value_parser = at_least_one)]
    repetitions: usize,
    /// The most prompt tokens per step; all steps get the same number, but for a token.
    #[arg(long, value_name = "N", default_value = "512", value_parser = at_least_one)]
    chunk: usize,
    /// Measure what looking costs as well: nobody, one stage, all stages, all saved, and the audit of that.
    #[arg(long)]
    observers: bool,
    /// Do not measure the machine's limits.
    #[arg(long)]
    no_probe: bool,
}

/// In what arithmetic it runs. The backend is the fast one: nobody waits for the other to be fast.
#[derive(Clone, Copy, Debug, clap::Args)]
#[command(next_help_heading = "Backend")]
struct CpuArgs {
    /// Instruction set: scalar, avx2, avxvnni, avx512, amx, neon or neondot [default: the best that the machine has].
    #[arg(long, value_name = "NAME")]
    isa: Option<Isa>,
    /// Leave quantised weights as the file has them instead of reordering them on load.
    #[arg(long)]
    no_repack: bool,
    /// What activations are rounded to before they meet quantised weights: native or f32.
    #[arg(long, value_enum, value_name = "TYPE", default_value_t)]
    activations: ActivationsArg,
    /// What keys and values are kept as: f16 or f32 [default: f16].
    #[arg(long, value_enum, value_name = "TYPE")]
    kv: Option<KvArg>,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Output")]
struct OutputArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Compare with what `llama-bench -o json` printed.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
}

pub(crate) fn run(args: Args) -> Result<Exit> {
    let runs = args.lengths.runs()?;
    let threads = match &args.lengths.threads[..] {
        [] => vec![machine::cores()],
        threads => threads.to_vec(),
    };
    let theirs = args.output.compare.as_deref().map(LlamaBench::read).transpose()?;
    let opened = Opened::new(&args.model)?;
    let (checkpoint, config) = (&opened.checkpoint, &opened.config);
    runs.refuse_what_does_not_fit(config)?;

    let before = Moment::now();
    let progress = Progress::new((threads.len() * runs.tokens()) as u64, "tokens");
    let (mut loaded, mut first_load, mut measured) = (None, None, Vec::new());
    for &threads in &threads {
        // Two at once would be twice the memory.
        drop(loaded.take());
        let start = Instant::now();
        let cpu = Cpu::new(args.backend.options(threads).cpu()?)?;
        let model = Model::load(cpu, checkpoint)?;
        let weights_seconds = start.elapsed().as_secs_f64();
        if first_load.is_none() {
            first_load = Some(opened.first_load(&model, weights_seconds)?);
        }
        let costs = Costs::of(&model, checkpoint)?;
        let reader = (!args.lengths.no_probe).then(|| Reader::new(threads, model.weights()));
        measured.extend(measure::measure(&model, &costs, &runs, reader.as_ref(), &progress)?);
        loaded = Some((model, costs));
    }
    progress.finish();
    let (model, costs) = loaded.context("no number of threads was given")?;
    let load = first_load.context("no number of threads was given")?;
    let memory = Memory {
        // Before captures, which need memory of their own.
        peak_resident_bytes: machine::peak_resident(),
        file_bytes: checkpoint.files().iter().map(File::size).sum(),
        tensor_bytes: checkpoint.tensors().map(|(_, stored)| stored.bytes().len() as u64).sum(),
        cache_bytes: costs.cache_bytes(runs.positions()),
        cache_positions: runs.positions(),
    };
    let observers = match args.lengths.observers {
        true => Some(observers::measure(&model, checkpoint, &runs)?),
        false => None,
    };
    let after = Moment::now();
    let (info, isa) = (model.backend().info(), model.backend().isa());
    let plan = model.plan().fingerprint().to_owned();
    drop(model);

    let peaks = match args.lengths.no_probe {
        true => None,
        false => Some(peaks(&threads, isa, &measured)?),
    };
    let results: Vec<ResultLine> = measured.iter().map(|m| m.line(peaks.as_ref())).collect();
    let report = BenchReport {
        schema: "apr-bench/1",
        model: checkpoint.path().display().to_string(),
        container: checkpoint.container().to_string(),
        architecture: config.architecture.name(),
        backend: info.name,
        activations: args.backend.activations(),
        kv: info.kv.name(),
        chunk: runs.chunk,
        repetitions: runs.repetitions,
        plan,
        machine: before.machine(&after, info.isa),
        load,
        comparison: theirs.map(|theirs| theirs.against(&results, memory.tensor_bytes, info.kv)),
        memory,
        peaks,
        results,
        observers,
    };
    if args.output.json {
        output::print_json(&report)?;
    } else {
        output::print(&report.text())?;
    }
    Ok(report.comparison.map_or(Exit::Success, |c| Exit::of_verdict(c.exit_code())))
}

/// A model that no backend has yet, and how long it took to come so far.
struct Opened {
    checkpoint: Checkpoint,
    config: Config,
    open_seconds: f64,
    tokenizer_seconds: Option<f64>,
}

impl Opened {
    fn new(path: &Path) -> Result<Self> {
        let start = Instant::now();
        let checkpoint = engine::open_runnable(path)?;
        let open_seconds = start.elapsed().as_secs_f64();
        let config = read_config(&checkpoint)?;
        let start = Instant::now();
        let tokenizer = Tokenizer::from_checkpoint(&checkpoint);
        let tokenizer_seconds = tokenizer.is_ok().then(|| start.elapsed().as_secs_f64());
        Ok(Self { checkpoint, config, open_seconds, tokenizer_seconds })
    }

    /// The way from here to the first token of a short prompt on `model`, which has just been loaded.
    fn first_load(&self, model: &Model<Cpu>, weights_seconds: f64) -> Result<Load> {
        let Self { open_seconds, tokenizer_seconds, .. } = *self;
        let prompt_tokens = SHORT_PROMPT.min(self.config.max_position_embeddings);
        let first_token_seconds = measure::first_token(model, prompt_tokens)?;
        let before = open_seconds + tokenizer_seconds.unwrap_or(0.0) + weights_seconds;
        Ok(Load {
            open_seconds,
            tokenizer_seconds,
            weights_seconds,
            first_token_seconds,
            start_to_first_token_seconds: before + first_token_seconds,
            prompt_tokens,
            threads: model.backend().info().threads,
        })
    }
}

/// The limits of this machine.
fn peaks(threads: &[usize], isa: Isa, measured: &[Measured]) -> Result<Peaks> {
    let progress = Progress::new(threads.len() as u64, "probing the machine");
    let mut by_threads = Vec::new();
    for &threads in threads {
        let apr_cpu::Peaks { threads, int8, f32, .. } = apr_cpu::probe(threads, isa)?;
        by_threads.push(PeaksLine {
            threads,
            read_bytes_per_second: Measured::best_read(measured, threads),
            int8_ops_per_second: int8,
            f32_ops_per_second: f32,
        });
        progress.advance();
    }
    progress.finish();
    Ok(Peaks { isa: isa.name(), by_threads })
}

impl LengthArgs {
    fn runs(&self) -> Result<Runs> {
        let wanted = |lengths: &[usize]| {
            let mut lengths: Vec<usize> = lengths.iter().copied().filter(|&n| n > 0).collect();
            lengths.dedup();
            lengths
        };
        let (prefill, decode) = (wanted(&self.prompt_tokens), wanted(&self.generate));
        ensure!(
            !prefill.is_empty() || !decode.is_empty(),
            "-p 0 and -n 0 leave nothing to measure; give a length to one of them"
        );
        let mut depths = self.depth.clone();
        depths.sort_unstable();
        depths.dedup();
        let (chunk, repetitions) = (self.chunk, self.repetitions);
        Ok(Runs { prefill, decode, depths, chunk, repetitions })
    }
}

impl CpuArgs {
    /// The same as other commands have them.
    fn options(&self, threads: usize) -> BackendArgs {
        let Self { isa, no_repack, activations, kv } = *self;
        let plain = BackendArgs::plain(BackendName::Cpu);
        BackendArgs { threads: Some(threads), isa, no_repack, activations, kv, ..plain }
    }

    fn activations(&self) -> &'static str {
        match self.activations {
            ActivationsArg::F32 => "f32",
            _ => "native",
        }
    }
}
