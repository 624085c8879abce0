//! Damaged copies of files, for tests of what reads them.

/// Values that sizes, counts and offsets are wrong with.
const HOSTILE: [u64; 12] = [
    0,
    1,
    31,
    0x7f,
    0xff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_ffe0,
    u64::MAX,
];

/// A source of damage: the same for the same seed, everywhere.
#[derive(Clone, Debug)]
pub struct Mutants(u64);

impl Mutants {
    /// Damage that begins with `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// Changes `file` in one to three ways; most changes hit the first `hot` bytes, where the structure is.
    pub fn mutate(&mut self, file: &mut Vec<u8>, hot: usize) {
        for _ in 0..=self.below(3) {
            let reach = if self.below(8) == 0 { file.len() } else { hot.min(file.len()) };
            let at = self.below(reach);
            let rest = file.len() - at;
            match self.below(8) {
                0 if rest > 0 => file[at] ^= 1 << self.below(8),
                1 if rest > 0 => file[at] = self.next() as u8,
                2 if rest >= 4 => {
                    let value = HOSTILE[self.below(HOSTILE.len())] as u32;
                    file[at..at + 4].copy_from_slice(&value.to_le_bytes());
                }
                3 if rest >= 8 => {
                    let value = HOSTILE[self.below(HOSTILE.len())];
                    file[at..at + 8].copy_from_slice(&value.to_le_bytes());
                }
                4 => file.truncate(at),
                5 => file.extend((0..self.below(200)).map(|i| i as u8)),
                6 => {
                    let from = self.below(reach);
                    let len = self.below(64).min(file.len() - from);
                    let piece = file[from..from + len].to_vec();
                    file.splice(at..at, piece);
                }
                _ => {
                    let len = self.below(32).min(rest);
                    file.drain(at..at + len);
                }
            }
        }
    }
}
