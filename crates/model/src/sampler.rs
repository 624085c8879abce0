//! Choosing the next token from logits.

use crate::{Error, Result};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Values above 0 flatten the distribution; any other, NaN included, takes the most likely token.
    pub temperature: f64,
    /// Only the `top_k` most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability; 1 for all.
    pub top_p: f64,
    /// Where the random sequence starts.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// A sampler and its random state.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    state: u64,
}

impl Sampler {
    /// A sampler that starts at the seed.
    pub fn new(options: SamplerOptions) -> Self {
        Self { options, state: options.seed }
    }

    /// The next token. Equal logits are broken in favour of the lower id.
    ///
    /// A NaN or infinite logit is an error: there is no most likely token then, and text made of it would
    /// look like an answer.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let wrong = logits.iter().filter(|l| !l.is_finite()).count();
        if wrong > 0 || logits.is_empty() {
            return Err(Error::LogitsNotFinite { wrong, vocab_size: logits.len() });
        }
        let random = self.options.temperature > 0.0;
        let keep = match (random, self.options.top_k) {
            (false, _) => 1,
            (true, 0) => logits.len(),
            (true, k) => k.min(logits.len()),
        };
        let mut ids = top_k(logits, keep);
        if !random {
            return Ok(ids[0]);
        }
        let max = f64::from(logits[ids[0] as usize]);
        let weight = |&id: &u32| {
            libm::exp((f64::from(logits[id as usize]) - max) / self.options.temperature)
        };
        let mut weights: Vec<f64> = ids.iter().map(weight).collect();
        let total: f64 = weights.iter().sum();
        let mut reached = 0.0;
        let nucleus = weights.iter().position(|w| {
            reached += w;
            reached >= self.options.top_p * total
        });
        let kept = nucleus.map_or(weights.len(), |last| last + 1);
        ids.truncate(kept);
        weights.truncate(kept);

        let mut left = self.uniform() * weights.iter().sum::<f64>();
        for (&id, w) in ids.iter().zip(&weights) {
            left -= w;
            if left < 0.0 {
                return Ok(id);
            }
        }
        Ok(ids[kept - 1])
    }

    /// A number in `[0, 1)` (SplitMix64, Steele et al. 2014).
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The ids of the `k` largest values, largest first; equal values in the order of their ids, NaN last.
pub fn top_k(values: &[f32], k: usize) -> Vec<u32> {
    let key = |id: &u32| {
        let v = values[*id as usize];
        if v.is_nan() { f32::NEG_INFINITY } else { v }
    };
    let by_value = |a: &u32, b: &u32| key(b).total_cmp(&key(a)).then(a.cmp(b));
    let mut ids: Vec<u32> = (0..values.len() as u32).collect();
    if k < ids.len() {
        if k > 0 {
            ids.select_nth_unstable_by(k - 1, by_value);
        }
        ids.truncate(k);
    }
    ids.sort_unstable_by(by_value);
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(options: SamplerOptions, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(options);
        (0..n).map(|_| sampler.sample(logits).unwrap()).collect()
    }

    #[test]
    fn greedy_takes_the_largest_and_the_lower_id_of_equals() {
        for temperature in [0.0, -1.0, f64::NAN] {
            let options = SamplerOptions { temperature, ..SamplerOptions::default() };
            assert_eq!(draws(options, &[0.0, 3.0, -1.0, 3.0], 1), [1], "{temperature}");
        }
    }

    #[test]
    fn samples_follow_the_softmax() {
        let options = SamplerOptions { temperature: 1.0, seed: 7, ..Default::default() };
        let logits = [0.0f32, 1.0, 2.0];
        let drawn = draws(options, &logits, 20_000);
        let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        for (id, &logit) in logits.iter().enumerate() {
            let p = f64::from(logit).exp() / total;
            let share = drawn.iter().filter(|&&d| d as usize == id).count() as f64 / 20_000.0;
            // Five standard deviations of a binomial share.
            assert!(
                (share - p).abs() < 5.0 * (p * (1.0 - p) / 20_000.0).sqrt(),
                "{id}: {share} {p}"
            );
        }
    }

    #[test]
    fn top_k_and_top_p_exclude_the_tail() {
        let logits = [4.0f32, 3.0, 2.0, 1.0];
        let k = SamplerOptions { temperature: 5.0, top_k: 2, ..Default::default() };
        assert!(draws(k, &logits, 500).iter().all(|&id| id < 2));
        let p = SamplerOptions { temperature: 1.0, top_p: 0.5, ..Default::default() };
        assert!(draws(p, &logits, 500).iter().all(|&id| id == 0));
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let options = SamplerOptions { temperature: 1.0, seed: 3, ..Default::default() };
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
        assert_eq!(draws(options, &logits, 50), draws(options, &logits, 50));
        let other = SamplerOptions { seed: 4, ..options };
        assert_ne!(draws(options, &logits, 50), draws(other, &logits, 50));
    }

    #[test]
    fn logits_that_are_not_finite_are_refused() {
        for wrong in [f32::NAN, f32::INFINITY] {
            let error = Sampler::new(SamplerOptions::default()).sample(&[0.0, wrong]);
            assert!(matches!(error, Err(Error::LogitsNotFinite { wrong: 1, .. })));
        }
    }

    #[test]
    fn top_k_puts_nan_last() {
        assert_eq!(top_k(&[f32::NAN, 1.0, 5.0, f32::NAN], 3), [2, 1, 0]);
        assert!(top_k(&[1.0], 0).is_empty());
    }
}
