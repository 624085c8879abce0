//! What a step will execute: the ordered list of ops, kernels and arithmetics.
//!
//! A [`Plan`] is made by running the one forward pass on a backend that computes nothing and only writes down
//! which kernel the real backend would have run. So there is no second description of the model that could
//! disagree with the first, and no way for an observer to influence it. Its fingerprint stands in
//! every capture: two runs of one model with the same fingerprint did the same arithmetic.

use std::cell::RefCell;

use apr_tensor::Stored;
use serde::{Deserialize, Serialize};

use crate::{
    Cx, HostTensor, Observer, ObserverError, Phase, Result, Site, Stage, Step, TapSet, Values,
    View,
    backend::*,
    decoder::{Decoder, forward},
    rope::RopeTable,
};

/// One op of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PlanOp {
    /// The op's name, e.g. `linear`.
    pub op: String,
    /// The sites it computes; a fused op has several, data kept for later (`kv_append`) none.
    pub sites: Vec<String>,
    /// The kernel that runs it.
    #[serde(flatten)]
    pub kernel: Kernel,
}

/// The ordered list of ops that a step executes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    ops: Vec<PlanOp>,
    sites: Vec<Site>,
    fingerprint: String,
}

impl Plan {
    /// The plan of `decoder` on `backend`.
    pub(crate) fn of<B: Backend>(
        backend: &B,
        decoder: &Decoder<B::Weight, B::Vector>,
    ) -> Result<Self> {
        let planner = Planner { backend, ops: RefCell::default() };
        let mut everything = Everything::new(decoder);
        let step = Step {
            index: 0,
            phase: Phase::Prefill,
            chunk: 0,
            tokens: &[0],
            first_position: 0,
            logit_rows: 0..1,
        };
        let taps = everything.wanted();
        let (mut kv, mut rotation) = (vec![(); decoder.layers.len()], RopeTable::default());
        let mut cx = Cx::new(&planner, &step, &taps, &mut everything);
        forward(&mut cx, decoder, &mut kv, &mut rotation)?;

        let ops = planner.ops.into_inner();
        let canonical = serde_json::to_vec(&ops).expect("a plan is plain data");
        let fingerprint = blake3::hash(&canonical).to_hex().to_string();
        Ok(Self { ops, sites: everything.seen, fingerprint })
    }

    /// The ops, in the order of computation.
    pub fn ops(&self) -> &[PlanOp] {
        &self.ops
    }

    /// All sites, in the order of computation: what this model can show.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// A hash of the ops: with the model's weights and constants, which are not in it, it decides the bits of the result.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

/// Wants every site that a model could have and remembers those that it has.
struct Everything {
    taps: TapSet,
    seen: Vec<Site>,
}

impl Everything {
    fn new<W, V>(decoder: &Decoder<W, V>) -> Self {
        let mut taps = TapSet::none();
        for stage in Stage::all() {
            if stage.is_whole_model() {
                taps.insert(Site::whole(stage));
            } else {
                (0..decoder.layers.len()).for_each(|i| taps.insert(Site::layer(i, stage)));
            }
        }
        Self { taps, seen: Vec::new() }
    }
}

impl Observer for Everything {
    fn wanted(&self) -> TapSet {
        self.taps.clone()
    }

    fn value(&mut self, _: &Step<'_>, site: Site, _: View<'_>) -> Result<(), ObserverError> {
        assert!(!self.seen.contains(&site), "{site} is computed twice");
        self.seen.push(site);
        Ok(())
    }
}

/// The cache of a backend that keeps nothing.
impl LayerKv for () {
    fn truncate(&mut self, _: usize) {}

    fn bytes(&self) -> usize {
        0
    }
}

/// The backend that only takes notes.
struct Planner<'b, B> {
    backend: &'b B,
    ops: RefCell<Vec<PlanOp>>,
}

impl<B: Backend> Planner<'_, B> {
    fn note(&self, op: Op<'_, B::Weight>) {
        let name = op.name().to_owned();
        let kernel = self.backend.kernel(op);
        self.ops.borrow_mut().push(PlanOp { op: name, sites: Vec::new(), kernel });
    }
}

impl<B: Backend> Backend for Planner<'_, B> {
    type Tensor = ();
    type Weight = B::Weight;
    type Vector = B::Vector;
    type Kv = ();

    fn info(&self) -> BackendInfo {
        self.backend.info()
    }

    fn weight(&self, parts: &[Stored]) -> Result<B::Weight> {
        self.backend.weight(parts)
    }

    fn vector(&self, parts: &[Stored]) -> Result<B::Vector> {
        self.backend.vector(parts)
    }

    fn kv(&self, _: KvShape, _: usize) -> Result<()> {
        Ok(())
    }

    fn embed(&self, table: &B::Weight, _: &[u32]) -> Result<()> {
        self.note(Op::Embed(table));
        Ok(())
    }

    fn linear(&self, _: &(), w: &B::Weight) -> Result<()> {
        self.note(Op::Linear(w));
        Ok(())
    }

    fn add_bias(&self, (): (), _: &B::Vector) -> Result<()> {
        self.note(Op::AddBias);
        Ok(())
    }

    fn rms_norm(&self, _: &(), _: &B::Vector, _: f64) -> Result<()> {
        self.note(Op::RmsNorm);
        Ok(())
    }

    fn heads(&self, _: &(), _: usize, _: usize, _: usize) -> Result<()> {
        Ok(())
    }

    fn rope(&self, _: &(), _: &RopeTable) -> Result<()> {
        self.note(Op::Rope);
        Ok(())
    }

    fn kv_append(&self, _: &mut (), _: &(), _: &()) -> Result<()> {
        self.note(Op::KvAppend);
        Ok(())
    }

    fn attention(&self, _: &(), _: &(), _: f64, _: AttentionInner<()>) -> Result<Attended<()>> {
        self.note(Op::Attention);
        Ok(Attended { scores: Some(()), softmax: Some(()), out: () })
    }

    fn swiglu(&self, (): (), _: &(), _: Inner<()>) -> Result<Gated<()>> {
        self.note(Op::Swiglu);
        Ok(Gated { silu: Some(()), out: () })
    }

    fn top_k(&self, _: &(), _: usize) -> Result<()> {
        self.note(Op::TopK);
        Ok(())
    }

    fn route_weights(&self, _: &(), _: &(), _: bool) -> Result<()> {
        self.note(Op::RouteWeights);
        Ok(())
    }

    fn expert_linear(&self, _: &(), w: &B::Weight, _: usize, _: &()) -> Result<()> {
        self.note(Op::ExpertLinear(w));
        Ok(())
    }

    fn weighted_sum(&self, _: &(), _: &()) -> Result<()> {
        self.note(Op::WeightedSum);
        Ok(())
    }

    fn add(&self, (): (), _: &()) -> Result<()> {
        self.note(Op::Add);
        Ok(())
    }

    fn rows(&self, _: &(), _: std::ops::Range<usize>) -> Result<()> {
        Ok(())
    }

    fn show(&self, site: Site, _: &(), sink: &mut Sink<'_>) -> Result<()> {
        let mut ops = self.ops.borrow_mut();
        let last = ops.last_mut().expect("a value is shown after the op that computed it");
        last.sites.push(site.to_string());
        drop(ops);
        sink(site, View { shape: &[], values: Values::F32(&[]) })
    }

    fn shape(&self, _: &()) -> Vec<usize> {
        Vec::new()
    }

    fn upload(&self, _: HostTensor) -> Result<()> {
        Ok(())
    }

    fn kernel(&self, op: Op<'_, B::Weight>) -> Kernel {
        self.backend.kernel(op)
    }
}
