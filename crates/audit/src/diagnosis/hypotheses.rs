//! The mistakes that are known by name.
//!
//! Each is an alternative to an op, computed from the same inputs in the same arithmetic. A hypothesis has no say in
//! whether it is right: it makes a value, and the tests of the audit decide. Where a mistake has a parameter, it is fitted.

mod any;
mod attention;
mod bias;
mod elementwise;
mod embedding;
mod experts;
mod linear;
mod norm;
mod rope;
mod routing;

use apr_model::{Config, Site, Stage};

use super::suspect::{Answer, Suspect};

/// A mistake.
pub(crate) struct Hypothesis {
    /// Its name, for programs: it never changes.
    pub(crate) name: &'static str,
    /// The stages that it can happen at.
    pub(crate) stages: &'static [Stage],
    pub(crate) tier: Tier,
    /// The value with the mistake in it.
    pub(crate) compute: fn(&Suspect<'_>) -> Answer,
}

/// How much a hypothesis says. Where one says more that fits, those that say less are not asked: they would fit too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tier {
    /// One certain mistake.
    Named,
    /// A mistake with a number in it that was fitted.
    Fitted,
    /// What the value looks like, whatever made it so.
    General,
}

/// Those that can happen at `site`, in the order in which they are preferred.
pub(crate) fn at(site: Site, config: &Config) -> impl Iterator<Item = &'static Hypothesis> {
    let experts = site.layer.and_then(|layer| config.experts_of(layer as usize));
    // What a mixture of experts ends with is a sum and no product.
    let products = site.stage != Stage::FfnOut || experts.is_none();
    let tables: [&'static [Hypothesis]; 10] = [
        embedding::TABLE,
        if products { linear::TABLE } else { &[] },
        if experts.is_some() { routing::TABLE } else { &[] },
        if experts.is_some() { experts::TABLE } else { &[] },
        bias::TABLE,
        norm::TABLE,
        rope::TABLE,
        attention::TABLE,
        elementwise::TABLE,
        any::TABLE,
    ];
    tables.into_iter().flatten().filter(move |it| it.stages.contains(&site.stage))
}

const fn named(
    name: &'static str,
    stages: &'static [Stage],
    compute: fn(&Suspect<'_>) -> Answer,
) -> Hypothesis {
    Hypothesis { name, stages, tier: Tier::Named, compute }
}

const fn fitted(
    name: &'static str,
    stages: &'static [Stage],
    compute: fn(&Suspect<'_>) -> Answer,
) -> Hypothesis {
    Hypothesis { name, stages, tier: Tier::Fitted, compute }
}

const fn general(
    name: &'static str,
    stages: &'static [Stage],
    compute: fn(&Suspect<'_>) -> Answer,
) -> Hypothesis {
    Hypothesis { name, stages, tier: Tier::General, compute }
}

/// `from`, with the words for a part of a joined projection in front, if it is one.
fn of_part(part: &str, from: &str) -> String {
    if part.is_empty() { from.to_owned() } else { format!("in {part}, {from}") }
}

/// The parameter between `low` and `high` for which `misfit` is least: the best valleys of a grid, then golden sections.
fn least(
    low: f64,
    high: f64,
    grid: usize,
    mut misfit: impl FnMut(f64) -> crate::Result<f64>,
) -> crate::Result<f64> {
    const VALLEYS: usize = 4;
    const SECTIONS: usize = 64;
    let step = (high - low) / grid as f64;
    let at = |i: usize| low + step * i as f64;
    let found: Vec<f64> = (0..=grid).map(|i| misfit(at(i))).collect::<crate::Result<_>>()?;
    let is_valley = |&i: &usize| {
        let beside = [i.checked_sub(1).map(|i| found[i]), found.get(i + 1).copied()];
        beside.into_iter().flatten().all(|other| found[i] <= other)
    };
    let mut valleys: Vec<usize> = (0..=grid).filter(is_valley).collect();
    valleys.sort_by(|&a, &b| found[a].total_cmp(&found[b]));
    let golden = (5f64.sqrt() - 1.0) / 2.0;
    let mut best = (f64::INFINITY, low);
    for valley in valleys.into_iter().take(VALLEYS) {
        let (mut a, mut b) = (at(valley) - step, at(valley) + step);
        let (mut c, mut d) = (b - golden * (b - a), a + golden * (b - a));
        let (mut at_c, mut at_d) = (misfit(c)?, misfit(d)?);
        for _ in 0..SECTIONS {
            if at_c < at_d {
                (b, d, at_d) = (d, c, at_c);
                c = b - golden * (b - a);
                at_c = misfit(c)?;
            } else {
                (a, c, at_c) = (c, d, at_d);
                d = a + golden * (b - a);
                at_d = misfit(d)?;
            }
        }
        let nearest = if at_c < at_d { (at_c, c) } else { (at_d, d) };
        if nearest.0 < best.0 {
            best = nearest;
        }
    }
    Ok(best.1)
}

/// `x` as it was probably written down: the number of few digits, or the power of two, next to it, if it is near.
fn rounded(x: f64, near: f64) -> f64 {
    for digits in 0..4 {
        let text = format!("{x:.digits$e}");
        if let Ok(round) = text.parse::<f64>()
            && (round - x).abs() <= near * x.abs()
        {
            return round;
        }
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_in_kebab_case_and_unique_at_a_stage() {
        for model in apr_testkit::TINY {
            let path = apr_testkit::fixture(&format!("tiny/{model}"));
            let checkpoint = apr_format::Checkpoint::open(path).unwrap();
            let config = apr_model::read_config(&checkpoint).unwrap();
            let has = |of: bool| of == config.moe.is_some();
            for stage in Stage::all().filter(|stage| stage.of_experts().is_none_or(has)) {
                let site = Site { layer: (!stage.is_whole_model()).then_some(0), stage };
                let mut seen = BTreeSet::new();
                for Hypothesis { name, .. } in at(site, &config) {
                    assert!(seen.insert(name), "{name} occurs twice at {stage}");
                    let fits = |c: char| c.is_ascii_lowercase() || c == '-' || c.is_ascii_digit();
                    assert!(name.chars().all(fits), "{name}");
                }
                assert!(!seen.is_empty(), "{model}: nothing can go wrong at {stage}");
            }
        }
    }

    #[test]
    fn the_least_of_a_function_is_found_between_the_points_of_the_grid() {
        let wavy = |x: f64| Ok((x - 7.3).powi(2) + 4.0 * (5.0 * x).cos());
        let found = least(0.0, 10.0, 100, wavy).unwrap();
        assert!((found - 6.92).abs() < 0.1, "{found}");
        let found = least(0.0, 10.0, 7, |x| Ok((x - std::f64::consts::PI).powi(2))).unwrap();
        assert!((found - std::f64::consts::PI).abs() < 1e-6, "{found}");
    }

    #[test]
    fn fitted_numbers_become_those_that_were_written_down() {
        assert_eq!(rounded(9.999_993e-6, 1e-3), 1e-5);
        assert_eq!(rounded(499_998.0, 1e-3), 5e5);
        assert_eq!(rounded(std::f64::consts::PI, 1e-6), std::f64::consts::PI);
    }
}
