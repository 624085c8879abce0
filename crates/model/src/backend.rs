//! What a backend must be able to do: about a dozen ops on tensors of its own.
//!
//! The model asks for ops and never learns how they are done: in what type a weight is stored, whether it was
//! repacked, on how many threads or on which device the op runs. A backend in turn never learns who looks. A
//! fused op has inner values that somebody may want; they are asked for with [`Inner`], and asking changes
//! no arithmetic.
//!
//! Shapes are row-major with one row per token. Ops are called with matching shapes (the binder checks the
//! checkpoint's), so a mismatch is a bug in the caller and panics.

use apr_tensor::{DType, Stored};

use crate::{HostTensor, Result, Site, View, rope::RopeTable};

/// Where shown values go.
pub type Sink<'a> = dyn FnMut(Site, View<'_>) -> Result<()> + 'a;

/// An engine for the ops of a decoder.
pub trait Backend: Sized {
    /// Activations: `[rows, width]` or `[rows, heads, head_dim]`.
    type Tensor;
    /// A matrix `[out, in]`, in whatever form the backend likes it.
    type Weight;
    /// A norm weight or a bias.
    type Vector;
    /// The cached keys and values of one layer.
    type Kv: LayerKv;

    /// How this backend computes, for captures and reports.
    fn info(&self) -> BackendInfo;

    /// Takes a matrix whose rows are those of `parts`, one part after the other.
    ///
    /// Parts may differ in type: in a Q4_K_M file the value projection often does.
    fn weight(&self, parts: &[Stored]) -> Result<Self::Weight>;

    /// Takes a vector made of `parts`, one after the other.
    fn vector(&self, parts: &[Stored]) -> Result<Self::Vector>;

    /// An empty cache for `capacity` positions of one layer.
    fn kv(&self, shape: KvShape, capacity: usize) -> Result<Self::Kv>;

    /// Rows of `table`, one per token. `-> [tokens, hidden]`
    fn embed(&self, table: &Self::Weight, tokens: &[u32]) -> Result<Self::Tensor>;

    /// `x W^T`. `[n, in] -> [n, out]`
    fn linear(&self, x: &Self::Tensor, w: &Self::Weight) -> Result<Self::Tensor>;

    /// Adds `bias` to each row. The result may take the place of `x`.
    fn add_bias(&self, x: Self::Tensor, bias: &Self::Vector) -> Result<Self::Tensor>;

    /// `x / sqrt(mean(x^2) + eps) * w` over the last axis: a row, or a head where `x` has heads.
    fn rms_norm(&self, x: &Self::Tensor, w: &Self::Vector, eps: f64) -> Result<Self::Tensor>;

    /// The columns `start .. start + heads * head_dim` of `x` as `[n, heads, head_dim]`. Moves data, computes nothing.
    fn heads(
        &self,
        x: &Self::Tensor,
        start: usize,
        heads: usize,
        head_dim: usize,
    ) -> Result<Self::Tensor>;

    /// Rotates pair `(i, i + rotary_dim / 2)` of each head by the angle of its position.
    fn rope(&self, x: &Self::Tensor, table: &RopeTable) -> Result<Self::Tensor>;

    /// Appends one key and value per row, rounded to the cache's type.
    fn kv_append(&self, kv: &mut Self::Kv, k: &Self::Tensor, v: &Self::Tensor) -> Result<()>;

    /// Causal attention of the last `n` cached positions over all cached positions:
    /// query row `i` of `n` sees the keys `0 ..= len - n + i`. Query head `h` reads key head `h / (heads / kv_heads)`.
    fn attention(
        &self,
        q: &Self::Tensor,
        kv: &Self::Kv,
        scale: f64,
        inner: AttentionInner<Self::Tensor>,
    ) -> Result<Attended<Self::Tensor>>;

    /// `silu(gate) * up`, elementwise. Of a long prompt these are the largest tensors that there are, so the result may take the place of `gate`.
    fn swiglu(
        &self,
        gate: Self::Tensor,
        up: &Self::Tensor,
        silu: Inner<Self::Tensor>,
    ) -> Result<Gated<Self::Tensor>>;

    /// The ids of the `k` largest elements of each row, the largest first, of equal ones the smaller id first; NaN is
    /// smaller than all numbers. `[n, experts] -> [n, k]`. Ids are kept as whole numbers of the tensor's own type.
    fn top_k(&self, x: &Self::Tensor, k: usize) -> Result<Self::Tensor>;

    /// The softmax over all logits of a row, of those that `ids` chooses; divided by their sum if `normalize`.
    /// `[n, experts], [n, k] -> [n, k]`
    fn route_weights(
        &self,
        logits: &Self::Tensor,
        ids: &Self::Tensor,
        normalize: bool,
    ) -> Result<Self::Tensor>;

    /// `x W_e^T` for each expert `e` of a row: `w` holds the matrices of all `experts`, one below the other. A row of `x`
    /// meets all its experts, or has another one for each. `[n, in] or [n, k, in] -> [n, k, out]`
    ///
    /// The weights of experts that no row chose are not read.
    fn expert_linear(
        &self,
        x: &Self::Tensor,
        w: &Self::Weight,
        experts: usize,
        ids: &Self::Tensor,
    ) -> Result<Self::Tensor>;

    /// The sum over the slots of each row, each times its weight. `[n, k, width], [n, k] -> [n, width]`
    fn weighted_sum(&self, x: &Self::Tensor, weights: &Self::Tensor) -> Result<Self::Tensor>;

    /// `x + y`, elementwise. The result may take the place of `x`.
    fn add(&self, x: Self::Tensor, y: &Self::Tensor) -> Result<Self::Tensor>;

    /// Rows `range` of `x`. Moves data, computes nothing.
    fn rows(&self, x: &Self::Tensor, range: std::ops::Range<usize>) -> Result<Self::Tensor>;

    /// Shows `x`, the value of `site`, to `sink`: at once where the host can see it. A device enqueues a copy on
    /// the op's own stream instead and hands it over in [`Backend::drain`].
    fn show(&self, site: Site, x: &Self::Tensor, sink: &mut Sink<'_>) -> Result<()>;

    /// The dimensions of `x`.
    fn shape(&self, x: &Self::Tensor) -> Vec<usize>;

    /// The step has ended: shows what [`Backend::show`] has enqueued.
    fn drain(&self, sink: &mut Sink<'_>) -> Result<()> {
        let _ = sink;
        Ok(())
    }

    /// Brings a value of the host's to where the backend computes.
    fn upload(&self, value: HostTensor) -> Result<Self::Tensor>;

    /// The kernel that `op` runs, decided without looking at who observes.
    fn kernel(&self, op: Op<'_, Self::Weight>) -> Kernel;
}

/// One layer's keys and values, as far as the model handles them itself. A copy shares nothing with its original.
pub trait LayerKv: Clone {
    /// Forgets the positions from `len` on, of which there are at least `len`.
    fn truncate(&mut self, len: usize);

    /// The memory set aside for it.
    fn bytes(&self) -> usize;
}

/// How a backend computes, for captures and reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendInfo {
    /// `reference`, `cpu`, ...
    pub name: &'static str,
    /// The instruction set in use, e.g. `avx512`; results do not depend on it.
    pub isa: &'static str,
    /// Threads in use; results do not depend on it.
    pub threads: usize,
    /// The type that keys and values are rounded to in the cache.
    pub kv: DType,
}

/// The dimensions of one layer's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Key and value heads.
    pub heads: usize,
    /// Channels per head.
    pub head_dim: usize,
}

/// What somebody wants of an inner value of a fused op.
#[derive(Debug)]
pub struct Inner<T> {
    /// Hand the value out beside the op's result.
    pub spill: bool,
    /// Use this, which has the computed value's shape, in its place. What is spilled is the computed value
    /// all the same.
    pub replace: Option<T>,
}

impl<T> Default for Inner<T> {
    fn default() -> Self {
        Self { spill: false, replace: None }
    }
}

/// The inner values of attention, `[heads, n, kv]` each.
#[derive(Debug)]
pub struct AttentionInner<T> {
    /// Scaled dot products; masked entries are 0.
    pub scores: Inner<T>,
    /// Their softmax; masked entries are 0.
    pub softmax: Inner<T>,
}

impl<T> Default for AttentionInner<T> {
    fn default() -> Self {
        Self { scores: Inner::default(), softmax: Inner::default() }
    }
}

/// What attention computed.
#[derive(Debug)]
pub struct Attended<T> {
    /// The spilled scores, if asked for.
    pub scores: Option<T>,
    /// The spilled softmax, if asked for.
    pub softmax: Option<T>,
    /// The weighted sum of values, `[n, heads * head_dim]`.
    pub out: T,
}

/// What [`Backend::swiglu`] computed.
#[derive(Debug)]
pub struct Gated<T> {
    /// The spilled `silu(gate)`, if asked for.
    pub silu: Option<T>,
    /// `silu(gate) * up`.
    pub out: T,
}

/// An op, for asking which kernel it runs.
#[derive(Debug)]
#[allow(missing_docs, reason = "the variants are the methods of `Backend`")]
pub enum Op<'a, W> {
    Embed(&'a W),
    Linear(&'a W),
    AddBias,
    RmsNorm,
    Rope,
    KvAppend,
    Attention,
    Swiglu,
    TopK,
    RouteWeights,
    ExpertLinear(&'a W),
    WeightedSum,
    Add,
}

impl<'a, W> Op<'a, W> {
    /// The matrix that it reads, if it reads one.
    pub fn weight(&self) -> Option<&'a W> {
        match self {
            Self::Embed(w) | Self::Linear(w) | Self::ExpertLinear(w) => Some(w),
            _ => None,
        }
    }

    /// The same op on a matrix in another form.
    pub fn with_weight<'b, V>(&self, weight: impl FnOnce(&'a W) -> &'b V) -> Op<'b, V> {
        match self {
            Self::Embed(w) => Op::Embed(weight(w)),
            Self::Linear(w) => Op::Linear(weight(w)),
            Self::ExpertLinear(w) => Op::ExpertLinear(weight(w)),
            Self::AddBias => Op::AddBias,
            Self::RmsNorm => Op::RmsNorm,
            Self::Rope => Op::Rope,
            Self::KvAppend => Op::KvAppend,
            Self::Attention => Op::Attention,
            Self::Swiglu => Op::Swiglu,
            Self::TopK => Op::TopK,
            Self::RouteWeights => Op::RouteWeights,
            Self::WeightedSum => Op::WeightedSum,
            Self::Add => Op::Add,
        }
    }

    /// The op's name in plans.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Embed(_) => "embed",
            Self::Linear(_) => "linear",
            Self::AddBias => "add_bias",
            Self::RmsNorm => "rms_norm",
            Self::Rope => "rope",
            Self::KvAppend => "kv_append",
            Self::Attention => "attention",
            Self::Swiglu => "swiglu",
            Self::TopK => "top_k",
            Self::RouteWeights => "route_weights",
            Self::ExpertLinear(_) => "expert_linear",
            Self::WeightedSum => "weighted_sum",
            Self::Add => "add",
        }
    }
}

/// A kernel, as the plan records it: everything that decides the bits of its result.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Kernel {
    /// The name of its arithmetic contract. Two instruction sets that give the same bits share it.
    pub kernel: String,
    /// Stored types of the weights it reads, in order of the parts; empty where it reads none.
    pub weights: Vec<String>,
    /// What activations are rounded to before use, one entry per part, or one for all; `F32` and `F64` are the plain types.
    pub activations: Vec<String>,
    /// The type sums are kept in.
    pub accumulation: String,
    /// The type of the result.
    pub output: String,
}
