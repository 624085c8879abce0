//! How far an engine may be from what its declared arithmetic says, and why.
//!
//! An engine accumulates in f32, in an order that is its own. Each rounding errs by at most a *unit* `u` of its result
//! (2^-24 for f32), with either sign, so a sum of `k` terms that never exceeds `A` on the way is off by a random walk of
//! standard deviation at most `u A sqrt(k)` (Higham and Mary 2019). These functions return such standard deviations,
//! element by element, from the data at hand: there is no constant that was tuned to a model. Where a
//! value was not given by the engine, the slack of what it is computed from goes on through the op.
//!
//! Rounding on purpose adds a discontinuity: an activation that is off by `b` falls to the other side of a
//! rounding threshold with probability `b / step`, and is then off by a whole `step`: a variance of `b step`. One such flip
//! is not a Gaussian, so wherever flips are possible the largest single one is counted in full.

use apr_model::{Error, Result, RopeTable};
use apr_reference::{Arithmetic, Tensor};
use apr_tensor::{DType, Stored, activation::ActivationType};
use rayon::prelude::*;

/// Unit roundoffs: half the distance between 1 and the next number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Units {
    /// Of sums of products.
    pub(crate) product: f64,
    /// Of the sums within attention.
    pub(crate) attention: f64,
    /// Of the type that results are kept in.
    pub(crate) output: f64,
    /// Of the type that values were captured in, where the engine had more than that: else 0.
    pub(crate) captured: f64,
    /// How far the engine's weights may be from the stored ones, in [steps](apr_tensor::block::steps) of their types: 0
    /// where it has the same, half a step where it has those that these were rounded from.
    pub(crate) weights: f64,
}

impl Units {
    /// The unit roundoff of a float type; that of f32 for all others, which is what integers are turned into.
    pub(crate) fn of(dtype: DType) -> f64 {
        match dtype {
            DType::F64 => f64::EPSILON / 2.0,
            DType::F16 => 2f64.powi(-11),
            DType::BF16 => 2f64.powi(-8) / 2.0,
            _ => f64::from(f32::EPSILON) / 2.0,
        }
    }

    /// Of a result of magnitude `y` that is rounded `times` on the way to being kept.
    fn kept(&self, times: f64, y: f64) -> f64 {
        times * self.output.max(self.captured) * y.abs()
    }

    /// The slack of values that are known as captured, if they are not exactly those that the engine had.
    pub(crate) fn known(&self, values: &Tensor<f64>) -> Option<Vec<f32>> {
        let one = |x: &f64| root((self.captured * x).powi(2));
        (self.captured > 0.0).then(|| values.data.iter().map(one).collect())
    }
}

/// The unit of f32.
const F32: f64 = f32::EPSILON as f64 / 2.0;

fn at(slack: Option<&[f32]>, i: usize) -> f64 {
    slack.map_or(0.0, |slack| f64::from(slack[i]))
}

/// The root of a sum of squares, as slack is kept. Below the smallest normal number engines may flush to zero.
fn root(squares: f64) -> f32 {
    (squares.sqrt() as f32).max(f32::MIN_POSITIVE)
}

fn squares<const N: usize>(terms: [f64; N]) -> f64 {
    terms.iter().map(|x| x * x).sum()
}

/// A row of a matrix, as far as rounding is concerned.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RowNorm {
    max: f64,
    norm: f64,
}

/// A row of a matrix and of the steps of its elements; these are asked for where weights may be off.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WeightRow {
    values: RowNorm,
    steps: RowNorm,
}

impl RowNorm {
    pub(crate) fn of<T: Copy + Into<f64>>(row: &[T]) -> Self {
        // In lanes, which processors have.
        let (lanes, rest) = row.as_chunks::<8>();
        let (mut max, mut squares) = ([0.0f64; 8], [0.0; 8]);
        for row in lanes {
            for (i, &x) in row.iter().enumerate() {
                let x: f64 = x.into();
                max[i] = max[i].max(x.abs());
                squares[i] += x * x;
            }
        }
        for (i, &x) in rest.iter().enumerate() {
            let x: f64 = x.into();
            max[i] = max[i].max(x.abs());
            squares[i] += x * x;
        }
        Self { max: max.into_iter().fold(0.0, f64::max), norm: squares.iter().sum::<f64>().sqrt() }
    }

    /// A bound on the norm of the products of two rows, element by element.
    fn products(self, other: Self) -> f64 {
        (self.max * other.norm).min(other.max * self.norm)
    }
}

impl WeightRow {
    /// A row of these weights, which are certain.
    pub(crate) fn certain(row: &[f32]) -> Self {
        Self { values: RowNorm::of(row), steps: RowNorm::default() }
    }

    /// Row `row` of `part`, which holds `values`.
    pub(crate) fn new(units: &Units, part: &Stored, row: usize, values: &[f32]) -> Result<Self> {
        let mut steps = RowNorm::default();
        if units.weights > 0.0 {
            let mut of_row = vec![0.0f32; values.len()];
            part.row_steps(row, &mut of_row)?;
            steps = RowNorm::of(&of_row);
        }
        Ok(Self { values: RowNorm::of(values), steps })
    }
}

/// Rows of a table: scale times quant less minimum may round once or twice.
pub(crate) fn embed(
    units: &Units,
    table: &[Stored],
    tokens: &[u32],
    y: &Tensor<f64>,
) -> Result<Vec<f32>> {
    let mut slack = Vec::with_capacity(y.data.len());
    let mut steps = vec![0.0f32; y.cols()];
    for (&token, row) in tokens.iter().zip(y.rows()) {
        if let ([table], true) = (table, units.weights > 0.0) {
            table.row_steps(token as usize, &mut steps)?;
        }
        let max = RowNorm::of(row).max;
        slack.extend(row.iter().zip(&steps).map(|(&y, &step)| {
            let off = units.weights * f64::from(step);
            root(squares([2.0 * F32 * max, off, units.kept(1.0, y)]))
        }));
    }
    Ok(slack)
}

/// `x W^T`: on the way the sum is at most the norm of the products and the result itself.
pub(crate) fn linear(
    units: &Units,
    x: &Tensor<f64>,
    weights: &[WeightRow],
    y: &Tensor<f64>,
) -> Vec<f32> {
    let walk = units.product * (x.cols() as f64).sqrt();
    let rows: Vec<RowNorm> = x.rows().map(RowNorm::of).collect();
    let mut slack = vec![0.0; y.data.len()];
    slack.par_chunks_exact_mut(weights.len()).enumerate().for_each(|(i, slack)| {
        let y = &y.data[i * weights.len()..][..weights.len()];
        for ((slack, &y), w) in slack.iter_mut().zip(y).zip(weights) {
            let own = walk * (rows[i].products(w.values) + y.abs());
            let off = units.weights * rows[i].products(w.steps);
            *slack = root(squares([own, off, units.kept(1.0, y)]));
        }
    });
    slack
}

/// Adds what the slack `before` of `x` becomes in `x W^T`, activations being rounded to `kind` of the weight's type.
pub(crate) fn through_linear(
    slack: &mut [f32],
    x: &Tensor<f64>,
    before: &[f32],
    parts: &[Stored],
    kind: impl Fn(DType) -> ActivationType,
) -> Result<()> {
    let (n, width) = (x.shape[0], x.cols());
    let out = slack.len() / n.max(1);
    let mut column = 0;
    for part in parts {
        let kind = kind(part.dtype());
        // Variance of each activation, and the square of the flip that is possible there.
        let mut variance = Vec::with_capacity(x.data.len());
        let mut flip = Vec::with_capacity(x.data.len());
        for (row, before) in x.rows().zip(before.chunks_exact(width)) {
            for (step, &b) in steps(kind, row).into_iter().zip(before) {
                let b = f64::from(b);
                variance.push(b * b + b * step);
                flip.push(if b > 0.0 { step * step } else { 0.0 });
            }
        }
        let rows = part.shape().rows();
        let added: Vec<Vec<f64>> = (0..rows)
            .into_par_iter()
            .map_init(
                || vec![0.0f32; width],
                |w, row| {
                    part.dequantize_row(row, w)?;
                    let of_row = |i: usize| {
                        let (variance, flip) = (&variance[i * width..], &flip[i * width..]);
                        let (mut sum, mut largest) = (0.0, 0.0f64);
                        for ((&w, v), f) in w.iter().zip(variance).zip(flip) {
                            let square = f64::from(w) * f64::from(w);
                            sum += square * v;
                            largest = largest.max(square * f);
                        }
                        sum + largest
                    };
                    Ok::<_, Error>((0..n).map(of_row).collect())
                },
            )
            .collect::<Result<_>>()?;
        for (row, added) in added.iter().enumerate() {
            for (i, added) in added.iter().enumerate() {
                let slack = &mut slack[i * out + column + row];
                *slack = root(f64::from(*slack).powi(2) + added);
            }
        }
        column += rows;
    }
    Ok(())
}

/// The distance between the values that each activation may be rounded to.
fn steps(kind: ActivationType, row: &[f64]) -> Vec<f64> {
    match kind.block_len() {
        1 => {
            let ulp = match kind {
                ActivationType::F16 => 2.0 * Units::of(DType::F16),
                ActivationType::BF16 => 2.0 * Units::of(DType::BF16),
                _ => 0.0,
            };
            row.iter().map(|x| ulp * x.abs()).collect()
        }
        block => row
            .chunks(block)
            .flat_map(|block| std::iter::repeat_n(RowNorm::of(block).max / 127.0, block.len()))
            .collect(),
    }
}

/// What the cache does to the slack of a key or value.
pub(crate) fn rounded(kv: DType, x: &Tensor<f64>, slack: Option<&[f32]>) -> Vec<f32> {
    let ulp = if matches!(kv, DType::F16 | DType::BF16) { 2.0 * Units::of(kv) } else { 0.0 };
    let one = |(i, x): (usize, &f64)| match at(slack, i) {
        0.0 => 0.0,
        b => root(b * b + b * ulp * x.abs() + (ulp * x).powi(2)),
    };
    x.data.iter().enumerate().map(one).collect()
}

/// A sum of two values of these slacks.
pub(crate) fn sum(units: &Units, y: &Tensor<f64>, slacks: [Option<&[f32]>; 2]) -> Vec<f32> {
    let one = |(i, &y): (usize, &f64)| {
        let [a, b] = slacks.map(|slack| at(slack, i));
        root(squares([a, b, F32 * y, units.kept(1.0, y)]))
    };
    y.data.iter().enumerate().map(one).collect()
}

/// A product of two values of these slacks.
pub(crate) fn product(
    units: &Units,
    [a, b]: [&Tensor<f64>; 2],
    slacks: [Option<&[f32]>; 2],
    y: &Tensor<f64>,
) -> Vec<f32> {
    let one = |(i, &y): (usize, &f64)| {
        let [da, db] = slacks.map(|slack| at(slack, i));
        // Kernels that fuse the two recompute the first factor: its roundings come again.
        root(squares([da * b.data[i], db * a.data[i], 8.0 * F32 * y, units.kept(2.0, y)]))
    };
    y.data.iter().enumerate().map(one).collect()
}

/// `x / rms * w` of each row: the sum of squares is a walk of `width` steps, under a root.
pub(crate) fn rms_norm(
    units: &Units,
    x: &Tensor<f64>,
    before: Option<&[f32]>,
    w: &[f64],
    eps: f64,
    y: &Tensor<f64>,
) -> Vec<f32> {
    let width = w.len();
    let own = F32 * (4.0 + (width as f64).sqrt() / 2.0);
    let mut slack = Vec::with_capacity(y.data.len());
    for (row, x) in x.data.chunks_exact(width).enumerate() {
        let first = row * width;
        let square = x.iter().map(|x| x * x).sum::<f64>() / width as f64 + eps;
        let rms = square.sqrt();
        let moved: f64 =
            (0..width).map(|i| (x[i] * at(before, first + i)).powi(2)).sum::<f64>().sqrt();
        // d(1/rms) / (1/rms)
        let scale = moved / (width as f64 * square);
        for (i, w) in w.iter().enumerate() {
            let y = y.data[first + i];
            let through = w / rms * at(before, first + i);
            slack.push(root(squares([own * y, scale * y, through, units.kept(3.0, y)])));
        }
    }
    slack
}

/// A rotation: engines compute angles in f32, the frequency of pair `i` by up to `i` multiplications.
pub(crate) fn rope(
    units: &Units,
    x: &Tensor<f64>,
    before: Option<&[f32]>,
    table: &RopeTable,
) -> Vec<f32> {
    let [_, heads, head_dim] = x.shape[..] else { panic!("rotation is per head") };
    let pairs = table.pairs();
    let mut slack: Vec<f32> = match before {
        Some(before) => before.to_vec(),
        None => vec![0.0; x.data.len()],
    };
    for (head, (x, slack)) in
        x.data.chunks_exact(head_dim).zip(slack.chunks_exact_mut(head_dim)).enumerate()
    {
        let row = head / heads;
        let (angles, (cos, sin)) = (table.angles(row), table.row(row));
        for i in 0..pairs {
            let j = i + pairs;
            let length = x[i].hypot(x[j]);
            let angle = F32 * (i as f64 + 4.0) * angles[i].abs();
            let own = squares([angle * length, 4.0 * F32 * length, units.kept(4.0, length)]);
            let (a, b) = (f64::from(slack[i]), f64::from(slack[j]));
            slack[i] = root(own + squares([a * cos[i], b * sin[i]]));
            slack[j] = root(own + squares([b * cos[i], a * sin[i]]));
        }
        for i in 2 * pairs..head_dim {
            slack[i] = root(squares([f64::from(slack[i]), units.kept(1.0, x[i])]));
        }
    }
    slack
}

/// `x / (1 + exp(-x))`: the exponential is good to a few units, the slope is below 1.1.
pub(crate) fn silu(
    units: &Units,
    x: &Tensor<f64>,
    before: Option<&[f32]>,
    y: &Tensor<f64>,
) -> Vec<f32> {
    let own = |(i, &x): (usize, &f64)| {
        let y = y.data[i];
        // exp(-x) has the relative error that its argument has in absolute terms.
        let argument = F32 * x.abs() * y;
        root(squares([1.1 * at(before, i), 8.0 * F32 * y, argument, units.kept(2.0, y)]))
    };
    x.data.iter().enumerate().map(own).collect()
}

/// What the inner values of attention are computed from.
#[derive(Debug)]
pub(crate) struct Attention<'a> {
    pub(crate) units: &'a Units,
    pub(crate) arithmetic: &'a Arithmetic,
    pub(crate) q: &'a Tensor<f64>,
    pub(crate) q_slack: Option<&'a [f32]>,
    pub(crate) keys: &'a [f64],
    pub(crate) values: &'a [f64],
    pub(crate) kv_slack: Option<[&'a [f32]; 2]>,
    pub(crate) kv_heads: usize,
    pub(crate) scale: f64,
}

impl Attention<'_> {
    fn dims(&self) -> (usize, usize, usize) {
        let [n, heads, head_dim] = self.q.shape[..] else { panic!("queries have heads") };
        (n, heads, head_dim)
    }

    /// Where the key or value of position `j` begins for query head `h`.
    fn at(&self, j: usize, h: usize) -> usize {
        let (_, heads, head_dim) = self.dims();
        (j * self.kv_heads + h / (heads / self.kv_heads)) * head_dim
    }

    /// Each row of `[heads, n, keys]`, with its head, row and number of visible keys.
    fn each_row(
        &self,
        keys: usize,
        f: impl Fn(usize, usize, usize, &mut [f32]) + Sync,
    ) -> Vec<f32> {
        let (n, heads, _) = self.dims();
        let mut slack = vec![0.0; heads * n * keys];
        slack.par_chunks_exact_mut(keys).enumerate().for_each(|(row, slack)| {
            let (h, i) = (row / n, row % n);
            f(h, i, keys - n + i + 1, slack);
        });
        slack
    }

    /// Of scaled dot products; masked entries have none.
    pub(crate) fn scores(&self, scores: &Tensor<f64>) -> Vec<f32> {
        let (n, heads, head_dim) = self.dims();
        let keys = scores.cols();
        let ulp = steps(self.arithmetic.queries, &[1.0])[0];
        self.each_row(keys, |h, i, visible, slack| {
            let first = (i * heads + h) * head_dim;
            let q = &self.q.data[first..][..head_dim];
            let q_norm = RowNorm::of(q);
            for (j, slack) in slack[..visible].iter_mut().enumerate() {
                let start = self.at(j, h);
                let k = &self.keys[start..][..head_dim];
                let score = scores.data[(h * n + i) * keys + j];
                let walk = self.units.product.max(F32) * (head_dim as f64).sqrt();
                let own = walk * (self.scale * q_norm.products(RowNorm::of(k)) + score.abs());
                let mut moved = 0.0;
                if self.q_slack.is_some() || self.kv_slack.is_some() {
                    for c in 0..head_dim {
                        let b = at(self.q_slack, first + c);
                        let flips =
                            if b > 0.0 { b * ulp * q[c].abs() + (ulp * q[c]).powi(2) } else { 0.0 };
                        let dk = at(self.kv_slack.map(|[k, _]| k), start + c);
                        moved += k[c] * k[c] * (b * b + flips) + q[c] * q[c] * dk * dk;
                    }
                }
                let kept = self.units.kept(2.0, score);
                *slack = root(squares([own, kept]) + self.scale * self.scale * moved);
            }
        })
    }

    /// Of the softmax of `scores`, which have the slack `before`.
    pub(crate) fn softmax(
        &self,
        scores: &Tensor<f64>,
        before: Option<&[f32]>,
        softmax: &Tensor<f64>,
    ) -> Vec<f32> {
        let (n, _, _) = self.dims();
        let keys = scores.cols();
        self.each_row(keys, |h, i, visible, slack| {
            let first = (h * n + i) * keys;
            let (scores, p) = (&scores.data[first..][..visible], &softmax.data[first..][..visible]);
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let shared: f64 = (0..visible).map(|j| (p[j] * at(before, first + j)).powi(2)).sum();
            for j in 0..visible {
                // The difference to the largest score is rounded; a relative error of its size comes out.
                let own = F32 * (8.0 + (scores[j] - max).abs() + (visible as f64).sqrt());
                let moved = squares([at(before, first + j)]) + shared;
                slack[j] =
                    root(p[j] * p[j] * (own * own + moved) + self.units.kept(2.0, p[j]).powi(2));
            }
        })
    }

    /// Of the weighted sum of values under `softmax`, which has the slack `before`.
    pub(crate) fn out(
        &self,
        softmax: &Tensor<f64>,
        before: Option<&[f32]>,
        out: &Tensor<f64>,
    ) -> Vec<f32> {
        let (n, heads, head_dim) = self.dims();
        let keys = softmax.cols();
        let ulp = steps(self.arithmetic.probabilities, &[1.0])[0];
        let mut slack = vec![0.0; out.data.len()];
        slack.par_chunks_exact_mut(head_dim).enumerate().for_each(|(row, slack)| {
            let (i, h) = (row / heads, row % heads);
            let visible = keys - n + i + 1;
            let first = (h * n + i) * keys;
            let mut products = vec![0.0; head_dim];
            let mut moved = vec![0.0; head_dim];
            for j in 0..visible {
                let p = softmax.data[first + j];
                let dp = at(before, first + j);
                let flips = if dp > 0.0 { dp * ulp * p + (ulp * p).powi(2) } else { 0.0 };
                let start = self.at(j, h);
                for c in 0..head_dim {
                    let v = self.values[start + c];
                    let dv = at(self.kv_slack.map(|[_, v]| v), start + c);
                    products[c] += (p * v).powi(2);
                    moved[c] += v * v * (dp * dp + flips) + p * p * dv * dv;
                }
            }
            // Running sums may be rescaled whenever a larger score comes along: twice the roundings.
            let walk = 2.0 * self.units.attention.max(F32) * (visible as f64).sqrt();
            for c in 0..head_dim {
                let y = out.data[row * head_dim + c];
                let own = walk * (products[c].sqrt() + y.abs());
                slack[c] = root(squares([own, self.units.kept(1.0, y)]) + moved[c]);
            }
        });
        slack
    }
}
