//! The backend of a replay: each value exactly, as the declared arithmetic makes it, and how far an engine may be from it.
//!
//! Every op runs on the reference backend twice: in f64 without any rounding, and in f64 with the rounding that the
//! engine declares (activations to 8 bits, a cache in f16, ...). Beside both goes the *slack*: what the engine's own
//! accumulation in f32 may add, as a standard deviation per element ([`slack`]). Values that were overwritten with an
//! engine's own are known exactly and have no slack.
//!
//! Observers are shown one array of numbers, but these values have three; the others go by the [`Mailbox`] that backend
//! and observer share.

pub(crate) mod slack;

use std::{cell::RefCell, ops::Range, rc::Rc, sync::Arc};

use apr_model::*;
use apr_reference::{
    Activations, Arithmetic, Operand, Reference, Tensor as Plain, by_expert, expert, gather,
    products, scatter,
};
use apr_tensor::{DType, Stored, activation::ActivationType};

use slack::{UNKNOWN, is_unknown};
pub(crate) use slack::{Units, WeightRow};

type Values = Arc<Plain<f64>>;

/// One value of a replay.
#[derive(Clone, Debug)]
pub(crate) struct Triple {
    /// Computed in f64 without rounding.
    pub(crate) exact: Values,
    /// Computed in f64 with the declared rounding.
    pub(crate) emulated: Values,
    /// The standard deviation that an engine's accumulation may have, element by element; `None` for a value that the
    /// engine itself gave.
    pub(crate) slack: Option<Arc<[f32]>>,
}

impl Triple {
    pub(crate) fn new(exact: Plain<f64>, emulated: Plain<f64>, slack: Vec<f32>) -> Self {
        Self::with_slack((Arc::new(exact), Arc::new(emulated)), slack)
    }

    /// A value that is known.
    pub(crate) fn known(value: Plain<f64>) -> Self {
        let value = Arc::new(value);
        Self { exact: value.clone(), emulated: value, slack: None }
    }

    /// A value that is known as captured.
    pub(crate) fn captured(value: Plain<f64>, units: &Units) -> Self {
        let slack = units.known(&value).map(Arc::from);
        Self { slack, ..Self::known(value) }
    }

    /// A value of a known slack that is only computed in one way.
    pub(crate) fn alternative(value: Plain<f64>, slack: Vec<f32>) -> Self {
        let value = Arc::new(value);
        Self::with_slack((value.clone(), value), slack)
    }

    /// The same with a further independent error of each element.
    pub(crate) fn roughened(mut self, error: impl Fn(usize) -> f64) -> Self {
        let slack = self.slack.iter().flat_map(|slack| slack.iter());
        let rougher = slack.enumerate().map(|(i, &x)| f64::from(x).hypot(error(i)) as f32);
        self.slack = Some(rougher.collect());
        self
    }

    fn is_one(&self) -> bool {
        Arc::ptr_eq(&self.exact, &self.emulated)
    }

    /// The same op on exact and emulated values; once where they are one.
    fn map(&self, f: impl Fn(&Plain<f64>) -> Result<Plain<f64>>) -> Result<(Values, Values)> {
        let exact = Arc::new(f(&self.exact)?);
        let emulated = if self.is_one() { exact.clone() } else { Arc::new(f(&self.emulated)?) };
        Ok((exact, emulated))
    }

    fn zip(
        &self,
        other: &Self,
        f: impl Fn(&Plain<f64>, &Plain<f64>) -> Result<Plain<f64>>,
    ) -> Result<(Values, Values)> {
        let exact = Arc::new(f(&self.exact, &other.exact)?);
        let emulated = match self.is_one() && other.is_one() {
            true => exact.clone(),
            false => Arc::new(f(&self.emulated, &other.emulated)?),
        };
        Ok((exact, emulated))
    }

    /// The rows that `of` names, number `i` being slot `i % k` of token row `i / k`.
    pub(crate) fn gathered(&self, k: usize, of: &[usize]) -> Self {
        let shape = &self.exact.shape;
        let rows = |x: &Values| {
            let data = gather(&x.data, shape, k, of);
            Arc::new(Plain { shape: vec![of.len(), x.cols()], data })
        };
        let exact = rows(&self.exact);
        let emulated = if self.is_one() { exact.clone() } else { rows(&self.emulated) };
        let slack = self.slack.as_ref().map(|slack| gather(slack, shape, k, of).into());
        Self { exact, emulated, slack }
    }

    fn with_slack((exact, emulated): (Values, Values), slack: Vec<f32>) -> Self {
        Self { exact, emulated, slack: Some(slack.into()) }
    }

    fn moved(&self, f: impl Fn(&Plain<f64>) -> Result<Plain<f64>>) -> Result<Self> {
        let (exact, emulated) = self.map(&f)?;
        let slack = match &self.slack {
            None => None,
            Some(slack) => {
                let data = slack.iter().map(|&x| x.into()).collect();
                let moved = f(&Plain { shape: self.exact.shape.clone(), data })?;
                Some(moved.data.iter().map(|&x| x as f32).collect())
            }
        };
        Ok(Self { exact, emulated, slack })
    }
}

/// What backend and observer of a replay tell each other beside the values that observers are shown.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    /// The value that is being shown.
    pub(crate) shown: RefCell<Option<Triple>>,
    /// The value that is going to be uploaded, where it is more than the engine's own.
    pub(crate) incoming: RefCell<Option<Triple>>,
    /// The logits by which experts were chosen last.
    pub(crate) logits: RefCell<Option<Triple>>,
}

/// A matrix as stored, and what is known of its rows.
#[derive(Debug)]
pub(crate) struct Weight {
    pub(crate) parts: Vec<Stored>,
}

impl Weight {
    /// Elements of the matrix.
    pub(crate) fn elements(&self) -> usize {
        self.parts.iter().map(|part| part.shape().elements()).sum()
    }
}

/// One layer's cache, three times.
#[derive(Clone, Debug)]
pub(crate) struct Kv {
    exact: apr_reference::Kv<f64>,
    emulated: apr_reference::Kv<f64>,
    heads: usize,
    len: usize,
    /// Slack of keys and values, while any of them has some.
    slack: Option<[Vec<f32>; 2]>,
    /// Whether exact and emulated have been the same so far.
    one: bool,
}

impl LayerKv for Kv {
    fn truncate(&mut self, len: usize) {
        let width = self.exact.keys().len().checked_div(self.len).unwrap_or(0);
        self.exact.truncate(len);
        self.emulated.truncate(len);
        self.slack.iter_mut().flatten().for_each(|slack| slack.truncate(len * width));
        self.len = self.len.min(len);
    }

    fn bytes(&self) -> usize {
        self.exact.bytes() + self.emulated.bytes()
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Twin {
    exact: Reference<f64>,
    emulated: Reference<f64>,
    pub(crate) arithmetic: Arithmetic,
    pub(crate) units: Units,
    mailbox: Rc<Mailbox>,
    /// What the last product itself adds to slack: an engine that adds the bias in the same kernel has it in the sum.
    product: RefCell<Option<Arc<[f32]>>>,
}

impl Twin {
    pub(crate) fn new(arithmetic: Arithmetic, units: Units, mailbox: Rc<Mailbox>) -> Self {
        Self {
            exact: Reference::new(Arithmetic::EXACT),
            emulated: Reference::new(arithmetic.clone()),
            arithmetic,
            units,
            mailbox,
            product: RefCell::default(),
        }
    }

    fn rounds(&self, weight: &Weight) -> bool {
        let kind = |part: &Stored| self.arithmetic.activations.of(part.dtype());
        weight.parts.iter().any(|part| kind(part) != ActivationType::F32)
    }

    fn rounds_in_attention(&self) -> bool {
        let Arithmetic { kv, queries, probabilities, .. } = &self.arithmetic;
        !matches!(kv, DType::F64 | DType::F32)
            || *queries != ActivationType::F32
            || *probabilities != ActivationType::F32
    }
}

impl Backend for Twin {
    type Tensor = Triple;
    type Weight = Weight;
    type Vector = Vec<f64>;
    type Kv = Kv;

    fn info(&self) -> BackendInfo {
        self.emulated.info()
    }

    fn weight(&self, parts: &[Stored]) -> Result<Weight> {
        Ok(Weight { parts: self.exact.weight(parts)? })
    }

    fn vector(&self, parts: &[Stored]) -> Result<Vec<f64>> {
        self.exact.vector(parts)
    }

    fn kv(&self, shape: KvShape, capacity: usize) -> Result<Kv> {
        let exact = self.exact.kv(shape, capacity)?;
        let emulated = self.emulated.kv(shape, capacity)?;
        Ok(Kv {
            exact,
            emulated,
            heads: shape.heads,
            len: 0,
            slack: None,
            one: !self.rounds_in_attention(),
        })
    }

    fn embed(&self, table: &Weight, tokens: &[u32]) -> Result<Triple> {
        let rows = Arc::new(self.exact.embed(&table.parts, tokens)?);
        let slack = slack::embed(&self.units, &table.parts, tokens, &rows)?;
        Ok(Triple::with_slack((rows.clone(), rows), slack))
    }

    fn linear(&self, x: &Triple, w: &Weight) -> Result<Triple> {
        let exact = Operand { x: &x.exact, activations: &Activations::Plain };
        let emulated = Operand { x: &x.emulated, activations: &self.arithmetic.activations };
        let one = x.is_one() && !self.rounds(w);
        let operands: &[_] = if one { &[emulated] } else { &[exact, emulated] };
        let units = &self.units;
        let weight_row = |part: &_, row, w: &_| WeightRow::new(units, part, row, w);
        let (mut y, rows) = products(operands, &w.parts, weight_row)?;
        let emulated = Arc::new(y.pop().expect("one for each operand"));
        let exact = y.pop().map_or_else(|| emulated.clone(), Arc::new);
        let mut slack = slack::linear(&self.units, &x.emulated, &rows, &emulated);
        // A bias in the same kernel meets the very product that the engine had, whatever its weights were.
        let product = match units.weights > 0.0 {
            true => slack::linear(&Units { weights: 0.0, ..*units }, &x.emulated, &rows, &emulated),
            false => slack.clone(),
        };
        self.product.replace(Some(product.into()));
        if let Some(before) = &x.slack {
            let kind = |dtype| self.arithmetic.activations.of(dtype);
            slack::through_linear(&mut slack, &x.emulated, before, &w.parts, kind)?;
        }
        Ok(Triple::with_slack((exact, emulated), slack))
    }

    fn add_bias(&self, x: Triple, bias: &Vec<f64>) -> Result<Triple> {
        let y = x.map(|x| self.exact.add_bias(x.clone(), bias))?;
        let product = self.product.borrow();
        let slack = slack::sum(&self.units, &y.1, [x.slack.as_deref(), product.as_deref()]);
        Ok(Triple::with_slack(y, slack))
    }

    fn rms_norm(&self, x: &Triple, w: &Vec<f64>, eps: f64) -> Result<Triple> {
        let y = x.map(|x| self.exact.rms_norm(x, w, eps))?;
        let slack = slack::rms_norm(&self.units, &x.emulated, x.slack.as_deref(), w, eps, &y.1);
        Ok(Triple::with_slack(y, slack))
    }

    fn heads(&self, x: &Triple, start: usize, heads: usize, head_dim: usize) -> Result<Triple> {
        x.moved(|x| self.exact.heads(x, start, heads, head_dim))
    }

    fn rope(&self, x: &Triple, table: &RopeTable) -> Result<Triple> {
        let y = x.map(|x| self.exact.rope(x, table))?;
        let slack = slack::rope(&self.units, &x.emulated, x.slack.as_deref(), table);
        Ok(Triple::with_slack(y, slack))
    }

    fn kv_append(&self, kv: &mut Kv, k: &Triple, v: &Triple) -> Result<()> {
        kv.one &= k.is_one() && v.is_one();
        kv.len += k.exact.shape[0];
        let before = [kv.emulated.keys().len(), kv.emulated.values().len()];
        self.exact.kv_append(&mut kv.exact, &k.exact, &v.exact)?;
        self.emulated.kv_append(&mut kv.emulated, &k.emulated, &v.emulated)?;
        if kv.slack.is_none() && k.slack.is_none() && v.slack.is_none() {
            return Ok(());
        }
        let kept = kv.slack.get_or_insert_with(|| before.map(|len| vec![0.0; len]));
        for (kept, new) in kept.iter_mut().zip([k, v]) {
            kept.extend(slack::rounded(self.arithmetic.kv, &new.emulated, new.slack.as_deref()));
        }
        Ok(())
    }

    fn attention(
        &self,
        q: &Triple,
        kv: &Kv,
        scale: f64,
        inner: AttentionInner<Triple>,
    ) -> Result<Attended<Triple>> {
        let (scores, softmax) = (inner.scores.replace, inner.softmax.replace);
        let run = |backend: &Reference<f64>, kv, of: fn(&Triple) -> &Values| {
            let inner = |replace: &Option<Triple>| Inner {
                spill: true,
                replace: replace.as_ref().map(|value| Plain::clone(of(value))),
            };
            let inner = AttentionInner { scores: inner(&scores), softmax: inner(&softmax) };
            let attended = backend.attention(of(q), kv, scale, inner)?;
            let spilled = |value: Option<Plain<f64>>| Arc::new(value.expect("asked for"));
            Ok::<_, Error>((
                spilled(attended.scores),
                spilled(attended.softmax),
                Arc::new(attended.out),
            ))
        };
        let exact = run(&self.exact, &kv.exact, |value| &value.exact)?;
        let replaced = [&scores, &softmax].into_iter().flatten().all(Triple::is_one);
        let emulated = match kv.one && q.is_one() && replaced && !self.rounds_in_attention() {
            true => exact.clone(),
            false => run(&self.emulated, &kv.emulated, |value| &value.emulated)?,
        };
        let slack = slack::Attention {
            units: &self.units,
            arithmetic: &self.arithmetic,
            q: &q.emulated,
            q_slack: q.slack.as_deref(),
            keys: kv.emulated.keys(),
            values: kv.emulated.values(),
            kv_slack: kv.slack.as_ref().map(|[k, v]| [&k[..], &v[..]]),
            kv_heads: kv.heads,
            scale,
        };
        let scores_slack = slack.scores(&emulated.0);
        // What flows on is the replacement where there is one.
        let (scores_value, flowing) = match &scores {
            Some(replaced) => (&*replaced.emulated, replaced.slack.as_deref()),
            None => (&*emulated.0, Some(&scores_slack[..])),
        };
        let softmax_slack = slack.softmax(scores_value, flowing, &emulated.1);
        let (softmax_value, flowing) = match &softmax {
            Some(replaced) => (&*replaced.emulated, replaced.slack.as_deref()),
            None => (&*emulated.1, Some(&softmax_slack[..])),
        };
        let out_slack = slack.out(softmax_value, flowing, &emulated.2);
        Ok(Attended {
            scores: Some(Triple::with_slack((exact.0, emulated.0), scores_slack)),
            softmax: Some(Triple::with_slack((exact.1, emulated.1), softmax_slack)),
            out: Triple::with_slack((exact.2, emulated.2), out_slack),
        })
    }

    fn swiglu(&self, gate: Triple, up: &Triple, inner: Inner<Triple>) -> Result<Gated<Triple>> {
        let replace = inner.replace;
        let run = |gate: &Values, up: &Values, replace: Option<&Values>| {
            let inner = Inner { spill: true, replace: replace.map(|value| Plain::clone(value)) };
            let gated = self.exact.swiglu(Plain::clone(gate), up, inner)?;
            Ok::<_, Error>((Arc::new(gated.silu.expect("asked for")), Arc::new(gated.out)))
        };
        let exact = run(&gate.exact, &up.exact, replace.as_ref().map(|value| &value.exact))?;
        let one = gate.is_one() && up.is_one() && replace.as_ref().is_none_or(Triple::is_one);
        let emulated = match one {
            true => exact.clone(),
            false => {
                let replace = replace.as_ref().map(|value| &value.emulated);
                run(&gate.emulated, &up.emulated, replace)?
            }
        };
        let silu_slack =
            slack::silu(&self.units, &gate.emulated, gate.slack.as_deref(), &emulated.0);
        let (silu, flowing) = match &replace {
            Some(replaced) => (&*replaced.emulated, replaced.slack.as_deref()),
            None => (&*emulated.0, Some(&silu_slack[..])),
        };
        let slack = slack::product(
            &self.units,
            [silu, &up.emulated],
            [flowing, up.slack.as_deref()],
            &emulated.1,
        );
        Ok(Gated {
            silu: Some(Triple::with_slack((exact.0, emulated.0), silu_slack)),
            out: Triple::with_slack((exact.1, emulated.1), slack),
        })
    }

    /// Exact and emulated go on with one choice. The slack says where it may be another one.
    fn top_k(&self, x: &Triple, k: usize) -> Result<Triple> {
        let ids = self.emulated.top_k(&x.emulated, k)?;
        let slack = slack::choice(&x.emulated, x.slack.as_deref(), &ids);
        self.mailbox.logits.replace(Some(x.clone()));
        Ok(Triple::alternative(ids, slack))
    }

    fn route_weights(&self, logits: &Triple, ids: &Triple, normalize: bool) -> Result<Triple> {
        let y = logits.zip(ids, |x, ids| self.exact.route_weights(x, ids, normalize))?;
        let slack = slack::route_weights(
            &self.units,
            &logits.emulated,
            logits.slack.as_deref(),
            (&ids.emulated, ids.slack.as_deref()),
            normalize,
            &y.1,
        );
        Ok(Triple::with_slack(y, slack))
    }

    fn expert_linear(
        &self,
        x: &Triple,
        w: &Weight,
        experts: usize,
        ids: &Triple,
    ) -> Result<Triple> {
        let [n, k] = ids.emulated.shape[..] else { panic!("ids are of rows and slots") };
        let width = w.parts.iter().map(|part| part.shape().rows()).sum::<usize>() / experts;
        let (mut exact, mut emulated) = (Plain::zeros([n, k, width]), Plain::zeros([n, k, width]));
        let mut slack = vec![0.0; n * k * width];
        for (id, rows) in by_expert(&ids.emulated) {
            let w = Weight { parts: expert(&w.parts, experts, id) };
            let y = self.linear(&x.gathered(k, &rows), &w)?;
            scatter(&y.exact.data, width, &rows, &mut exact.data);
            scatter(&y.emulated.data, width, &rows, &mut emulated.data);
            scatter(y.slack.as_deref().expect("products have slack"), width, &rows, &mut slack);
        }
        let chosen = ids.slack.iter().flat_map(|slack| slack.iter());
        for (slack, of) in slack.chunks_exact_mut(width).zip(chosen) {
            if is_unknown(*of) {
                slack.fill(UNKNOWN);
            }
        }
        Ok(Triple::new(exact, emulated, slack))
    }

    fn weighted_sum(&self, x: &Triple, weights: &Triple) -> Result<Triple> {
        let y = x.zip(weights, |x, weights| self.exact.weighted_sum(x, weights))?;
        let slack = slack::weighted_sum(
            &self.units,
            [&x.emulated, &weights.emulated],
            [x.slack.as_deref(), weights.slack.as_deref()],
            &y.1,
        );
        Ok(Triple::with_slack(y, slack))
    }

    fn add(&self, x: Triple, y: &Triple) -> Result<Triple> {
        let z = x.zip(y, |x, y| self.exact.add(x.clone(), y))?;
        let slack = slack::sum(&self.units, &z.1, [x.slack.as_deref(), y.slack.as_deref()]);
        Ok(Triple::with_slack(z, slack))
    }

    fn rows(&self, x: &Triple, range: Range<usize>) -> Result<Triple> {
        x.moved(|x| self.exact.rows(x, range.clone()))
    }

    fn show(&self, site: Site, x: &Triple, sink: &mut Sink<'_>) -> Result<()> {
        self.mailbox.shown.replace(Some(x.clone()));
        let shown = sink(
            site,
            View { shape: &x.emulated.shape, values: apr_model::Values::F64(&x.emulated.data) },
        );
        self.mailbox.shown.take();
        shown
    }

    fn shape(&self, x: &Triple) -> Vec<usize> {
        x.exact.shape.clone()
    }

    fn upload(&self, value: HostTensor) -> Result<Triple> {
        Ok(self
            .mailbox
            .incoming
            .take()
            .unwrap_or_else(|| Triple::captured(value.into(), &self.units)))
    }

    fn kernel(&self, op: Op<'_, Weight>) -> Kernel {
        self.emulated.kernel(op.with_weight(|w| &w.parts))
    }
}
