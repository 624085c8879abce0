//! What this machine can do at most: the limits that a run is held against.
//!
//! Each limit is the best of a few short windows in which all threads do one thing and nothing else: multiply and add what lies in
//! registers, or [read](Reader) the weights that a run has just read. They are not what a data sheet says, but what this machine reaches now,
//! in the instruction set asked for and beside whatever else it runs.

use std::{
    hint::black_box,
    sync::{
        Barrier,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    Cpu, CpuOptions, Isa, Result, Weight,
    generic::{Simd, kernels, scalar::Scalar},
    memory::prefetch,
};

/// How long all threads work before the rate is taken.
const WINDOW: Duration = Duration::from_millis(50);
/// So many windows of operations, of which the best counts.
const WINDOWS: usize = 6;

/// The most that is read, or how often all chains are lengthened, between two looks at the clock.
const BLOCK: usize = 4 << 20;
const ROUNDS: usize = 4096;

/// The limits of this machine for a number of threads in one instruction set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    /// Threads that worked at once.
    pub threads: usize,
    /// The instruction set.
    pub isa: Isa,
    /// Operations per second on 8-bit integers; a product and the sum it enters are two.
    pub int8: f64,
    /// The same on 32-bit floats, fused.
    pub f32: f64,
}

/// Measures what `threads` threads can compute in `isa`. Takes a second.
pub fn probe(threads: usize, isa: Isa) -> Result<Peaks> {
    // Refuses what no backend can be made of, so that no loop runs on a machine that lacks its instructions.
    Cpu::new(CpuOptions { threads: Some(threads), isa: Some(isa), ..CpuOptions::default() })?;
    let probes = Probes::of(isa);
    let chains = |probe: ChainProbe| {
        best_rate(threads, WINDOWS, || {
            (probe.run)(black_box(ROUNDS), black_box(&mut 0.0));
            ROUNDS as u64 * probe.ops_per_round
        })
    };
    Ok(Peaks { threads, isa, int8: chains(probes.int8)?, f32: chains(probes.f32)? })
}

/// Reads memory as fast as a number of threads can.
///
/// How fast memory is may change within seconds on a machine that is shared, and may depend on which pages it is. So this reads the weights themselves,
/// and whoever measures a run does so between its repetitions.
#[derive(Debug)]
pub struct Reader<'m> {
    threads: usize,
    blocks: Vec<&'m [u8]>,
    /// The block that is read next.
    next: AtomicUsize,
}

impl<'m> Reader<'m> {
    /// Of the memory of `weights`.
    pub fn new(threads: usize, weights: impl Iterator<Item = &'m Weight>) -> Self {
        let memory: Vec<&[u8]> = weights.flat_map(Weight::memory).collect();
        let share = memory.iter().map(|bytes| bytes.len()).sum::<usize>() / threads.max(1);
        let block = share.clamp(LINE, BLOCK).next_multiple_of(LINE);
        let blocks = memory.iter().flat_map(|bytes| bytes.chunks(block)).collect();
        Self { threads, blocks, next: AtomicUsize::new(0) }
    }

    /// Bytes per second: the best of some ways to read, for 50 ms each. 0 if there are no weights.
    pub fn rate(&self) -> Result<f64> {
        let mut best: f64 = 0.0;
        if self.blocks.is_empty() {
            return Ok(best);
        }
        for read in READS {
            let rate = best_rate(self.threads, 1, || {
                let i = self.next.fetch_add(1, Relaxed) % self.blocks.len();
                read(black_box(self.blocks[i]), black_box(&mut 0));
                self.blocks[i].len() as u64
            });
            best = best.max(rate?);
        }
        Ok(best)
    }
}

/// Sums up `bytes`.
type Read = fn(bytes: &[u8], out: &mut u64);

/// The ways to read of which the fastest counts: one stream of memory, several, and several fetched ahead. Memory is slower than any
/// instruction set, so they are compiled once.
const READS: &[Read] = &[read::<1, false>, read::<4, false>, read::<4, true>];

/// Lines that a stream is fetched ahead.
const AHEAD: usize = 16;
const LINE: usize = 64;

/// Lengthens independent chains of products and sums, and puts something that depends on all of them into `out`.
#[derive(Clone, Copy, Debug)]
struct ChainProbe {
    run: fn(rounds: usize, out: &mut f32),
    ops_per_round: u64,
}

/// The loops of one instruction set.
#[derive(Debug)]
struct Probes {
    int8: ChainProbe,
    f32: ChainProbe,
}

/// The loops compiled for one instruction set. `$chains` floats chains of [`Simd::Lanes`] fill the registers without spilling.
macro_rules! probes {
    ($simd:ty, $features:tt, $chains:literal, $int8:path, $int8_ops:expr) => {
        Probes {
            int8: ChainProbe {
                run: kernels! { @fn $features $int8, (rounds: usize, out: &mut f32) },
                ops_per_round: $int8_ops,
            },
            f32: ChainProbe {
                run: kernels! { @fn $features chains::<$simd, $chains>, (rounds: usize, out: &mut f32) },
                ops_per_round: 2 * $chains * crate::generic::LANES as u64,
            },
        }
    };
}

impl Probes {
    /// Those of `isa`, which the machine must have.
    fn of(isa: Isa) -> Self {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                use crate::x86_64::{avx2::Avx2, probe::*};
                probes!(Avx2<false>, ["avx2,fma,f16c"], 6, int8_avx2, INT8_AVX2_OPS)
            }
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => {
                use crate::x86_64::{avx2::Avx2, probe::*};
                probes!(Avx2<true>, ["avx2,fma,f16c,avxvnni"], 6, int8_avxvnni, INT8_AVX2_OPS)
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                use crate::x86_64::{avx512::Avx512, probe::*};
                probes!(
                    Avx512,
                    ["avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"],
                    12,
                    int8_avx512,
                    INT8_AVX512_OPS
                )
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => {
                use crate::x86_64::{amx, avx512::Avx512};
                probes!(
                    Avx512,
                    ["avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"],
                    12,
                    amx::chains,
                    amx::CHAINS_OPS
                )
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => {
                use crate::aarch64::{neon::Neon, probe::*};
                probes!(Neon<false>, ["neon"], 6, int8_neon, INT8_NEON_OPS)
            }
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => {
                use crate::aarch64::{neon::Neon, probe::*};
                probes!(Neon<true>, ["neon,dotprod"], 6, int8_neondot, INT8_NEON_OPS)
            }
            // Foreign sets have been refused; a new one must not pass for the scalar one.
            #[allow(unreachable_patterns, reason = "which sets are foreign depends on the target")]
            Isa::Scalar
            | Isa::Avx2
            | Isa::AvxVnni
            | Isa::Avx512
            | Isa::Amx
            | Isa::Neon
            | Isa::NeonDot => {
                probes!(Scalar, [], 1, int8_plain, INT8_PLAIN_OPS)
            }
        }
    }
}

/// The best sum of all threads' rates in one of `windows`. `turn` is what a thread does again and again: some work, whose
/// amount it returns.
fn best_rate(threads: usize, windows: usize, turn: impl Fn() -> u64 + Sync) -> Result<f64> {
    let together = Barrier::new(threads);
    let run = || {
        turn();
        let window = |_| {
            together.wait();
            let (start, mut done) = (Instant::now(), 0);
            loop {
                done += turn();
                let elapsed = start.elapsed();
                if elapsed >= WINDOW {
                    return done as f64 / elapsed.as_secs_f64();
                }
            }
        };
        (0..windows).map(window).collect::<Vec<f64>>()
    };
    let rates = thread::scope(|scope| -> Result<Vec<Vec<f64>>> {
        // Nobody waits at the barrier before everybody is there: of fewer threads none would get past it.
        let (mut starts, mut workers) = (Vec::new(), Vec::new());
        for _ in 0..threads {
            let (start, started) = mpsc::channel();
            let worker = move || started.recv().map_or(Vec::new(), |()| run());
            workers.push(thread::Builder::new().spawn_scoped(scope, worker)?);
            starts.push(start);
        }
        for start in starts {
            start.send(()).expect("the thread waits for it");
        }
        Ok(workers.into_iter().map(|worker| worker.join().expect("no loop panics")).collect())
    })?;
    let window = |i| rates.iter().map(|rates: &Vec<f64>| rates[i]).sum();
    Ok((0..windows).map(window).fold(0.0, f64::max))
}

/// Sums up `bytes`, read in `STREAMS` streams at once, with `FETCH` of what comes [`AHEAD`] lines later.
#[inline(always)]
fn read<const STREAMS: usize, const FETCH: bool>(bytes: &[u8], out: &mut u64) {
    let (lines, rest) = bytes.as_chunks::<LINE>();
    let len = lines.len() / STREAMS;
    let mut sums = [[0u64; 8]; STREAMS];
    for i in 0..len {
        for (stream, sums) in sums.iter_mut().enumerate() {
            let line = stream * len + i;
            if FETCH && let Some(ahead) = lines.get(line + AHEAD) {
                prefetch(ahead);
            }
            let (words, _) = lines[line].as_chunks::<8>();
            for (sum, word) in sums.iter_mut().zip(words) {
                *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
            }
        }
    }
    // What is left is read too, so that all of it counts.
    let rest = lines[STREAMS * len..].as_flattened().iter().chain(rest);
    let sums = sums.as_flattened().iter().copied().chain(rest.map(|&byte| u64::from(byte)));
    *out = sums.fold(0, u64::wrapping_add);
}

/// `CHAINS` chains of fused multiply-adds in each lane.
#[inline(always)]
fn chains<S: Simd, const CHAINS: usize>(rounds: usize, out: &mut f32) {
    let (half, one) = (S::splat(black_box(0.5)), S::splat(black_box(1.0)));
    let mut sums = [one; CHAINS];
    for sum in &mut sums {
        // Chains that begin alike could be computed once.
        *sum = S::splat(black_box(1.0));
    }
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = S::fma(*sum, half, one);
        }
    }
    for sum in sums {
        for x in S::store(sum) {
            *out += x;
        }
    }
}

/// Rows of activations that meet one row of weights in [`int8_plain`].
const PLAIN_ROWS: usize = 4;
const PLAIN_LEN: usize = 256;
const INT8_PLAIN_OPS: u64 = 2 * (PLAIN_ROWS * PLAIN_LEN) as u64;

/// Dot products of bytes, as a compiler does them.
#[inline(always)]
fn int8_plain(rounds: usize, out: &mut f32) {
    let (weights, activations) = ([1i8; PLAIN_LEN], [[1i8; PLAIN_LEN]; PLAIN_ROWS]);
    let mut sums = [0i32; PLAIN_ROWS];
    for _ in 0..rounds {
        let (weights, activations) = (black_box(&weights), black_box(&activations));
        for (sum, row) in sums.iter_mut().zip(activations) {
            for (w, a) in weights.iter().zip(row) {
                *sum = sum.wrapping_add(i32::from(*w) * i32::from(*a));
            }
        }
    }
    for sum in sums {
        *out += sum as f32;
    }
}

#[cfg(test)]
mod tests {
    use apr_tensor::{DType, Stored};

    use super::*;
    use crate::Error;

    #[test]
    fn every_instruction_set_has_positive_peaks_and_a_foreign_one_is_refused() {
        for isa in Isa::available() {
            let peaks = probe(2, isa).unwrap();
            assert_eq!((peaks.threads, peaks.isa), (2, isa));
            for peak in [peaks.int8, peaks.f32] {
                assert!(peak.is_finite() && peak > 0.0, "{peaks:?}");
            }
        }
        let foreign = if cfg!(target_arch = "aarch64") { Isa::Avx2 } else { Isa::Neon };
        assert!(matches!(probe(1, foreign), Err(Error::IsaUnavailable { .. })));
        assert!(matches!(probe(0, Isa::Scalar), Err(Error::Threads { .. })));
    }

    #[test]
    fn a_reader_reads_all_weights_on_any_number_of_threads() {
        let cpu = Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
        let weight = |dtype: DType, rows: usize| {
            let bytes = vec![0u8; rows * dtype.row_bytes(256).unwrap()];
            let stored = Stored::new(dtype, [rows, 256].into(), bytes.into()).unwrap();
            Weight::new(&[stored.clone(), stored], &cpu).unwrap()
        };
        let weights = [weight(DType::Q4_K, 33), weight(DType::F16, 3)];
        // 33 rows take two tiles of 32.
        let bytes = 2 * (2 * 32 * 144 + 3 * 512);
        for threads in [1, 2, 5] {
            let reader = Reader::new(threads, weights.iter());
            assert_eq!(reader.blocks.iter().map(|block| block.len()).sum::<usize>(), bytes);
            assert!(reader.blocks.len() >= threads, "each thread has something to read");
            let rate = reader.rate().unwrap();
            assert!(rate.is_finite() && rate > 0.0);
            assert!(reader.next.load(Relaxed) > reader.blocks.len(), "all of it, again and again");
        }
    }

    #[test]
    fn each_loop_does_the_work_that_it_is_counted_for() {
        let words: Vec<u8> = (0..512u64).flat_map(u64::to_ne_bytes).collect();
        // Two lines that four streams leave, and less than a line.
        let more: Vec<u8> = words.iter().copied().chain([1; 2 * LINE + 5]).collect();
        for read in READS {
            let [mut sum, mut more_sum] = [0; 2];
            read(&words, &mut sum);
            assert_eq!(sum, 511 * 512 / 2, "each word is read once");
            read(&more, &mut more_sum);
            // The lines as words, or as bytes if they are left.
            let expected = [16 * 0x0101_0101_0101_0101 + 5, 2 * LINE as u64 + 5];
            assert!(expected.contains(&(more_sum - sum)), "nothing is left out");
        }
        for isa in Isa::available() {
            let probes = Probes::of(isa);
            // All factors are 1, so the sum is the number of products.
            let mut products = 0.0;
            (probes.int8.run)(3, &mut products);
            assert_eq!(2 * products as u64, 3 * probes.int8.ops_per_round, "{isa}");
            // 1 -> 1/2 + 1 -> 3/4 + 1 in every lane of every chain.
            let mut lanes = 0.0;
            (probes.f32.run)(2, &mut lanes);
            assert_eq!(lanes, 1.75 * (probes.f32.ops_per_round / 2) as f32, "{isa}");
        }
    }
}
