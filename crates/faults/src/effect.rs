//! What a fault does, measured against the same run without it.

use apr_model::{Site, Stage};
use serde::Serialize;

use crate::recording::Recording;

/// What a fault does.
///
/// Upstream of its site both runs have the same bits, so what they differ by there is the fault's own doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Effect {
    /// `|wrong - right| / |right|` at the site, over all steps.
    pub relative_l2: f64,
    /// The largest of the same over single rows.
    pub worst_row: f64,
    /// The largest difference of an element, in units of what rounding to f32 does to it, or to the mean element of its
    /// row if that is larger.
    pub worst_element: f64,
    /// The largest Kullback-Leibler divergence of the next token's distribution, in nats, over all rows of logits.
    pub logits_kl: f64,
    /// Rows of logits whose largest entry is another one.
    pub argmax_flips: usize,
    /// Whether the site holds a number that is not finite and was before.
    pub non_finite: bool,
}

/// Differences below this many roundings of an element are what sums in f32 do by themselves.
const NOISE: f64 = 64.0;

impl Effect {
    /// Whether it can be told from rounding at all.
    pub fn is_visible(&self) -> bool {
        self.non_finite || self.worst_element > NOISE
    }

    pub(crate) fn between(wrong: &Recording, right: &Recording, site: Site) -> Self {
        let mut effect = Self::default();
        let (mut difference, mut norm) = (0.0, 0.0);
        for step in 0..right.steps.len() {
            let (Some((tensor, r)), Some((_, w))) = (right.get(step, site), wrong.get(step, site))
            else {
                continue;
            };
            if r.len() != w.len() {
                // Rows are missing; those that are there are as they were.
                continue;
            }
            for row in rows(&tensor.shape, site.stage.axes().row_axis()) {
                let (mut d, mut n) = (0.0, 0.0);
                let mean_square = row.iter().map(|&i| r[i] * r[i]).filter(|x| x.is_finite());
                let mean = (mean_square.sum::<f64>() / row.len() as f64).sqrt();
                for i in row.iter().copied() {
                    let (wrong, right) = (w[i], r[i]);
                    effect.non_finite |= right.is_finite() && !wrong.is_finite();
                    if wrong.is_finite() && right.is_finite() {
                        d += (wrong - right).powi(2);
                        n += right * right;
                        let rounding = f64::from(f32::EPSILON / 2.0) * mean.max(right.abs());
                        let apart = quotient((wrong - right).abs(), rounding);
                        effect.worst_element = effect.worst_element.max(apart);
                    }
                }
                difference += d;
                norm += n;
                effect.worst_row = effect.worst_row.max(quotient(d, n).sqrt());
            }
        }
        effect.relative_l2 = quotient(difference, norm).sqrt();
        effect.on_logits(wrong, right);
        effect
    }

    fn on_logits(&mut self, wrong: &Recording, right: &Recording) {
        let site = Site::whole(Stage::LmHead);
        for step in 0..right.steps.len() {
            let (Some((tensor, r)), Some((_, w))) = (right.get(step, site), wrong.get(step, site))
            else {
                continue;
            };
            let vocab = tensor.shape[1];
            for (r, w) in r.chunks_exact(vocab).zip(w.chunks_exact(vocab)) {
                let (p, q) = (log_softmax(r), log_softmax(w));
                let kl: f64 = p.iter().zip(&q).map(|(p, q)| libm::exp(*p) * (p - q)).sum();
                self.logits_kl = if kl.is_nan() { f64::INFINITY } else { self.logits_kl.max(kl) };
                self.argmax_flips += usize::from(argmax(r) != argmax(w));
            }
        }
    }
}

/// The elements of each row of a tensor.
fn rows(shape: &[usize], axis: usize) -> Vec<Vec<usize>> {
    let inner: usize = shape[axis + 1..].iter().product();
    let outer: usize = shape[..axis].iter().product();
    let of_row = |row: usize| {
        let piece = move |outer: usize| {
            let start = (outer * shape[axis] + row) * inner;
            start..start + inner
        };
        (0..outer).flat_map(piece).collect()
    };
    (0..shape[axis]).map(of_row).collect()
}

/// `a / b`, where nothing of nothing is nothing.
fn quotient(a: f64, b: f64) -> f64 {
    if a == 0.0 { 0.0 } else { a / b }
}

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(x));
    let sum: f64 = logits.iter().map(|&x| libm::exp(x - max)).sum();
    logits.iter().map(|&x| x - max - libm::log(sum)).collect()
}

fn argmax(logits: &[f64]) -> Option<usize> {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_scores_go_across_heads() {
        assert_eq!(rows(&[2, 2, 3], 1), [vec![0, 1, 2, 6, 7, 8], vec![3, 4, 5, 9, 10, 11]]);
        assert_eq!(rows(&[2, 2], 0), [vec![0, 1], vec![2, 3]]);
    }
}
