//! The ops of a decoder.
//!
//! Ops that only add, multiply or move are written here; those with a contract of their own are kernels.

use std::{collections::BTreeSet, ops::Range};

use apr_model::{
    Attended, AttentionInner, Backend, BackendInfo, Error, Gated, HostTensor, Inner, Kernel,
    KvShape, Op, Result, RopeTable, Sink, Site,
};
use apr_tensor::{DType, Stored};

use crate::{
    Cpu, Kv, Tensor, Weight,
    kernels::IntegerKernel,
    pool::Columns,
    routing,
    weight::{Part, Product},
};

impl Backend for Cpu {
    type Tensor = Tensor;
    type Weight = Weight;
    type Vector = Vec<f32>;
    type Kv = Kv;

    fn info(&self) -> BackendInfo {
        BackendInfo {
            name: "cpu",
            isa: self.isa.name(),
            threads: self.pool.threads(),
            kv: self.kv.dtype(),
        }
    }

    fn weight(&self, parts: &[Stored]) -> Result<Weight> {
        Weight::new(parts, self)
    }

    fn vector(&self, parts: &[Stored]) -> Result<Vec<f32>> {
        if !parts.iter().all(|part| part.dtype().can_dequantize()) {
            return Err(Error::weight_type("cpu", parts, DType::can_dequantize));
        }
        let mut vector = Vec::new();
        for part in parts {
            vector.extend(part.to_f32()?);
        }
        Ok(vector)
    }

    fn kv(&self, shape: KvShape, capacity: usize) -> Result<Kv> {
        Ok(Kv::new(shape, capacity, self.kv))
    }

    fn embed(&self, table: &Weight, tokens: &[u32]) -> Result<Tensor> {
        let mut out = vec![0.0; tokens.len() * table.cols];
        for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(table.cols)) {
            let row = token as usize;
            table.part_of(row).widen(row, self.kernels, out);
        }
        Ok(Tensor::new([tokens.len(), table.cols], out))
    }

    fn linear(&self, x: &Tensor, w: &Weight) -> Result<Tensor> {
        Ok(self.multiply(x, w))
    }

    fn add_bias(&self, x: &Tensor, bias: &Vec<f32>) -> Result<Tensor> {
        assert_eq!(x.width(), bias.len(), "a bias is as wide as the activations");
        let sums = |(x, b): (&f32, &f32)| x + b;
        let rows = x.values().chunks_exact(bias.len());
        Ok(Tensor::new(x.shape(), rows.flat_map(|x| x.iter().zip(bias).map(sums)).collect()))
    }

    fn rms_norm(&self, x: &Tensor, w: &Vec<f32>, eps: f64) -> Result<Tensor> {
        assert_eq!(x.shape().last(), Some(&w.len()), "a norm weight is as wide as the last axis");
        Ok(self.map(x, w.len(), |_, x, out| {
            for (x, out) in x.chunks_exact(w.len()).zip(out.chunks_exact_mut(w.len())) {
                (self.kernels.rms_norm)(x, w, eps, out);
            }
        }))
    }

    fn heads(&self, x: &Tensor, start: usize, heads: usize, head_dim: usize) -> Result<Tensor> {
        let rows = x.values().chunks_exact(x.width());
        let values = rows.flat_map(|row| &row[start..start + heads * head_dim]).copied().collect();
        Ok(Tensor::new([x.rows(), heads, head_dim], values))
    }

    fn rope(&self, x: &Tensor, table: &RopeTable) -> Result<Tensor> {
        let [n, heads, head_dim] = *x.shape() else { panic!("rope turns heads") };
        assert_eq!(table.rows(), n, "the table has one rotation per row");
        Ok(self.map(x, head_dim, |first, x, out| {
            let pairs = x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim));
            for (i, (x, out)) in pairs.enumerate() {
                let (cos, sin) = table.row((first + i) / heads);
                rotate(x, cos, sin, out);
            }
        }))
    }

    fn kv_append(&self, kv: &mut Kv, k: &Tensor, v: &Tensor) -> Result<()> {
        kv.append(k, v);
        Ok(())
    }

    fn attention(
        &self,
        q: &Tensor,
        kv: &Kv,
        scale: f64,
        inner: AttentionInner<Tensor>,
    ) -> Result<Attended<Tensor>> {
        Ok(self.attend(q, kv, scale, inner))
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor, silu: Inner<Tensor>) -> Result<Gated<Tensor>> {
        let computed = self.map(gate, 1, |_, gate, out| (self.kernels.silu)(gate, out));
        let out = self.zip(silu.replace.as_ref().unwrap_or(&computed), up, |silu, up| silu * up);
        Ok(Gated { silu: silu.spill.then_some(computed), out })
    }

    fn top_k(&self, x: &Tensor, k: usize) -> Result<Tensor> {
        Ok(routing::top_k(x, k))
    }

    fn route_weights(&self, logits: &Tensor, ids: &Tensor, normalize: bool) -> Result<Tensor> {
        Ok(routing::weights(logits, ids, normalize, self.kernels))
    }

    fn expert_linear(
        &self,
        x: &Tensor,
        w: &Weight,
        experts: usize,
        ids: &Tensor,
    ) -> Result<Tensor> {
        Ok(self.multiply_experts(x, w, experts, ids))
    }

    fn weighted_sum(&self, x: &Tensor, weights: &Tensor) -> Result<Tensor> {
        let [n, k, width] = *x.shape() else { panic!("rows have slots") };
        let mut out = vec![0.0; n * width];
        let columns = Columns { count: width, granule: 1, cost: n * k };
        self.pool.fill(&mut out, columns, |mut strip| {
            let columns = strip.columns();
            for slot in 0..n * k {
                let weight = weights.values()[slot];
                let x = &x.values()[slot * width..][columns.clone()];
                strip.row(slot / k).iter_mut().zip(x).for_each(|(out, x)| *out += weight * x);
            }
        });
        Ok(Tensor::new([n, width], out))
    }

    fn add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        Ok(self.zip(x, y, |x, y| x + y))
    }

    fn rows(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        let mut shape = x.shape().to_vec();
        shape[0] = range.len();
        let values = &x.values()[range.start * x.width()..range.end * x.width()];
        Ok(Tensor::new(shape, values.to_vec()))
    }

    fn show(&self, site: Site, x: &Tensor, sink: &mut Sink<'_>) -> Result<()> {
        sink(site, x.view())
    }

    fn shape(&self, x: &Tensor) -> Vec<usize> {
        x.shape().to_vec()
    }

    fn upload(&self, value: HostTensor) -> Result<Tensor> {
        Ok(Tensor::from_host(value))
    }

    fn kernel(&self, op: Op<'_, Weight>) -> Kernel {
        let (name, accumulation) = match op {
            Op::Embed(w) => (contracts("embed", w, |part| part.dtype.to_string()), "f32"),
            Op::Linear(w) | Op::ExpertLinear(w) => (
                contracts("dot", w, |part| format!("{}_{}", part.dtype, part.activations())),
                "f32",
            ),
            Op::AddBias => ("add_bias".into(), "f32"),
            Op::RmsNorm => ("rms_norm_f64".into(), "f64"),
            Op::Rope => ("rope".into(), "f32"),
            Op::KvAppend => (format!("kv_append_{}", self.kv.dtype()), "f32"),
            Op::Attention => (format!("attention_{}", self.kv.dtype()), "f32"),
            Op::Swiglu => ("swiglu".into(), "f32"),
            Op::TopK => ("top_k".into(), "f32"),
            Op::RouteWeights => ("route_weights".into(), "f32"),
            Op::WeightedSum => ("weighted_sum".into(), "f32"),
            Op::Add => ("add".into(), "f32"),
        };
        // A type of the many experts is named once.
        let of_parts = |f: fn(&Part) -> &'static str| {
            let mut names: Vec<_> =
                op.weight().map_or(&[][..], |w| &w.parts).iter().map(f).collect();
            if let Op::ExpertLinear(_) = op {
                names.dedup();
            }
            names
        };
        let strings = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect();
        Kernel {
            kernel: name.to_lowercase(),
            weights: strings(of_parts(|part| part.file_type.name())),
            activations: strings(match op {
                Op::Linear(_) | Op::ExpertLinear(_) => of_parts(Part::activations),
                _ => vec![DType::F32.name()],
            }),
            accumulation: accumulation.to_owned(),
            output: match op {
                Op::KvAppend => self.kv.dtype().to_string(),
                _ => DType::F32.to_string(),
            },
        }
    }
}

impl Cpu {
    /// A tensor of the shape of `x`, made on all threads: `f(first, x, out)` makes the granules from number `first` on.
    fn map(
        &self,
        x: &Tensor,
        granule: usize,
        f: impl Fn(usize, &[f32], &mut [f32]) + Sync,
    ) -> Tensor {
        /// Of one element, in multiply-adds: these ops divide, take exponentials or compute in f64.
        const COST: usize = 8;
        let mut out = vec![0.0; x.values().len()];
        let columns = Columns { count: out.len(), granule, cost: COST * granule };
        self.pool.fill(&mut out, columns, |mut strip| {
            let elements = strip.columns();
            f(elements.start / granule, &x.values()[elements], strip.row(0));
        });
        Tensor::new(x.shape(), out)
    }

    /// `f` of each two elements of `x` and `y`.
    fn zip(&self, x: &Tensor, y: &Tensor, f: impl Fn(f32, f32) -> f32 + Sync) -> Tensor {
        assert_eq!(x.shape(), y.shape(), "operands have one shape");
        self.map(x, 1, |first, x, out| {
            for ((out, &x), &y) in out.iter_mut().zip(x).zip(&y.values()[first..]) {
                *out = f(x, y);
            }
        })
    }
}

/// Turns the pairs `(i, i + pairs)` of one head; channels beyond them pass through. Products are not fused.
fn rotate(x: &[f32], cos: &[f64], sin: &[f64], out: &mut [f32]) {
    out.copy_from_slice(x);
    let (firsts, rest) = out.split_at_mut(cos.len());
    for (((a, b), &cos), &sin) in firsts.iter_mut().zip(rest).zip(cos).zip(sin) {
        let (cos, sin) = (cos as f32, sin as f32);
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// The names of the contracts that the parts of `w` are computed by, each once.
fn contracts(op: &str, w: &Weight, of: impl Fn(&Part) -> String) -> String {
    let names: BTreeSet<_> = w.parts.iter().map(|part| format!("{op}_{}", of(part))).collect();
    names.into_iter().collect::<Vec<_>>().join("+")
}

impl Part {
    /// What activations are rounded to.
    fn activations(&self) -> &'static str {
        match self.product {
            Product::Integer(IntegerKernel::Blocks(_)) => DType::Q8_0.name(),
            Product::Integer(IntegerKernel::Superblocks(_)) => DType::Q8_K.name(),
            Product::Float(_) => DType::F32.name(),
        }
    }
}
