//! Llama 3's rotary scaling: four numbers for Hugging Face, and for GGUF a factor for each pair, which is a tensor.
//!
//! A factor is what a frequency is divided by: 1 for short waves, the rule's `factor` for long ones, and between the two bounds
//! `1 / ((1 - s) / factor + s)`, where `s` follows from the wavelength. Only the ratios of the rule's other three
//! numbers show in the factors, so two of them are taken as published and the third is computed.

use std::f64::consts::TAU;

use apr_format::Map;
use apr_model::{Config, Llama3Scaling, Role, RopeFrequencies, RopeScaling};
use apr_tensor::{DType, Stored};

use crate::{Loss, verify::same_frequencies};

/// What all published models have.
const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;
const ORIGINAL: f64 = 8192.0;
const FACTORS: [f64; 2] = [8.0, 32.0];

/// What GGUF stores in `rope_freqs.weight` for a model that is scaled by Llama 3's rule.
pub(crate) fn llama3_factors(config: &Config) -> Option<Stored> {
    let RopeScaling::Llama3(scaling) = &config.rope_scaling else { return None };
    let plain = RopeFrequencies::new(config.rope_theta, config.rotary_dim);
    let scaled = plain.clone().llama3(scaling);
    let pairs = plain.as_slice().iter().zip(scaled.as_slice());
    let factors: Vec<u8> = pairs.flat_map(|(p, s)| ((p / s) as f32).to_le_bytes()).collect();
    let stored = Stored::new(DType::F32, [config.rotary_dim / 2].into(), factors.into());
    Some(stored.expect("one factor for each pair"))
}

/// Whether metadata in Hugging Face's words say how frequencies are scaled.
pub(crate) fn says_scaling(map: &Map) -> bool {
    map.get("rope_scaling").is_some()
}

/// The scaling of `config` in numbers, and what of it cannot be said in numbers.
pub(crate) fn in_numbers(config: &Config) -> (RopeScaling, Option<Loss>) {
    let RopeScaling::Factors(factors) = &config.rope_scaling else {
        return (config.rope_scaling.clone(), None);
    };
    if factors.iter().all(|&factor| factor == 1.0) {
        return (RopeScaling::None, None);
    }
    let plain = RopeFrequencies::new(config.rope_theta, config.rotary_dim);
    match recovered(&plain, factors) {
        Some(scaling) => (RopeScaling::Llama3(scaling), None),
        None => {
            let why = "these factors follow no rule of Llama 3's, which is all that `rope_scaling` could say"
                .to_owned();
            let what = format!("tensor `{}`", Role::RopeFreqs.gguf_name());
            (RopeScaling::None, Some(Loss { what, why }))
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
