//! `apr audit`: each stage of a capture judged by itself, with the model file.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use apr_audit::{Declared, Options, Verdict, audit, consequence, diagnose};
use apr_capture::{Capture, Dims, NameMap, OpenOptions};
use apr_format::Checkpoint;
use apr_report::{
    audit::{self as report, AuditReport},
    html, plural,
};

use crate::{
    args::{PromptArgs, token_id},
    engine,
    output::{self, Exit, Progress},
    prompt::Prompt,
};

const EXAMPLES: &str = "\
Examples:
  apr audit cap/ --model model.gguf
  apr audit cap/ --model model.gguf --arithmetic llama-cpp --html report.html
  apr audit dumps/ --model model_dir/ --tokens 3838,374,220 --common
  apr audit --arithmetic list

Exit codes: 0 match, 1 a stage is wrong, 2 error, 3 nothing (or not everything) could be judged.";

/// Of more faults than this, the later ones mostly follow from the others.
const FAULTS_EXPLAINED: usize = 8;

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A capture, a tree of APRT, a directory of .npy, a .npz or foreign .safetensors, of any engine.
    capture: Option<PathBuf>,
    /// The model that the capture was made of: a .gguf, .safetensors or .apr file, or a Hugging Face directory.
    #[arg(short, long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// The arithmetic to hold the capture against; `list` lists them [default: the one that the capture declares, or
    /// else the one that explains the median stage best].
    #[arg(long, value_name = "NAME")]
    arithmetic: Option<String>,
    /// Judge what the capture holds, and do not miss the rest.
    #[arg(long)]
    common: bool,
    #[command(flatten)]
    reading: ReadingArgs,
    #[command(flatten)]
    shown: ShownArgs,
}

/// How the capture is read.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Captures of other programs")]
struct ReadingArgs {
    /// The token ids that a capture was made of that does not say them.
    #[arg(long, value_name = "ID,ID,...", value_delimiter = ',', value_parser = token_id)]
    #[arg(allow_negative_numbers = true)]
    tokens: Option<Vec<u32>>,
    /// The same as a text, for the model's tokenizer; `-` reads it from stdin.
    #[arg(short, long, value_name = "TEXT", conflicts_with = "tokens")]
    prompt: Option<String>,
    /// What another program calls the stages: a TOML file.
    #[arg(long, value_name = "FILE")]
    map: Option<PathBuf>,
    /// Read the whole steps of a capture whose writer was interrupted.
    #[arg(long)]
    allow_partial: bool,
}

/// What is shown, and how.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Output")]
struct ShownArgs {
    /// How many stages the table has, worst first.
    #[arg(long, value_name = "N", default_value_t = 12)]
    limit: usize,
    /// All of them.
    #[arg(long, conflicts_with = "limit")]
    all: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write a page for browsers here as well: one file that needs nothing else.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

pub(crate) fn run(args: Args) -> Result<Exit> {
    if args.arithmetic.as_deref() == Some("list") {
        let line = |(name, about): (&str, &str)| format!("{name:<18}{about}\n");
        output::print(&Declared::names().into_iter().map(line).collect::<String>())?;
        return Ok(Exit::Success);
    }
    let arithmetic = args.arithmetic.as_deref().map(named).transpose()?;
    let path = args.capture.as_ref().context("no capture: say what to audit")?;
    let Some(model) = &args.model else {
        bail!("no model: give the file that {} was made of with --model", path.display())
    };
    if let Some(page) = &args.shown.html {
        output::may_write(page)?;
    }
    let checkpoint = engine::open(model)?;
    let dims = Dims::from(&engine::runnable_config(&checkpoint)?);
    let names = match &args.reading.map {
        Some(path) => NameMap::read(path)?,
        None => NameMap::default(),
    };
    let allow_partial = args.reading.allow_partial;
    let capture =
        Capture::open_with(path, &OpenOptions { allow_partial, dims: Some(dims), names })?;
    let tokens = args.reading.tokens(&capture, &checkpoint)?;
    let options = Options { arithmetic, common: args.common, tokens, ..Options::default() };

    let progress = Progress::new(0, "stages");
    let audited = audit(&capture, &checkpoint, &options, &mut |at| progress.set(at.done, at.total));
    progress.finish();
    let audited = audited?;
    output::tell_unknown(&capture);
    tell_other_file(&capture, &checkpoint);
    let diagnoses = diagnose(&capture, &checkpoint, &audited, FAULTS_EXPLAINED)?;
    let place = tempfile::tempdir().context("cannot make a temporary directory")?;
    let consequence = consequence(&capture, &checkpoint, &audited, &place.path().join("right"))?;
    args.show(&AuditReport {
        audit: &audited,
        diagnoses: &diagnoses,
        consequence: consequence.as_ref(),
        provenance: capture.provenance(),
    })?;
    Ok(Exit::from(&audited.verdict))
}

/// Says so where a capture was made of another file, as its manifest has it. That is no error: the weights may be the same.
fn tell_other_file(capture: &Capture, checkpoint: &Checkpoint) {
    let Some(made_of) = capture.provenance().map(|provenance| &provenance.model) else { return };
    let other = |declared: &String| *declared != checkpoint.index_sha256();
    if made_of.index_sha256.as_ref().is_some_and(other) {
        output::tell(format_args!(
            "note: {} says that it was made of {}, whose tensors have other names, types or shapes than those of {}",
            capture.path().display(),
            made_of.path,
            checkpoint.path().display()
        ));
    }
}

/// The arithmetic called `name`.
fn named(name: &str) -> Result<Declared> {
    Declared::named(name).map_err(|_| {
        let known = Declared::names().into_iter().map(|(name, about)| format!("{name} ({about})"));
        let known = known.collect::<Vec<_>>().join("; ");
        anyhow::anyhow!("--arithmetic: there is no `{name}`; there are: {known}")
    })
}

impl ReadingArgs {
    /// The tokens of a capture that does not say them. One that does is taken at its word.
    fn tokens(&self, capture: &Capture, checkpoint: &Checkpoint) -> Result<Option<Vec<u32>>> {
        if self.tokens.is_none() && self.prompt.is_none() {
            return Ok(None);
        }
        let args = PromptArgs {
            prompt: self.prompt.clone(),
            tokens: self.tokens.clone(),
            chat: false,
            system: None,
        };
        let given = Prompt::resolve(&args, checkpoint)?.token_ids;
        let steps = capture.steps();
        let path = capture.path().display();
        if steps.iter().all(|step| step.token_ids.is_some()) {
            let said: Vec<u32> =
                steps.iter().flat_map(|step| step.token_ids.iter().flatten().copied()).collect();
            ensure!(
                said == given,
                "{path} says itself that it is of {}, which are not the {} given; leave out --tokens and --prompt",
                plural(said.len(), "token"),
                given.len(),
            );
            return Ok(None);
        }
        ensure!(
            steps.len() == 1,
            "{path} has {} steps and does not say which tokens each is of; capture the tokens in one step",
            steps.len()
        );
        Ok(Some(given))
    }
}

impl Args {
    fn show(&self, report: &AuditReport<'_>) -> Result<()> {
        if let Some(path) = &self.shown.html {
            output::write_whole(path, &html::audit(report))?;
            output::tell(format_args!("the page is {}", path.display()));
        }
        if self.shown.json {
            return output::print_json(report);
        }
        let limit = if self.shown.all { usize::MAX } else { self.shown.limit };
        output::print(&report.text(&report::Options { limit, colour: output::coloured() }))
    }
}

impl From<&Verdict> for Exit {
    fn from(verdict: &Verdict) -> Self {
        Self::of_verdict(verdict.exit_code())
    }
}
