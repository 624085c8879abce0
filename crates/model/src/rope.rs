//! Rotary position embedding: which angle each pair of channels turns by.
//!
//! Pair `i` of a head turns by `position * inv_freq[i]` with `inv_freq[i] = theta^(-2i / rotary_dim)`
//! (Su et al. 2021, RoFormer). Llama 3.1 stretches the low frequencies for long contexts. Everything is computed in f64 by
//! functions that give the same bits on every machine; backends round the table to the type they compute in.

use std::f64::consts::TAU;

/// The angular frequency of each pair of channels, in radians per position.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeFrequencies {
    inv_freq: Vec<f64>,
}

/// Llama 3.1's frequency scaling, with `config.json`'s own keys.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs, reason = "the keys of `rope_scaling` in config.json")]
pub struct Llama3Scaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: f64,
}

impl RopeFrequencies {
    /// `theta^(-2i / rotary_dim)` for each of the `rotary_dim / 2` pairs.
    pub fn new(theta: f64, rotary_dim: usize) -> Self {
        let inv_freq = (0..rotary_dim / 2)
            .map(|i| libm::pow(theta, -((2 * i) as f64) / rotary_dim as f64))
            .collect();
        Self { inv_freq }
    }

    /// All frequencies divided by `factor`: `rope_scaling.rope_type = "linear"`.
    pub fn linear(mut self, factor: f64) -> Self {
        self.inv_freq.iter_mut().for_each(|f| *f /= factor);
        self
    }

    /// Llama 3.1's scaling: wavelengths longer than the old context are stretched by `factor`, short ones
    /// stay, and those between are interpolated.
    pub fn llama3(mut self, s: &Llama3Scaling) -> Self {
        let low_wavelen = s.original_max_position_embeddings / s.low_freq_factor;
        let high_wavelen = s.original_max_position_embeddings / s.high_freq_factor;
        for f in &mut self.inv_freq {
            let wavelen = TAU / *f;
            if wavelen > low_wavelen {
                *f /= s.factor;
            } else if wavelen >= high_wavelen {
                let smooth = (s.original_max_position_embeddings / wavelen - s.low_freq_factor)
                    / (s.high_freq_factor - s.low_freq_factor);
                *f = (1.0 - smooth) * *f / s.factor + smooth * *f;
            }
        }
        self
    }

    /// Each frequency divided by its own factor: what GGUF stores as `rope_freqs.weight`.
    ///
    /// # Panics
    /// If there is not one factor per pair.
    pub fn divided_by(mut self, factors: &[f32]) -> Self {
        assert_eq!(factors.len(), self.inv_freq.len(), "one rope factor per pair");
        self.inv_freq.iter_mut().zip(factors).for_each(|(f, &d)| *f /= f64::from(d));
        self
    }

    /// The frequencies.
    pub fn as_slice(&self) -> &[f64] {
        &self.inv_freq
    }

    /// Sines and cosines for `positions`.
    pub fn table(&self, positions: impl IntoIterator<Item = usize>) -> RopeTable {
        let mut table = RopeTable::default();
        self.fill(&mut table, positions);
        table
    }

    /// The same in the memory of an old table.
    pub(crate) fn fill(&self, table: &mut RopeTable, positions: impl IntoIterator<Item = usize>) {
        let RopeTable { pairs, angles, cos, sin } = table;
        *pairs = self.inv_freq.len();
        angles.clear();
        for position in positions {
            angles.extend(self.inv_freq.iter().map(|f| position as f64 * f));
        }
        cos.clear();
        cos.extend(angles.iter().map(|&angle| libm::cos(angle)));
        sin.clear();
        sin.extend(angles.iter().map(|&angle| libm::sin(angle)));
    }
}

/// The rotation of each row of a step: `[n, pairs]` cosines and sines.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RopeTable {
    pairs: usize,
    angles: Vec<f64>,
    cos: Vec<f64>,
    sin: Vec<f64>,
}

impl RopeTable {
    /// Pairs per head; channels beyond `2 * pairs` are not rotated.
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// Rows in the table.
    pub fn rows(&self) -> usize {
        self.cos.len() / self.pairs.max(1)
    }

    /// The angles of row `row`, in radians.
    pub fn angles(&self, row: usize) -> &[f64] {
        &self.angles[row * self.pairs..(row + 1) * self.pairs]
    }

    /// The cosines and sines of row `row`.
    pub fn row(&self, row: usize) -> (&[f64], &[f64]) {
        let range = row * self.pairs..(row + 1) * self.pairs;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pair_turns_one_radian_per_position() {
        let table = RopeFrequencies::new(10_000.0, 8).table(3..5);
        assert_eq!(table.rows(), 2);
        let (cos, sin) = table.row(1);
        assert_eq!((cos[0], sin[0]), (libm::cos(4.0), libm::sin(4.0)));
        assert!((cos[3] - (4.0 * 1e-3f64).cos()).abs() < 1e-15);
    }

    #[test]
    fn llama3_scaling_keeps_high_frequencies_and_divides_low_ones() {
        let plain = RopeFrequencies::new(500_000.0, 128);
        let scaled = plain.clone().llama3(&Llama3Scaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        });
        let ratio = |i: usize| plain.as_slice()[i] / scaled.as_slice()[i];
        assert_eq!(ratio(0), 1.0);
        assert_eq!(ratio(63), 8.0);
        let between: Vec<f64> = (0..64).map(ratio).filter(|&r| r > 1.0 && r < 8.0).collect();
        assert!(!between.is_empty() && between.is_sorted());
    }
}
