//! A check-up: which checks are made, and what they share.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use apr_format::Checkpoint;
use apr_model::{Backend, BackendInfo, LogitRows, Model};

use crate::{
    Check, Checkup, Error, Outcome, Result, Watch,
    compare::{Baseline, Record},
    file::FileSession,
    outcome::{self, Verdict},
    script::{Act, Texts, play, reads},
};

/// What a factory may fail with.
pub type FactoryError = Box<dyn std::error::Error + Send + Sync>;

/// Builds a backend, in every way that must not change a bit.
pub trait Factory {
    /// What it builds.
    type Backend: Backend;

    /// The backend, built in this way.
    fn build(&self, way: Way) -> Result<Self::Backend, FactoryError>;

    /// Numbers of threads to build it with; none where the backend has no such choice.
    fn threads(&self) -> Vec<usize> {
        Vec::new()
    }

    /// Instruction sets to build it for; none where the backend has no such choice.
    fn isas(&self) -> Vec<&'static str> {
        Vec::new()
    }
}

/// A way to build a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As the user asked for.
    AsAsked,
    /// With another number of threads.
    Threads(usize),
    /// For another instruction set.
    Isa(&'static str),
}

/// What to check.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The prompt of all runs, at least two tokens for most checks.
    pub tokens: Vec<u32>,
    /// Only these checks; `None` for all.
    pub only: Option<Vec<Check>>,
    /// Fewer runs of each kind.
    pub quick: bool,
}

/// Checks the model in `checkpoint` on the backend that `factory` builds.
///
/// An error means that nothing could be checked as asked for; whatever goes wrong in a check is its outcome.
pub fn check_model<F: Factory>(
    checkpoint: &Checkpoint,
    factory: &F,
    options: &Options,
    watch: &dyn Watch,
) -> Result<Checkup> {
    let session = Session::new(checkpoint, factory, options, watch)?;
    let asked_for = |check: &Check| options.only.as_ref().is_none_or(|only| only.contains(check));
    let make = |check| outcome::made(check, options.only.is_some(), || session.verdict(check));
    let checks = Check::all().filter(asked_for).map(make).collect();
    let plan = session.model.as_ref().ok().map(|model| model.plan().fingerprint().to_owned());
    Ok(Checkup { backend: session.info, plan, checks })
}

/// What the checks share. Everything is made when it is first needed.
pub(crate) struct Session<'a, F: Factory> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) factory: &'a F,
    pub(crate) options: &'a Options,
    pub(crate) watch: &'a dyn Watch,
    info: BackendInfo,
    pub(crate) model: Result<Model<F::Backend>, apr_model::Error>,
    file: FileSession<'a>,
    pub(crate) texts: Texts,
    /// By the steps that the prompt was read in.
    baselines: RefCell<BTreeMap<Vec<usize>, Rc<Baseline>>>,
}

impl<'a, F: Factory> Session<'a, F> {
    fn new(
        checkpoint: &'a Checkpoint,
        factory: &'a F,
        options: &'a Options,
        watch: &'a dyn Watch,
    ) -> Result<Self> {
        let backend = factory.build(Way::AsAsked).map_err(|source| Error::Backend { source })?;
        let info = backend.info();
        let model = Model::load(backend, checkpoint);
        let mut vocab_size = u32::MAX as usize;
        if let Ok(model) = &model {
            let (config, tokens) = (model.config(), &options.tokens);
            vocab_size = config.vocab_size;
            if tokens.is_empty() {
                return Err(Error::NoTokens);
            }
            if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocab_size) {
                return Err(Error::TokenOutOfRange { id, vocab_size });
            }
            let context = config.max_position_embeddings;
            if tokens.len() > context {
                return Err(Error::ContextFull { tokens: tokens.len(), context });
            }
        }
        let texts = Texts::new(&options.tokens, vocab_size);
        let file = FileSession::new(checkpoint, model.as_ref().map(Model::config), watch);
        Ok(Self {
            checkpoint,
            factory,
            options,
            watch,
            info,
            model,
            file,
            texts,
            baselines: RefCell::default(),
        })
    }

    fn verdict(&self, check: Check) -> Result<Verdict, Outcome> {
        match check {
            Check::Plan => self.plan(),
            Check::FiniteValues => self.finite_values(),
            Check::Routing => self.routing(),
            Check::Repeat => self.repeat(),
            Check::Traced => self.traced(),
            Check::LogitRows => self.logit_rows(),
            Check::Chunks => self.chunks(),
            Check::Decode => self.decode(),
            Check::Interleaved => self.interleaved(),
            Check::Snapshot => self.snapshot(),
            Check::Rewind => self.rewind(),
            Check::Threads => self.threads(),
            Check::Isa => self.isa(),
            of_file => self.file.verdict(of_file),
        }
    }

    /// The model as asked for.
    pub(crate) fn model(&self) -> Result<&Model<F::Backend>, Outcome> {
        self.model
            .as_ref()
            .map_err(|_| Outcome::not_measured("the model cannot be loaded: see config"))
    }

    /// What the model as asked for computes when it makes the reads among `acts` and nothing else.
    pub(crate) fn baseline(&self, acts: &[Act]) -> Result<Rc<Baseline>, apr_model::Error> {
        let Ok(model) = &self.model else { unreachable!("asked for by checks that have a model") };
        let acts = reads(acts);
        let key: Vec<usize> = acts.iter().map(|act| act.len()).collect();
        if let Some(made) = self.baselines.borrow().get(&key) {
            return Ok(made.clone());
        }
        let mut record = Record::new(model.all_taps(), self.watch);
        let logits = play(model, &self.texts, &acts, LogitRows::All, &mut record)?;
        let baseline = Rc::new(record.finish(logits));
        self.baselines.borrow_mut().insert(key, baseline.clone());
        Ok(baseline)
    }
}
