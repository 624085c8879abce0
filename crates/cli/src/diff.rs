//! `apr diff`: two captures, two APRT files, or two model files.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use apr_capture::{Capture, Dims, NameMap, OpenOptions};
use apr_diff::{Options, Outcome, compare, compare_aprt};
use apr_format::Checkpoint;
use apr_model::read_config;

use crate::{
    output::{self, Exit},
    selection,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What is under test: a capture, a tree or file of APRT, .npy files, .npz, foreign .safetensors, or a model.
    a: PathBuf,
    /// The reference, of the same kind.
    b: PathBuf,
    /// The largest relative L2 that counts as equal.
    #[arg(long, value_name = "X", default_value_t = Options::TOLERANCE)]
    tolerance: f64,
    /// Only these stages: names separated by commas.
    #[arg(long, value_name = "STAGES")]
    stages: Option<String>,
    /// Only these layers: numbers, ranges such as 0..4 (without 4) or 0..=4, `last`; separated by commas.
    #[arg(long, value_name = "LAYERS")]
    layers: Option<String>,
    /// Compare what both sides hold, and do not miss the rest.
    #[arg(long)]
    common: bool,
    /// How many of the likeliest tokens to compare.
    #[arg(long, value_name = "K", default_value_t = 10)]
    top_k: usize,
    /// Show values side by side (two APRT files).
    #[arg(long)]
    values: bool,
    /// How many values to show.
    #[arg(long, value_name = "N", default_value_t = 16)]
    limit: usize,
    /// The model whose dimensions a bare tree of files has.
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// What another program calls the stages: a TOML file.
    #[arg(long, value_name = "FILE")]
    map: Option<PathBuf>,
    /// Read the whole steps of a capture whose writer was interrupted.
    #[arg(long)]
    allow_partial: bool,
    /// Only tensors whose name contains this (two models).
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What a path holds, as far as this command treats it differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Capture,
    Aprt,
    Model,
}

pub(crate) fn run(args: Args) -> Result<Exit> {
    anyhow::ensure!(args.tolerance >= 0.0, "--tolerance cannot be negative");
    match (kind(&args.a)?, kind(&args.b)?) {
        (Kind::Aprt, Kind::Aprt) => aprt(&args),
        (Kind::Model, Kind::Model) => models(&args),
        (Kind::Capture, Kind::Capture) => captures(&args),
        (a, b) => bail!(
            "{} is {} and {} is {}: only things of the same kind can be compared",
            args.a.display(),
            a.describe(),
            args.b.display(),
            b.describe(),
        ),
    }
}

impl Kind {
    fn describe(self) -> &'static str {
        match self {
            Self::Capture => "a capture",
            Self::Aprt => "an APRT file",
            Self::Model => "a model",
        }
    }
}

/// Looks at names only: whether the content is sound is for the reader to say.
fn kind(path: &Path) -> Result<Kind> {
    let metadata = path.metadata().with_context(|| format!("cannot open {}", path.display()))?;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    Ok(match (metadata.is_dir(), extension) {
        (true, _) if path.join("config.json").is_file() => Kind::Model,
        (false, "bin") => Kind::Aprt,
        (false, "gguf" | "apr" | "json") => Kind::Model,
        // A model's safetensors has its config beside it; a foreign capture has not.
        (false, "safetensors") if path.with_file_name("config.json").is_file() => Kind::Model,
        _ => Kind::Capture,
    })
}

fn captures(args: &Args) -> Result<Exit> {
    let names = match &args.map {
        Some(path) => NameMap::read(path)?,
        None => NameMap::default(),
    };
    let dims = match &args.model {
        Some(path) => Some(Dims::from(&read_config(&Checkpoint::open(path)?)?)),
        None => None,
    };
    let options = OpenOptions { allow_partial: args.allow_partial, dims, names };
    let a = Capture::open_with(&args.a, &options)?;
    let b = Capture::open_with(&args.b, &options)?;
    let sites = match (&args.stages, &args.layers) {
        (None, None) => None,
        (stages, layers) => {
            let mut sites = a.sites();
            sites.extend(b.sites());
            sites.sort();
            sites.dedup();
            let stages = stages.as_deref().unwrap_or("all");
            Some(selection::select(&sites, stages, layers.as_deref())?)
        }
    };
    let options =
        Options { sites, common: args.common, tolerance: args.tolerance, top_k: args.top_k };
    let comparison = compare(&a, &b, &options)?;
    if args.json {
        output::print_json(&comparison)?;
    } else {
        output::print(&apr_report::diff::captures(&comparison))?;
    }
    Ok(exit(&comparison.outcome))
}

fn aprt(args: &Args) -> Result<Exit> {
    let comparison = compare_aprt(&args.a, &args.b, args.tolerance)?;
    if args.json {
        output::print_json(&comparison)?;
    } else {
        let shown = if args.values { args.limit } else { 0 };
        output::print(&apr_report::diff::aprt(&comparison, shown))?;
    }
    Ok(exit(&comparison.outcome))
}

fn models(args: &Args) -> Result<Exit> {
    let _ = args;
    bail!("not yet")
}

fn exit(outcome: &Outcome) -> Exit {
    match outcome.exit_code() {
        0 => Exit::Success,
        1 => Exit::Differs,
        _ => Exit::Unmeasured,
    }
}
