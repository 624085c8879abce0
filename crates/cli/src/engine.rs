//! From options to a loaded model on the backend they name.

use std::{
    ops::ControlFlow,
    panic::resume_unwind,
    path::Path,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use anyhow::{Result, bail};
use apr_cpu::Cpu;
use apr_format::Checkpoint;
use apr_model::{Backend, Cache, Config, Model, read_config};
use apr_reference::{Arithmetic, Reference};

use crate::{
    args::{BackendArgs, BackendName, Precision},
    output::Progress,
};

/// Something to do with a model, whatever its backend.
pub(crate) trait Job {
    /// What comes of it.
    type Output;

    /// Does it.
    fn run<B: Backend>(self, model: &Model<B>) -> Result<Self::Output>;
}

/// Loads `checkpoint` onto the backend that `args` name, and does a job with it.
///
/// `prepare` makes the job while another thread loads. What it fails with comes first, as if nothing had been loaded.
pub(crate) fn with_model<J: Job>(
    args: &BackendArgs,
    checkpoint: &Checkpoint,
    prepare: impl FnOnce() -> Result<J>,
) -> Result<J::Output> {
    match args.backend {
        BackendName::Cpu => load_beside(|| Ok(Cpu::new(args.cpu()?)?), checkpoint, prepare),
        BackendName::Reference => match args.precision.unwrap_or_default() {
            Precision::F64 => {
                let backend = || Ok(Reference::<f64>::new(args.arithmetic()?));
                load_beside(backend, checkpoint, prepare)
            }
            Precision::F32 => {
                let backend = || Ok(Reference::<f32>::new(args.arithmetic()?));
                load_beside(backend, checkpoint, prepare)
            }
        },
    }
}

fn load_beside<B, J: Job>(
    backend: impl FnOnce() -> Result<B> + Send,
    checkpoint: &Checkpoint,
    prepare: impl FnOnce() -> Result<J>,
) -> Result<J::Output>
where
    B: Backend<Weight: Send, Vector: Send> + Send,
{
    let failed = AtomicBool::new(false);
    let (model, job) = thread::scope(|scope| {
        let model = scope.spawn(|| load(backend()?, checkpoint, &failed));
        // Here and not there: what a tokenizer gives back can be used again only by the thread that took it.
        let job = prepare().inspect_err(|_| failed.store(true, Relaxed));
        (model.join().unwrap_or_else(|panic| resume_unwind(panic)), job)
    });
    let job = job?;
    job.run(&model?)
}

/// Loads a model and shows how far it is, unless `stop` says not to go on.
fn load<B: Backend>(backend: B, checkpoint: &Checkpoint, stop: &AtomicBool) -> Result<Model<B>> {
    let progress = Progress::of_bytes(0, "loading");
    let model = Model::load_watched(backend, checkpoint, &mut |loaded| {
        progress.set(loaded.bytes as usize, loaded.total as usize);
        if stop.load(Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    progress.finish();
    Ok(model?)
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
