//! `apr faultbench`: how good is the debugger?

mod auditor;

use anyhow::{Context, Result};
use apr_faults::{Bench, BenchOptions, Finding, Score, Trained, catalogue};
use apr_report::faultbench as report;
use apr_tokenizer::{Specials, Tokenizer};

use crate::{
    embedded,
    output::{self, Exit, Progress},
};
use auditor::Auditor;

const EXAMPLES: &str = "\
Examples:
  apr faultbench --quick
  apr faultbench --only attention,rope-theta
  apr faultbench --models qwen3_moe
  apr faultbench --json > score.json
  apr faultbench --list

Exit codes: 0 every fault that can be seen was found at its stage and no control was blamed, 1 not so, 2 error.";

/// What the trained model reads in the bench: like what it was trained on, and two dozen tokens or more.
const TEXT: &str = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.items.append(item)\n";
const TOKENS: usize = 24;

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A fixed part of the cases: each kind of fault, and the controls of our engine; under three minutes.
    #[arg(long)]
    quick: bool,
    /// Only these kinds or families, separated by commas; `control` for the runs without a fault.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// Only these models, separated by commas: `trained`, an architecture, or one of them in one format as in `llama-Q8_0`.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    models: Vec<String>,
    /// Chooses places, weights and prompts.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// List the kinds of faults.
    #[arg(long)]
    list: bool,
    /// Print JSON: the score and every case.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Result<Exit> {
    if args.list {
        let kinds: Vec<_> = catalogue::all().collect();
        output::print(&report::kinds(&kinds))?;
        return Ok(Exit::Success);
    }
    let Args { quick, only, models, seed, .. } = args;
    let options = BenchOptions { seed, quick, only, models };
    let bench = Bench::new(&options, Some(trained()?))?;
    let place = tempfile::tempdir().context("cannot make a temporary directory")?;
    let progress = Progress::new(bench.cases().len() as u64, "cases");
    let outcomes = bench.run(&Auditor, place.path(), &|_| progress.advance());
    progress.finish();
    let score = Score::of(outcomes?);
    if args.json {
        output::print_json(&score)?;
    } else {
        output::print(&report::text(&score))?;
    }
    use Finding::{FalseAlarm, LayerOnly, Missed, WrongPlace};
    let wrong: usize =
        [LayerOnly, WrongPlace, Missed, FalseAlarm].into_iter().map(|f| score.judge.count(f)).sum();
    Ok(if wrong == 0 { Exit::Success } else { Exit::Differs })
}

fn trained() -> Result<Trained> {
    let model = embedded::checkpoint()?;
    let mut prompt = Tokenizer::from_checkpoint(&model)?.encode(TEXT, Specials::Literal)?;
    prompt.truncate(TOKENS);
    Ok(Trained { model, prompt })
}
