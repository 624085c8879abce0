//! `apr bisect`: from "it prints gibberish" to the faulty stage, tensor, key or token.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use apr_audit::{
    Against, Bisect, BisectOptions, BisectProgress, BisectVerdict, Declared, Engine, Loaded, Run,
    Script, bisect,
};
use apr_capture::{Capture, Dims, NameMap, OpenOptions, manifest};
use apr_cpu::Cpu;
use apr_format::Checkpoint;
use apr_reference::Reference;
use apr_report::{bisect as report, html};

use crate::{
    args::{BackendArgs, BackendName, OptionalPromptArgs, Precision},
    engine, logits,
    output::{self, Exit, Progress},
    prompt::Prompt,
};

const EXAMPLES: &str = "\
Examples:
  apr bisect model.gguf --against ref/                     a capture, e.g. of apr-oracle hf
  apr bisect model-q4.gguf --against model-bf16/           another file: quantisation, or a fault of it?
  apr bisect model.gguf --against backend:reference        one backend against another
  apr bisect model.gguf --against ref/ --html report.html

Exit codes: 0 match or drift, 1 something is wrong, 2 error, 3 nothing (or not everything) could be measured.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model under test: a .gguf, .safetensors or .apr file, or a Hugging Face directory.
    model: PathBuf,
    /// What to hold it against: a capture, a model file or directory, or `backend:cpu`, `backend:reference`.
    #[arg(long, value_name = "REF")]
    against: String,
    #[command(flatten)]
    prompt: OptionalPromptArgs,
    /// Steps to decode after the prompt, greedily. A capture's own steps are repeated as they are.
    #[arg(long, value_name = "N", default_value_t = 2)]
    decode: usize,
    #[command(flatten)]
    reference: ReferenceArgs,
    #[command(flatten)]
    effort: EffortArgs,
    #[command(flatten)]
    shown: ShownArgs,
    #[command(flatten)]
    backend: BackendArgs,
}

/// What is known of the reference.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Reference")]
struct ReferenceArgs {
    /// The model file that the reference's capture was made of, if it is another one.
    #[arg(long, value_name = "MODEL")]
    reference_model: Option<PathBuf>,
    /// The arithmetic of the reference's capture, if it does not declare it; `apr audit --arithmetic list` lists them.
    #[arg(long, value_name = "NAME")]
    arithmetic: Option<String>,
    /// What another program calls the stages: a TOML file.
    #[arg(long, value_name = "FILE")]
    map: Option<PathBuf>,
}

/// How much to do.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Effort")]
struct EffortArgs {
    /// How many faults to explain and to put right.
    #[arg(long, value_name = "N", default_value_t = 4)]
    faults: usize,
    /// How many tensors to measure the harm of.
    #[arg(long, value_name = "N", default_value_t = 8)]
    harm: usize,
    /// Keep the captures in this directory, which must not exist or be empty.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// What is shown, and how.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Output")]
struct ShownArgs {
    /// How many rows each table has, worst first.
    #[arg(long, value_name = "N", default_value_t = 12)]
    limit: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write a report for the browser: one file, nothing else needed.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

pub(crate) fn run(args: Args) -> Result<Exit> {
    if let Some(path) = &args.shown.html {
        output::may_write(path)?;
    }
    let checkpoint = engine::open_runnable(&args.model)?;
    let arithmetic = args.reference.arithmetic.as_deref().map(Declared::named).transpose()?;
    let options = BisectOptions { arithmetic, faults: args.effort.faults, harm: args.effort.harm };
    let temporary;
    let place: &Path = match &args.effort.keep {
        Some(directory) => {
            output::fresh_directory(directory)?;
            directory
        }
        None => {
            temporary = tempfile::tempdir().context("cannot make a temporary directory")?;
            temporary.path()
        }
    };
    let work = Work { args: &args, checkpoint: &checkpoint, place, options };
    let found = match args.against.strip_prefix("backend:") {
        Some(name) => work.against_backend(name)?,
        None => work.against_path(Path::new(&args.against))?,
    };
    if let Some(path) = &args.shown.html {
        let logits = logits::side_by_side(&found.comparison, &checkpoint)?;
        output::write_whole(path, &html::bisect(&found, &logits))?;
    }
    if args.shown.json {
        output::print_json(&found)?;
    } else {
        let limit = args.shown.limit;
        output::print(&report::text(
            &found,
            &report::Options { limit, colour: output::coloured() },
        ))?;
    }
    if let Some(directory) = &args.effort.keep {
        output::tell(format_args!("note: the captures are in {}", directory.display()));
    }
    Ok(Exit::from(&found.verdict))
}

/// A bisection that only lacks what it is against.
struct Work<'a> {
    args: &'a Args,
    checkpoint: &'a Checkpoint,
    place: &'a Path,
    options: BisectOptions,
}

impl Work<'_> {
    fn against_backend(&self, name: &str) -> Result<Bisect> {
        let backend = match name {
            "cpu" => BackendName::Cpu,
            "reference" => BackendName::Reference,
            _ => bail!(
                "--against backend:{name}: there is no such backend; there are: cpu, reference"
            ),
        };
        let prompt = self.prompt()?;
        let reference = Ours::new(&BackendArgs::plain(backend), None);
        let against = Against::Model { checkpoint: self.checkpoint, engine: &reference };
        self.bisect(&against, &self.greedy(&prompt), Some(&prompt))
    }

    fn against_path(&self, path: &Path) -> Result<Bisect> {
        // A directory may be a model or a capture; a model says so by its config.
        if path.is_file() && !is_capture_file(path) || path.join("config.json").exists() {
            let reference = engine::open_runnable(path)?;
            let prompt = self.prompt()?;
            let engine = Ours::new(&self.args.backend, Some(prompt.manifest()));
            let against = Against::Model { checkpoint: &reference, engine: &engine };
            return self.bisect(&against, &self.greedy(&prompt), Some(&prompt));
        }
        let reference = match &self.args.reference.reference_model {
            Some(path) => Some(engine::open_runnable(path)?),
            None => None,
        };
        let dims =
            Dims::from(&engine::runnable_config(reference.as_ref().unwrap_or(self.checkpoint))?);
        let names = match &self.args.reference.map {
            Some(path) => NameMap::read(path)?,
            None => NameMap::default(),
        };
        let open = OpenOptions { dims: Some(dims), names, ..OpenOptions::default() };
        let capture = Capture::open_with(path, &open).map_err(neither)?;
        let given = self.args.prompt.given().map(|args| Prompt::resolve(&args, self.checkpoint));
        let given = given.transpose()?;
        let steps = steps_of(&capture, given.as_ref())?;
        let against = Against::Capture { capture: &capture, checkpoint: reference.as_ref() };
        let found = self.bisect(&against, &Script::Steps(steps), given.as_ref())?;
        output::tell_unknown(&capture);
        Ok(found)
    }

    fn prompt(&self) -> Result<Prompt> {
        match self.args.prompt.given() {
            Some(args) => Prompt::resolve(&args, self.checkpoint),
            None => bail!(
                "no prompt: give -p TEXT or --tokens; only a capture as the reference says what it was made of"
            ),
        }
    }

    fn greedy(&self, prompt: &Prompt) -> Script {
        Script::Greedy { prompt: prompt.token_ids.clone(), decode: self.args.decode }
    }

    fn bisect(
        &self,
        against: &Against<'_>,
        script: &Script,
        prompt: Option<&Prompt>,
    ) -> Result<Bisect> {
        let engine = Ours::new(&self.args.backend, prompt.map(Prompt::manifest));
        let progress = Progress::new(0, "");
        let mut show = |at: BisectProgress| {
            progress.say(at.doing);
            if let Some(part) = at.part {
                progress.set(part.done, part.total);
            }
        };
        let found =
            bisect(self.checkpoint, &engine, against, script, self.place, &self.options, &mut show);
        progress.finish();
        Ok(found?)
    }
}

/// What is no capture is no model either: that was looked at first.
fn neither(error: apr_capture::Error) -> anyhow::Error {
    match error {
        apr_capture::Error::NotACapture { .. } => {
            anyhow::Error::new(error).context("neither a capture nor a model")
        }
        other => other.into(),
    }
}

/// Whether a file is of values rather than weights, by its name.
fn is_capture_file(path: &Path) -> bool {
    matches!(path.extension().and_then(|e| e.to_str()), Some("npz" | "npy" | "bin"))
}

/// The tokens of each step of a reference's capture.
fn steps_of(capture: &Capture, given: Option<&Prompt>) -> Result<Vec<Vec<u32>>> {
    let said: Option<Vec<Vec<u32>>> =
        capture.steps().iter().map(|step| step.token_ids.clone()).collect();
    match (said, given) {
        (Some(steps), given) if !steps.is_empty() => {
            // It may go on beyond its prompt.
            let agree = |given: &Prompt| steps.concat().starts_with(&given.token_ids);
            ensure!(
                given.is_none_or(agree),
                "{} says itself which tokens it is of, and they do not begin with those given; leave out --tokens and --prompt, or give another capture",
                capture.path().display()
            );
            Ok(steps)
        }
        (_, Some(prompt)) if capture.steps().len() == 1 => Ok(vec![prompt.token_ids.clone()]),
        _ => bail!(
            "{} does not say its tokens; give them with --tokens or -p",
            capture.path().display()
        ),
    }
}

/// One of our backends, as the options say.
struct Ours {
    args: BackendArgs,
    prompt: Option<manifest::Prompt>,
}

impl Ours {
    fn new(args: &BackendArgs, prompt: Option<manifest::Prompt>) -> Self {
        Self { args: args.clone(), prompt }
    }

    fn load(&self, checkpoint: &Checkpoint) -> Result<Box<dyn Run>> {
        let prompt = self.prompt.clone();
        Ok(match self.args.backend {
            BackendName::Cpu => {
                Box::new(Loaded::new(Cpu::new(self.args.cpu()?)?, checkpoint, prompt)?)
            }
            BackendName::Reference => {
                let arithmetic = self.args.arithmetic()?;
                match self.args.precision.unwrap_or_default() {
                    Precision::F64 => {
                        let backend = Reference::<f64>::new(arithmetic);
                        Box::new(Loaded::new(backend, checkpoint, prompt)?)
                    }
                    Precision::F32 => {
                        let backend = Reference::<f32>::new(arithmetic);
                        Box::new(Loaded::new(backend, checkpoint, prompt)?)
                    }
                }
            }
        })
    }
}

impl Engine for Ours {
    fn name(&self) -> String {
        self.args.describe()
    }

    fn load(&self, checkpoint: &Checkpoint) -> apr_audit::Result<Box<dyn Run>> {
        Ours::load(self, checkpoint).map_err(|error| apr_audit::Error::Engine(error.into()))
    }
}

impl From<&BisectVerdict> for Exit {
    fn from(verdict: &BisectVerdict) -> Self {
        Self::of_verdict(verdict.exit_code())
    }
}
