//! The two methods in common use, on the same captures: they compare a run with a reference run, stage by stage.
//!
//! Both are cumulative. What they see at a stage is all that went before, so the first stage beyond a threshold is
//! where drift becomes visible, which need not be where the fault is.

use apr_model::Site;

use crate::recording::Recording;

/// Standard deviations this far apart are called different.
const STD_RATIO: std::ops::RangeInclusive<f64> = 0.7..=1.4;
/// Directions this far apart are called different.
const COSINE: f64 = 0.999;

/// The first stage whose standard deviation is not about that of the reference.
pub(crate) fn std_ratio(run: &Recording, reference: &Recording) -> Option<Site> {
    let differs = |&site: &Site| {
        let ratio = std(&run.values(site)) / std(&reference.values(site));
        !STD_RATIO.contains(&ratio)
    };
    run.common_sites(reference).into_iter().find(differs)
}

/// The first stage whose values point elsewhere than those of the reference.
pub(crate) fn cosine(run: &Recording, reference: &Recording) -> Option<Site> {
    let differs = |&site: &Site| {
        let (a, b) = (run.values(site), reference.values(site));
        let cosine = cosine_of(&a, &b);
        // Whoever has other rows cannot be compared this way.
        a.len() == b.len() && (cosine.is_nan() || cosine < COSINE)
    };
    run.common_sites(reference).into_iter().find(differs)
}

fn std(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    (values.iter().map(|&x| (x - mean).powi(2)).sum::<f64>() / n).sqrt()
}

fn cosine_of(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
