//! Comparing two APRT files: values without shape or position, one by one.

use std::path::Path;

use apr_capture::Aprt;
use apr_model::Stage;
use serde::Serialize;

use crate::{
    Error, Outcome, Result,
    metrics::{Accumulator, Metrics, Pair},
};

/// How the values of one file differ from those of the other.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AprtComparison {
    /// The version of this form: `apr-diff-aprt/1`.
    pub schema: &'static str,
    /// The largest relative L2 that counts as equal.
    pub tolerance: f64,
    /// The numbers; places are indices into the values.
    #[serde(flatten)]
    pub metrics: Metrics<usize>,
    /// What follows.
    pub outcome: Outcome,
    #[serde(skip)]
    pairs: Vec<(f32, f32)>,
}

impl AprtComparison {
    /// The `limit` pairs that are furthest apart: other categories first, then by difference.
    pub fn values(&self, limit: usize) -> Vec<Pair<usize>> {
        let distance = |&(a, b): &(f32, f32)| match (f64::from(a) - f64::from(b)).abs() {
            // Equal infinities, or NaN on both sides, are no difference.
            _ if a == b || (a.is_nan() && b.is_nan()) => 0.0,
            apart if apart.is_nan() => f64::INFINITY,
            apart => apart,
        };
        let mut order: Vec<usize> = (0..self.pairs.len()).collect();
        order.sort_by(|&i, &j| distance(&self.pairs[j]).total_cmp(&distance(&self.pairs[i])));
        order.truncate(limit);
        let pair = |at: usize| {
            let (a, b) = self.pairs[at];
            Pair { at, a: a.into(), b: b.into() }
        };
        order.into_iter().map(pair).collect()
    }
}

/// Compares the file `a`, which is under test, with the file `b`, the reference.
pub fn compare_aprt(a: &Path, b: &Path, tolerance: f64) -> Result<AprtComparison> {
    let (values_a, values_b) = (Aprt::read(a)?, Aprt::read(b)?);
    let (what_a, what_b) = (what(a, values_a.layer), what(b, values_b.layer));
    if what_a.0 != what_b.0 || what_a.1.zip(what_b.1).is_some_and(|(a, b)| a != b) {
        let [a_is, b_is] = [what_a, what_b].map(|(layer, stage)| {
            let layer = layer.map_or("the whole model".into(), |layer| format!("layer {layer}"));
            stage.map_or(layer.clone(), |stage| format!("{stage} of {layer}"))
        });
        return Err(Error::Stages { file_a: a.into(), file_b: b.into(), a: a_is, b: b_is });
    }
    let (a_len, b_len) = (values_a.values.len(), values_b.values.len());
    if a_len != b_len {
        return Err(Error::Lengths { file_a: a.into(), file_b: b.into(), a: a_len, b: b_len });
    }
    let widen = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    let mut accumulator = Accumulator::default();
    accumulator.add(&widen(&values_a.values), &widen(&values_b.values), |i| i);
    let metrics = accumulator.metrics();

    let pairs: Vec<(f32, f32)> = values_a.values.into_iter().zip(values_b.values).collect();
    let outcome = match &metrics {
        m if m.within(tolerance) => {
            let bitwise = pairs.iter().all(|(a, b)| a.to_bits() == b.to_bits());
            Outcome::Match { bitwise }
        }
        m if m.count == 0 => Outcome::Unmeasured { because: "the files hold no values".into() },
        m if m.finite == 0 && m.categories.mismatched == 0 => {
            Outcome::Unmeasured { because: "no finite value on either side".into() }
        }
        _ => Outcome::Differs { first: a.display().to_string() },
    };
    Ok(AprtComparison { schema: "apr-diff-aprt/1", tolerance, metrics, outcome, pairs })
}

/// What a file is of, as far as it says: two files that say different things are not compared.
fn what(path: &Path, layer: Option<u32>) -> (Option<u32>, Option<Stage>) {
    let stage = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
    (layer.filter(|_| stage != Some(Stage::Embedding)), stage)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare(a: &[f32], b: &[f32]) -> Result<AprtComparison> {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, values: &[f32]| {
            let path = dir.path().join(name);
            Aprt { layer: Some(0), values: values.to_vec() }.write(&path).unwrap();
            path
        };
        compare_aprt(&write("a.bin", a), &write("b.bin", b), 1e-5)
    }

    #[test]
    fn the_values_furthest_apart_come_first_and_nan_before_all() {
        let found = compare(&[1.0, 5.0, f32::NAN, 2.0], &[1.0, 4.0, 0.0, 2.5]).unwrap();
        let at: Vec<_> = found.values(3).iter().map(|pair| pair.at).collect();
        assert_eq!(at, [2, 1, 3]);
        assert_eq!(found.outcome.exit_code(), 1);
        assert_eq!(found.values(99).len(), 4);
    }

    #[test]
    fn equal_files_match_bitwise_and_empty_ones_are_unmeasured() {
        assert_eq!(compare(&[1.0], &[1.0]).unwrap().outcome, Outcome::Match { bitwise: true });
        assert_eq!(compare(&[], &[]).unwrap().outcome.exit_code(), 3);
        let nan = [f32::NAN; 3];
        assert_eq!(compare(&nan, &nan).unwrap().outcome.exit_code(), 3);
        assert_eq!(compare(&nan, &[1.0; 3]).unwrap().outcome.exit_code(), 1);
        assert_eq!(compare(&[0.0], &[-0.0]).unwrap().outcome, Outcome::Match { bitwise: false });
    }

    #[test]
    fn different_lengths_stages_and_layers_are_refused() {
        assert!(matches!(compare(&[1.0], &[1.0, 2.0]), Err(Error::Lengths { a: 1, b: 2, .. })));
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, layer| {
            let path = dir.path().join(name);
            Aprt { layer, values: vec![1.0] }.write(&path).unwrap();
            path
        };
        let norm = write("attn_norm.bin", Some(0));
        for other in [write("ffn_norm.bin", Some(0)), write("x.bin", Some(1))] {
            let error = compare_aprt(&norm, &other, 1e-5).unwrap_err();
            assert!(matches!(error, Error::Stages { .. }), "{error}");
        }
        let (whole, in_layer) = (write("embedding.bin", None), dir.path().join("layer-0"));
        std::fs::create_dir(&in_layer).unwrap();
        let in_layer = in_layer.join("embedding.bin");
        Aprt { layer: Some(0), values: vec![1.0] }.write(&in_layer).unwrap();
        assert!(compare_aprt(&whole, &in_layer, 1e-5).is_ok());
    }
}
