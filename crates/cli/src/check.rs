//! `apr check`: what must hold without any reference.

use std::{cell::RefCell, path::PathBuf};

use anyhow::{Context, Result};
use apr_check::{Check, Checkup, Factory, FactoryError, Options, Watch, Way, check_model};
use apr_cpu::{Cpu, CpuOptions, Isa};
use apr_format::Checkpoint;
use apr_model::read_config;
use apr_reference::{Arithmetic, Real, Reference};
use apr_report::check::CheckReport;
use apr_tokenizer::{Specials, Tokenizer};

use crate::{
    args::{BackendArgs, BackendName, OptionalPromptArgs, Precision},
    engine,
    output::{self, Exit, Progress},
    prompt::Prompt,
};

const EXAMPLES: &str = "\
Examples:
  apr check model.gguf
  apr check model.gguf --only decode,threads -p 'What is 2+2?'
  apr check model_dir/ --backend reference --quick --json
  apr check --list

All runs read the prompt, by default a fixed text of up to 24 tokens.

Exit codes: 0 all holds (there may be notes), 1 something is broken, 2 error, 3 something asked for was not measured.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A .gguf, .safetensors or .apr file, or a Hugging Face directory.
    #[arg(required_unless_present = "list")]
    model: Option<PathBuf>,
    /// Only these checks: names separated by commas.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Option<Vec<Check>>,
    /// List the checks and what each is about.
    #[arg(long)]
    list: bool,
    /// A shorter prompt, and fewer chunk sizes and numbers of threads.
    #[arg(long)]
    quick: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    prompt: OptionalPromptArgs,
    #[command(flatten)]
    backend: BackendArgs,
}

pub(crate) fn run(args: Args) -> Result<Exit> {
    if args.list {
        let line = |check: Check| format!("{:<18}{}\n", check.name(), check.holds());
        output::print(&Check::all().map(line).collect::<String>())?;
        return Ok(Exit::Success);
    }
    let path = args.model.as_ref().context("no model: give a file or a directory")?;
    let checkpoint = engine::open(path)?;
    let (prompt, tokens) = resolve(&args.prompt, &checkpoint, args.quick)?;
    let options = Options { tokens, only: args.only.clone(), quick: args.quick };
    let checkup = check(&args.backend, &checkpoint, &options)?;
    let exit = Exit::of_verdict(checkup.exit_code());
    let (path, container) = (path.display().to_string(), checkpoint.container().to_string());
    let report = CheckReport::new(path, container, prompt, options.tokens, checkup);
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&report.text())?;
    }
    Ok(exit)
}

fn check(args: &BackendArgs, checkpoint: &Checkpoint, options: &Options) -> Result<Checkup> {
    let bars = Bars::default();
    let checkup = match (args.backend, args.precision.unwrap_or_default()) {
        (BackendName::Cpu, _) => check_model(checkpoint, &CpuFactory(args.cpu()?), options, &bars),
        (BackendName::Reference, Precision::F64) => {
            let factory = ReferenceFactory::<f64>(args.arithmetic()?, Default::default());
            check_model(checkpoint, &factory, options, &bars)
        }
        (BackendName::Reference, Precision::F32) => {
            let factory = ReferenceFactory::<f32>(args.arithmetic()?, Default::default());
            check_model(checkpoint, &factory, options, &bars)
        }
    };
    bars.finish();
    Ok(checkup?)
}

/// Builds cpu backends.
struct CpuFactory(CpuOptions);

/// More threads than these are tried in powers of two.
const EACH_COUNT_UP_TO: usize = 4;

impl Factory for CpuFactory {
    type Backend = Cpu;

    fn build(&self, way: Way) -> Result<Cpu, FactoryError> {
        let options = match way {
            Way::AsAsked => self.0,
            Way::Threads(n) => CpuOptions { threads: Some(n), ..self.0 },
            Way::Isa(name) => CpuOptions { isa: Some(name.parse()?), ..self.0 },
        };
        Ok(Cpu::new(options)?)
    }

    /// One, two, three and so on, up to all that the machine runs at once; never only one or two, since these
    /// cut evenly what three do not.
    fn threads(&self) -> Vec<usize> {
        let all = std::thread::available_parallelism().map_or(1, Into::into).max(3);
        let powers = (0..usize::BITS).map(|i| 1 << i).take_while(|&n| n < all);
        let each = 1..=all.min(EACH_COUNT_UP_TO);
        each.clone()
            .chain(powers.filter(|n| !each.contains(n)))
            .chain((!each.contains(&all)).then_some(all))
            .collect()
    }

    fn isas(&self) -> Vec<&'static str> {
        Isa::available().map(Isa::name).collect()
    }
}

/// Builds reference backends, in the one way that there is.
struct ReferenceFactory<F>(Arithmetic, std::marker::PhantomData<F>);

impl<F: Real> Factory for ReferenceFactory<F> {
    type Backend = Reference<F>;

    fn build(&self, _: Way) -> Result<Reference<F>, FactoryError> {
        Ok(Reference::new(self.0.clone()))
    }
}

/// What all runs read unless told otherwise: words, numbers and code.
const DEFAULT_TEXT: &str = "The number 42 is the sum of 17 and 25. def add(a, b):\n    return a + b\n\nA check reads this text in every way there is.";
/// Tokens of the usual prompt, and of the quick one.
const TOKENS: usize = 24;
const QUICK_TOKENS: usize = 8;

/// Where the prompt comes from, and its tokens.
fn resolve(
    prompt: &OptionalPromptArgs,
    checkpoint: &Checkpoint,
    quick: bool,
) -> Result<(String, Vec<u32>)> {
    if let Some(given) = prompt.given() {
        let prompt = Prompt::resolve(&given, checkpoint)?;
        let source = prompt.text.map_or("as given".to_owned(), |text| format!("{text:?}"));
        return Ok((source, prompt.token_ids));
    }
    let Ok(config) = read_config(checkpoint) else {
        return Ok(("none, since the model cannot be run".to_owned(), Vec::new()));
    };
    let wanted = if quick { QUICK_TOKENS } else { TOKENS };
    let wanted = wanted.min(config.max_position_embeddings);
    let encoded = Tokenizer::from_checkpoint(checkpoint)
        .and_then(|tokenizer| tokenizer.encode(DEFAULT_TEXT, Specials::Literal));
    let known = |id: &u32| (*id as usize) < config.vocab_size;
    match encoded {
        Ok(mut ids) if ids.len() >= wanted && ids.iter().all(known) => {
            ids.truncate(wanted);
            Ok(("the beginning of a fixed text".to_owned(), ids))
        }
        // Steps of a prime reach every id, neighbours apart.
        _ => {
            let ids = (0..wanted).map(|i| ((i * 37 + 11) % config.vocab_size) as u32);
            Ok(("derived from the size of the vocabulary".to_owned(), ids.collect()))
        }
    }
}

/// A bar of progress for each check that turns out to be long.
#[derive(Default)]
pub(crate) struct Bars(RefCell<Option<Progress>>);

impl Bars {
    pub(crate) fn finish(&self) {
        if let Some(bar) = self.0.take() {
            bar.finish();
        }
    }
}

impl Watch for Bars {
    fn begin(&self, check: Check, units: u64) {
        self.finish();
        *self.0.borrow_mut() = Some(Progress::new(units, check.name()));
    }

    fn advance(&self, units: u64) {
        if let Some(bar) = &*self.0.borrow() {
            bar.advance_by(units);
        }
    }
}
