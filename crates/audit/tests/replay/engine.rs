//! Captures of real runs, and of runs in which a value goes wrong on the way.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use apr_audit::{Audit, Options, Verdict, audit};
use apr_capture::{Capture, Dims, Layout, Precision, Provenance, Recorder, RecorderOptions, Rows};
use apr_cpu::{Cpu, CpuOptions};
use apr_format::Checkpoint;
use apr_model::{
    Backend, HostTensor, LogitRows, Model, Observer, ObserverError, Phase, Site, Step, StepInput,
    TapSet, Values, View,
};
use apr_testkit::{fixture, invariants::tokens};
use tempfile::TempDir;

/// The tiny models, in both containers.
pub(crate) fn tiny() -> Vec<String> {
    apr_testkit::invariants::tiny_files()
}

/// The trained model, at three precisions.
pub(crate) fn trained() -> Vec<String> {
    let quantised = ["Q8_0", "Q4_K_M"].map(|q| format!("pycoder-3m/pycoder-3m-{q}.gguf"));
    ["pycoder-3m".to_owned()].into_iter().chain(quantised).collect()
}

pub(crate) const Q4: &str = "pycoder-3m/pycoder-3m-Q4_K_M.gguf";

pub(crate) fn open(file: &str) -> Checkpoint {
    Checkpoint::open(fixture(file)).unwrap_or_else(|e| panic!("{e}"))
}

pub(crate) fn native() -> Cpu {
    Cpu::new(CpuOptions::default()).unwrap()
}

/// Changes a value of one step while it is computed; given its shape and elements.
pub(crate) type Change = Box<dyn Fn(&[usize], &mut [f64])>;

/// A run to be captured.
pub(crate) struct Run {
    /// Tokens per step.
    pub(crate) lengths: Vec<usize>,
    pub(crate) first_token: usize,
    pub(crate) sites: Option<TapSet>,
    pub(crate) rows: Rows,
    pub(crate) precision: Precision,
    pub(crate) layout: Layout,
    pub(crate) logits: LogitRows,
    pub(crate) plants: BTreeMap<(usize, Site), Change>,
    /// Of these, the ones that only the capture has: the engine goes on with what is right.
    pub(crate) miswritten: BTreeSet<(usize, Site)>,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            lengths: vec![7, 4, 1, 1],
            first_token: 0,
            sites: None,
            rows: Rows::All,
            precision: Precision::F32,
            layout: Layout::Safetensors,
            logits: LogitRows::All,
            plants: BTreeMap::new(),
            miswritten: BTreeSet::new(),
        }
    }
}

impl Run {
    /// Makes the engine compute `site` of step `step` wrongly, and go on with what it has got.
    pub(crate) fn planting(
        mut self,
        step: usize,
        site: &str,
        change: impl Fn(&[usize], &mut [f64]) + 'static,
    ) -> Self {
        self.plants.insert((step, self::site(site)), Box::new(change));
        self
    }

    /// Lets the capture have `site` of step `step` wrong, which the engine had right.
    pub(crate) fn miswriting(
        mut self,
        step: usize,
        site: &str,
        change: impl Fn(&[usize], &mut [f64]) + 'static,
    ) -> Self {
        self.miswritten.insert((step, self::site(site)));
        self.planting(step, site, change)
    }

    pub(crate) fn tokens(&self) -> Vec<u32> {
        let n: usize = self.lengths.iter().sum();
        tokens(self.first_token + n).split_off(self.first_token)
    }

    /// Captures this run of `checkpoint` on `backend`.
    pub(crate) fn on<B: Backend>(self, backend: B, checkpoint: &Checkpoint) -> Captured {
        let model = Model::load(backend, checkpoint).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("capture");
        let mut options =
            RecorderOptions::new(self.sites.clone().unwrap_or_else(|| model.all_taps()));
        options.rows = self.rows.clone();
        options.precision = self.precision;
        options.layout = self.layout;
        let provenance = Provenance::of(&model, checkpoint, None);
        let recorder =
            Recorder::create(&path, provenance, Dims::from(model.config()), options).unwrap();
        let tokens = self.tokens();
        let (plants, miswritten) = (&self.plants, &self.miswritten);
        let mut engine =
            Engine { recorder, plants, miswritten, step: 0, wrong: RefCell::default() };
        let mut cache = model.cache(tokens.len()).unwrap();
        let mut rest = &tokens[..];
        for (chunk, &length) in self.lengths.iter().enumerate() {
            let (tokens, after) = rest.split_at(length);
            rest = after;
            let phase = if length == 1 { Phase::Decode } else { Phase::Prefill };
            let input = StepInput { tokens, phase, chunk, logits: self.logits };
            model.step(input, &mut cache, &mut engine).unwrap();
        }
        engine.recorder.finish().unwrap();
        Captured { path, _directory: directory }
    }
}

pub(crate) fn site(name: &str) -> Site {
    name.parse().unwrap()
}

/// A capture on disk, for as long as this lives.
pub(crate) struct Captured {
    path: PathBuf,
    _directory: TempDir,
}

impl Captured {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn open(&self) -> Capture {
        Capture::open(&self.path).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Rewrites the manifest.
    pub(crate) fn edit(&self, edit: impl FnOnce(&mut serde_json::Value)) {
        let path = self.path.join("manifest.json");
        let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(&mut json);
        std::fs::write(&path, serde_json::to_vec(&json).unwrap()).unwrap();
    }

    pub(crate) fn audited(&self, checkpoint: &Checkpoint) -> Audit {
        self.audited_with(checkpoint, &Options::default())
    }

    pub(crate) fn audited_with(&self, checkpoint: &Checkpoint, options: &Options) -> Audit {
        audit(&self.open(), checkpoint, options, &mut |_| {}).unwrap_or_else(|e| panic!("{e}"))
    }
}

/// Records what an engine computes, some of it wrong.
struct Engine<'a> {
    recorder: Recorder,
    plants: &'a BTreeMap<(usize, Site), Change>,
    miswritten: &'a BTreeSet<(usize, Site)>,
    step: usize,
    /// What is to be used from here on.
    wrong: RefCell<Option<HostTensor>>,
}

impl Observer for Engine<'_> {
    fn wanted(&self) -> TapSet {
        let planted: TapSet = self.plants.keys().map(|&(_, site)| site).collect();
        self.recorder.wanted().union(&planted)
    }

    fn begin(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        self.step = step.index;
        self.recorder.begin(step)
    }

    fn value(&mut self, step: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError> {
        let recorded = self.recorder.wanted().contains(site);
        let Some(change) = self.plants.get(&(step.index, site)) else {
            return if recorded { self.recorder.value(step, site, view) } else { Ok(()) };
        };
        let mut values: Vec<f64> = match view.values {
            Values::F32(v) => v.iter().map(|&x| x.into()).collect(),
            Values::F64(v) => v.to_vec(),
        };
        change(view.shape, &mut values);
        let single: Vec<f32> = values.iter().map(|&x| x as f32).collect();
        self.wrong.replace(Some(HostTensor { shape: view.shape.to_vec(), values }));
        match recorded {
            true => {
                let view = View { shape: view.shape, values: Values::F32(&single) };
                self.recorder.value(step, site, view)
            }
            false => Ok(()),
        }
    }

    fn replace(&mut self, site: Site) -> Result<Option<HostTensor>, ObserverError> {
        let place = (self.step, site);
        match self.plants.contains_key(&place) && !self.miswritten.contains(&place) {
            true => {
                let wrong = self.wrong.take();
                assert!(
                    wrong.is_some(),
                    "{site} is asked for before it is computed; plant elsewhere"
                );
                Ok(wrong)
            }
            false => Ok(None),
        }
    }

    fn end(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        self.recorder.end(step)
    }
}

/// Where an audit says that something is wrong.
pub(crate) fn faults(audit: &Audit) -> Vec<String> {
    audit.faults().map(|stage| stage.site.to_string()).collect()
}

/// The largest excess, and where it is.
pub(crate) fn worst(audit: &Audit) -> (f64, Site) {
    let stage = audit.stages.iter().max_by(|a, b| a.worst.excess.total_cmp(&b.worst.excess));
    let stage = stage.expect("something was judged");
    (stage.worst.excess, stage.site)
}

#[track_caller]
pub(crate) fn assert_match(audit: &Audit, what: &str) {
    let worst = worst(audit);
    assert_eq!(audit.verdict, Verdict::Match, "{what}: {worst:?}: {:?}", audit.not_measured);
    println!("{what}: at most {:.2} of what it may be ({})", worst.0, worst.1);
}

/// Nothing that was judged is wrong, whatever is missing.
#[track_caller]
pub(crate) fn assert_quiet(audit: &Audit, what: &str) {
    assert!(!audit.stages.is_empty(), "{what}: nothing was judged");
    assert_eq!(faults(audit), [""; 0], "{what}: {:?}", worst(audit));
}
