//! What a fault is: how it is planted, where it can be, and what a judge ought to say about it.

use std::fmt;

use apr_format::Draft;
use apr_model::{Architecture, Config, HostTensor, LayerRole, Role, Site, Stage};
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
    Linear(fn(&op::Linear<'_>, &mut HostTensor) -> apr_model::Result<()>),
    Bias(fn(&op::Bias<'_>, &mut HostTensor) -> apr_model::Result<()>),
    Norm(fn(&op::Norm<'_>, &mut HostTensor) -> apr_model::Result<()>),
    Rope(fn(&op::Rope<'_>, &mut HostTensor) -> apr_model::Result<()>),
    Residual(fn(&op::Residual<'_>, &mut HostTensor) -> apr_model::Result<()>),
    Attention(fn(&op::Attention<'_>) -> apr_model::Result<op::Attended>),
    Swiglu(fn(&op::Swiglu<'_>) -> apr_model::Result<op::Gated>),
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
    pub(crate) config: &'a Config,
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
        roles(self.site, self.config)[0]
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

/// The tensors that the op of `site` reads, in the order of the op's parts.
pub(crate) fn roles(site: Site, config: &Config) -> Vec<Role> {
    use LayerRole::*;
    let layer = site.layer.map_or(0, |layer| layer as usize);
    let of_layer = |roles: &[LayerRole]| roles.iter().map(|&r| Role::Layer(layer, r)).collect();
    match site.stage {
        Stage::Embedding => vec![Role::TokenEmbd],
        Stage::LmHead if config.tie_word_embeddings => vec![Role::TokenEmbd],
        Stage::LmHead => vec![Role::Output],
        Stage::FinalNorm => vec![Role::OutputNorm],
        Stage::AttnNorm => of_layer(&[AttnNorm]),
        Stage::QkvMatmul => of_layer(&[AttnQ, AttnK, AttnV]),
        Stage::QkvBias => of_layer(&[AttnQBias, AttnKBias, AttnVBias]),
        Stage::QNorm => of_layer(&[AttnQNorm]),
        Stage::KNorm => of_layer(&[AttnKNorm]),
        Stage::AttnOut => of_layer(&[AttnOutput]),
        Stage::FfnNorm => of_layer(&[FfnNorm]),
        Stage::FfnGate => of_layer(&[FfnGate]),
        Stage::FfnUp => of_layer(&[FfnUp]),
        Stage::FfnOut => of_layer(&[FfnDown]),
        _ => Vec::new(),
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
            && has_site(target.config, target.site)
            && (self.fits)(target)
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
        let stages = self.also.iter().copied().chain([site.stage]);
        let mut sites: Vec<Site> = stages
            .flat_map(|stage| match stage.is_whole_model() {
                true => vec![Site::whole(stage)],
                false => layers.clone().map(|layer| Site::layer(layer as usize, stage)).collect(),
            })
            .filter(|&site| has_site(config, site))
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

/// Whether a model has a site.
pub(crate) fn has_site(config: &Config, site: Site) -> bool {
    let stage = match site.stage {
        Stage::QkvBias => config.attention_bias,
        Stage::QNorm | Stage::KNorm => config.qk_norm,
        _ => true,
    };
    stage && site.layer.is_none_or(|layer| (layer as usize) < config.num_hidden_layers)
}

/// For tables: a model of one architecture.
pub(crate) fn is_llama(target: &Target<'_>) -> bool {
    target.config.architecture == Architecture::Llama
}
