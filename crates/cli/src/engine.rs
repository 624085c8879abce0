//! From options to a loaded model on the backend they name.

use std::path::Path;

use anyhow::{Result, bail};
use apr_cpu::Cpu;
use apr_format::Checkpoint;
use apr_model::{Backend, Cache, Config, Model, read_config};
use apr_reference::{Arithmetic, Reference};

use crate::args::{BackendArgs, BackendName, Precision};

/// Something to do with a model, whatever its backend.
pub(crate) trait Job {
    /// What comes of it.
    type Output;

    /// Does it.
    fn run<B: Backend>(self, model: &Model<B>) -> Result<Self::Output>;
}

/// Loads `checkpoint` onto the backend that `args` name, and does `job` with it.
pub(crate) fn with_model<J: Job>(
    args: &BackendArgs,
    checkpoint: &Checkpoint,
    job: J,
) -> Result<J::Output> {
    match args.backend {
        BackendName::Cpu => job.run(&Model::load(Cpu::new(args.cpu()?)?, checkpoint)?),
        BackendName::Reference => {
            let arithmetic = args.arithmetic()?;
            match args.precision.unwrap_or_default() {
                Precision::F64 => {
                    job.run(&Model::load(Reference::<f64>::new(arithmetic), checkpoint)?)
                }
                Precision::F32 => {
                    job.run(&Model::load(Reference::<f32>::new(arithmetic), checkpoint)?)
                }
            }
        }
    }
}

/// Opens a model file or directory.
pub(crate) fn open(path: &Path) -> Result<Checkpoint> {
    Ok(Checkpoint::open(path)?)
}

/// Opens a model to run it. What cannot be run is refused before anything else about it is looked at.
pub(crate) fn open_runnable(path: &Path) -> Result<Checkpoint> {
    let checkpoint = open(path)?;
    read_config(&checkpoint)?;
    Ok(checkpoint)
}

/// The config that `checkpoint` runs with, or why it does not run.
///
/// This binds the model as every command does, to the backend that takes the weights as they are stored: it costs next
/// to nothing.
pub(crate) fn runnable_config(checkpoint: &Checkpoint) -> apr_model::Result<Config> {
    let model = Model::load(Reference::<f64>::new(Arithmetic::EXACT), checkpoint)?;
    Ok(model.config().clone())
}

/// A cache with room for `tokens`, or as many positions as the model has.
pub(crate) fn cache_for<B: Backend>(
    model: &Model<B>,
    prompt: usize,
    generated: usize,
) -> Result<Cache<B>> {
    let context = model.config().max_position_embeddings;
    if prompt > context {
        bail!(
            "the prompt has {prompt} tokens, but the model's context holds {context}; shorten it"
        );
    }
    Ok(model.cache(prompt.saturating_add(generated).min(context))?)
}
