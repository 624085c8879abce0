//! Ops as a fault sees them: what goes in, on the host, and the engine's own kernels to compute something else with.
//!
//! A fault in an engine keeps that engine's arithmetic: a mask that is off by one still rounds its keys to the
//! cache's type and sums in the engine's order. So a fault changes what a kernel is given, wherever that can say
//! it, and calls the same kernel again; what it cannot say so it writes into the result.

mod experts;

use std::{collections::BTreeMap, ops::Range};

use apr_model::{Config, HostTensor, Result, RopeFrequencies, RopeTable, Site, Stage};
use apr_tensor::{Stored, activation::ActivationType};

use crate::{Severity, models::f32_tensor, rng::Rng};
pub(crate) use experts::{ExpertSum, Experts, RouteWeights, TopK};

/// Where and how hard a fault strikes.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) site: Site,
    pub(crate) severity: Severity,
    pub(crate) seed: u64,
    /// The step of the run.
    pub(crate) step: usize,
    /// The expert of the layer that most rows go to; 0 where there are none.
    pub(crate) expert: usize,
    pub(crate) config: Config,
}

impl Place {
    /// The same numbers each time, so that a fault hits the same rows and channels in every step.
    pub(crate) fn rng(&self) -> Rng {
        Rng::new(self.seed)
    }

    pub(crate) fn is_subtle(&self) -> bool {
        self.severity == Severity::Subtle
    }

    /// One of two numbers.
    pub(crate) fn pick<T>(&self, subtle: T, gross: T) -> T {
        if self.is_subtle() { subtle } else { gross }
    }
}

/// The kernels of the engine that a fault is planted in, on values of the host.
pub(crate) trait Kernels {
    fn linear(&self, x: &HostTensor, parts: &[Stored]) -> Result<HostTensor>;
    fn rms_norm(&self, x: &HostTensor, w: &[f32], eps: f64) -> Result<HostTensor>;
    fn rope(&self, x: &HostTensor, table: &RopeTable) -> Result<HostTensor>;
    /// Attention of `q` over `k` and `v`, which are rounded as the cache rounds them; `softmax` in place of the
    /// computed one.
    fn attention(
        &self,
        q: &HostTensor,
        k: &HostTensor,
        v: &HostTensor,
        scale: f64,
        softmax: Option<HostTensor>,
    ) -> Result<Attended>;
    fn swiglu(&self, gate: &HostTensor, up: &HostTensor, silu: Option<HostTensor>)
    -> Result<Gated>;
    fn add(&self, x: &HostTensor, y: &HostTensor) -> Result<HostTensor>;
    fn top_k(&self, x: &HostTensor, k: usize) -> Result<HostTensor>;
    fn route_weights(
        &self,
        logits: &HostTensor,
        ids: &HostTensor,
        normalize: bool,
    ) -> Result<HostTensor>;
    /// Products with the matrices that `w` holds of all `experts`.
    fn expert_linear(
        &self,
        x: &HostTensor,
        w: &Stored,
        experts: usize,
        ids: &HostTensor,
    ) -> Result<HostTensor>;
    fn weighted_sum(&self, x: &HostTensor, weights: &HostTensor) -> Result<HostTensor>;
    /// What activations are rounded to before they are multiplied with `part`.
    fn activations(&self, part: &Stored) -> Result<ActivationType>;
}

/// What attention computes.
#[derive(Clone, Debug)]
pub(crate) struct Attended {
    pub(crate) scores: HostTensor,
    pub(crate) softmax: HostTensor,
    pub(crate) out: HostTensor,
}

/// What the activation function computes.
#[derive(Clone, Debug)]
pub(crate) struct Gated {
    pub(crate) silu: HostTensor,
    pub(crate) out: HostTensor,
}

/// Rows of `x`: of the first axis.
pub(crate) fn row_len(x: &HostTensor) -> usize {
    x.values.len() / x.shape[0].max(1)
}

/// Rows `rows` of `x`, in that order.
pub(crate) fn select_rows(x: &HostTensor, rows: impl IntoIterator<Item = usize>) -> HostTensor {
    let len = row_len(x);
    let mut values = Vec::new();
    let mut shape = x.shape.clone();
    shape[0] = 0;
    for row in rows {
        values.extend_from_slice(&x.values[row * len..][..len]);
        shape[0] += 1;
    }
    HostTensor { shape, values }
}

/// A product of activations and a matrix, which may have several parts.
pub(crate) struct Linear<'a> {
    pub(crate) place: &'a Place,
    pub(crate) kernels: &'a dyn Kernels,
    pub(crate) x: HostTensor,
    pub(crate) parts: &'a [Stored],
    /// The part that the fault is in.
    pub(crate) part: usize,
}

impl Linear<'_> {
    pub(crate) fn weight(&self) -> &Stored {
        &self.parts[self.part]
    }

    /// Outputs and inputs of the part.
    pub(crate) fn dims(&self) -> [usize; 2] {
        [self.weight().shape().rows(), self.weight().shape().cols()]
    }

    /// The columns of the result that the part computes.
    pub(crate) fn columns(&self) -> Range<usize> {
        let rows = |part: &Stored| part.shape().rows();
        let start = self.parts[..self.part].iter().map(rows).sum();
        start..start + rows(self.weight())
    }

    /// The numbers of the part.
    pub(crate) fn values(&self) -> Result<Vec<f32>> {
        Ok(self.weight().to_f32()?)
    }

    /// The activations as the kernel multiplies them.
    pub(crate) fn rounded(&self) -> Result<HostTensor> {
        let kind = self.kernels.activations(self.weight())?;
        let mut rounded = self.x.clone();
        for row in rounded.values.chunks_exact_mut(row_len(&self.x)) {
            if kind != ActivationType::F32 {
                let narrow: Vec<f32> = row.iter().map(|&x| x as f32).collect();
                kind.round_row(&narrow, row);
            }
        }
        Ok(rounded)
    }

    /// The activations of each row that share a scale.
    pub(crate) fn block_len(&self) -> Result<usize> {
        Ok(self.kernels.activations(self.weight())?.block_len())
    }

    /// Lets the part be `weight` instead.
    pub(crate) fn put_weight(&self, y: &mut HostTensor, weight: &Stored) -> Result<()> {
        self.put(y, self.kernels.linear(&self.x, std::slice::from_ref(weight))?)
    }

    /// Lets the part be multiplied with `x` instead.
    pub(crate) fn put_input(&self, y: &mut HostTensor, x: &HostTensor) -> Result<()> {
        self.put(y, self.kernels.linear(x, std::slice::from_ref(self.weight()))?)
    }

    /// Lets the part be the numbers `values`, multiplied with `x`, which is rounded already.
    pub(crate) fn put_dense(
        &self,
        y: &mut HostTensor,
        x: &HostTensor,
        values: &[f32],
    ) -> Result<()> {
        let weight = f32_tensor(&self.dims(), values)?;
        self.put(y, self.kernels.linear(x, &[weight])?)
    }

    fn put(&self, y: &mut HostTensor, part: HostTensor) -> Result<()> {
        let (columns, width) = (self.columns(), row_len(y));
        for (y, part) in
            y.values.chunks_exact_mut(width).zip(part.values.chunks_exact(columns.len()))
        {
            y[columns.clone()].copy_from_slice(part);
        }
        Ok(())
    }

    /// The result of the part in each row, to be written to.
    pub(crate) fn rows<'y>(
        &self,
        y: &'y mut HostTensor,
    ) -> impl Iterator<Item = &'y mut [f64]> + use<'y> {
        let (columns, width) = (self.columns(), row_len(y));
        y.values.chunks_exact_mut(width).map(move |row| &mut row[columns.clone()])
    }
}

/// Rows of the embedding table.
pub(crate) struct Embed<'a> {
    pub(crate) tokens: &'a [u32],
    pub(crate) table: &'a Stored,
}

/// A root-mean-square norm over rows or heads.
pub(crate) struct Norm<'a> {
    pub(crate) place: &'a Place,
    pub(crate) kernels: &'a dyn Kernels,
    pub(crate) x: HostTensor,
    pub(crate) w: &'a [f32],
    pub(crate) eps: f64,
}

/// A bias added to each row.
pub(crate) struct Bias<'a> {
    pub(crate) x: HostTensor,
    pub(crate) bias: &'a [f32],
}

/// A rotation of queries or keys.
pub(crate) struct Rope<'a> {
    pub(crate) place: &'a Place,
    pub(crate) kernels: &'a dyn Kernels,
    pub(crate) x: HostTensor,
    /// The position of the first row.
    pub(crate) first: usize,
}

impl Rope<'_> {
    /// The positions of the rows.
    pub(crate) fn positions(&self) -> Range<usize> {
        self.first..self.first + self.x.shape[0]
    }

    /// The rotation of the rows with other `frequencies`.
    pub(crate) fn by(&self, frequencies: &RopeFrequencies) -> Result<HostTensor> {
        self.kernels.rope(&self.x, &frequencies.table(self.positions()))
    }
}

/// Attention of the rows of a step over everything cached.
pub(crate) struct Attention<'a> {
    pub(crate) place: &'a Place,
    pub(crate) kernels: &'a dyn Kernels,
    pub(crate) q: HostTensor, // [n, heads, head_dim]
    pub(crate) k: HostTensor, // [cached, kv_heads, head_dim], before rounding
    pub(crate) v: HostTensor,
    pub(crate) scale: f64,
}

impl Attention<'_> {
    /// The position of the first row.
    pub(crate) fn first(&self) -> usize {
        self.cached() - self.q.shape[0]
    }

    /// Cached positions, the step's own among them.
    pub(crate) fn cached(&self) -> usize {
        self.k.shape[0]
    }

    /// The same attention of other keys and values.
    pub(crate) fn over(&self, k: &HostTensor, v: &HostTensor) -> Result<Attended> {
        self.kernels.attention(&self.q, k, v, self.scale, None)
    }

    /// The same attention with another scale.
    pub(crate) fn scaled(&self, scale: f64) -> Result<Attended> {
        self.kernels.attention(&self.q, &self.k, &self.v, scale, None)
    }

    /// The same attention with another softmax.
    pub(crate) fn with_softmax(&self, softmax: HostTensor) -> Result<Attended> {
        let attended =
            self.kernels.attention(&self.q, &self.k, &self.v, self.scale, Some(softmax.clone()))?;
        Ok(Attended { softmax, ..attended })
    }

    /// The attention of each row over the positions that `sees` gives for it, by position; at least one.
    pub(crate) fn masked(&self, sees: impl Fn(usize) -> Vec<usize>) -> Result<Attended> {
        let [n, heads, head_dim] = self.q.shape[..] else { panic!("queries have heads") };
        let cached = self.cached();
        let zeros =
            |shape: Vec<usize>| HostTensor { values: vec![0.0; shape.iter().product()], shape };
        let mut all = Attended {
            scores: zeros(vec![heads, n, cached]),
            softmax: zeros(vec![heads, n, cached]),
            out: zeros(vec![n, heads * head_dim]),
        };
        for row in 0..n {
            let seen = sees(self.first() + row);
            let q = select_rows(&self.q, [row]);
            let (k, v) = (
                select_rows(&self.k, seen.iter().copied()),
                select_rows(&self.v, seen.iter().copied()),
            );
            let one = self.kernels.attention(&q, &k, &v, self.scale, None)?;
            for (to, from) in [(&mut all.scores, &one.scores), (&mut all.softmax, &one.softmax)] {
                for head in 0..heads {
                    for (i, &position) in seen.iter().enumerate() {
                        to.values[(head * n + row) * cached + position] =
                            from.values[head * seen.len() + i];
                    }
                }
            }
            let width = heads * head_dim;
            all.out.values[row * width..][..width].copy_from_slice(&one.out.values);
        }
        Ok(all)
    }
}

/// The gated activation function.
pub(crate) struct Swiglu<'a> {
    pub(crate) kernels: &'a dyn Kernels,
    pub(crate) gate: HostTensor,
    pub(crate) up: HostTensor,
}

impl Swiglu<'_> {
    /// The result with `f` in place of SiLU.
    pub(crate) fn with(&self, f: impl Fn(f64) -> f64) -> Result<Gated> {
        let silu = HostTensor {
            shape: self.gate.shape.clone(),
            values: self.gate.values.iter().map(|&g| f(g)).collect(),
        };
        let gated = self.kernels.swiglu(&self.gate, &self.up, Some(silu.clone()))?;
        Ok(Gated { silu, ..gated })
    }
}

/// The sum of the residual stream and what a block adds to it.
pub(crate) struct Residual<'a> {
    pub(crate) place: &'a Place,
    pub(crate) kernels: &'a dyn Kernels,
    pub(crate) stream: HostTensor,
    pub(crate) added: HostTensor,
    /// What the layer has computed so far.
    pub(crate) before: &'a BTreeMap<Stage, HostTensor>,
    /// What the layer was given.
    pub(crate) layer_input: &'a HostTensor,
}
