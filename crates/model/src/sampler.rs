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
    /// The tokens to choose from and their weights: kept for their memory.
    ids: Vec<u32>,
    weights: Vec<f64>,
}

impl Sampler {
    /// A sampler that starts at the seed.
    pub fn new(options: SamplerOptions) -> Self {
        Self { options, state: options.seed, ids: Vec::new(), weights: Vec::new() }
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
        let SamplerOptions { temperature, top_k, top_p, .. } = self.options;
        if temperature.is_nan() || temperature <= 0.0 {
            return Ok(likeliest(logits));
        }
        let keep = if top_k == 0 { logits.len() } else { top_k.min(logits.len()) };
        largest_into(logits, keep, &mut self.ids);
        let max = f64::from(logits[self.ids[0] as usize]);
        let weight = |&id: &u32| libm::exp((f64::from(logits[id as usize]) - max) / temperature);
        self.weights.clear();
        self.weights.extend(self.ids.iter().map(weight));
        let total: f64 = self.weights.iter().sum();
        let mut reached = 0.0;
        let nucleus = self.weights.iter().position(|w| {
            reached += w;
            reached >= top_p * total
        });
        let kept = nucleus.map_or(self.weights.len(), |last| last + 1);
        self.ids.truncate(kept);
        self.weights.truncate(kept);

        let mut left = self.uniform() * self.weights.iter().sum::<f64>();
        for (&id, w) in self.ids.iter().zip(&self.weights) {
            left -= w;
            if left < 0.0 {
                return Ok(id);
            }
        }
        Ok(self.ids[kept - 1])
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
    let mut ids = Vec::new();
    largest_into(values, k, &mut ids);
    ids
}

/// The same in place of `ids`.
fn largest_into(values: &[f32], k: usize, ids: &mut Vec<u32>) {
    let key = |id: &u32| {
        let v = values[*id as usize];
        if v.is_nan() { f32::NEG_INFINITY } else { v }
    };
    let by_value = |a: &u32, b: &u32| key(b).total_cmp(&key(a)).then(a.cmp(b));
    ids.clear();
    if k == 0 {
        return;
    }
    ids.extend(0..values.len() as u32);
    if k < ids.len() {
        ids.select_nth_unstable_by(k - 1, by_value);
        ids.truncate(k);
    }
    ids.sort_unstable_by(by_value);
}

/// The first of [`top_k`], without a list of all, where all logits are finite.
fn likeliest(logits: &[f32]) -> u32 {
    /// An integer for each float, in the order of `total_cmp`.
    fn key(x: &f32) -> i32 {
        let bits = x.to_bits() as i32;
        bits ^ ((bits >> 31) as u32 >> 1) as i32
    }
    let largest = logits.iter().map(key).fold(i32::MIN, i32::max);
    let id = logits.iter().position(|x| key(x) == largest);
    id.expect("the largest is one of them") as u32
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
    fn greedy_takes_the_first_of_the_sorted() {
        let mut logits: Vec<f32> = (0..300).map(|i| ((i * 7919) % 613) as f32 - 700.0).collect();
        for more in [&[][..], &[-0.0], &[0.0, -0.0], &[-0.0, 0.0, 0.0], &[f32::MAX, f32::MIN]] {
            logits.extend(more);
            assert_eq!(likeliest(&logits), top_k(&logits, 1)[0], "{more:?}");
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
