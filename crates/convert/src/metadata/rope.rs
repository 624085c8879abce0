//! Llama 3's rotary scaling out of the factors that GGUF stores.
//!
//! A factor is what a frequency is divided by: 1 for short waves, the rule's `factor` for long ones, and between the two bounds
//! `1 / ((1 - s) / factor + s)`, where `s` follows from the wavelength. Only the ratios of the rule's other three
//! numbers show in the factors, so two of them are taken as published and the third is computed.

use std::f64::consts::TAU;

use apr_model::{Llama3Scaling, Role, RopeFrequencies, RopeScaling};

use super::Facts;
use crate::{Loss, verify::same_frequencies};

/// What all published models have.
const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;
const ORIGINAL: f64 = 8192.0;
const FACTORS: [f64; 2] = [8.0, 32.0];

/// The scaling of `facts` in numbers, and what of it cannot be said in numbers.
pub(super) fn in_numbers(facts: &Facts<'_>) -> (RopeScaling, Option<Loss>) {
    let name = Role::RopeFreqs.gguf_name();
    let stored = facts.source.tensor(&name).and_then(|stored| stored.to_f32().ok());
    let Some(factors) = stored.filter(|_| facts.config.rope_scaling == RopeScaling::None) else {
        return (facts.config.rope_scaling.clone(), None);
    };
    if factors.iter().all(|&factor| factor == 1.0) {
        return (RopeScaling::None, None);
    }
    let plain = RopeFrequencies::new(facts.config.rope_theta, facts.config.rotary_dim);
    match recovered(&plain, &factors) {
        Some(scaling) => (RopeScaling::Llama3(scaling), None),
        None => {
            let why = "these factors follow no rule of Llama 3's, which is all that `rope_scaling` could say"
                .to_owned();
            (RopeScaling::None, Some(Loss { what: format!("tensor `{name}`"), why }))
        }
    }
}

/// The rule that `factors` of the frequencies `plain` follow, if there is one.
fn recovered(plain: &RopeFrequencies, factors: &[f32]) -> Option<Llama3Scaling> {
    if factors.len() != plain.as_slice().len() {
        return None;
    }
    let largest = f64::from(factors.iter().copied().fold(1.0, f32::max));
    // The longest waves may still be between the bounds, or the largest of them be rounded.
    let candidates = FACTORS.into_iter().chain([largest, largest.round()]);
    candidates.into_iter().find_map(|factor| {
        let originals = pairs(plain, factors).filter_map(|(wavelength, found)| {
            let smooth = (1.0 / found - 1.0 / factor) / (1.0 - 1.0 / factor);
            let is_between = smooth > 0.001 && smooth < 0.999;
            is_between.then(|| (wavelength * (smooth * (HIGH - LOW) + LOW)).round())
        });
        std::iter::once(ORIGINAL).chain(originals).find_map(|original| {
            let scaling = Llama3Scaling {
                factor,
                low_freq_factor: LOW,
                high_freq_factor: HIGH,
                original_max_position_embeddings: original,
            };
            follows(plain, factors, &scaling).then_some(scaling)
        })
    })
}

/// Wavelengths in positions, and the factor of each.
fn pairs(plain: &RopeFrequencies, factors: &[f32]) -> impl Iterator<Item = (f64, f64)> {
    plain.as_slice().iter().zip(factors).map(|(frequency, &found)| (TAU / frequency, found.into()))
}

/// Whether `factors` are those of the rule, but for the rounding of who computed them.
fn follows(plain: &RopeFrequencies, factors: &[f32], scaling: &Llama3Scaling) -> bool {
    same_frequencies(&plain.clone().llama3(scaling), &plain.clone().divided_by(factors))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(scaling: &Llama3Scaling, theta: f64, dim: usize) -> (RopeFrequencies, Vec<f32>) {
        let plain = RopeFrequencies::new(theta, dim);
        let scaled = plain.clone().llama3(scaling);
        let pairs = plain.as_slice().iter().zip(scaled.as_slice());
        let factors = pairs.map(|(plain, scaled)| (plain / scaled) as f32).collect();
        (plain, factors)
    }

    fn llama3(factor: f64, original: f64) -> Llama3Scaling {
        Llama3Scaling {
            factor,
            low_freq_factor: LOW,
            high_freq_factor: HIGH,
            original_max_position_embeddings: original,
        }
    }

    #[test]
    fn published_rules_and_others_like_them_are_found() {
        for (factor, original, theta, dim) in [
            (8.0, 8192.0, 500_000.0, 128),
            (32.0, 8192.0, 500_000.0, 64),
            (8.0, 64.0, 10_000.0, 32),
            (2.5, 4096.0, 500_000.0, 128),
        ] {
            let scaling = llama3(factor, original);
            let (plain, factors) = factors(&scaling, theta, dim);
            assert_eq!(recovered(&plain, &factors), Some(scaling));
        }
    }

    #[test]
    fn factors_of_another_rule_are_not_taken_for_one() {
        let (plain, mut factors) = factors(&llama3(8.0, 8192.0), 500_000.0, 128);
        let between = factors.iter().position(|&factor| factor > 1.0 && factor < 8.0).unwrap();
        factors[between] *= 1.001;
        assert_eq!(recovered(&plain, &factors), None);
    }
}
