//! Writes model files of random weights in the shapes of real models: `cargo xtask synth`.
//!
//! What such a model costs is what the real one costs, byte for byte and operation for operation; the text that it makes
//! is noise. Everything but the numbers is that of a conversion (`apr convert --quantize`): [`hollow`] makes a checkpoint
//! whose weights are a hole in a file, the plan of its conversion says what is written, and [`weights`] fills it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{self, ExitCode},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result};
use apr_convert::{Recipe, Settings, fill};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use tempfile::TempDir;

mod hollow;
mod random;
mod shape;
mod tensors;
mod vocabulary;
mod weights;

#[cfg(test)]
mod tests;

use hollow::Hollow;
use shape::Shape;
use weights::Weights;

const EXAMPLES: &str = "\
Examples:
  cargo xtask synth --shape qwen2.5-0.5b --quantize q4_k_m model.gguf
  cargo xtask synth --shape qwen2.5-7b --quantize q8_0 --tokenizer Qwen2.5-7B/tokenizer.json model.gguf
  cargo xtask synth --shape Qwen3-4B/config.json --quantize bf16 model.gguf";

/// Writes a GGUF file of random weights in the shape of a real model, to measure speed with.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask synth", after_help = EXAMPLES)]
struct Args {
    /// The file to write.
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// A known shape, or the path of any config.json that `apr` runs.
    #[arg(long, value_name = "SHAPE", value_parser = Shape::named, long_help = shape::help())]
    shape: Shape,
    /// What chooses the type of each tensor, as in `apr convert`: q4_k_m, q8_0, f16, ...
    #[arg(long, value_name = "RECIPE", value_parser = recipe)]
    quantize: Recipe,
    /// A tokenizer.json to put in; the tokenizer_config.json beside it goes along [default: a vocabulary of all short
    /// byte strings, of the right size].
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// The same seed makes the same bytes.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Replace what is there under the name OUT.
    #[arg(long)]
    force: bool,
}

#[allow(clippy::print_stderr, reason = "a program, not a library")]
fn main() -> ExitCode {
    let args = Args::parse();
    match Doomed::on_interrupt().and_then(|doomed| args.write(&doomed)) {
        Ok(line) => {
            eprintln!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("synth: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Args {
    /// Writes the file, and says what it is. Whoever interrupts finds nothing left behind, where `doomed` is what an
    /// interrupt removes.
    fn write(&self, doomed: &Doomed) -> Result<String> {
        let temporary = TempDir::with_prefix("apr-synth-").context("a temporary directory")?;
        doomed.add(temporary.path());
        let hollow = Hollow::new(temporary.path(), &self.shape, self.tokenizer.as_deref())?;
        let (plan, output) = hollow.plan(self.quantize, &self.output, self.force)?;
        doomed.add(&output.partial());
        let style = "{msg} [{wide_bar}] {binary_bytes}/{binary_total_bytes}, {eta} left";
        let style = ProgressStyle::with_template(style).expect("the template is valid");
        let bar = ProgressBar::new(plan.bytes()).with_style(style).with_message("writing");
        let mut weights = Weights::new(self.seed);
        let bytes = fill(&plan, &output, &Settings::default(), &mut |tensor, put| {
            weights.write(tensor, &mut |piece| {
                put(piece)?;
                bar.inc(piece.len() as u64);
                Ok(())
            })
        })?;
        bar.finish_and_clear();
        let parameters: usize = plan.tensors.iter().map(|tensor| tensor.shape.elements()).sum();
        let name = self.output.display();
        Ok(format!("{name}: {}, {parameters} random weights, {bytes} bytes", self.quantize))
    }
}

/// Files and directories that an interrupt removes.
#[derive(Clone, Debug, Default)]
struct Doomed(Arc<Mutex<Vec<PathBuf>>>);

impl Doomed {
    /// None yet; from now on an interrupt removes them and ends the program.
    fn on_interrupt() -> Result<Self> {
        let doomed = Self::default();
        let all = doomed.clone();
        let end = move || {
            for path in all.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                // What is not there needs no removing.
                let _ =
                    if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            }
            process::exit(INTERRUPTED)
        };
        ctrlc::set_handler(end).context("signals cannot be handled")?;
        Ok(doomed)
    }

    fn add(&self, path: &Path) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_owned());
    }
}

/// The exit code of a process that Ctrl-C has ended, as shells have it.
const INTERRUPTED: i32 = 130;

fn recipe(text: &str) -> Result<Recipe, String> {
    text.parse().map_err(|()| {
        let known: Vec<_> = Recipe::all().map(Recipe::name).collect();
        format!("there are: {}", known.join(", "))
    })
}
