//! Numbers by seed: the same on every machine and in every version.

/// SplitMix64 (Steele, Lea and Flood 2014): enough for weights that mean nothing.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// The numbers of `seed` for what is called `name`.
    pub(crate) fn new(seed: u64, name: &str) -> Self {
        // FNV-1a, so that names alike have nothing in common.
        let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        let mut random = Self(name.bytes().fold(seed ^ 0xcbf2_9ce4_8422_2325, mix));
        Self(random.next())
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Nearly normal, with mean 0 and variance 1: a sum of twelve, which needs no function that machines disagree on.
    pub(crate) fn normal(&mut self) -> f32 {
        let mut uniform = || (self.next() >> 40) as f32 / (1u64 << 24) as f32;
        (0..12).map(|_| uniform()).sum::<f32>() - 6.0
    }
}
