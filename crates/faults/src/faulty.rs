//! A backend that computes one op wrongly.
//!
//! [`Faulty`] wraps any backend. It knows where in the forward pass it is by counting ops against the plan of the
//! model it runs, and lets a fault change what the op at its target makes; the rest of the run goes on with that.
//! Without a fault every bit is the wrapped backend's.

use std::{
    cell::{OnceCell, RefCell},
    collections::BTreeMap,
    ops::Range,
};

use apr_model::*;
use apr_tensor::{Stored, activation::ActivationType};

use crate::{
    fault::OpFault,
    models::f32_tensor,
    op::{self, Kernels, Place},
};

/// A backend with a fault in it, once [armed](Self::arm).
#[derive(Debug)]
pub struct Faulty<B> {
    inner: B,
    armed: OnceCell<Armed>,
    state: RefCell<State>,
}

/// A matrix of the wrapped backend's, and what it was made of.
#[derive(Debug)]
pub struct Weight<W> {
    inner: W,
    parts: Vec<Stored>,
}

/// A vector of the wrapped backend's, and its numbers.
#[derive(Debug)]
pub struct Vector<V> {
    inner: V,
    values: Vec<f32>,
}

/// A cache of the wrapped backend's, and what was appended to it, before rounding: `[positions, heads, head_dim]`.
#[derive(Clone, Debug)]
pub struct Kv<K> {
    inner: K,
    k: HostTensor,
    v: HostTensor,
}

impl<K: LayerKv> LayerKv for Kv<K> {
    fn truncate(&mut self, len: usize) {
        self.inner.truncate(len);
        for host in [&mut self.k, &mut self.v] {
            host.values.truncate(len * op::row_len(host));
            host.shape[0] = len;
        }
    }

    fn bytes(&self) -> usize {
        self.inner.bytes()
    }
}

#[derive(Debug)]
struct Armed {
    fault: OpFault,
    place: Place,
    part: usize,
    /// The sites of each op of the plan.
    sites: Vec<Vec<Site>>,
}

#[derive(Debug, Default)]
struct State {
    /// The op that comes next in the step.
    op: usize,
    /// Steps begun.
    steps: usize,
    /// What the target's layer has computed in this step.
    layer: BTreeMap<Stage, HostTensor>,
    layer_input: Option<HostTensor>,
}

impl<B: Backend> Faulty<B> {
    /// `inner`, without a fault for now.
    pub fn new(inner: B) -> Self {
        Self { inner, armed: OnceCell::new(), state: RefCell::default() }
    }

    /// Lets `fault` strike at `place`, in part `part` of the matrix there, in the model whose plan this is.
    ///
    /// # Panics
    /// If there is a fault already: one engine has one.
    pub(crate) fn arm(&self, plan: &Plan, fault: OpFault, place: Place, part: usize) {
        let parse = |site: &String| site.parse().expect("plans name sites");
        let sites = plan.ops().iter().map(|op| op.sites.iter().map(parse).collect()).collect();
        let armed = Armed { fault, place, part, sites };
        assert!(self.armed.set(armed).is_ok(), "an engine has one fault");
    }

    /// Counts an op, and says whether the fault is in it.
    fn next(&self) -> Option<(OpFault, Place, usize)> {
        let armed = self.armed.get()?;
        let mut state = self.state.borrow_mut();
        let sites = armed.sites.get(state.op)?;
        state.op += 1;
        let place = Place { step: state.steps - 1, ..armed.place.clone() };
        sites.contains(&place.site).then_some((armed.fault, place, armed.part))
    }

    /// Keeps what the target's layer computes, for faults that read it.
    fn keep(&self, value: &B::Tensor) -> Result<()> {
        let Some(armed) = self.armed.get() else { return Ok(()) };
        if !matches!(armed.fault, OpFault::Residual(_)) {
            return Ok(());
        }
        let op = self.state.borrow().op - 1;
        for site in &armed.sites[op] {
            if site.layer == armed.place.site.layer {
                let host = self.host(value)?;
                self.state.borrow_mut().layer.insert(site.stage, host);
            }
        }
        Ok(())
    }

    /// Keeps what the target's layer is given.
    fn keep_input(&self, x: &B::Tensor) -> Result<()> {
        let Some(armed) = self.armed.get() else { return Ok(()) };
        let op = self.state.borrow().op - 1;
        let input = Site { stage: Stage::AttnNorm, ..armed.place.site };
        if armed.sites[op].contains(&input) {
            let host = self.host(x)?;
            self.state.borrow_mut().layer_input = Some(host);
        }
        Ok(())
    }

    /// `x` on the host.
    fn host(&self, x: &B::Tensor) -> Result<HostTensor> {
        let mut host = None;
        let mut sink = |_: Site, view: View<'_>| {
            let values = (0..view.values.len()).map(|i| view.values.get(i)).collect();
            host = Some(HostTensor { shape: view.shape.to_vec(), values });
            Ok(())
        };
        // The sink looks at no site.
        self.inner.show(Site::whole(Stage::Embedding), x, &mut sink)?;
        self.inner.drain(&mut sink)?;
        Ok(host.expect("a backend shows what it is asked to show"))
    }
}

impl<B: Backend> Kernels for Faulty<B> {
    fn linear(&self, x: &HostTensor, parts: &[Stored]) -> Result<HostTensor> {
        let w = self.inner.weight(parts)?;
        self.host(&self.inner.linear(&self.inner.upload(x.clone())?, &w)?)
    }

    fn rms_norm(&self, x: &HostTensor, w: &[f32], eps: f64) -> Result<HostTensor> {
        let w = self.inner.vector(&[f32_tensor(&[w.len()], w)?])?;
        self.host(&self.inner.rms_norm(&self.inner.upload(x.clone())?, &w, eps)?)
    }

    fn rope(&self, x: &HostTensor, table: &RopeTable) -> Result<HostTensor> {
        self.host(&self.inner.rope(&self.inner.upload(x.clone())?, table)?)
    }

    fn attention(
        &self,
        q: &HostTensor,
        k: &HostTensor,
        v: &HostTensor,
        scale: f64,
        softmax: Option<HostTensor>,
    ) -> Result<op::Attended> {
        let [cached, heads, head_dim] = k.shape[..] else { panic!("keys have heads") };
        let mut kv = self.inner.kv(KvShape { heads, head_dim }, cached)?;
        let upload = |x: &HostTensor| self.inner.upload(x.clone());
        self.inner.kv_append(&mut kv, &upload(k)?, &upload(v)?)?;
        let inner = AttentionInner {
            scores: Inner { spill: true, replace: None },
            softmax: Inner { spill: true, replace: softmax.as_ref().map(upload).transpose()? },
        };
        let attended = self.inner.attention(&upload(q)?, &kv, scale, inner)?;
        let spilled = |x: Option<B::Tensor>| self.host(&x.expect("asked for"));
        Ok(op::Attended {
            scores: spilled(attended.scores)?,
            softmax: spilled(attended.softmax)?,
            out: self.host(&attended.out)?,
        })
    }

    fn swiglu(
        &self,
        gate: &HostTensor,
        up: &HostTensor,
        silu: Option<HostTensor>,
    ) -> Result<op::Gated> {
        let upload = |x: &HostTensor| self.inner.upload(x.clone());
        let inner = Inner { spill: true, replace: silu.as_ref().map(upload).transpose()? };
        let gated = self.inner.swiglu(upload(gate)?, &upload(up)?, inner)?;
        Ok(op::Gated {
            silu: self.host(&gated.silu.expect("asked for"))?,
            out: self.host(&gated.out)?,
        })
    }

    fn add(&self, x: &HostTensor, y: &HostTensor) -> Result<HostTensor> {
        let (x, y) = (self.inner.upload(x.clone())?, self.inner.upload(y.clone())?);
        self.host(&self.inner.add(x, &y)?)
    }

    fn top_k(&self, x: &HostTensor, k: usize) -> Result<HostTensor> {
        self.host(&self.inner.top_k(&self.inner.upload(x.clone())?, k)?)
    }

    fn route_weights(
        &self,
        logits: &HostTensor,
        ids: &HostTensor,
        normalize: bool,
    ) -> Result<HostTensor> {
        let (logits, ids) = (self.inner.upload(logits.clone())?, self.inner.upload(ids.clone())?);
        self.host(&self.inner.route_weights(&logits, &ids, normalize)?)
    }

    fn expert_linear(
        &self,
        x: &HostTensor,
        w: &Stored,
        experts: usize,
        ids: &HostTensor,
    ) -> Result<HostTensor> {
        let w = self.inner.weight(std::slice::from_ref(w))?;
        let (x, ids) = (self.inner.upload(x.clone())?, self.inner.upload(ids.clone())?);
        self.host(&self.inner.expert_linear(&x, &w, experts, &ids)?)
    }

    fn weighted_sum(&self, x: &HostTensor, weights: &HostTensor) -> Result<HostTensor> {
        let (x, weights) = (self.inner.upload(x.clone())?, self.inner.upload(weights.clone())?);
        self.host(&self.inner.weighted_sum(&x, &weights)?)
    }

    fn activations(&self, part: &Stored) -> Result<ActivationType> {
        use ActivationType::*;
        let w = self.inner.weight(std::slice::from_ref(part))?;
        let kernel = self.inner.kernel(Op::Linear(&w));
        let declared = kernel.activations.first().map_or("F32", String::as_str);
        let known = [F16, BF16, Q8_0, Q8_1, Q8_K].into_iter().find(|kind| kind.name() == declared);
        Ok(known.unwrap_or(F32))
    }
}

/// Lets the fault, if it is one of this kind of op, change the result `y`, then goes on with it.
macro_rules! damaged {
    ($self:ident, $y:expr, $target:expr, $kind:ident, |$place:ident, $part:ident| $op:expr) => {{
        let y = $y;
        let y = match $target {
            Some((OpFault::$kind(damage), $place, $part)) => {
                let _ = $part;
                let mut host = $self.host(&y)?;
                damage(&$op, &mut host)?;
                $self.inner.upload(host)?
            }
            Some((OpFault::Value(damage), place, _)) => {
                let mut host = $self.host(&y)?;
                damage(&place, &mut host)?;
                $self.inner.upload(host)?
            }
            _ => y,
        };
        $self.keep(&y)?;
        Ok(y)
    }};
}

impl<B: Backend> Backend for Faulty<B> {
    type Tensor = B::Tensor;
    type Weight = Weight<B::Weight>;
    type Vector = Vector<B::Vector>;
    type Kv = Kv<B::Kv>;

    fn info(&self) -> BackendInfo {
        self.inner.info()
    }

    fn weight(&self, parts: &[Stored]) -> Result<Self::Weight> {
        Ok(Weight { inner: self.inner.weight(parts)?, parts: parts.to_vec() })
    }

    fn vector(&self, parts: &[Stored]) -> Result<Self::Vector> {
        let inner = self.inner.vector(parts)?;
        let mut values = Vec::new();
        for part in parts {
            values.extend(part.to_f32()?);
        }
        Ok(Vector { inner, values })
    }

    fn kv(&self, shape: KvShape, capacity: usize) -> Result<Self::Kv> {
        // A new sequence begins.
        *self.state.borrow_mut() = State::default();
        let host = HostTensor { shape: vec![0, shape.heads, shape.head_dim], values: Vec::new() };
        Ok(Kv { inner: self.inner.kv(shape, capacity)?, k: host.clone(), v: host })
    }

    fn embed(&self, table: &Self::Weight, tokens: &[u32]) -> Result<B::Tensor> {
        {
            let mut state = self.state.borrow_mut();
            let steps = state.steps + 1;
            *state = State { steps, ..State::default() };
        }
        let target = self.next();
        let y = self.inner.embed(&table.inner, tokens)?;
        damaged!(self, y, target, Embed, |_place, _part| op::Embed {
            tokens,
            table: &table.parts[0],
        })
    }

    fn linear(&self, x: &B::Tensor, w: &Self::Weight) -> Result<B::Tensor> {
        let target = self.next();
        let y = self.inner.linear(x, &w.inner)?;
        damaged!(self, y, target, Linear, |place, part| op::Linear {
            place: &place,
            kernels: self,
            x: self.host(x)?,
            parts: &w.parts,
            part,
        })
    }

    fn add_bias(&self, x: B::Tensor, bias: &Self::Vector) -> Result<B::Tensor> {
        let target = self.next();
        let before = target.as_ref().map(|_| self.host(&x)).transpose()?;
        let y = self.inner.add_bias(x, &bias.inner)?;
        damaged!(self, y, target, Bias, |_place, _part| op::Bias {
            x: before.expect("kept for the fault"),
            bias: &bias.values
        })
    }

    fn rms_norm(&self, x: &B::Tensor, w: &Self::Vector, eps: f64) -> Result<B::Tensor> {
        let target = self.next();
        self.keep_input(x)?;
        let y = self.inner.rms_norm(x, &w.inner, eps)?;
        damaged!(self, y, target, Norm, |place, _part| op::Norm {
            place: &place,
            kernels: self,
            x: self.host(x)?,
            w: &w.values,
            eps,
        })
    }

    fn heads(
        &self,
        x: &B::Tensor,
        start: usize,
        heads: usize,
        head_dim: usize,
    ) -> Result<B::Tensor> {
        self.inner.heads(x, start, heads, head_dim)
    }

    fn rope(&self, x: &B::Tensor, table: &RopeTable) -> Result<B::Tensor> {
        let target = self.next();
        let y = self.inner.rope(x, table)?;
        damaged!(self, y, target, Rope, |place, _part| op::Rope {
            place: &place,
            kernels: self,
            x: self.host(x)?,
            first: first_position(&place.config, table),
        })
    }

    fn kv_append(&self, kv: &mut Self::Kv, k: &B::Tensor, v: &B::Tensor) -> Result<()> {
        self.next();
        for (host, new) in [(&mut kv.k, k), (&mut kv.v, v)] {
            let new = self.host(new)?;
            host.shape[0] += new.shape[0];
            host.values.extend(new.values);
        }
        self.inner.kv_append(&mut kv.inner, k, v)
    }

    fn attention(
        &self,
        q: &B::Tensor,
        kv: &Self::Kv,
        scale: f64,
        inner: AttentionInner<B::Tensor>,
    ) -> Result<Attended<B::Tensor>> {
        let (fault, place) = match self.next() {
            Some((fault @ (OpFault::Attention(_) | OpFault::Value(_)), place, _)) => (fault, place),
            _ => {
                let attended = self.inner.attention(q, &kv.inner, scale, inner)?;
                self.keep(&attended.out)?;
                return Ok(attended);
            }
        };
        let attention = op::Attention {
            place: &place,
            kernels: self,
            q: self.host(q)?,
            k: kv.k.clone(),
            v: kv.v.clone(),
            scale,
        };
        let mut wrong = attention.over(&kv.k, &kv.v)?;
        match fault {
            OpFault::Attention(damage) => wrong = damage(&attention)?,
            OpFault::Value(damage) => damage(&place, &mut wrong.out)?,
            _ => {}
        }
        let replaced = inner.scores.replace.is_some() || inner.softmax.replace.is_some();
        let scores = inner.scores.spill.then(|| self.inner.upload(wrong.scores)).transpose()?;
        let softmax = inner.softmax.spill.then(|| self.inner.upload(wrong.softmax)).transpose()?;
        // Who replaces what is inside of the op asks for the op without the fault.
        let out = match replaced {
            true => self.inner.attention(q, &kv.inner, scale, inner)?.out,
            false => self.inner.upload(wrong.out)?,
        };
        Ok(Attended { scores, softmax, out })
    }

    fn swiglu(
        &self,
        gate: B::Tensor,
        up: &B::Tensor,
        silu: Inner<B::Tensor>,
    ) -> Result<Gated<B::Tensor>> {
        let (fault, place) = match self.next() {
            Some((fault @ (OpFault::Swiglu(_) | OpFault::Value(_)), place, _)) => (fault, place),
            _ => return self.inner.swiglu(gate, up, silu),
        };
        let swiglu = op::Swiglu { kernels: self, gate: self.host(&gate)?, up: self.host(up)? };
        let wrong = match fault {
            OpFault::Swiglu(damage) => damage(&swiglu)?,
            OpFault::Value(damage) => {
                let mut gated = Kernels::swiglu(self, &swiglu.gate, &swiglu.up, None)?;
                damage(&place, &mut gated.out)?;
                gated
            }
            _ => unreachable!("only these two get here"),
        };
        let spilled = silu.spill.then(|| self.inner.upload(wrong.silu)).transpose()?;
        let out = match silu.replace {
            Some(_) => self.inner.swiglu(gate, up, silu)?.out,
            None => self.inner.upload(wrong.out)?,
        };
        Ok(Gated { silu: spilled, out })
    }

    fn top_k(&self, x: &B::Tensor, k: usize) -> Result<B::Tensor> {
        let target = self.next();
        let y = self.inner.top_k(x, k)?;
        damaged!(self, y, target, TopK, |place, _part| op::TopK {
            place: &place,
            kernels: self,
            logits: self.host(x)?,
            k,
        })
    }

    fn route_weights(
        &self,
        logits: &B::Tensor,
        ids: &B::Tensor,
        normalize: bool,
    ) -> Result<B::Tensor> {
        let target = self.next();
        let y = self.inner.route_weights(logits, ids, normalize)?;
        damaged!(self, y, target, RouteWeights, |place, _part| op::RouteWeights {
            place: &place,
            kernels: self,
            logits: self.host(logits)?,
            ids: self.host(ids)?,
            normalize,
        })
    }

    fn expert_linear(
        &self,
        x: &B::Tensor,
        w: &Self::Weight,
        experts: usize,
        ids: &B::Tensor,
    ) -> Result<B::Tensor> {
        let target = self.next();
        let y = self.inner.expert_linear(x, &w.inner, experts, ids)?;
        let [w] = &w.parts[..] else { panic!("files of the bench hold all experts in one tensor") };
        let (x, ids) = (|| self.host(x), || self.host(ids));
        if let Some((OpFault::Linear(damage), place, _)) = &target {
            let op = op::Experts { place, kernels: self, x: x()?, w, experts, ids: ids()? };
            let mut host = self.host(&y)?;
            op.strike(&mut host, *damage)?;
            return self.inner.upload(host);
        }
        damaged!(self, y, target, Experts, |place, _part| op::Experts {
            place: &place,
            kernels: self,
            x: x()?,
            w,
            experts,
            ids: ids()?,
        })
    }

    fn weighted_sum(&self, x: &B::Tensor, weights: &B::Tensor) -> Result<B::Tensor> {
        let target = self.next();
        let y = self.inner.weighted_sum(x, weights)?;
        damaged!(self, y, target, ExpertSum, |place, _part| op::ExpertSum {
            place: &place,
            kernels: self,
            x: self.host(x)?,
            weights: self.host(weights)?,
        })
    }

    fn add(&self, x: B::Tensor, y: &B::Tensor) -> Result<B::Tensor> {
        let target = self.next();
        let stream = target.as_ref().map(|_| self.host(&x)).transpose()?;
        let sum = self.inner.add(x, y)?;
        let (before, layer_input) = {
            let state = self.state.borrow();
            (state.layer.clone(), state.layer_input.clone())
        };
        damaged!(self, sum, target, Residual, |place, _part| op::Residual {
            kernels: self,
            place: &place,
            stream: stream.expect("kept for the fault"),
            added: self.host(y)?,
            before: &before,
            layer_input: layer_input.as_ref().expect("a layer begins with its first norm"),
        })
    }

    fn rows(&self, x: &B::Tensor, range: Range<usize>) -> Result<B::Tensor> {
        self.inner.rows(x, range)
    }

    fn show(&self, site: Site, x: &B::Tensor, sink: &mut Sink<'_>) -> Result<()> {
        self.inner.show(site, x, sink)
    }

    fn shape(&self, x: &B::Tensor) -> Vec<usize> {
        self.inner.shape(x)
    }

    fn drain(&self, sink: &mut Sink<'_>) -> Result<()> {
        self.inner.drain(sink)
    }

    fn upload(&self, value: HostTensor) -> Result<B::Tensor> {
        self.inner.upload(value)
    }

    fn kernel(&self, op: Op<'_, Self::Weight>) -> Kernel {
        self.inner.kernel(op.with_weight(|w| &w.inner))
    }
}

/// The position that `table` begins with: tables are made of nothing else.
fn first_position(config: &Config, table: &RopeTable) -> usize {
    let frequencies = config.rope_frequencies();
    let begins = |&p: &usize| frequencies.table(p..p + 1).row(0) == table.row(0);
    let found = (0..config.max_position_embeddings).find(begins);
    found.expect("the table is one of this model's")
}
