//! Which cases there are, and running them in front of a judge.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use apr_model::{Config, Site};
use rayon::prelude::*;

use crate::{
    Case, Engine, Error, Expectation, Fault, Judge, ModelSpec, Outcome, Planting, Result, Rig,
    Severity, Subject, Target, Trained, catalogue, classic,
    fault::Operands,
    recording::Recording,
    rng::{Rng, seed_of},
};

/// What to run.
#[derive(Debug, Default)]
pub struct BenchOptions {
    /// Chooses places, weights and prompts.
    pub seed: u64,
    /// Run a fixed part of the cases: one of each kind and severity, all controls of our engine.
    pub quick: bool,
    /// Run only kinds and families of these names; `control` for the controls. All if empty.
    pub only: Vec<String>,
    /// Run only models of these names, with or without the format: `llama`, `llama-Q8_0`. All if empty.
    pub models: Vec<String>,
}

/// The cases, and the models that they are of.
#[derive(Debug)]
pub struct Bench {
    cases: Vec<Case>,
    trained: Option<Trained>,
    seed: u64,
}

impl Bench {
    /// The bench with `trained`; without it, the cases of the trained model are left out.
    pub fn new(options: &BenchOptions, trained: Option<Trained>) -> Result<Self> {
        check_names(&options.only)?;
        let seed = options.seed;
        let mut cases = Vec::new();
        let specs = ModelSpec::named(&options.models)?
            .into_iter()
            .filter(|spec| trained.is_some() || !matches!(spec, ModelSpec::Trained { .. }));
        for model in specs {
            let subject = model.build(trained.as_ref(), seed)?;
            let config = apr_model::read_config(&subject.model)?;
            let operands = Operands::of(&subject.model, &config);
            let places = Places { model, config, operands };
            for engine in Engine::ALL {
                cases.push(Case { model, engine, planting: None, seed });
            }
            for fault in catalogue::all() {
                places.enumerate(fault, seed, &mut cases);
            }
        }
        cases.retain(|case| is_wanted(case, &options.only));
        if options.quick {
            cases = quick(cases);
        }
        Ok(Self { cases, trained, seed })
    }

    /// The cases, in the order of models.
    pub fn cases(&self) -> &[Case] {
        &self.cases
    }

    /// Runs all cases in front of `judge`, with captures below `directory`, which keeps none of them. Each is shown to
    /// `done` as soon as it is judged. The order of the outcomes is that of the cases.
    pub fn run(
        &self,
        judge: &dyn Judge,
        directory: &Path,
        done: &(dyn Fn(&Outcome) + Sync),
    ) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::with_capacity(self.cases.len());
        // A model and an engine have one fault-free run, and a model has one reference.
        for of_model in self.cases.chunk_by(|a, b| a.model == b.model) {
            let model = of_model[0].model;
            let subject = Arc::new(model.build(self.trained.as_ref(), self.seed)?);
            let reference = rig(model, Engine::Exact, &subject, directory)?;
            let mut of_engines: BTreeMap<Engine, Vec<(usize, Case)>> = BTreeMap::new();
            for (index, &case) in of_model.iter().enumerate() {
                of_engines.entry(case.engine).or_default().push((index, case));
            }
            let mut of_this = Vec::with_capacity(of_model.len());
            for (engine, cases) in of_engines {
                let rig = rig(model, engine, &subject, directory)?;
                let judged = cases.into_par_iter().map(|(index, case)| {
                    let place = directory.join(format!("case-{index}"));
                    let outcome = judged(&case, &rig, reference.clean(), judge, &place)?;
                    remove(&place)?;
                    done(&outcome);
                    Ok::<_, Error>((index, outcome))
                });
                of_this.extend(judged.collect::<Result<Vec<_>>>()?);
            }
            of_this.sort_by_key(|(index, _)| *index);
            outcomes.extend(of_this.into_iter().map(|(_, outcome)| outcome));
        }
        Ok(outcomes)
    }
}

/// The fault-free run of `model` on `engine`.
fn rig(model: ModelSpec, engine: Engine, subject: &Arc<Subject>, directory: &Path) -> Result<Rig> {
    let place = directory.join("clean");
    let rig = Rig::new(model, engine, Arc::clone(subject), &place)?;
    remove(&place)?;
    Ok(rig)
}

fn remove(directory: &Path) -> Result<()> {
    let path = PathBuf::from(directory);
    fs::remove_dir_all(directory).map_err(|reason| Error::Io { path, reason })
}

fn judged(
    case: &Case,
    rig: &Rig,
    reference: &Recording,
    judge: &dyn Judge,
    place: &Path,
) -> Result<Outcome> {
    let (expected, effect, recording) = match case.planting {
        Some(planting) => {
            let planted = rig.plant(planting, case.seed, place)?;
            let names = planting.fault.expected(&rig.target(planting.site), planting.severity);
            ((planted.expectation, names), Some(planted.effect), planted.recording)
        }
        None => {
            rig.run(place)?;
            ((Expectation::Clean, &[][..]), None, Some(rig.clean().clone()))
        }
    };
    let start = Instant::now();
    let verdict = judge.judge(place, rig.original());
    let seconds = start.elapsed().as_secs_f64();
    let classic = recording
        .map(|run| [classic::std_ratio(&run, reference), classic::cosine(&run, reference)]);
    Ok(Outcome::new(*case, expected, effect, verdict, classic, seconds))
}

/// A model, to look for places in.
struct Places {
    model: ModelSpec,
    config: Config,
    operands: Operands,
}

impl Places {
    /// Adds the cases of `fault`: two layers, or two sites where there are no layers, and each severity at least once.
    fn enumerate(&self, fault: &'static Fault, seed: u64, cases: &mut Vec<Case>) {
        let mut rng = Rng::new(seed_of(seed, &format!("{} {}", fault.name, self.model)));
        // Our own engine most often: that is the one whose arithmetic is hardest to see through.
        let mut engines = vec![Engine::Cpu, Engine::CpuF32, Engine::LlamaCpp, Engine::Exact];
        if rng.below(2) == 0 {
            let start = rng.below(engines.len());
            engines.rotate_left(start);
        }
        let found = engines.into_iter().find_map(|engine| {
            let sites = self.sites(fault, engine);
            (!sites.is_empty()).then_some((engine, sites))
        });
        let Some((engine, sites)) = found else { return };
        let mut layers: Vec<Option<u32>> = sites.iter().map(|site| site.layer).collect();
        layers.dedup();
        // One of the first half, where the massive channel may not be yet, and one of the second.
        let (early, late) = layers.split_at(layers.len() / 2);
        let halves = [early, late].into_iter().filter(|half| !half.is_empty());
        let chosen: Vec<Option<u32>> = halves.map(|half| half[rng.below(half.len())]).collect();
        let severities = fault.severities();
        let start = rng.below(severities.len());
        for turn in 0..chosen.len().max(severities.len()) {
            let layer = chosen[turn % chosen.len()];
            let there: Vec<&Site> = sites.iter().filter(|site| site.layer == layer).collect();
            let site = *there[rng.below(there.len())];
            let severity: Severity = severities[(start + turn) % severities.len()];
            let planting = Some(Planting { fault, site, severity });
            cases.push(Case { model: self.model, engine, planting, seed });
        }
    }

    /// Where `fault` can be planted, in the order of layers.
    fn sites(&self, fault: &'static Fault, engine: Engine) -> Vec<Site> {
        let layers = (0..self.config.num_hidden_layers as u32).map(Some).chain([None]);
        let sites = layers.flat_map(|layer| {
            let stages = fault.stages.iter().filter(move |s| s.is_whole_model() == layer.is_none());
            stages.map(move |&stage| Site { layer, stage })
        });
        sites.filter(|&site| fault.applies(&self.target(engine, site))).collect()
    }

    fn target(&self, engine: Engine, site: Site) -> Target<'_> {
        Target::new(self.model, &self.operands, &self.config, engine, site)
    }
}

impl<'a> Target<'a> {
    pub(crate) fn new(
        model: ModelSpec,
        operands: &Operands,
        config: &'a Config,
        engine: Engine,
        site: Site,
    ) -> Self {
        let weights = operands.at(site).iter().map(|&(_, dtype)| dtype).collect();
        Self { model, config, engine, site, weights }
    }
}

/// What runs without a fault are called where kinds are named.
pub(crate) const CONTROL: &str = "control";

fn check_names(only: &[String]) -> Result<()> {
    let families = catalogue::families();
    for name in only {
        let is_family = families.iter().any(|family| family.to_string() == *name);
        if name != CONTROL && !is_family {
            catalogue::find(name)?;
        }
    }
    Ok(())
}

fn is_wanted(case: &Case, only: &[String]) -> bool {
    let is_named = |name: &String| match case.planting {
        None => name == CONTROL,
        Some(Planting { fault, .. }) => name == fault.name || *name == fault.family.to_string(),
    };
    only.is_empty() || only.iter().any(is_named)
}

/// One case of each kind and severity, over all models by turns, and the controls of our own engine.
fn quick(cases: Vec<Case>) -> Vec<Case> {
    let mut of_kind: BTreeMap<(&str, bool), Vec<usize>> = BTreeMap::new();
    for (index, case) in cases.iter().enumerate() {
        if let Some(planting) = &case.planting {
            let subtle = planting.severity == Severity::Subtle;
            of_kind.entry((planting.fault.name, subtle)).or_default().push(index);
        }
    }
    let chosen: Vec<usize> =
        of_kind.values().enumerate().map(|(turn, of)| of[7 * turn % of.len()]).collect();
    let is_quick = |(index, case): (usize, Case)| {
        let keep = match case.planting {
            None => case.engine == Engine::Cpu,
            Some(_) => chosen.contains(&index),
        };
        keep.then_some(case)
    };
    cases.into_iter().enumerate().filter_map(is_quick).collect()
}
