//! The ops of a decoder.
//!
//! What is written here cuts an op into parts and moves data; whatever computes is a kernel, or in a file of its own.

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
    tensor::Shape,
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
        let elements =
            shape.heads.checked_mul(shape.head_dim).and_then(|n| n.checked_mul(capacity));
        let bytes = elements.and_then(|n| n.checked_mul(2 * self.kv.bytes()));
        // Whether there would be room is asked first, since memory that is zeroed by the system cannot be asked for in vain.
        match bytes.map(|bytes| Vec::<u8>::new().try_reserve_exact(bytes)) {
            Some(Ok(())) => Ok(Kv::new(shape, capacity, self.kv)),
            _ => Err(Error::CacheMemory { positions: capacity }),
        }
    }

    fn embed(&self, table: &Weight, tokens: &[u32]) -> Result<Tensor> {
        let mut out = self.tensor([tokens.len(), table.cols]);
        for (&token, out) in tokens.iter().zip(out.values_mut().chunks_exact_mut(table.cols)) {
            let row = token as usize;
            table.part_of(row).widen(row, self.kernels, out);
        }
        Ok(out)
    }

    fn linear(&self, x: &Tensor, w: &Weight) -> Result<Tensor> {
        Ok(self.multiply(x, w))
    }

    fn add_bias(&self, mut x: Tensor, bias: &Vec<f32>) -> Result<Tensor> {
        assert_eq!(x.width(), bias.len(), "a bias is as wide as the activations");
        self.runs_of(&mut x, bias.len(), CHEAP * bias.len(), |_, rows| {
            rows.chunks_exact_mut(bias.len()).for_each(|row| (self.kernels.add)(bias, row));
        });
        Ok(x)
    }

    fn rms_norm(&self, x: &Tensor, w: &Vec<f32>, eps: f64) -> Result<Tensor> {
        assert_eq!(x.shape().last(), Some(&w.len()), "a norm weight is as wide as the last axis");
        Ok(self.each(x.shape(), w.len(), COSTLY, |row, out| {
            (self.kernels.rms_norm)(x.part(row, w.len()), w, eps, out);
        }))
    }

    fn heads(&self, x: &Tensor, start: usize, heads: usize, head_dim: usize) -> Result<Tensor> {
        let width = heads * head_dim;
        Ok(self.each([x.rows(), heads, head_dim], width, CHEAP, |row, out| {
            out.copy_from_slice(&x.part(row, x.width())[start..start + width]);
        }))
    }

    fn rope(&self, x: &Tensor, table: &RopeTable) -> Result<Tensor> {
        let [n, heads, head_dim] = *x.shape() else { panic!("rope turns heads") };
        assert_eq!(table.rows(), n, "the table has one rotation per row");
        let width = heads * head_dim;
        Ok(self.each(x.shape(), width, CHEAP, |row, out| {
            let (cos, sin) = table.row(row);
            (self.kernels.rotate)(x.part(row, width), head_dim, cos, sin, out);
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

    fn swiglu(&self, mut gate: Tensor, up: &Tensor, silu: Inner<Tensor>) -> Result<Gated<Tensor>> {
        assert_eq!(gate.shape(), up.shape(), "a gate is as wide as what it gates");
        let Inner { spill, replace } = silu;
        if !spill && replace.is_none() {
            self.runs_of(&mut gate, 1, COSTLY, |elements, gate| {
                (self.kernels.swiglu)(&up.values()[elements], gate);
            });
            return Ok(Gated { silu: None, out: gate });
        }
        let computed = self.runs(gate.shape(), 1, COSTLY, |elements, out| {
            (self.kernels.silu)(&gate.values()[elements], out);
        });
        let gate = replace.as_ref().unwrap_or(&computed);
        let out = self.runs(up.shape(), 1, CHEAP, |elements, out| {
            let (gate, up) = (&gate.values()[elements.clone()], &up.values()[elements]);
            (self.kernels.multiply)(gate, up, out);
        });
        Ok(Gated { silu: spill.then_some(computed), out })
    }

    fn top_k(&self, x: &Tensor, k: usize) -> Result<Tensor> {
        let mut ids = self.tensor([x.rows(), k]);
        let mut order = self.memory.buffer(x.width());
        for (row, ids) in ids.values_mut().chunks_exact_mut(k).enumerate() {
            routing::top_k(x.part(row, x.width()), &mut order, ids);
        }
        Ok(ids)
    }

    fn route_weights(&self, logits: &Tensor, ids: &Tensor, normalize: bool) -> Result<Tensor> {
        let (experts, k) = (logits.width(), ids.width());
        let mut weights = self.tensor(ids.shape());
        let mut softmax = self.memory.buffer(experts);
        for (row, weights) in weights.values_mut().chunks_exact_mut(k).enumerate() {
            softmax.copy_from_slice(logits.part(row, experts));
            (self.kernels.softmax)(&mut softmax);
            routing::weights(&softmax, ids.part(row, k), normalize, weights);
        }
        Ok(weights)
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
        let mut out = self.zeros([n, width]);
        let columns = Columns { count: width, granule: 1, cost: n * k };
        self.pool.fill(out.values_mut(), columns, |mut strip| {
            let columns = strip.columns();
            for (slot, &weight) in weights.values().iter().enumerate() {
                let x = &x.part(slot, width)[columns.clone()];
                (self.kernels.add_weighted)(x, weight, strip.row(slot / k));
            }
        });
        Ok(out)
    }

    fn add(&self, mut x: Tensor, y: &Tensor) -> Result<Tensor> {
        assert_eq!(x.shape(), y.shape(), "summands have one shape");
        self.runs_of(&mut x, 1, CHEAP, |elements, x| (self.kernels.add)(&y.values()[elements], x));
        Ok(x)
    }

    fn rows(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        let mut shape = Shape::from(x.shape());
        shape[0] = range.len();
        let mut out = self.tensor(shape);
        let values = &x.values()[range.start * x.width()..range.end * x.width()];
        out.values_mut().copy_from_slice(values);
        Ok(out)
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

/// What an element costs, in multiply-adds, where it is added, multiplied or moved.
const CHEAP: usize = 1;

/// The same where it takes an exponential, a quotient or f64.
const COSTLY: usize = 8;

impl Cpu {
    /// A tensor made on all threads, each of which makes some runs of whole granules, of which one costs `cost`:
    /// `f(elements, out)`.
    fn runs(
        &self,
        shape: impl Into<Shape>,
        granule: usize,
        cost: usize,
        f: impl Fn(Range<usize>, &mut [f32]) + Sync,
    ) -> Tensor {
        let mut out = self.tensor(shape);
        self.runs_of(&mut out, granule, cost, f);
        out
    }

    /// The same of a tensor that is there.
    fn runs_of(
        &self,
        out: &mut Tensor,
        granule: usize,
        cost: usize,
        f: impl Fn(Range<usize>, &mut [f32]) + Sync,
    ) {
        let columns = Columns { count: out.values().len(), granule, cost };
        self.pool.fill(out.values_mut(), columns, |mut strip| f(strip.columns(), strip.row(0)));
    }

    /// A tensor made on all threads, `granule` elements at a time: `f(number, out)`.
    fn each(
        &self,
        shape: impl Into<Shape>,
        granule: usize,
        cost: usize,
        f: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Tensor {
        self.runs(shape, granule, cost * granule, |elements, out| {
            let first = elements.start / granule;
            for (i, out) in out.chunks_exact_mut(granule).enumerate() {
                f(first + i, out);
            }
        })
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
