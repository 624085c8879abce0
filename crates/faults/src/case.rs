//! A case: one model on one engine with one fault, or none, and its capture.

use std::{collections::BTreeMap, fmt, path::Path, sync::Arc};

use apr_capture::{Dims, Precision, Provenance, Recorder, RecorderOptions, manifest};
use apr_cpu::{Activations, Cpu, CpuOptions, KvType};
use apr_format::{Checkpoint, Draft};
use apr_model::{Backend, Cache, Config, LogitRows, Model, Phase, Site, Stage, StepInput};
use apr_reference::{Arithmetic, Reference};
use apr_tensor::DType;
use serde::Serialize;

use crate::{
    Effect, Error, Expectation, Fault, Faulty, ModelSpec, Result, Severity, Subject, Target,
    fault::{CapturePlace, FilePlace, OpFault, Operands, Plant},
    op::Place,
    recording::Recording,
    rng::seed_of,
};

/// Tokens that are decoded one by one after the prompt.
const DECODED: usize = 2;

/// An engine, by how it rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// Our CPU backend as it runs: 8-bit activations for quantised weights, keys and values in f16.
    Cpu,
    /// Our CPU backend, rounding to f32 only.
    CpuF32,
    /// The reference in f64, captured as that.
    Exact,
    /// The reference in f32, rounding where llama.cpp does.
    LlamaCpp,
}

impl Engine {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::CpuF32, Self::Exact, Self::LlamaCpp];

    /// Whether it rounds the activations that meet quantised weights.
    pub fn rounds_activations(self) -> bool {
        matches!(self, Self::Cpu | Self::LlamaCpp)
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Cpu => "cpu",
            Self::CpuF32 => "cpu-f32",
            Self::Exact => "exact",
            Self::LlamaCpp => "llama.cpp",
        })
    }
}

/// A fault in a place.
#[derive(Clone, Copy, Debug)]
pub struct Planting {
    /// The fault.
    pub fault: &'static Fault,
    /// The first site that it makes wrong.
    pub site: Site,
    /// How hard it strikes.
    pub severity: Severity,
}

/// One run of the bench.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The model.
    pub model: ModelSpec,
    /// The engine.
    pub engine: Engine,
    /// The fault; `None` for a control.
    pub planting: Option<Planting>,
    /// Decides what the rest leaves open: which rows, channels and blocks.
    pub seed: u64,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.planting {
            None => write!(f, "control")?,
            Some(p) => write!(f, "{} ({}) at {}", p.fault.name, p.severity, p.site)?,
        }
        write!(f, ", {} on {}", self.model, self.engine)
    }
}

/// A model on an engine, with its fault-free run.
#[derive(Debug)]
pub struct Rig {
    model: ModelSpec,
    engine: Engine,
    subject: Arc<Subject>,
    config: Config,
    operands: Operands,
    clean: Recording,
}

/// A run with its fault, on disk.
#[derive(Debug)]
pub struct Planted {
    /// What a judge ought to say.
    pub expectation: Expectation,
    /// What the fault does.
    pub effect: Effect,
    /// The capture, where it can still be read.
    pub(crate) recording: Option<Recording>,
}

impl Rig {
    /// Makes the run without a fault, whose capture stays at `directory`.
    pub fn new(
        model: ModelSpec,
        engine: Engine,
        subject: impl Into<Arc<Subject>>,
        directory: &Path,
    ) -> Result<Self> {
        let subject = subject.into();
        let config = apr_model::read_config(&subject.model)?;
        let operands = Operands::of(&subject.model, &config);
        run(engine, &subject.model, &subject.prompt, None, directory)?;
        let clean = Recording::read(directory)?;
        Ok(Self { model, engine, subject, config, operands, clean })
    }

    /// The model as the judge is given it.
    pub fn original(&self) -> &Checkpoint {
        &self.subject.model
    }

    /// The model's dimensions.
    pub fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn clean(&self) -> &Recording {
        &self.clean
    }

    /// A place in this run, to ask whether a fault fits there.
    pub fn target(&self, site: Site) -> Target<'_> {
        Target::new(self.model, &self.operands, &self.config, self.engine, site)
    }

    /// Runs the model without a fault, and leaves the capture at `directory`.
    pub fn run(&self, directory: &Path) -> Result<()> {
        run(self.engine, &self.subject.model, &self.subject.prompt, None, directory)
    }

    /// Runs the model with `planting`, and leaves the capture at `directory`.
    pub fn plant(&self, planting: Planting, seed: u64, directory: &Path) -> Result<Planted> {
        let Planting { fault, site, severity } = planting;
        let no_site = || Error::NoSite { fault: fault.name, site: site.to_string() };
        if !fault.applies(&self.target(site)) {
            return Err(no_site());
        }
        let Subject { model, prompt } = &*self.subject;
        let (config, operands) = (&self.config, &self.operands);
        let seed = seed_of(seed, &format!("{}@{site}", fault.name));
        let expert = self.busiest_expert(site);
        match fault.plant {
            Plant::Op(op) => {
                let config = config.clone();
                let place = Place { site, severity, seed, step: 0, expert, config };
                let fitting = self.fitting_parts(fault, site);
                let part = fitting.get(seed as usize % fitting.len().max(1)).copied().unwrap_or(0);
                run(self.engine, model, prompt, Some((op, place, part)), directory)?;
            }
            Plant::File(alter) => {
                let mut draft = Draft::of(model);
                let fault = fault.name;
                let place = FilePlace { fault, site, severity, seed, expert, config, operands };
                alter(&place, &mut draft)?;
                let altered = draft.to_gguf(&model.path().to_string_lossy())?;
                run(self.engine, &altered, prompt, None, directory)?;
            }
            Plant::Capture(change) => {
                run(self.engine, model, prompt, None, directory)?;
                let mut recording = self.clean.clone();
                change(&CapturePlace { site, seed, config }, &mut recording);
                recording.write(directory)?;
            }
            Plant::Disk(damage) => {
                run(self.engine, model, prompt, None, directory)?;
                damage(directory)
                    .map_err(|reason| Error::Io { path: directory.to_owned(), reason })?;
            }
        }
        let expectation = fault.expectation(site, config);
        let recording = match fault.plant {
            Plant::Disk(_) => None,
            _ => Some(Recording::read(directory)?),
        };
        let between = |wrong| Effect::between(wrong, &self.clean, site);
        let effect = recording.as_ref().map(between).unwrap_or_default();
        Ok(Planted { expectation, effect, recording })
    }

    /// The expert of the site's layer that most rows go to; 0 where there are none.
    fn busiest_expert(&self, site: Site) -> usize {
        let ids = self.clean.values(Site { stage: Stage::MoeRouterIndices, ..site });
        let mut rows = BTreeMap::<usize, usize>::new();
        ids.iter().for_each(|&id| *rows.entry(id as usize).or_default() += 1);
        rows.into_iter().max_by_key(|&(_, rows)| rows).map_or(0, |(expert, _)| expert)
    }

    /// The parts of the site's matrix that the fault can be in, by their stored types.
    fn fitting_parts(&self, fault: &Fault, site: Site) -> Vec<usize> {
        let target = self.target(site);
        let fits = |part: &usize| {
            let weights = vec![target.weights[*part]];
            (fault.fits)(&Target { weights, ..self.target(site) })
        };
        (0..target.weights.len()).filter(fits).collect()
    }
}

type Armament = (OpFault, Place, usize);

/// Records a run of `model` on `engine`: the prompt in two chunks, then some tokens one by one.
fn run(
    engine: Engine,
    model: &Checkpoint,
    prompt: &[u32],
    fault: Option<Armament>,
    directory: &Path,
) -> Result<()> {
    let one_thread = CpuOptions { threads: Some(1), ..CpuOptions::default() };
    match engine {
        Engine::Cpu => run_on(Cpu::new(one_thread)?, model, prompt, fault, directory),
        Engine::CpuF32 => {
            let plain = CpuOptions { activations: Activations::F32, kv: KvType::F32, ..one_thread };
            run_on(Cpu::new(plain)?, model, prompt, fault, directory)
        }
        Engine::Exact => {
            let reference = Reference::<f64>::new(Arithmetic::EXACT);
            run_on(reference, model, prompt, fault, directory)
        }
        Engine::LlamaCpp => {
            let reference = Reference::<f32>::new(Arithmetic::LLAMA_CPP);
            run_on(reference, model, prompt, fault, directory)
        }
    }
}

fn run_on<B: Backend>(
    backend: B,
    checkpoint: &Checkpoint,
    prompt: &[u32],
    fault: Option<Armament>,
    directory: &Path,
) -> Result<()> {
    let Some((fault, place, part)) = fault else {
        return record(&Model::load(backend, checkpoint)?, checkpoint, prompt, directory);
    };
    let model = Model::load(Faulty::new(backend), checkpoint)?;
    // Binding knows more than the metadata: rope factors are a tensor.
    let place = Place { config: model.config().clone(), ..place };
    model.backend().arm(model.plan(), fault, place, part);
    record(&model, checkpoint, prompt, directory)
}

/// Records every stage of every row.
fn record<B: Backend>(
    model: &Model<B>,
    checkpoint: &Checkpoint,
    prompt: &[u32],
    directory: &Path,
) -> Result<()> {
    // A capture in f32 of values in f64 would not be what the next op was given.
    let is_f64 = model.plan().ops().iter().any(|op| op.kernel.output == DType::F64.name());
    let precision = if is_f64 { Precision::F64 } else { Precision::F32 };
    let taps = model.all_taps();
    let options = RecorderOptions { force: true, precision, ..RecorderOptions::new(taps) };
    let dims = Dims::from(model.config());
    let mut recorder = Recorder::create(directory, provenance(model, checkpoint), dims, options)?;
    let mut cache = model.cache(prompt.len())?;
    let mut step = |tokens: &[u32], phase, chunk, cache: &mut Cache<B>| {
        let input = StepInput { tokens, phase, chunk, logits: LogitRows::All };
        model.step(input, cache, &mut recorder).map(drop)
    };
    let (chunked, decoded) = prompt.split_at(prompt.len() - DECODED);
    let (first, second) = chunked.split_at(chunked.len() * 2 / 3);
    for (chunk, tokens) in [first, second].into_iter().enumerate() {
        step(tokens, Phase::Prefill, chunk, &mut cache)?;
    }
    for token in decoded.chunks(1) {
        step(token, Phase::Decode, 0, &mut cache)?;
    }
    recorder.finish()?;
    Ok(())
}

fn provenance<B: Backend>(model: &Model<B>, checkpoint: &Checkpoint) -> Provenance {
    let info = model.backend().info();
    Provenance {
        tool: manifest::Tool { name: "apr".into(), version: env!("CARGO_PKG_VERSION").into() },
        model: manifest::Model {
            path: checkpoint.path().display().to_string(),
            format: checkpoint.container().to_string(),
            architecture: Some(model.config().architecture.name().to_owned()),
            index_sha256: Some(checkpoint.index_sha256()),
            file_sha256: None,
            config: Some(Dims::from(model.config())),
        },
        prompt: Some(manifest::Prompt { mode: "tokens".to_owned(), text: None }),
        backend: Some((&info).into()),
        plan: Some(model.plan().into()),
        kv: Some(info.kv.name().to_lowercase()),
    }
}
