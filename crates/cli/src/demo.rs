//! `apr demo`: the two-minute tour, on a small model inside the binary.
//!
//! It generates text, traces the same model through every stage, compares all of them with a capture of Hugging Face's
//! implementation that is in the binary too, audits the fast backend, and finds a planted bug.

mod transposed;

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use apr_audit::{Audit, Bisect, Options as AuditOptions, StageAudit, audit};
use apr_capture::{Capture, Dims, Provenance, Recorder, RecorderOptions};
use apr_cpu::{Activations, Cpu, CpuOptions, KvType};
use apr_diff::{Comparison, Options, compare};
use apr_format::Checkpoint;
use apr_model::{
    Backend, GenerateOptions, LogitRows, Model, Phase, Sampler, SamplerOptions, StepInput,
    Unobserved, generate,
};
use apr_reference::{Arithmetic, Reference};
use apr_report::html;
use apr_tokenizer::{Specials, Tokenizer};

use crate::{
    embedded, logits,
    output::{self, Exit},
};

const GOLDEN_MANIFEST: &[u8] =
    include_bytes!("../../../fixtures/golden/pycoder-3m-Q4_K_M/capture/manifest.json");
const GOLDEN_STEP: &[u8] =
    include_bytes!("../../../fixtures/golden/pycoder-3m-Q4_K_M/capture/step-0000.safetensors");

const TOKENS: usize = 36;
/// The report on the planted bug.
const REPORT: &str = "transposed.html";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Keep the model, the captures and the report here, to go on with `apr trace`, `apr diff` and a browser.
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
}

pub(crate) fn run(args: Args) -> Result<Exit> {
    match &args.output {
        Some(directory) => keep(directory),
        None => tour(tempfile::tempdir().context("cannot make a temporary directory")?.path()),
    }
}

/// Takes the tour and keeps what it made in `directory`: all of it, or nothing.
fn keep(directory: &Path) -> Result<Exit> {
    let is_new = !directory.exists();
    output::fresh_directory(directory)?;
    let exit = tour_below(directory);
    if exit.is_err() && is_new {
        // The error that led here is the one to tell.
        let _ = fs::remove_dir(directory);
    }
    let exit = exit?;
    output::print(&format!(
        "\nThe model and the captures are in {0}. Try:\n  apr diff {0}/cpu {0}/golden\n  apr audit {0}/cpu --model {0}/{1}\n  apr trace {0}/{1} -p 'import os' --payload\nThe report on the planted bug, for the browser, is {0}/{2}.\n",
        directory.display(),
        embedded::FILE,
        REPORT,
    ))?;
    Ok(exit)
}

/// Takes the tour in a temporary directory in `directory`, on the same file system whatever is mounted there, and
/// moves what it made up when all is whole.
fn tour_below(directory: &Path) -> Result<Exit> {
    let cannot_write = || format!("cannot write to {}", directory.display());
    let partial = tempfile::Builder::new().prefix(".partial-").tempdir_in(directory);
    let partial = partial.with_context(cannot_write)?;
    let exit = tour(partial.path())?;
    write(&partial.path().join(embedded::FILE), embedded::BYTES)?;
    for entry in fs::read_dir(partial.path()).with_context(cannot_write)? {
        let entry = entry.with_context(cannot_write)?;
        fs::rename(entry.path(), directory.join(entry.file_name())).with_context(cannot_write)?;
    }
    Ok(exit)
}

/// Takes the tour, with the captures in `place`.
fn tour(place: &Path) -> Result<Exit> {
    let golden = place.join("golden");
    fs::create_dir(&golden).with_context(|| format!("cannot write to {}", place.display()))?;
    // The manifest says that all else is there: it comes last.
    write(&golden.join("step-0000.safetensors"), GOLDEN_STEP)?;
    write(&golden.join("manifest.json"), GOLDEN_MANIFEST)?;
    let golden = Capture::open(&golden)?;

    let checkpoint = embedded::checkpoint()?;
    let cpu = Model::load(Cpu::new(CpuOptions::default())?, &checkpoint)?;
    output::print(
        "1. The model writes, on the cpu backend, from Q4_K and Q6_K weights as stored:\n\n",
    )?;
    write_text(&cpu, &checkpoint)?;

    let tokens = tokens(&golden);
    let text = Tokenizer::from_checkpoint(&checkpoint)?.decode(&tokens);
    output::print(&format!(
        "\n2. The same model, traced on the reference backend (f64), against Hugging Face in float32.\n   \
         This and what follows is compared on the {} tokens of {text:?}:\n\n",
        tokens.len()
    ))?;
    let exact = Model::load(Reference::<f64>::new(Arithmetic::EXACT), &checkpoint)?;
    let exact = against_golden(&exact, &checkpoint, &place.join("reference"), &golden)?;
    output::print(&apr_report::diff::summary(&exact))?;

    output::print("\n3. The cpu backend, told to round nothing, against the same:\n\n")?;
    let plain =
        CpuOptions { activations: Activations::F32, kv: KvType::F32, ..CpuOptions::default() };
    let plain = Model::load(Cpu::new(plain)?, &checkpoint)?;
    let plain = against_golden(&plain, &checkpoint, &place.join("cpu-f32"), &golden)?;
    output::print(&apr_report::diff::summary(&plain))?;

    output::print(
        "\n4. The cpu backend as it runs, with activations rounded to 8 bits as in llama.cpp, against the same.\n   \
         Hugging Face does not round them, so DIFFERS is the expected verdict here. Whether rounding is all that\n   \
         there is to it cannot be seen by comparing:\n\n",
    )?;
    let fast = against_golden(&cpu, &checkpoint, &place.join("cpu"), &golden)?;
    output::print(&apr_report::diff::summary(&fast))?;
    output::print(
        "\n   So `apr audit` computes each stage again from what the run itself had, exactly and with the rounding that\n   \
         it declares:\n\n",
    )?;
    let capture = Capture::open(place.join("cpu"))?;
    let audited = audit(&capture, &checkpoint, &AuditOptions::default(), &mut |_| {})?;
    output::print(&most_rounded(&audited))?;
    output::print(&format!("{}\n", audited.verdict))?;

    let found = story(&checkpoint, place)?;
    let verdicts = [
        Exit::from(&exact.outcome),
        Exit::from(&plain.outcome),
        Exit::from(&audited.verdict),
        if transposed::is_found(&found) { Exit::Success } else { Exit::Differs },
    ];
    Ok(verdicts.into_iter().find(|&exit| exit != Exit::Success).unwrap_or(Exit::Success))
}

/// How much of the largest error that a stage adds by itself is its rounding.
fn most_rounded(audited: &Audit) -> String {
    let local = |stage: &&StageAudit| stage.errors.local;
    let most = audited.stages.iter().max_by(|a, b| local(a).total_cmp(&local(b)));
    most.map_or(String::new(), |stage| {
        format!(
            "{} adds most by itself, a relative L2 of {:.1e}: its rounding adds {:.1e}, and all but {:.1e} is explained\n",
            stage.site, stage.errors.local, stage.errors.floor, stage.errors.unexplained
        )
    })
}

/// Plants the bug that this program was born from, and finds it.
fn story(checkpoint: &Checkpoint, place: &Path) -> Result<Bisect> {
    let file = transposed::with_f32_head(checkpoint)?;
    output::print(
        "\n5. The bug that this program was born from: one kernel reads the F32 head transposed. The same model writes:\n\n",
    )?;
    let wrong = Model::load(Cpu::new(CpuOptions::default())?, &transposed::misread(&file)?)?;
    write_text(&wrong, checkpoint)?;
    output::print(
        "\n   and this is what `apr bisect` says of it, against the reference backend:\n\n",
    )?;
    let prompt =
        Tokenizer::from_checkpoint(checkpoint)?.encode(embedded::PROMPT, Specials::Literal)?;
    let captures = place.join("transposed");
    fs::create_dir(&captures).with_context(|| format!("cannot write to {}", place.display()))?;
    let found = transposed::find(&file, prompt, &captures)?;
    let shown = apr_report::bisect::Options { limit: 5, colour: output::coloured() };
    output::print(&apr_report::bisect::text(&found, &shown))?;
    let logits = logits::side_by_side(&found.comparison, &file)?;
    write(&place.join(REPORT), html::bisect(&found, &logits).as_bytes())?;
    Ok(found)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("{}: cannot be written", path.display()))
}

/// The tokens that a capture is of.
fn tokens(capture: &Capture) -> Vec<u32> {
    capture.steps().iter().flat_map(|step| step.token_ids.iter().flatten().copied()).collect()
}

fn write_text<B: Backend>(model: &Model<B>, checkpoint: &Checkpoint) -> Result<()> {
    let tokenizer = Tokenizer::from_checkpoint(checkpoint)?;
    let prompt = tokenizer.encode(embedded::PROMPT, Specials::Literal)?;
    let mut text = tokenizer.stream();
    let mut failure = None;
    output::print(embedded::PROMPT)?;
    generate(
        model,
        &mut model.cache(prompt.len() + TOKENS)?,
        &prompt,
        &GenerateOptions { max_tokens: TOKENS, ..GenerateOptions::default() },
        &mut Sampler::new(SamplerOptions::default()),
        &mut Unobserved,
        &mut |token| match output::print(&text.push(token.id).unwrap_or_default()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        },
    )?;
    match failure {
        Some(error) => Err(error),
        None => Ok(output::print("\n")?),
    }
}

/// Records every stage of the golden capture's own tokens at `output`, and compares.
fn against_golden<B: Backend>(
    model: &Model<B>,
    checkpoint: &Checkpoint,
    output: &Path,
    golden: &Capture,
) -> Result<Comparison> {
    let provenance = Provenance::of(model, checkpoint, None);
    let dims = Dims::from(model.config());
    let options = RecorderOptions::new(model.all_taps());
    let mut recorder = Recorder::create(output, provenance, dims, options)?;
    let tokens = tokens(golden);
    let input =
        StepInput { tokens: &tokens, phase: Phase::Prefill, chunk: 0, logits: LogitRows::All };
    model.step(input, &mut model.cache(tokens.len())?, &mut recorder)?;
    let capture = Capture::open(recorder.finish()?)?;
    let mut comparison = compare(&capture, golden, &Options::default())?;
    // The place is temporary: what lasts is the name.
    for side in [&mut comparison.a, &mut comparison.b] {
        let name = Path::new(&side.path).file_name();
        side.path = name.unwrap_or_default().to_string_lossy().into_owned();
    }
    Ok(comparison)
}
