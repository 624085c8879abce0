//! Statistics against their textbook definitions, in one go and in parts.

use apr_tensor::Summary;
use proptest::prelude::*;

/// The definitions, in two passes with Neumaier's summation.
fn moments(values: &[f64]) -> (f64, f64, f64) {
    let n = values.len() as f64;
    let mean = sum(values.iter().copied()) / n;
    let std = (sum(values.iter().map(|x| (x - mean) * (x - mean))) / n).sqrt();
    let rms = (sum(values.iter().map(|x| x * x)) / n).sqrt();
    (mean, std, rms)
}

fn sum(values: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut lost) = (0.0f64, 0.0);
    for x in values {
        let next = sum + x;
        lost += if sum.abs() >= x.abs() { (sum - next) + x } else { (x - next) + sum };
        sum = next;
    }
    sum + lost
}

fn assert_close(found: Option<f64>, expected: f64, scale: f64) {
    let found = found.unwrap();
    assert!((found - expected).abs() <= 1e-13 * scale, "{found:e}, not {expected:e}");
}

/// Lengths around the chunks of 256 in which sums are made.
fn sample() -> impl Strategy<Value = Vec<f32>> {
    let length = prop::sample::select(vec![0, 1, 2, 255, 256, 257, 511, 512, 513, 700]);
    let value = prop_oneof![
        8 => -1e3f32..1e3,
        1 => prop::num::f32::NORMAL,
        1 => prop::sample::select(vec![0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
    ];
    length.prop_flat_map(move |length| prop::collection::vec(value.clone(), length))
}

proptest! {
    #[test]
    fn every_number_is_that_of_its_definition(values in sample()) {
        let summary = Summary::of(&values);
        let finite: Vec<f64> = values.iter().filter(|x| x.is_finite()).map(|&x| x.into()).collect();

        prop_assert_eq!(summary.count(), values.len() as u64);
        prop_assert_eq!(summary.nan(), values.iter().filter(|x| x.is_nan()).count() as u64);
        prop_assert_eq!(summary.inf(), values.iter().filter(|x| x.is_infinite()).count() as u64);
        prop_assert_eq!(summary.zeros(), values.iter().filter(|&&x| x == 0.0).count() as u64);
        prop_assert_eq!(summary.min(), finite.iter().copied().reduce(f64::min));
        prop_assert_eq!(summary.max(), finite.iter().copied().reduce(f64::max));
        prop_assert_eq!(summary.abs_max(), finite.iter().map(|x| x.abs()).reduce(f64::max));
        if finite.is_empty() {
            prop_assert_eq!((summary.mean(), summary.std(), summary.rms()), (None, None, None));
        } else {
            let (mean, std, rms) = moments(&finite);
            assert_close(summary.mean(), mean, rms);
            assert_close(summary.std(), std, rms);
            assert_close(summary.rms(), rms, rms);
        }
    }

    #[test]
    fn parts_merge_to_the_whole(values in sample(), cut in any::<prop::sample::Index>()) {
        let (left, right) = values.split_at(cut.index(values.len() + 1));
        let (merged, whole) = (Summary::of(left).merge(Summary::of(right)), Summary::of(&values));
        let exact = |s: &Summary| (s.count(), s.nan(), s.inf(), s.zeros(), s.min(), s.max());
        prop_assert_eq!(exact(&merged), exact(&whole));
        if let Some(rms) = whole.rms() {
            assert_close(merged.mean(), whole.mean().unwrap(), rms);
            assert_close(merged.std(), whole.std().unwrap(), rms);
            assert_close(merged.rms(), rms, rms);
        }
    }
}

#[test]
fn a_small_deviation_survives_a_large_mean() {
    let values: Vec<f64> = (0..10_000).map(|i| 1e9 + f64::from(i % 2)).collect();
    let summary = Summary::of(&values);
    assert!((summary.std().unwrap() - 0.5).abs() < 1e-9, "{:?}", summary.std());
    assert!((summary.mean().unwrap() - (1e9 + 0.5)).abs() < 1e-6, "{:?}", summary.mean());
}

#[test]
fn merging_with_nothing_changes_nothing() {
    let some = Summary::of(&[1.0, -7.0, f64::NAN, 0.0]);
    assert_eq!(some.merge(Summary::default()), some);
    assert_eq!(Summary::default().merge(some), some);
    assert_eq!(Summary::of::<f32>(&[]), Summary::default());
}

#[test]
fn a_sample_without_finite_values_has_counts_but_no_moments() {
    let summary = Summary::of(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
    assert_eq!((summary.count(), summary.nan(), summary.inf()), (3, 1, 2));
    assert_eq!((summary.min(), summary.rms(), summary.abs_max()), (None, None, None));
}

#[test]
fn an_iterator_and_a_slice_of_the_same_values_agree_by_bits() {
    let values: Vec<f32> = (0..1000).map(|i| (i as f32).sin()).collect();
    let iterated: Summary = values.iter().map(|&x| f64::from(x)).collect();
    assert_eq!(iterated, Summary::of(&values));
}
