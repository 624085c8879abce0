//! How far an engine may be from what its declared arithmetic says, and why.
//!
//! An engine accumulates in f32, in an order that is its own. Each rounding errs by at most a *unit* `u` of its result
//! (2^-24 for f32), with either sign, so a sum of `k` terms that never exceeds `A` on the way is off by a random walk of
//! standard deviation at most `u A sqrt(k)` (Higham and Mary 2019). These functions return such standard deviations,
//! element by element, from the data at hand: there is no constant that was tuned to a model. Where a
//! value was not given by the engine, the slack of what it is computed from goes on through the op.
//!
//! Rounding on purpose adds a discontinuity: an activation that is off may fall to the other side of a rounding threshold,
//! and is then off by a whole step. Where the threshold is within its [`REACH`] the step is counted in full, elsewhere
//! not at all.

use apr_model::{Error, Result, RopeTable};
use apr_reference::{Arithmetic, Tensor, dot};
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
            DType::BF16 => 2f64.powi(-8),
            _ => f64::from(f32::EPSILON) / 2.0,
        }
    }

    /// Of a result of magnitude `y` that is rounded `times` on the way to being kept.
    fn kept(&self, times: f64, y: f64) -> f64 {
        times * rounding(self.output.max(self.captured), y)
    }

    /// The slack of values that are known as captured, if they are not exactly those that the engine had.
    pub(crate) fn known(&self, values: &Tensor<f64>) -> Option<Vec<f32>> {
        let one = |&x: &f64| root(rounding(self.captured, x).powi(2));
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
    (squares.sqrt() as f32).clamp(f32::MIN_POSITIVE, UNKNOWN)
}

/// The slack of what nobody can know, such as the result of an expert that may have been another one. It is finite, so that
/// what does not depend on it stays certain: nothing times it is nothing.
pub(crate) const UNKNOWN: f32 = 1e30;

/// Whether a slack came of [`UNKNOWN`], on whatever way: no value is as large.
pub(crate) fn is_unknown(slack: f32) -> bool {
    slack > 1e18
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
        let variance: Vec<Vec<f64>> = x
            .rows()
            .zip(before.chunks_exact(width))
            .map(|(row, before)| after_rounding(kind, row, before))
            .collect();
        let rows = part.shape().rows();
        let added: Vec<Vec<f64>> = (0..rows)
            .into_par_iter()
            .map_init(
                || (vec![0.0f32; width], vec![0.0; width]),
                |(w, squares), row| {
                    part.dequantize_row(row, w)?;
                    squares
                        .iter_mut()
                        .zip(w)
                        .for_each(|(square, w)| *square = f64::from(*w).powi(2));
                    Ok::<_, Error>(variance.iter().map(|v| dot(squares, v)).collect())
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

/// How many standard deviations a value may be off: by more than this, none of a billion is.
const REACH: f64 = 7.0;

/// What a value `x` that is off by `before` may be off in addition when it is rounded to a multiple of `step`.
fn flip(x: f64, before: f64, step: f64) -> f64 {
    // Thresholds lie half way between multiples.
    let from_threshold = ((x / step).rem_euclid(1.0) - 0.5).abs() * step;
    if before > 0.0 && from_threshold <= REACH * before { step } else { 0.0 }
}

/// The distance between neighbours of `x` in a float type of this unit.
fn spacing(unit: f64, x: f64) -> f64 {
    match x {
        0.0 => 0.0,
        x => (2.0 * unit * x.abs().log2().floor().exp2()).max(2.0 * least(unit)),
    }
}

/// How far `x` may be off when it is rounded to a float type of this unit.
fn rounding(unit: f64, x: f64) -> f64 {
    (unit * x.abs()).max(least(unit))
}

/// Half the distance between the smallest numbers of a float type of this unit. Only those of f16 are of a size that
/// values have: softmax weights below 6e-5.
fn least(unit: f64) -> f64 {
    if unit == Units::of(DType::F16) { 2f64.powi(-25) } else { 0.0 }
}

/// What a value that is off by `before` may be off in addition when it is rounded to a float type.
fn flip_of(dtype: DType, x: f64, before: f64) -> f64 {
    match (dtype, x) {
        (_, 0.0) | (DType::F32 | DType::F64, _) => 0.0,
        _ => flip(x, before, spacing(Units::of(dtype), x)),
    }
}

/// The same of an operand of a product.
fn flip_as(kind: ActivationType, x: f64, before: f64) -> f64 {
    match kind {
        ActivationType::F16 => flip_of(DType::F16, x, before),
        ActivationType::BF16 => flip_of(DType::BF16, x, before),
        _ => 0.0,
    }
}

/// The variances of activations of the slack `before` after they have been rounded to `kind`.
fn after_rounding(kind: ActivationType, row: &[f64], before: &[f32]) -> Vec<f64> {
    let mut variances = Vec::with_capacity(row.len());
    let len = kind.block_len();
    for (x, before) in row.chunks(len).zip(before.chunks(len)) {
        let largest = (0..x.len()).max_by(|&i, &j| x[i].abs().total_cmp(&x[j].abs()));
        let (max, off) = largest.map_or((0.0, 0.0), |i| (x[i].abs(), f64::from(before[i])));
        let step = max / 127.0;
        // The scale of a block of 32 is kept in f16: with it all of the block moves to one side.
        let scale = match kind {
            ActivationType::Q8_0 | ActivationType::Q8_1 => {
                flip_of(DType::F16, step, off / 127.0) / step.max(f64::MIN_POSITIVE)
            }
            _ => 0.0,
        };
        for (&x, &before) in x.iter().zip(before) {
            let before = f64::from(before);
            let flip = match kind {
                _ if len == 1 => flip_as(kind, x, before),
                // The sum of the block is kept in f16 as well, and moves with every element.
                ActivationType::Q8_1 if before > 0.0 => step,
                // An element moves against its thresholds also when the largest does.
                _ if max > 0.0 => flip(x, before + off * x.abs() / max, step),
                _ => 0.0,
            };
            let with_scale = len as f64 * (scale * x).powi(2);
            variances.push(squares([before, flip]) + with_scale);
        }
    }
    variances
}

/// What the cache does to the slack of a key or value.
pub(crate) fn rounded(kv: DType, x: &Tensor<f64>, slack: Option<&[f32]>) -> Vec<f32> {
    let one = |(i, &x): (usize, &f64)| match at(slack, i) {
        0.0 => 0.0,
        b => root(squares([b, flip_of(kv, x, b)])),
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

/// The logits of a row, as far as an engine can tell them apart: it may compare their softmax, whose numbers are rounded,
/// and of which all that underflow are the same.
#[derive(Debug)]
pub(crate) struct Choice<'a> {
    pub(crate) logits: &'a [f64],
    before: Option<&'a [f32]>,
    max: f64,
}

impl<'a> Choice<'a> {
    /// How far below the largest a logit is whose power is below the smallest normal number of f32.
    const UNDERFLOW: f64 = 87.0;

    pub(crate) fn new(logits: &'a [f64], before: Option<&'a [f32]>) -> Self {
        Self { logits, before, max: logits.iter().copied().fold(f64::NEG_INFINITY, f64::max) }
    }

    /// Whether there is an order: among NaN there is none.
    pub(crate) fn is_ordered(&self) -> bool {
        self.max.is_finite() && !self.logits.iter().any(|x| x.is_nan())
    }

    /// By how much the logit of expert `a` is larger than that of `b`, and the standard deviation of that.
    pub(crate) fn lead(&self, a: usize, b: usize) -> (f64, f64) {
        let below = |id: usize| (self.max - self.logits[id]).min(Self::UNDERFLOW);
        let off = |id: usize| (F32 * (8.0 + below(id))).hypot(at(self.before, id));
        (below(b) - below(a), off(a).hypot(off(b)))
    }

    /// Whether `id` may have been another one in its slot: in a set, or in the order of one.
    fn is_open(&self, id: usize) -> bool {
        let near = |(lead, off): (f64, f64)| lead.abs() <= REACH * off;
        !self.is_ordered()
            || (0..self.logits.len()).any(|other| other != id && near(self.lead(id, other)))
    }
}

/// The slack of the `ids` chosen by `logits`: a choice is certain, or nobody knows it.
pub(crate) fn choice(logits: &Tensor<f64>, before: Option<&[f32]>, ids: &Tensor<f64>) -> Vec<f32> {
    let experts = logits.cols();
    let of_row = |(row, (x, ids)): (usize, (&[f64], &[f64]))| {
        let before = before.map(|before| &before[row * experts..][..experts]);
        let choice = Choice::new(x, before);
        let slack = |&id: &f64| if choice.is_open(id as usize) { UNKNOWN } else { 0.0 };
        ids.iter().map(slack).collect::<Vec<_>>()
    };
    logits.rows().zip(ids.rows()).enumerate().flat_map(of_row).collect()
}

/// The softmax of the chosen logits, over all or over the chosen ones only.
pub(crate) fn route_weights(
    units: &Units,
    logits: &Tensor<f64>,
    before: Option<&[f32]>,
    (ids, ids_slack): (&Tensor<f64>, Option<&[f32]>),
    normalize: bool,
    y: &Tensor<f64>,
) -> Vec<f32> {
    let (experts, k) = (logits.cols(), ids.cols());
    let mut slack = Vec::with_capacity(y.data.len());
    for (row, (x, ids)) in logits.rows().zip(ids.rows()).enumerate() {
        let off = |id: usize| at(before, row * experts + id);
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let powers: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
        let chosen = ids.iter().map(|&id| id as usize);
        let summed: Vec<usize> =
            if normalize { chosen.clone().collect() } else { (0..experts).collect() };
        let sum: f64 = summed.iter().map(|&id| powers[id]).sum();
        let shared: f64 = summed.iter().map(|&id| (powers[id] / sum * off(id)).powi(2)).sum();
        for (slot, id) in chosen.enumerate() {
            let y = y.data[row * k + slot];
            // As in attention. The sum over all experts cancels where the chosen ones are divided by their own.
            let own = F32 * (8.0 + (x[id] - max).abs() + (summed.len() as f64).sqrt());
            let moved = squares([off(id)]) + shared;
            let another = at(ids_slack, row * k + slot).powi(2);
            slack.push(root(y * y * (own * own + moved) + units.kept(2.0, y).powi(2) + another));
        }
    }
    slack
}

/// The sum over the slots of `x`, each times its weight.
pub(crate) fn weighted_sum(
    units: &Units,
    [x, weights]: [&Tensor<f64>; 2],
    [x_slack, w_slack]: [Option<&[f32]>; 2],
    y: &Tensor<f64>,
) -> Vec<f32> {
    let (k, width) = (weights.cols(), x.cols());
    // Engines that keep results in a narrower type keep the products and the sums on the way in it.
    let unit = units.output.max(F32);
    let walk = unit * (k as f64).sqrt();
    let mut slack = Vec::with_capacity(y.data.len());
    for (i, &y) in y.data.iter().enumerate() {
        let (row, column) = (i / width, i % width);
        let (mut products, mut moved) = (0.0, 0.0);
        for slot in row * k..(row + 1) * k {
            let (x, w) = (x.data[slot * width + column], weights.data[slot]);
            products += (x * w).powi(2);
            moved += squares([w * at(x_slack, slot * width + column), x * at(w_slack, slot)]);
        }
        // Each product is rounded by itself, and then each sum.
        let own = [unit * products.sqrt(), walk * (products.sqrt() + y.abs())];
        slack.push(root(squares(own) + units.kept(1.0, y).powi(2) + moved));
    }
    slack
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
                        let flip = flip_as(self.arithmetic.queries, q[c], b);
                        let dk = at(self.kv_slack.map(|[k, _]| k), start + c);
                        moved += k[c] * k[c] * squares([b, flip]) + q[c] * q[c] * dk * dk;
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
                let dp = squares([dp, flip_as(self.arithmetic.probabilities, p, dp)]);
                let start = self.at(j, h);
                for c in 0..head_dim {
                    let v = self.values[start + c];
                    let dv = at(self.kv_slack.map(|[_, v]| v), start + c);
                    products[c] += (p * v).powi(2);
                    moved[c] += v * v * dp + p * p * dv * dv;
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

#[cfg(test)]
#[allow(clippy::print_stdout, reason = "how generous slack is, for those who ask with --nocapture")]
mod tests;
