//! What a difference of logits means for the tokens: the favourite, the best few, the distribution.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::metrics::option_number;

/// How far the predictions are apart, over the rows compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Logits {
    /// Rows in which both sides are free of NaN.
    pub rows: usize,
    /// Rows in which a side has a NaN: they take part in nothing here.
    pub rows_with_nan: usize,
    /// Rows in which both favour the same token.
    pub argmax_agree: usize,
    /// The first row in which they do not.
    pub first_disagreement: Option<Disagreement>,
    /// How many of the best tokens are compared.
    pub top_k: usize,
    /// The share of the best tokens that both sides have, averaged over rows.
    #[serde(serialize_with = "option_number")]
    pub top_k_overlap: Option<f64>,
    /// KL(reference || test) in nats, averaged over rows.
    #[serde(serialize_with = "option_number")]
    pub kl_mean: Option<f64>,
    /// The largest of them.
    #[serde(serialize_with = "option_number")]
    pub kl_max: Option<f64>,
    /// The position of that row.
    pub kl_max_position: Option<usize>,
}

/// Two sides that favour different tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Disagreement {
    /// The position of the row, where it is known.
    pub position: Option<usize>,
    /// The favourite of the side under test.
    pub a: usize,
    /// The favourite of the reference.
    pub b: usize,
    /// By how much the reference prefers its favourite to the other: a near-tie may flip without fault.
    pub reference_margin: f64,
}

/// Collects the rows of [`Logits`].
#[derive(Debug)]
pub(crate) struct LogitRows {
    logits: Logits,
    kl_sum: f64,
    overlap_sum: f64,
}

impl LogitRows {
    pub(crate) fn new(top_k: usize) -> Self {
        let logits = Logits {
            rows: 0,
            rows_with_nan: 0,
            argmax_agree: 0,
            first_disagreement: None,
            top_k,
            top_k_overlap: None,
            kl_mean: None,
            kl_max: None,
            kl_max_position: None,
        };
        Self { logits, kl_sum: 0.0, overlap_sum: 0.0 }
    }

    /// Takes in a row of logits of the side under test and of the reference.
    pub(crate) fn add(&mut self, position: Option<usize>, a: &[f64], b: &[f64]) {
        let logits = &mut self.logits;
        if a.is_empty() {
            return;
        }
        if a.iter().chain(b).any(|x| x.is_nan()) {
            logits.rows_with_nan += 1; // There is no distribution to speak of.
            return;
        }
        logits.rows += 1;
        let k = logits.top_k.clamp(1, a.len());
        let (best_a, best_b) = (best(a, k), best(b, k));
        let (top_a, top_b) = (best_a[0], best_b[0]);
        if top_a == top_b {
            logits.argmax_agree += 1;
        } else {
            logits.first_disagreement.get_or_insert_with(|| Disagreement {
                position,
                a: top_a,
                b: top_b,
                reference_margin: b[top_b] - b[top_a],
            });
        }
        let set: BTreeSet<_> = best_a.iter().collect();
        self.overlap_sum += best_b.iter().filter(|i| set.contains(i)).count() as f64 / k as f64;

        let kl = kl_divergence(b, a);
        self.kl_sum += kl;
        if logits.kl_max.is_none_or(|max| kl > max) {
            logits.kl_max = Some(kl);
            logits.kl_max_position = position;
        }
    }

    pub(crate) fn finish(self) -> Logits {
        let Self { mut logits, kl_sum, overlap_sum } = self;
        if logits.rows > 0 {
            logits.kl_mean = Some(kl_sum / logits.rows as f64);
            logits.top_k_overlap = Some(overlap_sum / logits.rows as f64);
        }
        logits
    }
}

/// The indices of the `k` largest values, largest first; of equal ones the first.
fn best(values: &[f64], k: usize) -> Vec<usize> {
    let order = |&i: &usize, &j: &usize| values[j].total_cmp(&values[i]).then(i.cmp(&j));
    let mut indices: Vec<usize> = (0..values.len()).collect();
    if k < indices.len() {
        indices.select_nth_unstable_by(k - 1, order);
        indices.truncate(k);
    }
    indices.sort_unstable_by(order);
    indices
}

/// KL(p || q) in nats, of the softmaxes of two rows of logits without NaN.
fn kl_divergence(p: &[f64], q: &[f64]) -> f64 {
    let (log_z_p, log_z_q) = (log_sum_exp(p), log_sum_exp(q));
    let sum: f64 = p
        .iter()
        .zip(q)
        .map(|(&p, &q)| {
            let log_p = p - log_z_p;
            match log_p.exp() {
                0.0 => 0.0,
                weight => weight * (log_p - (q - log_z_q)),
            }
        })
        .sum();
    // Never negative; rounding may say so.
    if sum.is_nan() { f64::INFINITY } else { sum.max(0.0) }
}

fn log_sum_exp(x: &[f64]) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + x.iter().map(|&v| (v - max).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare(a: &[f64], b: &[f64], k: usize) -> Logits {
        let mut rows = LogitRows::new(k);
        rows.add(Some(3), a, b);
        rows.finish()
    }

    #[test]
    fn kl_is_that_of_the_definition_and_stable_for_large_logits() {
        let (p, q) = ([0.25f64, 0.75], [0.5f64, 0.5]);
        let expected: f64 = p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum();
        for shift in [0.0, 1000.0, -5000.0] {
            let log = |x: [f64; 2], shift: f64| x.map(|x| x.ln() + shift);
            let logits = compare(&log(q, -shift), &log(p, shift), 2);
            assert!((logits.kl_mean.unwrap() - expected).abs() < 1e-12, "{shift}");
        }
        assert_eq!(compare(&[1.0, 2.0], &[1.0, 2.0], 2).kl_max, Some(0.0));
        assert_eq!(compare(&[0.0, f64::NEG_INFINITY], &[0.0, 0.0], 2).kl_max, Some(f64::INFINITY));
    }

    #[test]
    fn another_favourite_is_named_with_the_references_margin() {
        let logits = compare(&[1.0, 3.0, 2.0], &[4.0, 3.5, 2.0], 2);
        assert_eq!(logits.argmax_agree, 0);
        let expected = Disagreement { position: Some(3), a: 1, b: 0, reference_margin: 0.5 };
        assert_eq!(logits.first_disagreement, Some(expected));
        assert_eq!(logits.top_k_overlap, Some(0.5));
    }

    #[test]
    fn of_equal_logits_the_first_counts() {
        assert_eq!(best(&[1.0, 2.0, 2.0, 2.0], 2), [1, 2]);
        assert_eq!(best(&[0.0, -0.0], 5), [0, 1]);
    }

    #[test]
    fn a_row_with_nan_is_counted_and_no_agreement() {
        let logits = compare(&[f64::NAN, 1.0], &[0.0, 1.0], 1);
        assert_eq!((logits.rows, logits.argmax_agree, logits.kl_mean), (0, 0, None));
        assert_eq!(logits.rows_with_nan, 1);
    }
}
