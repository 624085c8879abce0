//! The ops, one loop each.

use std::ops::Range;

use apr_model::*;
use apr_tensor::{DType, Stored, activation::ActivationType};
use rayon::prelude::*;

use crate::{
    Arithmetic, Operand, Real, Tensor, by_expert, expert, gather,
    linear::{Rounded, dot},
    products, scatter,
};

/// The reference backend in `F`, computing as `Arithmetic` declares.
#[derive(Clone, Debug)]
pub struct Reference<F> {
    arithmetic: Arithmetic,
    number: std::marker::PhantomData<F>,
}

impl<F: Real> Reference<F> {
    /// A reference that rounds what `arithmetic` declares to be rounded, and nothing else.
    pub fn new(arithmetic: Arithmetic) -> Self {
        Self { arithmetic, number: std::marker::PhantomData }
    }
}

/// One layer's cache: `[positions, heads * head_dim]` keys and values, already rounded.
#[derive(Clone, Debug)]
pub struct Kv<F> {
    shape: KvShape,
    k: Vec<F>,
    v: Vec<F>,
}

impl<F: Real> Kv<F> {
    fn width(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }

    fn len(&self) -> usize {
        self.k.len() / self.width()
    }

    /// The keys, `[positions, heads * head_dim]`, rounded as the cache keeps them.
    pub fn keys(&self) -> &[F] {
        &self.k
    }

    /// The values, likewise.
    pub fn values(&self) -> &[F] {
        &self.v
    }
}

impl<F: Real> LayerKv for Kv<F> {
    fn truncate(&mut self, len: usize) {
        let elements = len * self.width();
        self.k.truncate(elements);
        self.v.truncate(elements);
    }

    fn bytes(&self) -> usize {
        (self.k.capacity() + self.v.capacity()) * size_of::<F>()
    }
}

impl<F: Real> Backend for Reference<F> {
    type Tensor = Tensor<F>;
    type Weight = Vec<Stored>;
    type Vector = Vec<F>;
    type Kv = Kv<F>;

    fn info(&self) -> BackendInfo {
        BackendInfo { name: "reference", isa: "scalar", threads: 1, kv: self.arithmetic.kv }
    }

    fn weight(&self, parts: &[Stored]) -> Result<Vec<Stored>> {
        match parts.iter().all(|part| part.dtype().can_dequantize()) {
            true => Ok(parts.to_vec()),
            false => Err(Error::weight_type("reference", parts, DType::can_dequantize)),
        }
    }

    fn vector(&self, parts: &[Stored]) -> Result<Vec<F>> {
        self.weight(parts)?;
        let mut vector = Vec::new();
        for part in parts {
            vector.extend(part.to_f32()?.into_iter().map(|x| F::of(x.into())));
        }
        Ok(vector)
    }

    fn kv(&self, shape: KvShape, _: usize) -> Result<Kv<F>> {
        Ok(Kv { shape, k: Vec::new(), v: Vec::new() })
    }

    fn embed(&self, table: &Vec<Stored>, tokens: &[u32]) -> Result<Tensor<F>> {
        let [table] = &table[..] else { panic!("an embedding table has one part") };
        let mut row = vec![0.0f32; table.shape().cols()];
        let mut data = Vec::with_capacity(tokens.len() * row.len());
        for &token in tokens {
            table.dequantize_row(token as usize, &mut row)?;
            data.extend(row.iter().map(|&x| F::of(x.into())));
        }
        Ok(Tensor { shape: vec![tokens.len(), row.len()], data })
    }

    fn linear(&self, x: &Tensor<F>, w: &Vec<Stored>) -> Result<Tensor<F>> {
        let operand = Operand { x, activations: &self.arithmetic.activations };
        let (mut y, _) = products(&[operand], w, |_, _, _| Ok(()))?;
        Ok(y.pop().expect("one for each operand"))
    }

    fn add_bias(&self, mut x: Tensor<F>, bias: &Vec<F>) -> Result<Tensor<F>> {
        for row in x.data.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(x, &b)| *x = *x + b);
        }
        Ok(x)
    }

    fn rms_norm(&self, x: &Tensor<F>, w: &Vec<F>, eps: f64) -> Result<Tensor<F>> {
        let mut y = x.clone();
        for row in y.data.chunks_exact_mut(w.len()) {
            let mean_square = row.iter().map(|&x| x * x).sum::<F>() / F::of(w.len() as f64);
            let rms = (mean_square + F::of(eps)).sqrt();
            row.iter_mut().zip(w).for_each(|(x, &w)| *x = *x / rms * w);
        }
        Ok(y)
    }

    fn heads(
        &self,
        x: &Tensor<F>,
        start: usize,
        heads: usize,
        head_dim: usize,
    ) -> Result<Tensor<F>> {
        let columns = start..start + heads * head_dim;
        let data = x.rows().flat_map(|row| row[columns.clone()].to_vec()).collect();
        Ok(Tensor { shape: vec![x.shape[0], heads, head_dim], data })
    }

    fn rope(&self, x: &Tensor<F>, table: &RopeTable) -> Result<Tensor<F>> {
        let mut y = x.clone();
        let [_, heads, head_dim] = x.shape[..] else { panic!("rotation is per head") };
        for (i, row) in y.data.chunks_exact_mut(heads * head_dim).enumerate() {
            let (cos, sin) = table.row(i);
            for head in row.chunks_exact_mut(head_dim) {
                for pair in 0..table.pairs() {
                    let (a, b) = (head[pair], head[pair + table.pairs()]);
                    let (cos, sin) = (F::of(cos[pair]), F::of(sin[pair]));
                    head[pair] = a * cos - b * sin;
                    head[pair + table.pairs()] = b * cos + a * sin;
                }
            }
        }
        Ok(y)
    }

    fn kv_append(&self, kv: &mut Kv<F>, k: &Tensor<F>, v: &Tensor<F>) -> Result<()> {
        let round = |&x: &F| F::of(self.arithmetic.round_kv(x.wide()));
        kv.k.extend(k.data.iter().map(round));
        kv.v.extend(v.data.iter().map(round));
        Ok(())
    }

    fn attention(
        &self,
        q: &Tensor<F>,
        kv: &Kv<F>,
        scale: f64,
        inner: AttentionInner<Tensor<F>>,
    ) -> Result<Attended<Tensor<F>>> {
        let [n, heads, head_dim] = q.shape[..] else { panic!("queries have heads") };
        let (keys, width, group) = (kv.len(), kv.width(), heads / kv.shape.heads);
        let visible = |i: usize| keys - n + i + 1;
        // Where the key or value of position `j` for query head `h` begins.
        let at = |j: usize, h: usize| j * width + h / group * head_dim;

        let queries = round(q, self.arithmetic.queries);
        let mut scores = Tensor::zeros([heads, n, keys]);
        scores.data.par_chunks_exact_mut(keys).enumerate().for_each(|(row, scores)| {
            let (h, i) = (row / n, row % n);
            let q = &queries[(i * heads + h) * head_dim..][..head_dim];
            for (j, score) in scores[..visible(i)].iter_mut().enumerate() {
                *score = dot(q, &kv.k[at(j, h)..][..head_dim]) * F::of(scale);
            }
        });
        let computed_scores = inner.scores.spill.then(|| scores.clone());
        let scores = inner.scores.replace.unwrap_or(scores);

        let mut softmax = Tensor::zeros([heads, n, keys]);
        softmax.data.par_chunks_exact_mut(keys).enumerate().for_each(|(row, softmax)| {
            let visible = visible(row % n);
            let scores = &scores.data[row * keys..][..visible];
            let max = scores.iter().copied().fold(scores[0], |m, s| if s > m { s } else { m });
            softmax.iter_mut().zip(scores).for_each(|(p, &s)| *p = (s - max).exp());
            let sum = softmax[..visible].iter().copied().sum::<F>();
            softmax[..visible].iter_mut().for_each(|p| *p = *p / sum);
        });
        let computed_softmax = inner.softmax.spill.then(|| softmax.clone());
        let softmax = inner.softmax.replace.unwrap_or(softmax);

        let probabilities = round(&softmax, self.arithmetic.probabilities);
        let mut out = Tensor::zeros([n, heads * head_dim]);
        out.data.par_chunks_exact_mut(head_dim).enumerate().for_each(|(row, out)| {
            let (i, h) = (row / heads, row % heads);
            let weights = &probabilities[(h * n + i) * keys..][..visible(i)];
            for (j, &p) in weights.iter().enumerate() {
                let v = &kv.v[at(j, h)..][..head_dim];
                out.iter_mut().zip(v).for_each(|(out, &v)| *out = *out + p * v);
            }
        });
        Ok(Attended { scores: computed_scores, softmax: computed_softmax, out })
    }

    fn swiglu(
        &self,
        gate: Tensor<F>,
        up: &Tensor<F>,
        inner: Inner<Tensor<F>>,
    ) -> Result<Gated<Tensor<F>>> {
        let one = F::of(1.0);
        let silu = |g: F| g / (one + (F::of(0.0) - g).exp());
        let computed = Tensor {
            shape: gate.shape.clone(),
            data: gate.data.iter().map(|&g| silu(g)).collect(),
        };
        let spilled = inner.spill.then(|| computed.clone());
        let out = inner.replace.unwrap_or(computed).zip(up, |silu, up| silu * up);
        Ok(Gated { silu: spilled, out })
    }

    fn top_k(&self, x: &Tensor<F>, k: usize) -> Result<Tensor<F>> {
        let order = |x: F| if x.wide().is_nan() { f64::NEG_INFINITY } else { x.wide() };
        let mut data = Vec::with_capacity(x.shape[0] * k);
        for row in x.rows() {
            let mut ids: Vec<usize> = (0..row.len()).collect();
            // Stable: of equal ones the first stays first.
            ids.sort_by(|&a, &b| order(row[b]).total_cmp(&order(row[a])));
            data.extend(ids[..k].iter().map(|&id| F::of(id as f64)));
        }
        Ok(Tensor { shape: vec![x.shape[0], k], data })
    }

    fn route_weights(
        &self,
        logits: &Tensor<F>,
        ids: &Tensor<F>,
        normalize: bool,
    ) -> Result<Tensor<F>> {
        let mut data = Vec::with_capacity(ids.data.len());
        for (logits, ids) in logits.rows().zip(ids.rows()) {
            let max = logits.iter().copied().fold(logits[0], |m, x| if x > m { x } else { m });
            let powers: Vec<F> = logits.iter().map(|&x| (x - max).exp()).collect();
            let chosen = ids.iter().map(|&id| powers[id.wide() as usize]);
            let sum: F = match normalize {
                true => chosen.clone().sum(),
                false => powers.iter().copied().sum(),
            };
            data.extend(chosen.map(|power| power / sum));
        }
        Ok(Tensor { shape: ids.shape.clone(), data })
    }

    fn expert_linear(
        &self,
        x: &Tensor<F>,
        w: &Vec<Stored>,
        experts: usize,
        ids: &Tensor<F>,
    ) -> Result<Tensor<F>> {
        let [n, k] = ids.shape[..] else { panic!("ids are of rows and slots") };
        let width = w.iter().map(|part| part.shape().rows()).sum::<usize>() / experts;
        let mut out = Tensor::zeros([n, k, width]);
        for (id, rows) in by_expert(ids) {
            let data = gather(&x.data, &x.shape, k, &rows);
            let x = Tensor { shape: vec![rows.len(), x.cols()], data };
            let y = self.linear(&x, &expert(w, experts, id))?;
            scatter(&y.data, width, &rows, &mut out.data);
        }
        Ok(out)
    }

    fn weighted_sum(&self, x: &Tensor<F>, weights: &Tensor<F>) -> Result<Tensor<F>> {
        let [n, k, width] = x.shape[..] else { panic!("rows have slots") };
        let mut out = Tensor::zeros([n, width]);
        for (i, out) in out.data.chunks_exact_mut(width).enumerate() {
            for slot in i * k..(i + 1) * k {
                let weight = weights.data[slot];
                let x = &x.data[slot * width..][..width];
                out.iter_mut().zip(x).for_each(|(out, &x)| *out = *out + weight * x);
            }
        }
        Ok(out)
    }

    fn add(&self, x: Tensor<F>, y: &Tensor<F>) -> Result<Tensor<F>> {
        Ok(x.zip(y, |x, y| x + y))
    }

    fn rows(&self, x: &Tensor<F>, range: Range<usize>) -> Result<Tensor<F>> {
        let cols = x.cols();
        let data = x.data[range.start * cols..range.end * cols].to_vec();
        Ok(Tensor { shape: vec![range.len(), cols], data })
    }

    fn show(&self, site: Site, x: &Tensor<F>, sink: &mut Sink<'_>) -> Result<()> {
        sink(site, View { shape: &x.shape, values: F::values(&x.data) })
    }

    fn shape(&self, x: &Tensor<F>) -> Vec<usize> {
        x.shape.clone()
    }

    fn upload(&self, value: HostTensor) -> Result<Tensor<F>> {
        Ok(value.into())
    }

    fn kernel(&self, op: Op<'_, Vec<Stored>>) -> Kernel {
        let plain = F::DTYPE.name().to_owned();
        let parts: &[Stored] = op.weight().map_or(&[], |parts| parts);
        let activations = match op {
            Op::Linear(w) | Op::ExpertLinear(w) => {
                w.iter().map(|part| self.activation_name(part.dtype())).collect()
            }
            Op::Attention if self.arithmetic.queries != ActivationType::F32 => {
                vec![self.arithmetic.queries.name().to_owned()]
            }
            _ => vec![plain.clone()],
        };
        let output = match op {
            Op::KvAppend => self.arithmetic.kv.name().to_owned(),
            _ => plain.clone(),
        };
        Kernel {
            kernel: format!("reference_{}", op.name()),
            weights: parts.iter().map(|part| part.dtype().name().to_owned()).collect(),
            activations,
            accumulation: plain,
            output,
        }
    }
}

impl<F: Real> Reference<F> {
    fn activation_name(&self, weight: DType) -> String {
        match self.arithmetic.activations.of(weight) {
            ActivationType::F32 => F::DTYPE.name().to_owned(),
            rounded => rounded.name().to_owned(),
        }
    }
}

/// The elements of `x`, each rounded to a float type.
fn round<F: Real>(x: &Tensor<F>, kind: ActivationType) -> Vec<F> {
    Rounded::new(&x.data, kind).row
}
