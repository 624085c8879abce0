//! What a step has to read and to multiply, whatever runs it: how near a run comes to a machine's limits is held against
//! this.
//!
//! Sizes are those of the file: a backend that keeps weights in another form may read more or less. Counted are matrix products
//! and attention, next to which norms and elementwise ops are small.

use std::{
    collections::BTreeSet,
    iter::Sum,
    ops::{Add, AddAssign},
};

use apr_format::Checkpoint;
use apr_tensor::DType;

use crate::{
    Backend, Config, MoeConfig, Plan, Result,
    bind::{Keeper, Named, bind},
    decoder::{Decoder, Ffn},
    model::Model,
};

/// What the steps of one model cost.
#[derive(Debug)]
pub struct Costs {
    decoder: Decoder<Vec<Size>, u64>,
    /// Bytes of the keys and values of one position.
    kv_bytes: u64,
    /// The types whose weights meet activations as integers.
    integer: BTreeSet<DType>,
}

/// What one step costs, or several together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of weights that must be read once per step; of a mixture, those of the chosen experts.
    pub weight_bytes: u64,
    /// Bytes of keys and values that must be read once per step.
    pub kv_bytes: u64,
    /// Products of weights and activations that are both integers, each with a sum.
    pub integer_multiply_adds: u64,
    /// The same of floats: other weights, and attention.
    pub float_multiply_adds: u64,
}

/// Some rows of a matrix, as the file has them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    dtype: DType,
    rows: u64,
    cols: u64,
    bytes: u64,
}

impl Costs {
    /// Those of `model`, which was loaded from `checkpoint`.
    pub fn of<B: Backend>(model: &Model<B>, checkpoint: &Checkpoint) -> Result<Self> {
        let decoder = bind(&Sizes, checkpoint)?;
        let kv = model.backend().info().kv;
        let row = kv.row_bytes(decoder.config.kv_dim()).unwrap_or(0) as u64;
        let kv_bytes = 2 * row * decoder.config.num_hidden_layers as u64;
        Ok(Self { decoder, kv_bytes, integer: integer_types(model.plan()) })
    }

    /// Bytes of a cache for `positions`.
    pub fn cache_bytes(&self, positions: usize) -> u64 {
        self.kv_bytes * positions as u64
    }

    /// What a step of `tokens` costs that follow `first_position` others, of which the last `logit_rows` get logits.
    ///
    /// How many experts so many tokens meet is known for one token only; for more it is what an even choice makes likely.
    pub fn step(&self, first_position: usize, tokens: usize, logit_rows: usize) -> Cost {
        let Decoder { config, embed_tokens, layers, norm, lm_head, .. } = &self.decoder;
        let (n, first) = (tokens as u64, first_position as u64);
        let mut cost = Cost { kv_bytes: self.kv_bytes * (first + n), ..Cost::default() };
        if lm_head.is_some() || logit_rows == 0 {
            // Else the head reads the rows that are looked up.
            cost.weight_bytes += rows_of(embed_tokens, n);
        }
        if logit_rows > 0 {
            cost += self.product(lm_head.as_ref().unwrap_or(embed_tokens), logit_rows as u64);
        }
        for layer in layers {
            let vectors = [&layer.qkv_bias, &layer.q_norm, &layer.k_norm];
            let vectors = vectors.into_iter().flatten().sum::<u64>();
            cost.weight_bytes += layer.attn_norm + layer.ffn_norm + vectors;
            cost += self.product(&layer.qkv, n);
            cost += self.product(&layer.attn_output, n);
            cost.float_multiply_adds += attention(config, first, n);
            match &layer.ffn {
                Ffn::Dense { gate, up, down } => {
                    cost += [gate, up, down].map(|w| self.product(w, n)).into_iter().sum();
                }
                Ffn::Moe { config, router, gate, up, down } => {
                    cost += self.product(router, n);
                    cost += [gate, up, down].map(|w| self.experts(w, n, config)).into_iter().sum();
                }
            }
        }
        cost.weight_bytes += norm;
        cost
    }

    /// `n` rows against all of `matrix`.
    fn product(&self, matrix: &[Size], n: u64) -> Cost {
        let part = |size: &Size| self.part(size, size.bytes, n * size.rows * size.cols);
        matrix.iter().map(part).sum()
    }

    /// `n` rows, each against its own experts of all that are in `matrix`.
    fn experts(&self, matrix: &[Size], n: u64, moe: &MoeConfig) -> Cost {
        let (experts, chosen) = (moe.num_experts as u64, moe.num_experts_per_tok as u64);
        let share = chosen as f64 / experts as f64;
        let met = match n {
            1 => share,
            n => 1.0 - (1.0 - share).powf(n as f64),
        };
        let part = |size: &Size| {
            let bytes = (size.bytes as f64 * met).round() as u64;
            self.part(size, bytes, n * chosen * size.rows * size.cols / experts)
        };
        matrix.iter().map(part).sum()
    }

    fn part(&self, size: &Size, weight_bytes: u64, multiply_adds: u64) -> Cost {
        match self.integer.contains(&size.dtype) {
            true => Cost { weight_bytes, integer_multiply_adds: multiply_adds, ..Cost::default() },
            false => Cost { weight_bytes, float_multiply_adds: multiply_adds, ..Cost::default() },
        }
    }
}

/// Bytes of `n` rows of an embedding.
fn rows_of(matrix: &[Size], n: u64) -> u64 {
    matrix.iter().map(|size| size.bytes / size.rows.max(1) * n).max().unwrap_or(0)
}

/// The products of one layer's scores and weighted sums: row `i` of `n` sees `first + i + 1` positions.
fn attention(config: &Config, first: u64, n: u64) -> u64 {
    let seen = n * first + n * (n + 1) / 2;
    2 * config.q_dim() as u64 * seen
}

/// The types of weights that `plan` multiplies with rounded activations.
fn integer_types(plan: &Plan) -> BTreeSet<DType> {
    let named = |name: &str| DType::all().find(|dtype| dtype.name() == name);
    let products = plan.ops().iter().filter(|op| op.op.ends_with("linear"));
    let pairs = products.flat_map(|op| {
        let rounded_to = &op.kernel.activations;
        let of = |i: usize| rounded_to.get(i).or(rounded_to.last());
        op.kernel.weights.iter().enumerate().filter_map(move |(i, w)| Some((w, of(i)?)))
    });
    pairs
        .filter(|(_, rounded_to)| named(rounded_to).is_some_and(DType::is_quantized))
        .filter_map(|(weights, _)| named(weights))
        .collect()
}

/// Keeps sizes only.
struct Sizes;

impl Keeper for Sizes {
    type Matrix = Vec<Size>;
    type Vector = u64;

    fn matrix(&self, parts: &[Named]) -> Result<Vec<Size>> {
        let size = |part: &Named| {
            let stored = part.in_file();
            Size {
                dtype: stored.dtype(),
                rows: stored.shape().rows() as u64,
                cols: stored.shape().cols() as u64,
                bytes: stored.bytes().len() as u64,
            }
        };
        Ok(parts.iter().map(size).collect())
    }

    fn vector(&self, parts: &[Named]) -> Result<u64> {
        Ok(parts.iter().map(|part| part.in_file().bytes().len() as u64).sum())
    }
}

impl Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            weight_bytes: self.weight_bytes + other.weight_bytes,
            kv_bytes: self.kv_bytes + other.kv_bytes,
            integer_multiply_adds: self.integer_multiply_adds + other.integer_multiply_adds,
            float_multiply_adds: self.float_multiply_adds + other.float_multiply_adds,
        }
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), Add::add)
    }
}
