//! Engines of our own, in f32 and in several orders of summation, against what slack allows them.

use apr_model::{AttentionInner, Backend, KvShape, RopeFrequencies};
use apr_reference::{Arithmetic, Reference, Tensor};
use apr_tensor::Bytes;
use half::{bf16, f16};

use super::*;
use crate::judge::{Bound, Compared, Place, Record};

const UNITS: Units =
    Units { product: F32, attention: F32, output: F32, captured: 0.0, weights: 0.0 };

/// A linear congruential generator: the same numbers in every run.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// About normal.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }

    /// Numbers of f32 with two channels a thousand times larger than the others, as trained models have them.
    fn massive(&mut self, shape: impl Into<Vec<usize>>) -> Tensor<f64> {
        let mut x = Tensor::zeros(shape);
        let cols = x.cols();
        for (i, x) in x.data.iter_mut().enumerate() {
            let scale = if [3, cols / 2].contains(&(i % cols)) { 1000.0 } else { 1.0 };
            *x = f64::from((self.normal() * scale) as f32);
        }
        x
    }

    fn plain(&mut self, shape: impl Into<Vec<usize>>) -> Tensor<f64> {
        let mut x = Tensor::zeros(shape);
        x.data.iter_mut().for_each(|x| *x = f64::from(self.normal() as f32));
        x
    }
}

/// A sum in f32.
type Sum = fn(&[f32]) -> f32;

const ORDERS: [(&str, Sum); 5] = [
    ("forward", |x| x.iter().sum()),
    ("reverse", |x| x.iter().rev().sum()),
    ("in 8 lanes", |x| lanes::<8>(x)),
    ("in 32 lanes", |x| lanes::<32>(x)),
    ("pairwise", pairwise),
];

fn lanes<const N: usize>(x: &[f32]) -> f32 {
    let mut lanes = [0.0; N];
    x.iter().enumerate().for_each(|(i, x)| lanes[i % N] += x);
    lanes.iter().sum()
}

fn pairwise(x: &[f32]) -> f32 {
    match x {
        [] => 0.0,
        [x] => *x,
        x => {
            let (a, b) = x.split_at(x.len() / 2);
            pairwise(a) + pairwise(b)
        }
    }
}

fn record(engine: &[f32], expected: &Tensor<f64>, slack: &[f32]) -> Record {
    let mut record = Record::default();
    let cols = expected.cols();
    for (position, expected) in expected.rows().enumerate() {
        let part = position * cols..(position + 1) * cols;
        let captured: Vec<f64> = engine[part.clone()].iter().map(|&x| x.into()).collect();
        let compared = Compared {
            captured: &captured,
            exact: expected,
            emulated: expected,
            slack: Some(&slack[part]),
        };
        let place = Place { position, ..Place::default() };
        let sums = record.add(place, compared);
        record.rows.push((0, position, sums));
    }
    record
}

fn excess(engine: &[f32], expected: &Tensor<f64>, slack: &[f32]) -> f64 {
    let record = record(engine, expected, slack);
    record.worst(Bound::for_comparisons(record.elements as f64)).excess
}

/// That the engine's values are within what slack allows, that slack is not more than `generous` times what it does, and that an
/// element off by twenty times its slack is beyond.
#[track_caller]
fn assert_allows(what: &str, engine: &[f32], expected: &Tensor<f64>, slack: &[f32], generous: f64) {
    let found = excess(engine, expected, slack);
    let ratio = record(engine, expected, slack).whole.ratio();
    assert!(found <= 1.0, "{what}: an excess of {found}");
    assert!(ratio * generous >= 1.0, "{what}: slack is {:.0} times the error", 1.0 / ratio);
    let mut wrong = engine.to_vec();
    let i = wrong.len() / 3;
    wrong[i] = (expected.data[i] + 20.0 * f64::from(slack[i])) as f32;
    let found = excess(&wrong, expected, slack);
    assert!(found > 1.0, "{what}: 20 times the slack of an element is an excess of {found}");
}

fn single(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

fn stored(w: &Tensor<f64>) -> Stored {
    let bytes: Vec<u8> = w.data.iter().flat_map(|&w| (w as f32).to_le_bytes()).collect();
    Stored::new(DType::F32, apr_tensor::Shape::new(w.shape.clone()), Bytes::from(bytes)).unwrap()
}

fn exact() -> Reference<f64> {
    Reference::new(Arithmetic::EXACT)
}

#[test]
fn units_and_spacings_are_those_of_the_float_types() {
    assert_eq!(Units::of(DType::F16), f16::EPSILON.to_f64() / 2.0);
    assert_eq!(Units::of(DType::BF16), bf16::EPSILON.to_f64() / 2.0);
    for bits in (1..0x7bff).step_by(7) {
        let (x, next) = (f16::from_bits(bits).to_f64(), f16::from_bits(bits + 1).to_f64());
        assert_eq!(spacing(Units::of(DType::F16), x), next - x, "{x:e}");
        let between = x + 0.49 * (next - x);
        assert!(rounding(Units::of(DType::F16), between) >= between - x, "{between:e}");
    }
    // Subnormal numbers of bf16 are those of f32.
    for bits in (0x0080..0x7f7f).step_by(7) {
        let (x, next) = (bf16::from_bits(bits).to_f64(), bf16::from_bits(bits + 1).to_f64());
        assert_eq!(spacing(Units::of(DType::BF16), x), next - x, "{x:e}");
    }
}

#[test]
fn products_with_a_matrix_in_any_order() {
    let mut random = Random(1);
    for width in [33, 256, 896] {
        let (x, w) = (random.massive([9, width]), random.plain([40, width]));
        let y = exact().linear(&x, &vec![stored(&w)]).unwrap();
        let rows: Vec<_> = w.rows().map(|row| WeightRow::certain(&single(row))).collect();
        let slack = linear(&UNITS, &x, &rows, &y);
        for (order, sum) in ORDERS {
            let mut engine = Vec::new();
            for x in x.rows() {
                engine.extend(w.rows().map(|w| {
                    let products: Vec<f32> =
                        x.iter().zip(w).map(|(&x, &w)| x as f32 * w as f32).collect();
                    sum(&products)
                }));
            }
            assert_allows(&format!("{width} products {order}"), &engine, &y, &slack, 100.0);
        }
    }
}

#[test]
fn what_goes_through_a_matrix_after_rounding_to_eight_bits() {
    let mut random = Random(2);
    let (x, w) = (random.massive([16, 256]), random.plain([64, 256]));
    let parts = vec![stored(&w)];
    let before: Vec<f32> = x.data.iter().map(|x| (x.abs() * 1e-5) as f32 + 1e-6).collect();
    for kind in
        [ActivationType::F32, ActivationType::F16, ActivationType::Q8_0, ActivationType::Q8_K]
    {
        let engine = Reference::<f64>::new(Arithmetic {
            activations: apr_reference::Activations::All(kind),
            ..Arithmetic::EXACT
        });
        let y = engine.linear(&x, &parts).unwrap();
        let rows: Vec<_> = w.rows().map(|row| WeightRow::certain(&single(row))).collect();
        let mut slack = linear(&UNITS, &x, &rows, &y);
        through_linear(&mut slack, &x, &before, &parts, |_| kind).unwrap();
        let mut moved = x.clone();
        for (x, &before) in moved.data.iter_mut().zip(&before) {
            *x = f64::from((*x + random.normal() * f64::from(before)) as f32);
        }
        let moved = single(&engine.linear(&moved, &parts).unwrap().data);
        // A step that may be taken is allowed whether it is taken or not, and steps are large beside massive channels.
        assert_allows(
            &format!("{kind} activations that are not certain"),
            &moved,
            &y,
            &slack,
            1000.0,
        );
    }
}

#[test]
fn norms_in_any_order() {
    let mut random = Random(3);
    for width in [64, 896] {
        let (x, w) = (random.massive([9, width]), random.plain([1, width]).data);
        let y = exact().rms_norm(&x, &w, 1e-6).unwrap();
        let slack = rms_norm(&UNITS, &x, None, &w, 1e-6, &y);
        for (order, sum) in ORDERS {
            let mut engine = Vec::new();
            for x in x.rows() {
                let squares: Vec<f32> = x.iter().map(|&x| x as f32 * x as f32).collect();
                let scale = 1.0 / (sum(&squares) / width as f32 + 1e-6f32).sqrt();
                engine.extend(x.iter().zip(&w).map(|(&x, &w)| x as f32 * scale * w as f32));
            }
            assert_allows(&format!("norm of {width} {order}"), &engine, &y, &slack, 100.0);
        }
    }
}

#[test]
fn rotations_by_angles_from_a_recurrence() {
    let mut random = Random(4);
    let (heads, head_dim, n) = (3, 64, 300);
    let x = random.massive([n, heads, head_dim]);
    let table = RopeFrequencies::new(1e4, head_dim).table(0..n);
    let y = exact().rope(&x, &table).unwrap();
    let slack = rope(&UNITS, &x, None, &table);
    // As ggml does: each frequency is the one before times a constant, all in f32.
    let step = 1e4f32.powf(-2.0 / head_dim as f32);
    let mut engine = single(&x.data);
    for (row, head) in engine.chunks_exact_mut(head_dim).enumerate() {
        let mut angle = (row / heads) as f32;
        for i in 0..head_dim / 2 {
            let (a, b) = (head[i], head[i + head_dim / 2]);
            head[i] = a * angle.cos() - b * angle.sin();
            head[i + head_dim / 2] = b * angle.cos() + a * angle.sin();
            angle *= step;
        }
    }
    assert_allows("rotation", &engine, &y, &slack, 100.0);
}

#[test]
fn gates_and_sums() {
    let mut random = Random(5);
    let (mut gate, up) = (random.plain([9, 300]), random.massive([9, 300]));
    // Far into both tails.
    gate.data.iter_mut().for_each(|x| *x = f64::from((*x * 12.0) as f32));
    let silu_exact = Tensor {
        shape: gate.shape.clone(),
        data: gate.data.iter().map(|x| x / (1.0 + (-x).exp())).collect(),
    };
    let slack = silu(&UNITS, &gate, None, &silu_exact);
    let engine: Vec<f32> = single(&gate.data).iter().map(|x| x / (1.0 + (-x).exp())).collect();
    assert_allows("silu", &engine, &silu_exact, &slack, 100.0);

    let y = silu_exact.zip(&up, |silu, up| silu * up);
    let slack = product(&UNITS, [&silu_exact, &up], [Some(&slack), None], &y);
    let gated: Vec<f32> = engine.iter().zip(&up.data).map(|(silu, &up)| silu * up as f32).collect();
    assert_allows("gate times up", &gated, &y, &slack, 100.0);

    let y = gate.zip(&up, |a, b| a + b);
    let engine: Vec<f32> =
        gate.data.iter().zip(&up.data).map(|(&a, &b)| a as f32 + b as f32).collect();
    assert_allows("sum", &engine, &y, &sum(&UNITS, &y, [None, None]), 100.0);
}

#[test]
fn attention_in_any_order_and_in_one_pass() {
    let mut random = Random(6);
    let (n, heads, kv_heads, head_dim) = (40, 4, 2, 32);
    let q = random.massive([n, heads, head_dim]);
    let [k, v] = [0, 1].map(|_| random.plain([n, kv_heads, head_dim]));
    let scale = 0.01;
    let mut kv = exact().kv(KvShape { heads: kv_heads, head_dim }, n).unwrap();
    exact().kv_append(&mut kv, &k, &v).unwrap();
    let mut inner = AttentionInner::default();
    (inner.scores.spill, inner.softmax.spill) = (true, true);
    let attended = exact().attention(&q, &kv, scale, inner).unwrap();
    let (scores, softmax, out) =
        (attended.scores.unwrap(), attended.softmax.unwrap(), attended.out);
    let arithmetic = Arithmetic::EXACT;
    let slack = Attention {
        units: &UNITS,
        arithmetic: &arithmetic,
        q: &q,
        q_slack: None,
        keys: kv.keys(),
        values: kv.values(),
        kv_slack: None,
        kv_heads,
        scale,
    };
    let scores_slack = slack.scores(&scores);
    let softmax_slack = slack.softmax(&scores, Some(&scores_slack), &softmax);
    let out_slack = slack.out(&softmax, Some(&softmax_slack), &out);
    for (order, sum) in ORDERS {
        let mut engine = [vec![0.0; scores.data.len()], vec![0.0; softmax.data.len()]];
        let mut engine_out = vec![0.0; out.data.len()];
        for row in 0..heads * n {
            let (h, i) = (row / n, row % n);
            let head = |j: usize| (j * kv_heads + h / 2) * head_dim;
            let q = &q.data[(i * heads + h) * head_dim..][..head_dim];
            let of_row: Vec<f32> = (0..=i)
                .map(|j| {
                    let k = &k.data[head(j)..][..head_dim];
                    let products: Vec<f32> =
                        q.iter().zip(k).map(|(&q, &k)| q as f32 * k as f32).collect();
                    sum(&products) * scale as f32
                })
                .collect();
            let max = of_row.iter().copied().fold(f32::MIN, f32::max);
            let powers: Vec<f32> = of_row.iter().map(|s| (s - max).exp()).collect();
            let total = sum(&powers);
            let shares: Vec<f32> = powers.iter().map(|p| p / total).collect();
            for c in 0..head_dim {
                let products: Vec<f32> = match order {
                    // The one-pass form divides last.
                    "forward" => (0..=i).map(|j| powers[j] * v.data[head(j) + c] as f32).collect(),
                    _ => (0..=i).map(|j| shares[j] * v.data[head(j) + c] as f32).collect(),
                };
                let by = if order == "forward" { total } else { 1.0 };
                engine_out[(i * heads + h) * head_dim + c] = sum(&products) / by;
            }
            engine[0][row * n..][..=i].copy_from_slice(&of_row);
            engine[1][row * n..][..=i].copy_from_slice(&shares);
        }
        assert!(excess(&engine[0], &scores, &scores_slack) <= 1.0, "scores {order}");
        assert!(excess(&engine[1], &softmax, &softmax_slack) <= 1.0, "softmax {order}");
        assert_allows(&format!("attention {order}"), &engine_out, &out, &out_slack, 200.0);
        // A masked entry has no slack at all.
        engine[1][n - 1] = 1e-30;
        assert!(excess(&engine[1], &softmax, &softmax_slack) > 1.0, "a masked key is looked at");
    }
}

#[test]
fn weights_of_experts_and_their_sum_in_any_order() {
    let mut random = Random(7);
    let (n, experts, k, width) = (40, 64, 8, 96);
    let mut logits = random.plain([n, experts]);
    logits.data.iter_mut().for_each(|x| *x = f64::from((*x * 4.0) as f32));
    let ids = exact().top_k(&logits, k).unwrap();
    let x = random.massive([n, k, width]);
    for normalize in [true, false] {
        let weights = exact().route_weights(&logits, &ids, normalize).unwrap();
        let slack = route_weights(&UNITS, &logits, None, (&ids, None), normalize, &weights);
        let y = exact().weighted_sum(&x, &weights).unwrap();
        let sum_slack = weighted_sum(&UNITS, [&x, &weights], [None, Some(&slack)], &y);
        for (order, sum) in ORDERS {
            let (mut engine, mut engine_sum) = (Vec::new(), Vec::new());
            for (row, (logits, ids)) in logits.rows().zip(ids.rows()).enumerate() {
                let logits = single(logits);
                let max = logits.iter().copied().fold(f32::MIN, f32::max);
                let powers: Vec<f32> = logits.iter().map(|x| (x - max).exp()).collect();
                // As llama.cpp does: over all, by the inverse, and then over the chosen ones.
                let scale = 1.0 / sum(&powers);
                let mut chosen: Vec<f32> =
                    ids.iter().map(|&id| powers[id as usize] * scale).collect();
                if normalize {
                    let total = sum(&chosen);
                    chosen.iter_mut().for_each(|p| *p /= total);
                }
                for c in 0..width {
                    let products: Vec<f32> = (0..k)
                        .map(|slot| chosen[slot] * x.data[(row * k + slot) * width + c] as f32)
                        .collect();
                    engine_sum.push(sum(&products));
                }
                engine.extend(chosen);
            }
            let what = format!("{order}, normalised: {normalize}");
            assert_allows(&format!("weights {what}"), &engine, &weights, &slack, 100.0);
            assert_allows(&format!("sums {what}"), &engine_sum, &y, &sum_slack, 100.0);
        }
    }
}

#[test]
fn a_choice_is_open_where_another_expert_is_nearer_than_the_slack_reaches() {
    let logits =
        Tensor { shape: vec![2, 4], data: vec![3.0, 2.0, 2.0 - 1e-7, 0.0, 3.0, 2.0, 1.0, 0.0] };
    let ids = exact().top_k(&logits, 2).unwrap();
    assert_eq!(choice(&logits, None, &ids), [0.0, UNKNOWN, 0.0, 0.0]);
    // What the logits were computed from was not captured: the first two of the second row are as near.
    let before: Vec<f32> = vec![0.0, 0.0, 0.0, 0.0, 0.2, 0.2, 0.0, 0.0];
    assert_eq!(choice(&logits, Some(&before), &ids), [0.0, UNKNOWN, UNKNOWN, UNKNOWN]);
}

#[test]
fn what_nobody_knows_stays_unknown_on_its_way_and_touches_nothing_else() {
    let mut random = Random(8);
    let (x, w) = (random.plain([2, 64]), random.plain([32, 64]));
    let parts = vec![stored(&w)];
    let y = exact().linear(&x, &parts).unwrap();
    let rows: Vec<_> = w.rows().map(|row| WeightRow::certain(&single(row))).collect();
    let mut slack = linear(&UNITS, &x, &rows, &y);
    let before: Vec<f32> = (0..128).map(|i| if i < 64 { UNKNOWN } else { 0.0 }).collect();
    through_linear(&mut slack, &x, &before, &parts, |_| ActivationType::Q8_0).unwrap();
    let norm = rms_norm(&UNITS, &y, Some(&slack), &[1.0; 32], 1e-6, &y);
    for slack in [&slack, &norm] {
        assert!(
            slack[..32].iter().all(|&s| is_unknown(s)) && slack[32..].iter().all(|&s| s < 1e-3)
        );
    }
}
