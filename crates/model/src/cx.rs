//! The only way model code runs an op, and the only tap in the code base.
//!
//! Each method of [`Cx`] runs one op of the backend and passes its result through `emit` under the op's
//! [`Site`]. With nobody looking that is one predicted branch per op. `Cx` is generic over the backend and
//! never over the observer, so the observed step and the unobserved one are the same machine code.

use crate::{
    Backend, Error, HostTensor, Observer, ObserverError, Result, Site, Stage, Step, TapSet,
    backend::*, rope::RopeTable,
};

/// The context of one step.
#[allow(missing_debug_implementations, reason = "borrows a backend and an observer")]
pub struct Cx<'a, B: Backend> {
    backend: &'a B,
    step: &'a Step<'a>,
    taps: &'a TapSet,
    observer: &'a mut dyn Observer,
}

impl<'a, B: Backend> Cx<'a, B> {
    /// A context in which `observer` sees the sites in `taps`.
    pub(crate) fn new(
        backend: &'a B,
        step: &'a Step<'a>,
        taps: &'a TapSet,
        observer: &'a mut dyn Observer,
    ) -> Self {
        Self { backend, step, taps, observer }
    }

    /// The step this is the context of.
    pub(crate) fn step(&self) -> &'a Step<'a> {
        self.step
    }

    /// See [`Backend::embed`].
    pub fn embed(&mut self, site: Site, table: &B::Weight) -> Result<B::Tensor> {
        let y = self.backend.embed(table, self.step.tokens)?;
        self.emit(site, y)
    }

    /// See [`Backend::linear`].
    pub fn linear(&mut self, site: Site, x: &B::Tensor, w: &B::Weight) -> Result<B::Tensor> {
        let y = self.backend.linear(x, w)?;
        self.emit(site, y)
    }

    /// See [`Backend::add_bias`].
    pub fn add_bias(&mut self, site: Site, x: B::Tensor, bias: &B::Vector) -> Result<B::Tensor> {
        let y = self.backend.add_bias(x, bias)?;
        self.emit(site, y)
    }

    /// See [`Backend::rms_norm`].
    pub fn rms_norm(
        &mut self,
        site: Site,
        x: &B::Tensor,
        w: &B::Vector,
        eps: f64,
    ) -> Result<B::Tensor> {
        let y = self.backend.rms_norm(x, w, eps)?;
        self.emit(site, y)
    }

    /// See [`Backend::heads`]. Has no site: it computes nothing.
    pub fn heads(
        &mut self,
        x: &B::Tensor,
        start: usize,
        heads: usize,
        head_dim: usize,
    ) -> Result<B::Tensor> {
        self.backend.heads(x, start, heads, head_dim)
    }

    /// See [`Backend::rope`].
    pub fn rope(&mut self, site: Site, x: &B::Tensor, table: &RopeTable) -> Result<B::Tensor> {
        let y = self.backend.rope(x, table)?;
        self.emit(site, y)
    }

    /// See [`Backend::kv_append`]. Has no site: it keeps values that were shown before.
    pub fn kv_append(&mut self, kv: &mut B::Kv, k: &B::Tensor, v: &B::Tensor) -> Result<()> {
        self.backend.kv_append(kv, k, v)
    }

    /// See [`Backend::attention`]. One op, three sites of `layer`.
    pub fn attention(
        &mut self,
        layer: usize,
        q: &B::Tensor,
        kv: &B::Kv,
        scale: f64,
    ) -> Result<B::Tensor> {
        let scores = Site::layer(layer, Stage::AttnScores);
        let softmax = Site::layer(layer, Stage::AttnSoftmax);
        let (backend, keys) = (self.backend, self.step.first_position + self.step.tokens.len());
        let shape = || match backend.shape(q)[..] {
            [n, heads, _] => vec![heads, n, keys],
            _ => Vec::new(),
        };
        let inner = AttentionInner {
            scores: self.inner(scores, shape)?,
            softmax: self.inner(softmax, shape)?,
        };
        let attended = self.backend.attention(q, kv, scale, inner)?;
        self.spilled(scores, attended.scores)?;
        self.spilled(softmax, attended.softmax)?;
        self.emit(Site::layer(layer, Stage::Attention), attended.out)
    }

    /// See [`Backend::swiglu`]. One op, two sites: of `silu(gate)` and of the product.
    pub fn swiglu(
        &mut self,
        silu: Site,
        swigl: Site,
        gate: B::Tensor,
        up: &B::Tensor,
    ) -> Result<B::Tensor> {
        let backend = self.backend;
        let inner = self.inner(silu, || backend.shape(&gate))?;
        let gated = self.backend.swiglu(gate, up, inner)?;
        self.spilled(silu, gated.silu)?;
        self.emit(swigl, gated.out)
    }

    /// See [`Backend::top_k`].
    pub fn top_k(&mut self, site: Site, x: &B::Tensor, k: usize) -> Result<B::Tensor> {
        let ids = self.backend.top_k(x, k)?;
        if !self.taps.contains(site) {
            return Ok(ids);
        }
        self.show(site, &ids)?;
        let backend = self.backend;
        let Some(value) = self.replacing(site, || backend.shape(&ids))? else { return Ok(ids) };
        // Others' ids will choose among weights.
        let experts = backend.shape(x).last().copied().unwrap_or(0);
        let is_id = |&id: &f64| id >= 0.0 && id < experts as f64 && id.fract() == 0.0;
        match value.values.iter().find(|id| !is_id(id)) {
            Some(&found) => Err(Error::ReplacementId { site, found, experts }),
            None => backend.upload(value),
        }
    }

    /// See [`Backend::route_weights`].
    pub fn route_weights(
        &mut self,
        site: Site,
        logits: &B::Tensor,
        ids: &B::Tensor,
        normalize: bool,
    ) -> Result<B::Tensor> {
        let weights = self.backend.route_weights(logits, ids, normalize)?;
        self.emit(site, weights)
    }

    /// See [`Backend::expert_linear`].
    pub fn expert_linear(
        &mut self,
        site: Site,
        x: &B::Tensor,
        w: &B::Weight,
        experts: usize,
        ids: &B::Tensor,
    ) -> Result<B::Tensor> {
        let y = self.backend.expert_linear(x, w, experts, ids)?;
        self.emit(site, y)
    }

    /// See [`Backend::weighted_sum`].
    pub fn weighted_sum(
        &mut self,
        site: Site,
        x: &B::Tensor,
        weights: &B::Tensor,
    ) -> Result<B::Tensor> {
        let y = self.backend.weighted_sum(x, weights)?;
        self.emit(site, y)
    }

    /// See [`Backend::add`].
    pub fn add(&mut self, site: Site, x: B::Tensor, y: &B::Tensor) -> Result<B::Tensor> {
        let y = self.backend.add(x, y)?;
        self.emit(site, y)
    }

    /// See [`Backend::rows`]. Has no site: it computes nothing.
    pub fn rows(&mut self, x: &B::Tensor, range: std::ops::Range<usize>) -> Result<B::Tensor> {
        self.backend.rows(x, range)
    }

    /// The tap: every value of the step passes here under its own name.
    #[inline]
    fn emit(&mut self, site: Site, value: B::Tensor) -> Result<B::Tensor> {
        if !self.taps.contains(site) {
            return Ok(value);
        }
        self.observe(site, value)
    }

    #[cold]
    fn observe(&mut self, site: Site, value: B::Tensor) -> Result<B::Tensor> {
        self.show(site, &value)?;
        let backend = self.backend;
        Ok(self.replacement(site, || backend.shape(&value))?.unwrap_or(value))
    }

    /// What to ask of a fused op for its inner value `site`.
    fn inner(
        &mut self,
        site: Site,
        shape: impl FnOnce() -> Vec<usize>,
    ) -> Result<Inner<B::Tensor>> {
        if !self.taps.contains(site) {
            return Ok(Inner::default());
        }
        Ok(Inner { spill: true, replace: self.replacement(site, shape)? })
    }

    fn spilled(&mut self, site: Site, value: Option<B::Tensor>) -> Result<()> {
        match (self.taps.contains(site), value) {
            (true, Some(value)) => self.show(site, &value),
            (true, None) => Err(Error::NotSpillable { site }),
            (false, _) => Ok(()),
        }
    }

    #[cold]
    fn show(&mut self, site: Site, value: &B::Tensor) -> Result<()> {
        let Self { backend, step, observer, .. } = self;
        backend.show(site, value, &mut |site, view| {
            observer.value(step, site, view).map_err(|source| observer_error(site, source))
        })
    }

    /// The step has ended: shows what the backend still holds.
    pub(crate) fn finish(&mut self) -> Result<()> {
        if self.taps.is_empty() {
            return Ok(());
        }
        let Self { backend, step, observer, .. } = self;
        backend.drain(&mut |site, view| {
            observer.value(step, site, view).map_err(|source| observer_error(site, source))
        })
    }

    fn replacement(
        &mut self,
        site: Site,
        shape: impl FnOnce() -> Vec<usize>,
    ) -> Result<Option<B::Tensor>> {
        self.replacing(site, shape)?.map(|value| self.backend.upload(value)).transpose()
    }

    /// What the observer puts in the place of a value of this shape.
    #[cold]
    fn replacing(
        &mut self,
        site: Site,
        shape: impl FnOnce() -> Vec<usize>,
    ) -> Result<Option<HostTensor>> {
        let value = self.observer.replace(site).map_err(|source| observer_error(site, source))?;
        let Some(value) = value else { return Ok(None) };
        let expected = shape();
        if value.shape != expected || value.values.len() != expected.iter().product::<usize>() {
            return Err(Error::ReplacementShape { site, expected, found: value.shape });
        }
        Ok(Some(value))
    }
}

fn observer_error(site: Site, source: ObserverError) -> Error {
    Error::Observer { site: Some(site), source }
}
