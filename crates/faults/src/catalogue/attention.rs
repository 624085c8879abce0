//! The mask, the cache, the softmax: who sees whom, and as what.

use apr_model::{HostTensor, Result, Stage};
use half::bf16;

use crate::{
    Fault,
    fault::{Family, OpFault, Plant},
    op::{Attended, Attention, row_len},
};

const fn attention(
    name: &'static str,
    stages: &'static [Stage],
    damage: fn(&Attention<'_>) -> Result<Attended>,
    about: &'static str,
) -> Fault {
    Fault::new(name, Family::Attention, stages, Plant::Op(OpFault::Attention(damage)), about)
}

const SCORES: &[Stage] = &[Stage::AttnScores];
const SOFTMAX: &[Stage] = &[Stage::AttnSoftmax];
const OUT: &[Stage] = &[Stage::Attention];

pub(super) const FAULTS: &[Fault] = &[
    attention("mask-sees-next", SCORES, sees_next, "Each token sees the one after it.").diagnosed(&["mask-off-by-one"]),
    attention("mask-misses-itself", SCORES, misses_itself, "A token does not see itself.").diagnosed(&["mask-off-by-one"]),
    attention("mask-missing", SCORES, no_mask, "Every token sees the whole step.").diagnosed(&["mask-missing"]),
    attention("mask-after-chunk", SCORES, after_chunk, "After the first step the mask counts from the step's own beginning.").diagnosed(&["mask-without-offset"]),
    attention("mask-window", SCORES, window, "Tokens see only the last 16, or the last 4.").graded().diagnosed(&["mask-window"]),
    attention("mask-first-token", SCORES, forgets_first, "The first token is forgotten.").diagnosed(&["first-key-missing"]),
    attention("scale-missing", SCORES, scale_missing, "Scores are not scaled.").diagnosed(&["scores-unscaled"]),
    attention("scale-twice", SCORES, scale_twice, "Scores are scaled twice.").diagnosed(&["scores-scaled-twice"]),
    attention("scale-by-hidden", SCORES, scale_by_hidden, "Scores are scaled by the hidden size instead of the head's.").diagnosed(&["scores-scale"]),
    attention("head-map-modulo", SCORES, head_map, "Query head h reads key head h mod n instead of h div group.").also(OUT).diagnosed(&["head-map"]),
    attention("key-heads-swapped", SCORES, key_heads_swapped, "Keys are cached under the wrong head.").diagnosed(&["kv-in-other-head"]),
    attention("value-heads-swapped", OUT, value_heads_swapped, "Values are cached under the wrong head.").diagnosed(&["kv-in-other-head", "value-head-map"]),
    attention("key-row-stale", SCORES, key_stale, "The cache's row of a position holds the key of the one before: at one, or from half-way on.").graded().diagnosed(&["stale-kv-row", "kv-rows-shifted"]),
    attention("value-row-stale", OUT, value_stale, "The same of values.").graded().diagnosed(&["stale-kv-row", "kv-rows-shifted"]),
    attention("values-rolled", OUT, values_rolled, "Each position's value is that of its neighbour.").diagnosed(&["kv-rows-shifted"]),
    attention("keys-rolled", SCORES, keys_rolled, "Each position's key is that of its neighbour.").diagnosed(&["kv-rows-shifted"]),
    attention("key-never-written", SCORES, key_zero, "The cache's row of a position was never written.").graded().diagnosed(&["stale-kv-row", "all-zeros"]),
    attention("key-overflows", SCORES, key_overflows, "The largest channel of a key overflows f16 in the cache.").diagnosed(&["f16-overflow", "nan-origin"]),
    attention("cache-bf16", SCORES, cache_bf16, "Keys and values are cached in bf16, though the engine says otherwise.").also(OUT),
    attention("cache-8-bit", SCORES, cache_8_bit, "Keys and values are cached in 8 bits, though the engine says otherwise.").also(OUT),
    attention("softmax-not-normalised", SOFTMAX, not_normalised, "Softmax does not divide by the sum.").diagnosed(&["softmax-not-normalised"]),
    attention("softmax-over-padding", SOFTMAX, over_padding, "The sum of softmax runs over a padded row.").graded().diagnosed(&["softmax-over-padding"]),
    attention("softmax-base-2", SOFTMAX, base_2, "Softmax takes powers of 2 without scaling the scores for that.").diagnosed(&["softmax-temperature"]),
    attention("softmax-f16", SOFTMAX, softmax_f16, "Softmax is kept in half precision."),
    attention("heads-interleaved", OUT, interleaved, "Heads are written channel by channel instead of one after the other.").diagnosed(&["heads-not-transposed"]),
    attention("head-left-zero", OUT, head_zero, "The last head is never written.").diagnosed(&["all-zeros"]),
    attention("heads-exchanged", OUT, heads_exchanged, "The first two heads are written in each other's place.").diagnosed(&["channels-exchanged"]),
];

fn sees_next(op: &Attention<'_>) -> Result<Attended> {
    op.masked(|position| (0..op.cached().min(position + 2)).collect())
}

fn misses_itself(op: &Attention<'_>) -> Result<Attended> {
    // The first token has nobody else to see.
    op.masked(|position| (0..position.max(1)).collect())
}

fn no_mask(op: &Attention<'_>) -> Result<Attended> {
    op.masked(|_| (0..op.cached()).collect())
}

fn after_chunk(op: &Attention<'_>) -> Result<Attended> {
    op.masked(|position| (0..=position - op.first()).collect())
}

fn window(op: &Attention<'_>) -> Result<Attended> {
    let width = op.place.pick(16, 4);
    op.masked(|position| ((position + 1).saturating_sub(width)..=position).collect())
}

fn forgets_first(op: &Attention<'_>) -> Result<Attended> {
    op.masked(|position| (position.min(1)..=position).collect())
}

fn scale_missing(op: &Attention<'_>) -> Result<Attended> {
    op.scaled(1.0)
}

fn scale_twice(op: &Attention<'_>) -> Result<Attended> {
    op.scaled(op.scale * op.scale)
}

fn scale_by_hidden(op: &Attention<'_>) -> Result<Attended> {
    op.scaled(1.0 / (op.place.config.hidden_size as f64).sqrt())
}

/// Rows of heads with head `from(h)` in place of head `h`, of `heads` heads.
fn heads(x: &HostTensor, heads: usize, from: impl Fn(usize) -> usize) -> HostTensor {
    let head_dim = x.shape[2];
    let row = |row: &[f64]| {
        (0..heads).flat_map(|h| row[from(h) * head_dim..][..head_dim].to_vec()).collect::<Vec<_>>()
    };
    let values = x.values.chunks_exact(row_len(x)).flat_map(row).collect();
    HostTensor { shape: vec![x.shape[0], heads, head_dim], values }
}

fn head_map(op: &Attention<'_>) -> Result<Attended> {
    // A key head for each query head, then.
    let (q_heads, kv_heads) = (op.q.shape[1], op.k.shape[1]);
    let mapped = |x: &HostTensor| heads(x, q_heads, |h| h % kv_heads);
    op.over(&mapped(&op.k), &mapped(&op.v))
}

fn swapped(x: &HostTensor) -> HostTensor {
    let count = x.shape[1];
    heads(x, count, |h| (h + 1) % count)
}

fn key_heads_swapped(op: &Attention<'_>) -> Result<Attended> {
    op.over(&swapped(&op.k), &op.v)
}

fn value_heads_swapped(op: &Attention<'_>) -> Result<Attended> {
    op.over(&op.k, &swapped(&op.v))
}

/// The positions that a fault of single positions strikes: one early one, which all steps see, or all from half-way on.
fn struck(op: &Attention<'_>, x: &HostTensor) -> Vec<usize> {
    let one = 1 + op.place.rng().below(8);
    op.place.pick((one..one + 1).collect(), (8..x.shape[0]).collect())
}

fn stale(op: &Attention<'_>, x: &HostTensor) -> HostTensor {
    let (len, right) = (row_len(x), x);
    let mut x = x.clone();
    for row in struck(op, right) {
        if row < x.shape[0] {
            x.values[row * len..][..len].copy_from_slice(&right.values[(row - 1) * len..][..len]);
        }
    }
    x
}

fn key_stale(op: &Attention<'_>) -> Result<Attended> {
    op.over(&stale(op, &op.k), &op.v)
}

fn value_stale(op: &Attention<'_>) -> Result<Attended> {
    op.over(&op.k, &stale(op, &op.v))
}

fn rolled(x: &HostTensor) -> HostTensor {
    let mut rolled = x.clone();
    rolled.values.rotate_right(row_len(x));
    rolled
}

fn values_rolled(op: &Attention<'_>) -> Result<Attended> {
    op.over(&op.k, &rolled(&op.v))
}

fn keys_rolled(op: &Attention<'_>) -> Result<Attended> {
    op.over(&rolled(&op.k), &op.v)
}

fn key_zero(op: &Attention<'_>) -> Result<Attended> {
    let mut k = op.k.clone();
    let len = row_len(&k);
    for row in struck(op, &op.k) {
        k.values.chunks_exact_mut(len).skip(row).take(1).for_each(|row| row.fill(0.0));
    }
    op.over(&k, &op.v)
}

fn key_overflows(op: &Attention<'_>) -> Result<Attended> {
    let mut k = op.k.clone();
    let largest =
        (0..k.values.len()).max_by(|&a, &b| k.values[a].abs().total_cmp(&k.values[b].abs()));
    if let Some(largest) = largest {
        k.values[largest] = k.values[largest].signum() * f64::INFINITY;
    }
    op.over(&k, &op.v)
}

fn cache_bf16(op: &Attention<'_>) -> Result<Attended> {
    let round = |x: &HostTensor| HostTensor {
        shape: x.shape.clone(),
        values: x.values.iter().map(|&x| bf16::from_f64(x).to_f64()).collect(),
    };
    op.over(&round(&op.k), &round(&op.v))
}

fn cache_8_bit(op: &Attention<'_>) -> Result<Attended> {
    let round = |x: &HostTensor| {
        let mut x = x.clone();
        for block in x.values.chunks_mut(32) {
            let most = block.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
            if most > 0.0 {
                block.iter_mut().for_each(|x| *x = (*x * 127.0 / most).round() * most / 127.0);
            }
        }
        x
    };
    op.over(&round(&op.k), &round(&op.v))
}

/// The attention with the visible part of each row of softmax made from the scores by `f`.
fn softmax(op: &Attention<'_>, f: impl Fn(&[f64], usize) -> Vec<f64>) -> Result<Attended> {
    let right = op.over(&op.k, &op.v)?;
    let [_, n, cached] = right.scores.shape[..] else { panic!("scores have heads") };
    let mut wrong = right.softmax;
    for (index, (row, scores)) in wrong
        .values
        .chunks_exact_mut(cached)
        .zip(right.scores.values.chunks_exact(cached))
        .enumerate()
    {
        let visible = op.first() + index % n + 1;
        row[..visible].copy_from_slice(&f(&scores[..visible], cached));
    }
    op.with_softmax(wrong)
}

fn exponentials(scores: &[f64], exp: fn(f64) -> f64) -> (f64, Vec<f64>) {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (max, scores.iter().map(|s| exp(s - max)).collect())
}

fn not_normalised(op: &Attention<'_>) -> Result<Attended> {
    softmax(op, |scores, _| exponentials(scores, libm::exp).1)
}

fn over_padding(op: &Attention<'_>) -> Result<Attended> {
    let to = op.place.pick(1, 32);
    softmax(op, |scores, cached| {
        let (max, exponentials) = exponentials(scores, libm::exp);
        // Padding has scores of 0.
        let padding = cached.next_multiple_of(to) - scores.len();
        let sum = exponentials.iter().sum::<f64>() + padding as f64 * libm::exp(-max);
        exponentials.iter().map(|e| e / sum).collect()
    })
}

fn base_2(op: &Attention<'_>) -> Result<Attended> {
    softmax(op, |scores, _| {
        let (_, exponentials) = exponentials(scores, libm::exp2);
        let sum: f64 = exponentials.iter().sum();
        exponentials.iter().map(|e| e / sum).collect()
    })
}

fn softmax_f16(op: &Attention<'_>) -> Result<Attended> {
    softmax(op, |scores, _| {
        let (_, exponentials) = exponentials(scores, libm::exp);
        let sum: f64 = exponentials.iter().sum();
        exponentials.iter().map(|e| half::f16::from_f64(e / sum).to_f64()).collect()
    })
}

fn interleaved(op: &Attention<'_>) -> Result<Attended> {
    written(op, |channel, heads, head_dim| channel % heads * head_dim + channel / heads)
}

fn heads_exchanged(op: &Attention<'_>) -> Result<Attended> {
    written(op, |channel, _, head_dim| match channel / head_dim {
        0 => channel + head_dim,
        1 => channel - head_dim,
        _ => channel,
    })
}

/// The attention with channel `from(c)` of the result in place of channel `c`.
fn written(op: &Attention<'_>, from: impl Fn(usize, usize, usize) -> usize) -> Result<Attended> {
    let mut attended = op.over(&op.k, &op.v)?;
    let [_, heads, head_dim] = op.q.shape[..] else { panic!("queries have heads") };
    for row in attended.out.values.chunks_exact_mut(heads * head_dim) {
        let right = row.to_vec();
        row.iter_mut().enumerate().for_each(|(c, y)| *y = right[from(c, heads, head_dim)]);
    }
    Ok(attended)
}

fn head_zero(op: &Attention<'_>) -> Result<Attended> {
    let mut attended = op.over(&op.k, &op.v)?;
    let head_dim = op.q.shape[2];
    let width = row_len(&attended.out);
    attended.out.values.chunks_exact_mut(width).for_each(|row| row[width - head_dim..].fill(0.0));
    Ok(attended)
}
