//! `apr diff`: two captures, two APRT files, or two model files.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use apr_capture::{Capture, Dims, NameMap, OpenOptions};
use apr_diff::{Options, TensorOptions, compare, compare_aprt, compare_checkpoints};
use apr_format::Checkpoint;
use apr_model::read_config;
use apr_report::diff::AprtReport;

use crate::{
    args::{at_least_one, at_least_zero},
    output::{self, Exit},
    selection,
};

const EXAMPLES: &str = "\
Examples:
  apr diff cap/ ref/
  apr diff cap/ ref/ --stages attn_scores,ffn_out --layers 0..4 --tolerance 1e-3
  apr diff cap/layer-0/ffn_out.bin ref/layer-0/ffn_out.bin --values --limit 5
  apr diff converted.gguf original_dir/
  apr diff model-Q4_K_M.gguf original_dir/   is it only quantisation, or a fault of the file?

Exit codes: 0 match (or, of models, drift: quantisation explains it), 1 differs, 2 error, 3 nothing (or not
everything) was compared.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// What is under test: a capture, a tree or file of APRT, a directory of .npy, a .npz or foreign .safetensors,
    /// or a model.
    a: PathBuf,
    /// The reference, of the same kind.
    b: PathBuf,
    /// The largest relative L2, of a stage and of each of its rows, that counts as equal.
    #[arg(long, value_name = "X", default_value = "1e-5", value_parser = at_least_zero)]
    #[arg(allow_negative_numbers = true)]
    tolerance: f64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    captures: CaptureArgs,
    #[command(flatten)]
    files: FileArgs,
    #[command(flatten)]
    models: ModelArgs,
}

/// Options for two captures.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Two captures")]
struct CaptureArgs {
    /// Only these stages: names separated by commas.
    #[arg(long, value_name = "STAGES")]
    stages: Option<String>,
    /// Only these layers: numbers, ranges such as 0..4 (without 4) or 0..=4, `last`; separated by commas.
    #[arg(long, value_name = "LAYERS")]
    layers: Option<String>,
    /// Compare what both sides hold, and do not miss the rest.
    #[arg(long)]
    common: bool,
    /// How many of the likeliest tokens to compare [default: 10].
    #[arg(long, value_name = "K", value_parser = at_least_one)]
    top_k: Option<usize>,
    /// The model whose dimensions a bare tree of files has.
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// What another program calls the stages: a TOML file.
    #[arg(long, value_name = "FILE")]
    map: Option<PathBuf>,
    /// Read the whole steps of a capture whose writer was interrupted.
    #[arg(long)]
    allow_partial: bool,
}

/// Options for two APRT files.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Two APRT files")]
struct FileArgs {
    /// Show values side by side, those that are furthest apart first.
    #[arg(long)]
    values: bool,
    /// How many values to show.
    #[arg(long, value_name = "N", default_value_t = 16, requires = "values")]
    limit: usize,
}

/// Options for two model files.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Two models")]
struct ModelArgs {
    /// Only tensors whose name contains this.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
}

impl Args {
    /// Refuses options of another kind of comparison: one that did nothing would be taken for one that did.
    fn check(&self, kind: Kind) -> Result<()> {
        let CaptureArgs { stages, layers, common, top_k, model, map, allow_partial } =
            &self.captures;
        let given = [
            ("--stages", Kind::Capture, stages.is_some()),
            ("--layers", Kind::Capture, layers.is_some()),
            ("--common", Kind::Capture, *common),
            ("--top-k", Kind::Capture, top_k.is_some()),
            ("--model", Kind::Capture, model.is_some()),
            ("--map", Kind::Capture, map.is_some()),
            ("--allow-partial", Kind::Capture, *allow_partial),
            ("--values", Kind::Aprt, self.files.values),
            ("--filter", Kind::Model, self.models.filter.is_some()),
        ];
        match given.iter().find(|(_, of, given)| *given && *of != kind) {
            Some((option, of, _)) => bail!(
                "{option} is an option for two {}; these are two {}",
                of.plural(),
                kind.plural()
            ),
            None => Ok(()),
        }
    }
}

/// What a path holds, as far as this command treats it differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Capture,
    Aprt,
    Model,
}

pub(crate) fn run(args: Args) -> Result<Exit> {
    let (a, b) = (kind(&args.a)?, kind(&args.b)?);
    if a != b {
        bail!(
            "{} is {} and {} is {}: compare two captures, two APRT files or two models",
            args.a.display(),
            a.singular(),
            args.b.display(),
            b.singular(),
        );
    }
    args.check(a)?;
    match a {
        Kind::Capture => captures(&args),
        Kind::Aprt => aprt(&args),
        Kind::Model => models(&args),
    }
}

impl Kind {
    fn singular(self) -> &'static str {
        match self {
            Self::Capture => "a capture",
            Self::Aprt => "an APRT file",
            Self::Model => "a model",
        }
    }

    fn plural(self) -> &'static str {
        match self {
            Self::Capture => "captures",
            Self::Aprt => "APRT files",
            Self::Model => "models",
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
    let names = match &args.captures.map {
        Some(path) => NameMap::read(path)?,
        None => NameMap::default(),
    };
    let dims = match &args.captures.model {
        Some(path) => Some(Dims::from(&read_config(&Checkpoint::open(path)?)?)),
        None => None,
    };
    let options = OpenOptions { allow_partial: args.captures.allow_partial, dims, names };
    let (a, b) = open_both(&args.a, &args.b, &options)?;
    let sites = match (&args.captures.stages, &args.captures.layers) {
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
    let defaults = Options::default();
    let options = Options {
        sites,
        common: args.captures.common,
        tolerance: args.tolerance,
        top_k: args.captures.top_k.unwrap_or(defaults.top_k),
    };
    let comparison = compare(&a, &b, &options)?;
    if args.json {
        output::print_json(&comparison)?;
    } else {
        output::print(&apr_report::diff::captures(&comparison))?;
    }
    Ok(Exit::from(&comparison.outcome))
}

/// Opens both captures. Files without shapes are read with the dimensions that the other side states.
fn open_both(a: &Path, b: &Path, options: &OpenOptions) -> Result<(Capture, Capture)> {
    let beside = |other: &Capture| {
        let dims = options.dims.as_ref().or(other.dims()).cloned();
        OpenOptions { dims, ..options.clone() }
    };
    match Capture::open_with(a, options) {
        Ok(a) => {
            let b = Capture::open_with(b, &beside(&a))?;
            Ok((a, b))
        }
        Err(needs @ apr_capture::Error::NeedsDims { .. }) => {
            let b = Capture::open_with(b, options)?;
            let beside = beside(&b);
            if beside.dims.is_none() {
                return Err(needs.into());
            }
            Ok((Capture::open_with(a, &beside)?, b))
        }
        Err(error) => Err(error.into()),
    }
}

fn aprt(args: &Args) -> Result<Exit> {
    let comparison = compare_aprt(&args.a, &args.b, args.tolerance)?;
    let shown = if args.files.values { args.files.limit } else { 0 };
    let report = AprtReport::new(&args.a, &args.b, &comparison, shown);
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&report.text())?;
    }
    Ok(Exit::from(&comparison.outcome))
}

fn models(args: &Args) -> Result<Exit> {
    let (a, b) = (Checkpoint::open(&args.a)?, Checkpoint::open(&args.b)?);
    let options = TensorOptions { filter: args.models.filter.clone(), tolerance: args.tolerance };
    let comparison = compare_checkpoints(&a, &b, &options)?;
    if args.json {
        output::print_json(&comparison)?;
    } else {
        output::print(&apr_report::tensors::checkpoints(&comparison))?;
    }
    Ok(Exit::from(&comparison.outcome))
}
