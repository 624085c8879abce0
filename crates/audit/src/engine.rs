//! Engines under test, as far as a debugger handles them: load a file, run tokens, let somebody look.

use std::path::Path;

use apr_capture::{Capture, Dims, Precision, Provenance, Recorder, RecorderOptions, manifest};
use apr_format::Checkpoint;
use apr_model::{
    Backend, Config, HostTensor, LogitRows, Model, Observer, ObserverError, Phase, Site, Step,
    StepInput, TapSet, Values, View, top_k,
};

use crate::Result;

/// Something that loads model files.
pub trait Engine {
    /// What it is called in reports.
    fn name(&self) -> String;

    /// Takes the weights of `checkpoint`.
    fn load(&self, checkpoint: &Checkpoint) -> Result<Box<dyn Run>>;
}

/// A model on an engine.
pub trait Run {
    /// The model's dimensions and constants.
    fn config(&self) -> &Config;

    /// What can be looked at, in the order of computation.
    fn sites(&self) -> &[Site];

    /// What a capture says of where its values come from.
    fn provenance(&self) -> &Provenance;

    /// Runs a script in front of `observer` and returns the tokens of each step.
    fn run(&self, script: &Script, observer: &mut dyn Observer) -> Result<Vec<Vec<u32>>>;
}

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Script {
    /// Steps of these tokens: the first are a prompt in chunks, single tokens after them its continuation.
    Steps(Vec<Vec<u32>>),
    /// A prompt in one step, and so many steps after it, each of the token that the engine likes best.
    Greedy {
        /// The prompt.
        prompt: Vec<u32>,
        /// The steps.
        decode: usize,
    },
}

/// A model on one of our own backends.
#[allow(missing_debug_implementations, reason = "models need not be printable")]
pub struct Loaded<B: Backend> {
    model: Model<B>,
    provenance: Provenance,
}

impl<B: Backend> Loaded<B> {
    /// Takes the weights of `checkpoint` to `backend`.
    pub fn new(
        backend: B,
        checkpoint: &Checkpoint,
        prompt: Option<manifest::Prompt>,
    ) -> Result<Self> {
        let model = Model::load(backend, checkpoint)?;
        let provenance = Provenance::of(&model, checkpoint, prompt);
        Ok(Self { model, provenance })
    }
}

impl<B: Backend> Run for Loaded<B> {
    fn config(&self) -> &Config {
        self.model.config()
    }

    fn sites(&self) -> &[Site] {
        self.model.plan().sites()
    }

    fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    fn run(&self, script: &Script, observer: &mut dyn Observer) -> Result<Vec<Vec<u32>>> {
        let (given, more) = match script {
            Script::Steps(steps) => (steps.clone(), 0),
            Script::Greedy { prompt, decode } => (vec![prompt.clone()], *decode),
        };
        let positions = given.iter().map(Vec::len).sum::<usize>() + more;
        let mut cache = self.model.cache(positions)?;
        let mut steps = Vec::new();
        let mut next = None;
        for index in 0..given.len() + more {
            let tokens = match given.get(index) {
                Some(tokens) => tokens.clone(),
                None => Vec::from_iter(next),
            };
            let phase = match tokens.len() {
                1 if index > 0 => Phase::Decode,
                _ => Phase::Prefill,
            };
            let chunk = if phase == Phase::Prefill { index } else { 0 };
            let input = StepInput { tokens: &tokens, phase, chunk, logits: LogitRows::All };
            let logits = self.model.step(input, &mut cache, observer)?;
            next = logits.last().and_then(|row| top_k(row, 1).first().copied());
            steps.push(tokens);
        }
        Ok(steps)
    }
}

/// Runs `script` and records every stage at `output`. Returns the capture and the tokens of each step.
pub fn record(run: &dyn Run, script: &Script, output: &Path) -> Result<(Capture, Vec<Vec<u32>>)> {
    let taps: TapSet = run.sites().iter().copied().collect();
    record_with(run, script, output, taps, None)
}

/// The value that is to stand at a site in a step, if another one than the computed.
pub(crate) type Replacements<'a> =
    dyn FnMut(usize, Site) -> apr_capture::Result<Option<HostTensor>> + 'a;

/// The same of some sites, with other values in place: what is recorded is what the run goes on with.
pub(crate) fn record_with(
    run: &dyn Run,
    script: &Script,
    output: &Path,
    taps: TapSet,
    replaced: Option<(TapSet, &mut Replacements<'_>)>,
) -> Result<(Capture, Vec<Vec<u32>>)> {
    let outputs = run.provenance().plan.iter().flat_map(|plan| &plan.ops).map(|op| &op.output);
    let wide = outputs.into_iter().any(|output| output.eq_ignore_ascii_case("F64"));
    let precision = if wide { Precision::F64 } else { Precision::F32 };
    let options = RecorderOptions { precision, ..RecorderOptions::new(taps.clone()) };
    let dims = Dims::from(run.config());
    let mut recorder = Recorder::create(output, run.provenance().clone(), dims, options)?;
    let steps = match replaced {
        None => run.run(script, &mut recorder)?,
        Some((sites, values)) => {
            let recorded = taps;
            let mut replacing =
                Replacing { sites, values, recorded, recorder: &mut recorder, step: 0 };
            run.run(script, &mut replacing)?
        }
    };
    Ok((Capture::open(recorder.finish()?)?, steps))
}

/// Puts values in place and shows the recorder what the step goes on with.
struct Replacing<'a, 'v> {
    sites: TapSet,
    values: &'a mut Replacements<'v>,
    recorded: TapSet,
    recorder: &'a mut Recorder,
    step: usize,
}

impl Observer for Replacing<'_, '_> {
    fn wanted(&self) -> TapSet {
        self.sites.union(&self.recorded)
    }

    fn begin(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        self.step = step.index;
        self.recorder.begin(step)
    }

    fn value(&mut self, step: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError> {
        if !self.recorded.contains(site) {
            return Ok(());
        }
        match self.replace(site)? {
            None => self.recorder.value(step, site, view),
            Some(HostTensor { shape, values }) => {
                let view = View { shape: &shape, values: Values::F64(&values) };
                self.recorder.value(step, site, view)
            }
        }
    }

    fn replace(&mut self, site: Site) -> Result<Option<HostTensor>, ObserverError> {
        match self.sites.contains(site) {
            true => Ok((self.values)(self.step, site)?),
            false => Ok(None),
        }
    }

    fn end(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        self.recorder.end(step)
    }
}
