//! How far two sequences of numbers are apart: every statistic of a comparison is computed here.
//!
//! NaN and infinities come first. Where one side has one and the other has not, that is a mismatch of categories,
//! which no tolerance forgives; where both have the same, the pair is counted and takes no part in the
//! numbers. So a NaN can neither hide a difference nor make one. Everything is f64, in one pass.

use serde::{Serialize, Serializer};

/// How far `a` is from the reference `b`. `At` says where an element stands.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Metrics<At> {
    /// Pairs of elements seen.
    pub count: u64,
    /// Pairs of finite elements, which the numbers are of.
    pub finite: u64,
    /// `|a - b| / |b|` over all finite pairs; infinite if only `b` is zero, `None` without finite pairs.
    #[serde(serialize_with = "option_number")]
    pub relative_l2: Option<f64>,
    /// Why `relative_l2` is not the usual quotient.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_norm: Option<ZeroNorm>,
    /// The largest difference; `None` without finite pairs.
    pub max_abs: Option<Pair<At>>,
    /// The root of the mean squared difference.
    #[serde(serialize_with = "option_number")]
    pub rms: Option<f64>,
    /// The cosine of the angle between `a` and `b`; `None` if one of them is zero. Blind to a factor: see `norm_ratio`.
    #[serde(serialize_with = "option_number")]
    pub cosine: Option<f64>,
    /// `|a| / |b|`; `None` if `b` is zero.
    #[serde(serialize_with = "option_number")]
    pub norm_ratio: Option<f64>,
    /// What is not finite.
    pub categories: Categories<At>,
}

/// A side whose norm is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ZeroNorm {
    /// Both sides are all zeros, which are equal.
    Both,
    /// Only the side under test is all zeros.
    OnlyA,
    /// Only the reference is all zeros: no error is small relative to nothing.
    OnlyB,
}

/// A pair of elements and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Pair<At> {
    /// Where.
    pub at: At,
    /// The value under test.
    #[serde(serialize_with = "number")]
    pub a: f64,
    /// The reference's value.
    #[serde(serialize_with = "number")]
    pub b: f64,
}

impl<At> Pair<At> {
    /// `|a - b|`.
    pub fn abs_diff(&self) -> f64 {
        (self.a - self.b).abs()
    }
}

/// Elements that are not finite, and zeros.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Categories<At> {
    /// Pairs in which both are NaN.
    pub both_nan: u64,
    /// Pairs of equal infinities.
    pub both_inf: u64,
    /// Pairs in which one is NaN or an infinity that the other is not.
    pub mismatched: u64,
    /// The first of those.
    pub first: Option<Pair<At>>,
    /// Pairs in which only `a` is zero: for information, rounding may do that.
    pub zero_only_a: u64,
    /// Pairs in which only `b` is zero.
    pub zero_only_b: u64,
}

impl<At> Metrics<At> {
    /// Whether nothing differs in category and the relative L2 is at most `tolerance`. `false` without finite pairs:
    /// nothing measured is nothing within.
    pub fn within(&self, tolerance: f64) -> bool {
        self.categories.mismatched == 0 && self.relative_l2.is_some_and(|error| error <= tolerance)
    }

    /// The same with other words for places.
    pub(crate) fn locate<To>(self, mut to: impl FnMut(At) -> To) -> Metrics<To> {
        let mut pair = |pair: Pair<At>| Pair { at: to(pair.at), a: pair.a, b: pair.b };
        let Categories { both_nan, both_inf, mismatched, first, zero_only_a, zero_only_b } =
            self.categories;
        Metrics {
            count: self.count,
            finite: self.finite,
            relative_l2: self.relative_l2,
            zero_norm: self.zero_norm,
            max_abs: self.max_abs.map(&mut pair),
            rms: self.rms,
            cosine: self.cosine,
            norm_ratio: self.norm_ratio,
            categories: Categories {
                both_nan,
                both_inf,
                mismatched,
                first: first.map(&mut pair),
                zero_only_a,
                zero_only_b,
            },
        }
    }
}

/// What [`Metrics`] are made of: sums, over any number of slices.
#[derive(Clone, Debug)]
pub(crate) struct Accumulator<At> {
    count: u64,
    finite: u64,
    diff: f64,
    a: f64,
    b: f64,
    dot: f64,
    max: Option<Pair<At>>,
    categories: Categories<At>,
}

impl<At> Default for Accumulator<At> {
    fn default() -> Self {
        let categories = Categories {
            both_nan: 0,
            both_inf: 0,
            mismatched: 0,
            first: None,
            zero_only_a: 0,
            zero_only_b: 0,
        };
        Self { count: 0, finite: 0, diff: 0.0, a: 0.0, b: 0.0, dot: 0.0, max: None, categories }
    }
}

impl<At: Copy> Accumulator<At> {
    /// Takes in pairs; element `i` of the slices stands at `at(i)`.
    pub(crate) fn add(&mut self, a: &[f64], b: &[f64], at: impl Fn(usize) -> At) {
        assert_eq!(a.len(), b.len(), "elements are compared in pairs");
        self.count += a.len() as u64;
        let mut largest = self.max.map_or(-1.0, |pair| pair.abs_diff());
        for (i, (&a, &b)) in a.iter().zip(b).enumerate() {
            if !(a.is_finite() && b.is_finite()) {
                self.add_category(a, b, || at(i));
                continue;
            }
            self.finite += 1;
            let diff = a - b;
            self.diff += diff * diff;
            self.a += a * a;
            self.b += b * b;
            self.dot += a * b;
            self.categories.zero_only_a += u64::from(a == 0.0 && b != 0.0);
            self.categories.zero_only_b += u64::from(b == 0.0 && a != 0.0);
            if diff.abs() > largest {
                largest = diff.abs();
                self.max = Some(Pair { at: at(i), a, b });
            }
        }
    }

    fn add_category(&mut self, a: f64, b: f64, at: impl FnOnce() -> At) {
        let categories = &mut self.categories;
        if a.is_nan() && b.is_nan() {
            categories.both_nan += 1;
        } else if a == b {
            categories.both_inf += 1;
        } else {
            categories.mismatched += 1;
            categories.first.get_or_insert_with(|| Pair { at: at(), a, b });
        }
    }

    /// `|b|` over the finite pairs.
    pub(crate) fn reference_norm(&self) -> f64 {
        self.b.sqrt()
    }

    /// `|a - b|` over the finite pairs.
    pub(crate) fn distance(&self) -> f64 {
        self.diff.sqrt()
    }

    /// Takes in what `later` has seen.
    pub(crate) fn merge(&mut self, later: &Self) {
        self.count += later.count;
        self.finite += later.finite;
        self.diff += later.diff;
        self.a += later.a;
        self.b += later.b;
        self.dot += later.dot;
        let larger = |a: &Pair<At>, b: &Pair<At>| b.abs_diff() > a.abs_diff();
        self.max = match (self.max, later.max) {
            (Some(a), Some(b)) if larger(&a, &b) => Some(b),
            (a, b) => a.or(b),
        };
        let (ours, theirs) = (&mut self.categories, &later.categories);
        ours.both_nan += theirs.both_nan;
        ours.both_inf += theirs.both_inf;
        ours.mismatched += theirs.mismatched;
        ours.zero_only_a += theirs.zero_only_a;
        ours.zero_only_b += theirs.zero_only_b;
        ours.first = ours.first.or(theirs.first);
    }

    pub(crate) fn metrics(self) -> Metrics<At> {
        let Self { count, finite, diff, a, b, dot, max, categories } = self;
        let (norm, norm_a, norm_b) = (diff.sqrt(), a.sqrt(), b.sqrt());
        let zero_norm = match (norm_a == 0.0, norm_b == 0.0) {
            _ if finite == 0 => None,
            (true, true) => Some(ZeroNorm::Both),
            (true, false) => Some(ZeroNorm::OnlyA),
            (false, true) => Some(ZeroNorm::OnlyB),
            (false, false) => None,
        };
        let relative_l2 = match zero_norm {
            Some(ZeroNorm::Both) => 0.0,
            Some(ZeroNorm::OnlyB) => f64::INFINITY,
            Some(ZeroNorm::OnlyA) | None => norm / norm_b,
        };
        let some = |value: f64| (finite > 0).then_some(value);
        Metrics {
            count,
            finite,
            relative_l2: some(relative_l2),
            zero_norm,
            max_abs: max,
            rms: some((diff / finite as f64).sqrt()),
            // Rounding may carry the quotient an ulp past 1, or leave equal vectors an ulp apart.
            cosine: some(if diff == 0.0 { 1.0 } else { dot / norm_a / norm_b })
                .filter(|cosine| zero_norm.is_none() && cosine.is_finite())
                .map(|cosine| cosine.clamp(-1.0, 1.0)),
            norm_ratio: some(norm_a / norm_b).filter(|_| norm_b > 0.0),
            categories,
        }
    }
}

/// JSON has no infinities and no NaN; they are spelt out rather than turned into `null`.
pub(crate) fn number<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        v if v.is_finite() => serializer.serialize_f64(*v),
        v if v.is_nan() => serializer.serialize_str("NaN"),
        v => serializer.serialize_str(if *v > 0.0 { "inf" } else { "-inf" }),
    }
}

pub(crate) fn option_number<S: Serializer>(
    value: &Option<f64>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => number(value, serializer),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAN: f64 = f64::NAN;
    const INF: f64 = f64::INFINITY;

    fn compare(a: &[f64], b: &[f64]) -> Metrics<usize> {
        let mut accumulator = Accumulator::default();
        accumulator.add(a, b, |i| i);
        accumulator.metrics()
    }

    #[test]
    fn the_numbers_are_the_textbooks() {
        let metrics = compare(&[3.0, 4.0, 0.0], &[3.0, 0.0, 4.0]);
        assert_eq!(metrics.relative_l2, Some(32f64.sqrt() / 5.0));
        assert_eq!(metrics.rms, Some((32.0f64 / 3.0).sqrt()));
        assert_eq!(metrics.cosine, Some(9.0 / 25.0));
        assert_eq!(metrics.norm_ratio, Some(1.0));
        assert_eq!(metrics.max_abs, Some(Pair { at: 1, a: 4.0, b: 0.0 }));
        assert_eq!((metrics.categories.zero_only_a, metrics.categories.zero_only_b), (1, 1));
    }

    #[test]
    fn identical_values_are_at_distance_zero() {
        let values: Vec<f64> = (1..100).map(|i| f64::from(i).sin()).collect();
        for len in 1..values.len() {
            let metrics = compare(&values[..len], &values[..len]);
            assert_eq!((metrics.relative_l2, metrics.cosine), (Some(0.0), Some(1.0)));
            assert!(metrics.within(0.0));
        }
    }

    #[test]
    fn a_factor_is_seen_by_the_norm_ratio_where_the_cosine_is_blind() {
        let metrics = compare(&[2.0, 4.0], &[1.0, 2.0]);
        assert_eq!((metrics.cosine, metrics.norm_ratio), (Some(1.0), Some(2.0)));
    }

    #[test]
    fn a_nan_or_infinity_on_one_side_is_a_mismatch_that_no_tolerance_forgives() {
        for (a, b) in [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, -INF), (INF, -INF), (NAN, INF)] {
            let metrics = compare(&[7.0, a, 7.0], &[7.0, b, 7.0]);
            assert_eq!(metrics.categories.mismatched, 1, "{a} {b}");
            assert_eq!(metrics.categories.first.unwrap().at, 1);
            assert_eq!(metrics.relative_l2, Some(0.0), "the finite pairs are equal");
            assert!(!metrics.within(f64::INFINITY));
        }
    }

    #[test]
    fn equal_categories_are_counted_and_take_no_part() {
        let metrics = compare(&[NAN, INF, -INF, 1.0], &[NAN, INF, -INF, 1.5]);
        let Categories { both_nan, both_inf, mismatched, .. } = metrics.categories;
        assert_eq!((both_nan, both_inf, mismatched, metrics.finite), (1, 2, 0, 1));
        assert_eq!(metrics.max_abs.unwrap().abs_diff(), 0.5);
    }

    #[test]
    fn without_finite_pairs_there_are_no_numbers_and_nothing_is_within() {
        for values in [&[][..], &[NAN, NAN]] {
            let metrics = compare(values, values);
            assert_eq!((metrics.relative_l2, metrics.max_abs, metrics.rms), (None, None, None));
            assert!(!metrics.within(f64::INFINITY));
        }
    }

    #[test]
    fn zero_norms_are_stated() {
        let cases = [
            ([0.0, 0.0], [0.0, 0.0], ZeroNorm::Both, 0.0),
            ([0.0, 0.0], [1.0, 0.0], ZeroNorm::OnlyA, 1.0),
            ([1.0, 0.0], [0.0, 0.0], ZeroNorm::OnlyB, INF),
        ];
        for (a, b, zero_norm, relative_l2) in cases {
            let metrics = compare(&a, &b);
            assert_eq!(metrics.zero_norm, Some(zero_norm));
            assert_eq!((metrics.relative_l2, metrics.cosine), (Some(relative_l2), None));
        }
        let json = serde_json::to_value(compare(&[1.0], &[0.0])).unwrap();
        assert_eq!(json["relative_l2"], "inf");
    }

    #[test]
    fn parts_merge_into_the_whole() {
        let a: Vec<f64> = (0..50).map(|i| f64::from(i).sin()).collect();
        let b: Vec<f64> = (0..50).map(|i| if i == 33 { NAN } else { f64::from(i).cos() }).collect();
        let mut parts = Accumulator::default();
        for start in (0..50).step_by(10) {
            let mut part = Accumulator::default();
            part.add(&a[start..start + 10], &b[start..start + 10], |i| start + i);
            parts.merge(&part);
        }
        let (parts, whole) = (parts.metrics(), compare(&a, &b));
        assert_eq!((parts.count, parts.finite), (50, 49));
        assert_eq!(parts.max_abs, whole.max_abs);
        assert_eq!(parts.categories.first.unwrap().at, 33);
        assert!((parts.relative_l2.unwrap() - whole.relative_l2.unwrap()).abs() < 1e-14);
    }
}
