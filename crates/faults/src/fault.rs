//! What a fault is: how it is planted, where it can be, and what a judge ought to say about it.

use std::{collections::BTreeMap, fmt};

use apr_capture::Dims;
use apr_format::{Checkpoint, Draft};
use apr_model::{Architecture, Config, HostTensor, LayerRole, Role, Site, Stage, role_of};
use apr_tensor::{DType, Stored};
use serde::Serialize;

use crate::{
    Engine, Error, ModelSpec, Result,
    op::{self, Place},
    recording::Recording,
    rng::Rng,
};

/// A kind of fault.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Its name in lists and reports.
    pub name: &'static str,
    /// What it is a fault of.
    pub family: Family,
    /// What goes wrong, in a sentence.
    pub about: &'static str,
    /// Where it can be planted: the first stage that it makes wrong.
    pub stages: &'static [Stage],
    /// What a judge with a list of hypotheses may call it; empty if no closed form is expected of one. Each name is a true
    /// statement about the value that the fault makes.
    pub diagnoses: &'static [&'static str],
    pub(crate) plant: Plant,
    /// Stages beside that one which it makes wrong by itself, not by what they are given.
    pub(crate) also: &'static [Stage],
    pub(crate) reach: Reach,
    /// Whether it strikes harder or less hard as asked.
    pub(crate) graded: bool,
    pub(crate) blames: Blames,
    pub(crate) fits: fn(&Target<'_>) -> bool,
    /// Where it has the closed form that its diagnoses are names of.
    pub(crate) is_closed: fn(&Target<'_>, Severity) -> bool,
}

/// What a fault is a fault of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// A kernel.
    Kernel,
    /// The weights, or who converted them.
    Weights,
    /// A constant of the model.
    Config,
    /// The mask, the cache, the softmax.
    Attention,
    /// Activation functions and the residual stream.
    Activations,
    /// The routing of rows to experts, and what becomes of their results.
    Experts,
    /// The capture: the engine was right, what was written down is not.
    Capture,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kernel => "kernel",
            Self::Weights => "weights",
            Self::Config => "config",
            Self::Attention => "attention",
            Self::Activations => "activations",
            Self::Experts => "experts",
            Self::Capture => "capture",
        })
    }
}

/// How much of a value a fault touches, or how far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Severity {
    Subtle,
    Gross,
}

impl Severity {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Subtle, Self::Gross];
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Subtle => "subtle",
            Self::Gross => "gross",
        })
    }
}

/// How far a fault reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Its layer.
    Layer,
    /// Its layer and the next.
    NextLayer,
    /// All layers.
    EveryLayer,
}

/// What a judge has to notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blames {
    /// A site.
    Site,
    /// That not everything can be judged; no site is wrong.
    Nothing,
    /// That something is wrong with the capture, whatever it is taken for.
    Anything,
}

/// What a judge ought to say of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Expectation {
    /// Nothing is wrong.
    Clean,
    /// These sites are wrong by themselves, in the order of computation; the first is the answer.
    Sites(#[serde(serialize_with = "names")] Vec<Site>),
    /// Not everything can be judged, and nothing that can is wrong.
    Unmeasured,
    /// Anything but a clean bill.
    NotClean,
}

fn names<S: serde::Serializer>(sites: &[Site], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(sites.iter().map(Site::to_string))
}

/// How a fault is planted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Plant {
    /// The engine computes one op wrongly.
    Op(OpFault),
    /// The engine runs another file than the judge is given.
    File(fn(&FilePlace<'_>, &mut Draft) -> Result<()>),
    /// What was captured is changed afterwards.
    Capture(fn(&CapturePlace<'_>, &mut Recording)),
    /// The files of the capture are damaged afterwards.
    Disk(fn(&std::path::Path) -> std::io::Result<()>),
}

type Damage<T> = fn(&T, &mut HostTensor) -> apr_model::Result<()>;

/// What an op does instead; each kind is called for the op it is named after.
#[derive(Clone, Copy, Debug)]
pub(crate) enum OpFault {
    Embed(fn(&op::Embed<'_>, &mut HostTensor) -> apr_model::Result<()>),
    /// Of experts too: of each of them, or of one.
    Linear(fn(&op::Linear<'_>, &mut HostTensor) -> apr_model::Result<()>),
    Bias(fn(&op::Bias<'_>, &mut HostTensor) -> apr_model::Result<()>),
    Norm(fn(&op::Norm<'_>, &mut HostTensor) -> apr_model::Result<()>),
    Rope(fn(&op::Rope<'_>, &mut HostTensor) -> apr_model::Result<()>),
    Residual(fn(&op::Residual<'_>, &mut HostTensor) -> apr_model::Result<()>),
    Attention(fn(&op::Attention<'_>) -> apr_model::Result<op::Attended>),
    Swiglu(fn(&op::Swiglu<'_>) -> apr_model::Result<op::Gated>),
    TopK(fn(&op::TopK<'_>, &mut HostTensor) -> apr_model::Result<()>),
    RouteWeights(fn(&op::RouteWeights<'_>, &mut HostTensor) -> apr_model::Result<()>),
    Experts(fn(&op::Experts<'_>, &mut HostTensor) -> apr_model::Result<()>),
    ExpertSum(fn(&op::ExpertSum<'_>, &mut HostTensor) -> apr_model::Result<()>),
    /// The result of any op, once computed.
    Value(Damage<Place>),
}

/// Where a fault in a file strikes.
#[derive(Debug)]
pub(crate) struct FilePlace<'a> {
    pub(crate) fault: &'static str,
    pub(crate) site: Site,
    pub(crate) severity: Severity,
    pub(crate) seed: u64,
    /// The expert of the layer that most rows go to; 0 where there are none.
    pub(crate) expert: usize,
    pub(crate) config: &'a Config,
    pub(crate) operands: &'a Operands,
}

impl FilePlace<'_> {
    pub(crate) fn rng(&self) -> Rng {
        Rng::new(self.seed)
    }

    pub(crate) fn layer(&self) -> usize {
        self.site.layer.map_or(0, |layer| layer as usize)
    }

    /// Another layer, the next one.
    pub(crate) fn next_layer(&self) -> usize {
        (self.layer() + 1) % self.config.num_hidden_layers
    }

    /// The tensor that the site's op reads; the first of several.
    pub(crate) fn role(&self) -> Role {
        self.operands.at(self.site)[0].0
    }

    /// A role of the site's layer.
    pub(crate) fn of_layer(&self, role: LayerRole) -> Role {
        Role::Layer(self.layer(), role)
    }

    /// The tensor of `role`, to be altered.
    pub(crate) fn tensor<'d>(&self, draft: &'d mut Draft, role: Role) -> Result<&'d mut Stored> {
        let tensor = role.gguf_name();
        let fault = self.fault;
        draft.tensor_mut(&tensor).ok_or(Error::NoTensor { fault, tensor })
    }

    /// Exchanges two tensors.
    pub(crate) fn swap(&self, draft: &mut Draft, a: Role, b: Role) -> Result<()> {
        let first = self.tensor(draft, a)?.clone();
        let second = std::mem::replace(self.tensor(draft, b)?, first);
        *self.tensor(draft, a)? = second;
        Ok(())
    }

    /// Sets a key of the architecture's.
    pub(crate) fn set(&self, draft: &mut Draft, suffix: &str, value: impl Into<apr_format::Value>) {
        draft.metadata.insert(format!("{}.{suffix}", self.config.architecture.gguf_name()), value);
    }
}

/// Where a fault in a capture strikes.
#[derive(Debug)]
pub(crate) struct CapturePlace<'a> {
    pub(crate) site: Site,
    pub(crate) seed: u64,
    pub(crate) config: &'a Config,
}

/// A place to plant a fault, to ask whether it fits.
#[derive(Debug)]
pub struct Target<'a> {
    /// The model.
    pub model: ModelSpec,
    /// The model's dimensions.
    pub config: &'a Config,
    /// The engine.
    pub engine: Engine,
    /// The site.
    pub site: Site,
    /// The stored types of the weights that the site's op reads.
    pub weights: Vec<DType>,
}

/// The tensors that the op of each site reads, in the order of its parts, and their stored types.
#[derive(Debug)]
pub(crate) struct Operands(BTreeMap<Site, Vec<(Role, DType)>>);

impl Operands {
    pub(crate) fn of(checkpoint: &Checkpoint, config: &Config) -> Self {
        let mut operands = BTreeMap::<Site, Vec<(Role, DType)>>::new();
        for (name, stored) in checkpoint.tensors() {
            let Some(role) = role_of(name) else { continue };
            let Some(site) = role.site() else { continue };
            operands.entry(site).or_default().push((role, stored.dtype()));
        }
        // Roles are in the order in which ops join them.
        operands.values_mut().for_each(|of_site| of_site.sort_by_key(|(role, _)| *role));
        if config.tie_word_embeddings {
            let table = operands[&Site::whole(Stage::Embedding)].clone();
            operands.insert(Site::whole(Stage::LmHead), table);
        }
        Self(operands)
    }

    pub(crate) fn at(&self, site: Site) -> &[(Role, DType)] {
        self.0.get(&site).map_or(&[], Vec::as_slice)
    }
}

/// How faults of the tables are written down.
impl Fault {
    pub(crate) const fn new(
        name: &'static str,
        family: Family,
        stages: &'static [Stage],
        plant: Plant,
        about: &'static str,
    ) -> Self {
        Self {
            name,
            family,
            about,
            stages,
            diagnoses: &[],
            plant,
            also: &[],
            reach: Reach::Layer,
            graded: false,
            blames: Blames::Site,
            fits: |_| true,
            is_closed: |_, _| true,
        }
    }

    /// With diagnoses of which one can be expected.
    pub(crate) const fn diagnosed(mut self, diagnoses: &'static [&'static str]) -> Self {
        self.diagnoses = diagnoses;
        self
    }

    /// With a diagnosis to be expected only there.
    pub(crate) const fn closed(mut self, is_closed: fn(&Target<'_>, Severity) -> bool) -> Self {
        self.is_closed = is_closed;
        self
    }

    /// Makes further stages of the same layer, or of the whole model, wrong by itself.
    pub(crate) const fn also(mut self, stages: &'static [Stage]) -> Self {
        self.also = stages;
        self
    }

    /// Reaches further than its layer.
    pub(crate) const fn reaching(mut self, reach: Reach) -> Self {
        self.reach = reach;
        self
    }

    /// Knows how to be subtle and how to be gross.
    pub(crate) const fn graded(mut self) -> Self {
        self.graded = true;
        self
    }

    pub(crate) const fn blaming(mut self, blames: Blames) -> Self {
        self.blames = blames;
        self
    }

    /// Fits only there.
    pub(crate) const fn only(mut self, fits: fn(&Target<'_>) -> bool) -> Self {
        self.fits = fits;
        self
    }

    /// Whether it can be planted at `target`.
    pub fn applies(&self, target: &Target<'_>) -> bool {
        let last = target.config.num_hidden_layers as u32 - 1;
        let within_reach = match self.reach {
            Reach::Layer => true,
            Reach::NextLayer => target.site.layer.is_none_or(|layer| layer < last),
            Reach::EveryLayer => target.site.layer.is_none_or(|layer| layer == 0),
        };
        within_reach
            && self.stages.contains(&target.site.stage)
            && Dims::from(target.config).has(target.site)
            && self.is_of_op(target)
            && (self.fits)(target)
    }

    /// Whether the op at `target` is of the fault's kind: the feed-forward network ends with a product, or with a sum
    /// over experts.
    fn is_of_op(&self, target: &Target<'_>) -> bool {
        let is_sum = target.site.stage == Stage::FfnOut && target.weights.is_empty();
        match self.plant {
            Plant::Op(OpFault::Linear(_)) | Plant::File(_) => !is_sum,
            Plant::Op(OpFault::ExpertSum(_)) => is_sum,
            _ => true,
        }
    }

    /// What a judge may call it at `target`, if anything; empty if no closed form is to be expected of one.
    pub fn expected(&self, target: &Target<'_>, severity: Severity) -> &'static [&'static str] {
        if (self.is_closed)(target, severity) { self.diagnoses } else { &[] }
    }

    /// Whether it makes sense to plant it in one layer or another.
    pub fn is_layered(&self) -> bool {
        self.reach != Reach::EveryLayer && self.stages.iter().any(|stage| !stage.is_whole_model())
    }

    /// How hard it can strike.
    pub fn severities(&self) -> &'static [Severity] {
        if self.graded { &Severity::ALL } else { &[Severity::Gross] }
    }

    /// What a judge ought to say if it is planted at `site`.
    pub fn expectation(&self, site: Site, config: &Config) -> Expectation {
        match self.blames {
            Blames::Nothing => return Expectation::Unmeasured,
            Blames::Anything => return Expectation::NotClean,
            Blames::Site => {}
        }
        let layer = site.layer.unwrap_or(0);
        let layers = match self.reach {
            Reach::Layer => layer..layer + 1,
            Reach::NextLayer => layer..layer + 2,
            Reach::EveryLayer => 0..config.num_hidden_layers as u32,
        };
        let dims = Dims::from(config);
        let stages = self.also.iter().copied().chain([site.stage]);
        let mut sites: Vec<Site> = stages
            .flat_map(|stage| match stage.is_whole_model() {
                true => vec![Site::whole(stage)],
                false => layers.clone().map(|layer| Site::layer(layer as usize, stage)).collect(),
            })
            .filter(|&site| dims.has(site))
            // What strikes products strikes no sum over experts, unless that is where it is planted.
            .filter(|site| {
                let experts = site.layer.and_then(|layer| config.experts_of(layer as usize));
                let is_sum = site.stage == Stage::FfnOut && experts.is_some();
                !is_sum || self.stages.contains(&Stage::FfnOut)
            })
            // The head reads the embedding's table only if it is tied to it.
            .filter(|site| {
                let is_head = site.stage == Stage::LmHead && self.stages == [Stage::Embedding];
                !is_head || config.tie_word_embeddings
            })
            .collect();
        sites.sort();
        sites.dedup();
        Expectation::Sites(sites)
    }
}

/// For tables: a model of one architecture.
pub(crate) fn is_llama(target: &Target<'_>) -> bool {
    target.config.architecture == Architecture::Llama
}
