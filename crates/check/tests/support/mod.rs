//! A backend that keeps all promises but one.

#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::cell::Cell;

use apr_check::{Check, Checkup, Factory, FactoryError, Options, Unwatched, Way, check_model};
use apr_cpu::{Cpu, CpuOptions, Isa};
use apr_format::Checkpoint;
use apr_model::*;
use apr_tensor::Stored;

/// When a value is spoilt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mischief {
    None,
    /// The down projection of layer 1, where a step has one row.
    DecodeLinear,
    /// The rotated keys of layer 1, where a step has one row.
    DecodeRope,
    /// The attention of layer 1 in steps of several rows that are not the first.
    LaterChunks,
    /// The down projection of layer 1 with this many threads.
    Threads(usize),
    /// The down projection of layer 1 with this instruction set.
    Isa(&'static str),
    /// The attention of layer 1, if its scores are shown.
    Spilled,
    /// The attention of layer 1, if another sequence had its turn before.
    Others,
    /// The attention of layer 1 on a copied cache.
    Copied,
    /// The attention of layer 1 on a cache that was cut back.
    Cut,
    /// The down projection of layer 1, in its second run only.
    Once,
    /// The down projection of layer 1, another way in each run.
    Always,
    /// The logits, if they are of one row.
    OneLogitRow,
    /// A NaN out of the down projection of layer 1.
    Nan,
    /// Each token's second expert is its first.
    SameExpertTwice,
    /// The weights of the experts are not divided by their sum.
    NotNormalised,
    /// Another kernel with three threads.
    PlanOfThree,
}

/// A cpu backend that spoils one value.
pub(crate) struct Spoilt {
    cpu: Cpu,
    mischief: Mischief,
    /// Matrices, caches and runs of the down projection so far; rotations in this step.
    weights: Cell<usize>,
    caches: Cell<usize>,
    runs: Cell<usize>,
    ropes: Cell<usize>,
    /// The cache of layer 1 that was appended to last, and the one before.
    last: Cell<[usize; 2]>,
}

/// A cache that knows what was done to it.
pub(crate) struct Kv {
    kv: apr_cpu::Kv,
    number: usize,
    appends: usize,
    copied: bool,
    cut: bool,
}

impl Clone for Kv {
    fn clone(&self) -> Self {
        Self { kv: self.kv.clone(), copied: true, ..*self }
    }
}

impl LayerKv for Kv {
    fn truncate(&mut self, len: usize) {
        self.kv.truncate(len);
        self.cut = true;
    }

    fn bytes(&self) -> usize {
        self.kv.bytes()
    }
}

/// The number of a matrix in the order of binding: five in each layer, then the table, then the head.
pub(crate) struct Weight(usize, apr_cpu::Weight);

/// The tiny models have two layers.
const LAYERS: usize = 2;
const DOWN_OF_LAYER_1: usize = 9;
const HEADS: [usize; 2] = [10, 11];

impl Spoilt {
    fn new(options: CpuOptions, mischief: Mischief) -> Self {
        let cpu = Cpu::new(options).unwrap();
        let (weights, caches, runs, ropes, last) = Default::default();
        Self { cpu, mischief, weights, caches, runs, ropes, last }
    }

    /// `y` with what `change` makes of the sixth element of each row, or of the last row only.
    fn spoilt(
        &self,
        y: &apr_cpu::Tensor,
        all_rows: bool,
        change: impl Fn(f32) -> f32,
    ) -> apr_cpu::Tensor {
        let shape = self.cpu.shape(y);
        let mut values = Vec::new();
        let mut keep = |_: Site, view: View<'_>| {
            values.extend((0..view.values.len()).map(|i| view.values.get(i)));
            Ok(())
        };
        self.cpu.show(Site::whole(Stage::Embedding), y, &mut keep).unwrap();
        let row: usize = shape[1..].iter().product();
        let first = if all_rows { 0 } else { shape[0] - 1 };
        for row in values.chunks_exact_mut(row).skip(first) {
            row[5] = change(row[5] as f32).into();
        }
        self.cpu.upload(HostTensor { shape, values }).unwrap()
    }

    /// One element of the last row off by the last bit.
    fn one_bit(&self, y: &apr_cpu::Tensor) -> apr_cpu::Tensor {
        self.spoilt(y, false, |x| f32::from_bits(x.to_bits() ^ 1))
    }

    fn rows(&self, x: &apr_cpu::Tensor) -> usize {
        self.cpu.shape(x)[0]
    }
}

impl Backend for Spoilt {
    type Tensor = apr_cpu::Tensor;
    type Weight = Weight;
    type Vector = Vec<f32>;
    type Kv = Kv;

    fn info(&self) -> BackendInfo {
        self.cpu.info()
    }

    fn weight(&self, parts: &[Stored]) -> Result<Weight> {
        let number = self.weights.replace(self.weights.get() + 1);
        Ok(Weight(number, self.cpu.weight(parts)?))
    }

    fn vector(&self, parts: &[Stored]) -> Result<Vec<f32>> {
        self.cpu.vector(parts)
    }

    fn kv(&self, shape: KvShape, capacity: usize) -> Result<Kv> {
        let number = self.caches.replace(self.caches.get() + 1);
        let kv = self.cpu.kv(shape, capacity)?;
        Ok(Kv { kv, number, appends: 0, copied: false, cut: false })
    }

    fn embed(&self, table: &Weight, tokens: &[u32]) -> Result<Self::Tensor> {
        self.ropes.set(0);
        self.cpu.embed(&table.1, tokens)
    }

    fn linear(&self, x: &Self::Tensor, w: &Weight) -> Result<Self::Tensor> {
        let y = self.cpu.linear(x, &w.1)?;
        let one_row = self.rows(x) == 1;
        if HEADS.contains(&w.0) && self.mischief == Mischief::OneLogitRow && one_row {
            return Ok(self.one_bit(&y));
        }
        if w.0 != DOWN_OF_LAYER_1 {
            return Ok(y);
        }
        let run = self.runs.replace(self.runs.get() + 1);
        let info = self.info();
        let is_spoilt = match self.mischief {
            Mischief::DecodeLinear => one_row,
            Mischief::Threads(n) => info.threads == n,
            Mischief::Isa(isa) => info.isa == isa,
            Mischief::Once => run == 1,
            Mischief::Always => return Ok(self.spoilt(&y, true, |x| x + run as f32)),
            Mischief::Nan => return Ok(self.spoilt(&y, true, |_| f32::NAN)),
            _ => false,
        };
        Ok(if is_spoilt { self.one_bit(&y) } else { y })
    }

    fn add_bias(&self, x: Self::Tensor, bias: &Vec<f32>) -> Result<Self::Tensor> {
        self.cpu.add_bias(x, bias)
    }

    fn rms_norm(&self, x: &Self::Tensor, w: &Vec<f32>, eps: f64) -> Result<Self::Tensor> {
        self.cpu.rms_norm(x, w, eps)
    }

    fn heads(
        &self,
        x: &Self::Tensor,
        start: usize,
        heads: usize,
        head_dim: usize,
    ) -> Result<Self::Tensor> {
        self.cpu.heads(x, start, heads, head_dim)
    }

    fn rope(&self, x: &Self::Tensor, table: &RopeTable) -> Result<Self::Tensor> {
        let y = self.cpu.rope(x, table)?;
        // Queries and keys of layer 0, then those of layer 1.
        let number = self.ropes.replace(self.ropes.get() + 1);
        let is_spoilt = self.mischief == Mischief::DecodeRope && self.rows(x) == 1 && number == 3;
        Ok(if is_spoilt { self.one_bit(&y) } else { y })
    }

    fn kv_append(&self, kv: &mut Kv, k: &Self::Tensor, v: &Self::Tensor) -> Result<()> {
        kv.appends += 1;
        if kv.number % LAYERS == 1 {
            let [last, _] = self.last.get();
            self.last.set([kv.number, last]);
        }
        self.cpu.kv_append(&mut kv.kv, k, v)
    }

    fn attention(
        &self,
        q: &Self::Tensor,
        kv: &Kv,
        scale: f64,
        inner: AttentionInner<Self::Tensor>,
    ) -> Result<Attended<Self::Tensor>> {
        let is_shown = inner.scores.spill;
        let mut attended = self.cpu.attention(q, &kv.kv, scale, inner)?;
        let is_spoilt = match self.mischief {
            Mischief::LaterChunks => kv.appends > 1 && self.rows(q) > 1,
            Mischief::Spilled => is_shown,
            Mischief::Others => kv.appends > 1 && self.last.get() != [kv.number; 2],
            Mischief::Copied => kv.copied,
            Mischief::Cut => kv.cut,
            _ => false,
        };
        if is_spoilt && kv.number % LAYERS == 1 {
            // Were it the last row only, chunks would show it too.
            let all_rows = self.mischief == Mischief::Spilled;
            let turned = |x: f32| f32::from_bits(x.to_bits() ^ 1);
            attended.out = self.spoilt(&attended.out, all_rows, turned);
        }
        Ok(attended)
    }

    fn swiglu(
        &self,
        gate: Self::Tensor,
        up: &Self::Tensor,
        silu: Inner<Self::Tensor>,
    ) -> Result<Gated<Self::Tensor>> {
        self.cpu.swiglu(gate, up, silu)
    }

    fn top_k(&self, x: &Self::Tensor, k: usize) -> Result<Self::Tensor> {
        let ids = self.cpu.top_k(x, k)?;
        if self.mischief != Mischief::SameExpertTwice {
            return Ok(ids);
        }
        let first = |row: &[f32]| vec![f64::from(row[0]); k];
        let values = ids.values().chunks(k).flat_map(first).collect();
        self.cpu.upload(HostTensor { shape: ids.shape().to_vec(), values })
    }

    fn route_weights(
        &self,
        logits: &Self::Tensor,
        ids: &Self::Tensor,
        normalize: bool,
    ) -> Result<Self::Tensor> {
        let normalize = normalize && self.mischief != Mischief::NotNormalised;
        self.cpu.route_weights(logits, ids, normalize)
    }

    fn expert_linear(
        &self,
        x: &Self::Tensor,
        w: &Weight,
        experts: usize,
        ids: &Self::Tensor,
    ) -> Result<Self::Tensor> {
        self.cpu.expert_linear(x, &w.1, experts, ids)
    }

    fn weighted_sum(&self, x: &Self::Tensor, weights: &Self::Tensor) -> Result<Self::Tensor> {
        self.cpu.weighted_sum(x, weights)
    }

    fn add(&self, x: Self::Tensor, y: &Self::Tensor) -> Result<Self::Tensor> {
        self.cpu.add(x, y)
    }

    fn rows(&self, x: &Self::Tensor, range: std::ops::Range<usize>) -> Result<Self::Tensor> {
        Backend::rows(&self.cpu, x, range)
    }

    fn show(&self, site: Site, x: &Self::Tensor, sink: &mut Sink<'_>) -> Result<()> {
        self.cpu.show(site, x, sink)
    }

    fn shape(&self, x: &Self::Tensor) -> Vec<usize> {
        self.cpu.shape(x)
    }

    fn upload(&self, value: HostTensor) -> Result<Self::Tensor> {
        self.cpu.upload(value)
    }

    fn kernel(&self, op: Op<'_, Weight>) -> Kernel {
        let is_other = self.mischief == Mischief::PlanOfThree && self.info().threads == 3;
        let is_spoilt = is_other && matches!(op, Op::Swiglu);
        let mut kernel = self.cpu.kernel(op.with_weight(|w| &w.1));
        if is_spoilt {
            kernel.kernel = "swiglu_by_three".to_owned();
        }
        kernel
    }
}

/// Builds such backends: as asked for, on one thread and with the best instruction set.
pub(crate) struct SpoiltFactory(pub(crate) Mischief);

impl Factory for SpoiltFactory {
    type Backend = Spoilt;

    fn build(&self, way: Way) -> Result<Spoilt, FactoryError> {
        let (mut threads, mut isa) = (1, Isa::best());
        match way {
            Way::AsAsked => {}
            Way::Threads(n) => threads = n,
            Way::Isa(name) => isa = name.parse()?,
        }
        let options =
            CpuOptions { threads: Some(threads), isa: Some(isa), ..CpuOptions::default() };
        Ok(Spoilt::new(options, self.0))
    }

    fn threads(&self) -> Vec<usize> {
        vec![1, 2, 3]
    }

    fn isas(&self) -> Vec<&'static str> {
        Isa::available().map(Isa::name).collect()
    }
}

/// Checks `checkpoint` on such a backend; all checks unless `only` names some.
pub(crate) fn checked(checkpoint: &Checkpoint, mischief: Mischief, only: &[Check]) -> Checkup {
    let only = (!only.is_empty()).then(|| only.to_vec());
    let tokens = apr_testkit::invariants::tokens(24);
    let options = Options { tokens, only, quick: false };
    check_model(checkpoint, &SpoiltFactory(mischief), &options, &Unwatched).unwrap()
}

/// A model under `fixtures/`.
pub(crate) fn open(path: &str) -> Checkpoint {
    Checkpoint::open(apr_testkit::fixture(path)).unwrap()
}
