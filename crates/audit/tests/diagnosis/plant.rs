//! An engine with a mistake in it: a real run, one value of which is computed wrongly by loops of the test's own.

use std::{collections::BTreeMap, ops::Range, path::Path};

use apr_audit::{Audit, Diagnosis, Options, audit, diagnose};
use apr_capture::{Capture, Dims, Provenance, Recorder, RecorderOptions};
use apr_format::Checkpoint;
use apr_model::{
    Backend, Config, HostTensor, LogitRows, Model, Observer, ObserverError, Phase, Site, Stage,
    Step, StepInput, TapSet, Values, View,
};
use apr_reference::{Arithmetic, Reference};
use apr_testkit::fixture;

/// What a mistake may look at: the model, and all that has been computed so far.
pub(crate) struct Seen {
    pub(crate) config: Config,
    /// The model's tensors by their GGUF names, those of an expert followed by its number, as `(shape, values)`.
    pub(crate) tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
    /// Values of all steps so far.
    pub(crate) values: BTreeMap<(usize, Site), HostTensor>,
    /// The step that is being computed, and its positions.
    pub(crate) step: usize,
    pub(crate) positions: Range<usize>,
    pub(crate) tokens: Vec<u32>,
}

impl Seen {
    /// A value of the current step.
    pub(crate) fn get(&self, site: Site) -> &HostTensor {
        &self.values[&(self.step, site)]
    }

    /// The numbers of a tensor of the model.
    pub(crate) fn tensor(&self, name: &str) -> &[f64] {
        &self.tensors[name].1
    }

    /// The rows of a value over all steps so far.
    pub(crate) fn all_rows(&self, site: Site) -> Vec<f64> {
        (0..=self.step).flat_map(|step| self.values[&(step, site)].values.clone()).collect()
    }
}

/// Computes the wrong value in the place of the right one. Inner values of fused kernels are asked for before the right
/// one is there; their `right` is empty.
pub(crate) type Mistake<'m> = &'m dyn Fn(&Seen, &HostTensor) -> HostTensor;

struct Planted<'m> {
    recorder: Recorder,
    sites: TapSet,
    /// Where the mistake is.
    site: Site,
    mistake: Mistake<'m>,
    seen: Seen,
    wrong: Option<HostTensor>,
}

fn is_inner(site: Site) -> bool {
    use Stage::*;
    matches!(site.stage, AttnScores | AttnSoftmax | FfnSilu | MoeExpertSilu)
}

impl Observer for Planted<'_> {
    fn wanted(&self) -> TapSet {
        self.sites.clone()
    }

    fn begin(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        self.seen.step = step.index;
        self.seen.positions = step.first_position..step.first_position + step.tokens.len();
        self.seen.tokens = step.tokens.to_vec();
        self.recorder.begin(step)
    }

    fn value(&mut self, step: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError> {
        let mut values: Vec<f64> = match view.values {
            Values::F32(v) => v.iter().map(|&x| x.into()).collect(),
            Values::F64(v) => v.to_vec(),
        };
        if site == self.site {
            let right = HostTensor { shape: view.shape.to_vec(), values: values.clone() };
            if !is_inner(site) {
                self.wrong = Some((self.mistake)(&self.seen, &right));
            }
            values.clone_from(&self.wrong.as_ref().expect("was asked for").values);
        }
        let single: Vec<f32> = values.iter().map(|&x| x as f32).collect();
        let shown = View { shape: view.shape, values: Values::F32(&single) };
        if self.recorder.wanted().contains(site) {
            self.recorder.value(step, site, shown)?;
        }
        let values = single.into_iter().map(f64::from).collect();
        self.seen
            .values
            .insert((step.index, site), HostTensor { shape: view.shape.to_vec(), values });
        Ok(())
    }

    fn replace(&mut self, site: Site) -> Result<Option<HostTensor>, ObserverError> {
        if site != self.site {
            return Ok(None);
        }
        if is_inner(site) {
            let nothing = HostTensor { shape: Vec::new(), values: Vec::new() };
            self.wrong = Some((self.mistake)(&self.seen, &nothing));
        }
        Ok(self.wrong.clone())
    }

    fn end(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        self.recorder.end(step)
    }
}

/// What is found in the capture at `path`.
fn judged(path: &Path, checkpoint: &Checkpoint) -> (Audit, Vec<Diagnosis>) {
    let capture = Capture::open(path).unwrap();
    let options = Options { common: true, ..Options::default() };
    let audit = audit(&capture, checkpoint, &options, &mut |_| {}).unwrap();
    let diagnoses = diagnose(&capture, checkpoint, &audit, 4).unwrap();
    (audit, diagnoses)
}

/// How a mistake is planted.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// The model, under `fixtures`.
    pub(crate) model: &'static str,
    /// Tokens of each step.
    pub(crate) steps: Vec<usize>,
    /// Stages that the capture lacks.
    pub(crate) without: Vec<Stage>,
}

impl Run {
    pub(crate) fn of(model: &'static str) -> Self {
        Self { model, steps: vec![9], without: Vec::new() }
    }

    pub(crate) fn steps(mut self, steps: &[usize]) -> Self {
        self.steps = steps.to_vec();
        self
    }

    pub(crate) fn without(mut self, stages: &[Stage]) -> Self {
        self.without = stages.to_vec();
        self
    }

    /// Plants `mistake` at `site` in an engine that rounds nothing on purpose.
    pub(crate) fn plant(&self, site: Site, mistake: Mistake<'_>) -> (Audit, Vec<Diagnosis>) {
        self.plant_in(Reference::<f32>::new(Arithmetic::EXACT), site, mistake)
    }

    /// Plants `mistake` at `site`, and returns what is found.
    pub(crate) fn plant_in<B: Backend>(
        &self,
        backend: B,
        site: Site,
        mistake: Mistake<'_>,
    ) -> (Audit, Vec<Diagnosis>) {
        let checkpoint = Checkpoint::open(fixture(self.model)).unwrap();
        let model = Model::load(backend, &checkpoint).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("capture");
        self.record(&model, &checkpoint, &target, site, mistake);
        judged(&target, &checkpoint)
    }

    /// Runs the model as if `key` of its config were `value`.
    pub(crate) fn configured(
        &self,
        key: &str,
        value: serde_json::Value,
    ) -> (Audit, Vec<Diagnosis>) {
        let checkpoint = Checkpoint::open(fixture(self.model)).unwrap();
        let directory = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(fixture(self.model)).unwrap() {
            let file = file.unwrap();
            if file.path().extension().is_none_or(|extension| extension != "gguf") {
                std::fs::copy(file.path(), directory.path().join(file.file_name())).unwrap();
            }
        }
        let config = directory.path().join("config.json");
        let mut json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        json[key] = value;
        std::fs::write(&config, json.to_string()).unwrap();
        let other = Checkpoint::open(directory.path()).unwrap();
        let model = Model::load(Reference::<f32>::new(Arithmetic::EXACT), &other).unwrap();
        let target = directory.path().join("capture");
        let nothing = Site::whole(Stage::Embedding);
        self.record(&model, &checkpoint, &target, nothing, &|_, right| right.clone());
        judged(&target, &checkpoint)
    }

    fn record<B: Backend>(
        &self,
        model: &Model<B>,
        checkpoint: &Checkpoint,
        target: &Path,
        site: Site,
        mistake: Mistake<'_>,
    ) {
        let all = model.all_taps();
        let captured: TapSet =
            all.iter().filter(|site| !self.without.contains(&site.stage)).collect();
        let provenance = Provenance::of(model, checkpoint, None);
        let dims = Dims::from(model.config());
        let recorder =
            Recorder::create(target, provenance, dims, RecorderOptions::new(captured)).unwrap();
        let tensors = checkpoint
            .tensors()
            .filter_map(|(name, stored)| {
                let name = apr_model::role_of(name)?.to_string();
                let values = stored.to_f32().unwrap().into_iter().map(f64::from).collect();
                Some((name, (stored.shape().dims().to_vec(), values)))
            })
            .collect();
        let mut planted = Planted {
            recorder,
            sites: all,
            site,
            mistake,
            seen: Seen {
                config: model.config().clone(),
                tensors,
                values: BTreeMap::new(),
                step: 0,
                positions: 0..0,
                tokens: Vec::new(),
            },
            wrong: None,
        };
        let count = self.steps.iter().sum();
        let tokens = apr_testkit::invariants::tokens(count);
        let mut cache = model.cache(count).unwrap();
        let mut rest = &tokens[..];
        for (chunk, &length) in self.steps.iter().enumerate() {
            let (tokens, after) = rest.split_at(length);
            rest = after;
            let phase = Phase::Prefill;
            let input = StepInput { tokens, phase, chunk, logits: LogitRows::All };
            model.step(input, &mut cache, &mut planted).unwrap();
        }
        planted.recorder.finish().unwrap();
    }
}
