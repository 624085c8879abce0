//! What this machine can do at most: the limits that a run is held against.
//!
//! Each limit is the best of a few short windows in which all threads do one thing and nothing else: read memory, or
//! multiply and add what lies in registers. They are not what a data sheet says, but what this machine reaches now, in the instruction
//! set asked for and beside whatever else it runs.

use std::{
    hint::black_box,
    sync::{Barrier, mpsc},
    thread,
    time::{Duration, Instant},
};

use crate::{
    Cpu, CpuOptions, Isa, Result,
    generic::{Simd, kernels, scalar::Scalar},
    memory::prefetch,
};

/// How long all threads work before the rate is taken. The best of [`WINDOWS`] counts.
const WINDOW: Duration = Duration::from_millis(50);
const WINDOWS: usize = 6;

/// Memory that is read, of all threads together and at least of each: more than caches hold.
const READ_BYTES: usize = 512 << 20;
const READ_BYTES_PER_THREAD: usize = 16 << 20;

/// How much is read, or how often all chains are lengthened, between two looks at the clock.
const BLOCK: usize = 4 << 20;
const ROUNDS: usize = 4096;

/// The limits of this machine for a number of threads in one instruction set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    /// Threads that worked at once.
    pub threads: usize,
    /// The instruction set.
    pub isa: Isa,
    /// Bytes per second read from memory.
    pub read: f64,
    /// Operations per second on 8-bit integers; a product and the sum it enters are two.
    pub int8: f64,
    /// The same on 32-bit floats, fused.
    pub f32: f64,
}

/// Measures the limits of `threads` threads in `isa`. Takes a few seconds and half a gigabyte.
pub fn probe(threads: usize, isa: Isa) -> Result<Peaks> {
    // Refuses what no backend can be made of, so that no loop runs on a machine that lacks its instructions.
    Cpu::new(CpuOptions { threads: Some(threads), isa: Some(isa), ..CpuOptions::default() })?;
    let probes = Probes::of(isa);
    let bytes = (READ_BYTES / threads).max(READ_BYTES_PER_THREAD);
    let read = |read: ReadProbe| {
        best_rate(threads, || {
            let memory = vec![1u8; bytes];
            let mut blocks = (0..bytes / BLOCK).cycle();
            move || {
                let start = blocks.next().unwrap_or(0) * BLOCK;
                read(black_box(&memory[start..start + BLOCK]), black_box(&mut 0));
                BLOCK as u64
            }
        })
    };
    let chains = |probe: ChainProbe| {
        best_rate(threads, || {
            move || {
                (probe.run)(black_box(ROUNDS), black_box(&mut 0.0));
                ROUNDS as u64 * probe.ops_per_round
            }
        })
    };
    let reads = READS.iter().copied().map(read).collect::<Result<Vec<f64>>>()?;
    Ok(Peaks {
        threads,
        isa,
        read: reads.into_iter().fold(0.0, f64::max),
        int8: chains(probes.int8)?,
        f32: chains(probes.f32)?,
    })
}

/// Sums up `bytes`.
type ReadProbe = fn(bytes: &[u8], out: &mut u64);

/// The ways to read of which the fastest counts: one stream of memory, several, and several fetched ahead. Memory is slower than any
/// instruction set, so they are compiled once.
const READS: &[ReadProbe] = &[read::<1, false>, read::<4, false>, read::<4, true>];

/// Lines of 64 bytes that a stream is fetched ahead.
const AHEAD: usize = 16;

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
            Isa::Scalar | Isa::Avx2 | Isa::AvxVnni | Isa::Avx512 | Isa::Neon | Isa::NeonDot => {
                probes!(Scalar, [], 1, int8_plain, INT8_PLAIN_OPS)
            }
        }
    }
}

/// The best sum of all threads' rates in one window. `turn` makes what a thread does again and again: some work, whose
/// amount it returns.
fn best_rate<T: FnMut() -> u64>(threads: usize, turn: impl Fn() -> T + Sync) -> Result<f64> {
    let together = Barrier::new(threads);
    let run = || {
        let mut turn = turn();
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
        (0..WINDOWS).map(window).collect::<Vec<f64>>()
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
    Ok((0..WINDOWS).map(window).fold(0.0, f64::max))
}

/// Sums up `bytes`, read in `STREAMS` streams at once, with `FETCH` of what comes [`AHEAD`] lines later.
#[inline(always)]
fn read<const STREAMS: usize, const FETCH: bool>(bytes: &[u8], out: &mut u64) {
    let lines = bytes.as_chunks::<64>().0;
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
    *out = sums.as_flattened().iter().fold(0, |all, sum| all.wrapping_add(*sum));
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
    use super::*;
    use crate::Error;

    #[test]
    fn every_instruction_set_has_positive_peaks_and_a_foreign_one_is_refused() {
        for isa in Isa::available() {
            let peaks = probe(2, isa).unwrap();
            assert_eq!((peaks.threads, peaks.isa), (2, isa));
            for peak in [peaks.read, peaks.int8, peaks.f32] {
                assert!(peak.is_finite() && peak > 0.0, "{peaks:?}");
            }
        }
        let foreign = if cfg!(target_arch = "aarch64") { Isa::Avx2 } else { Isa::Neon };
        assert!(matches!(probe(1, foreign), Err(Error::IsaUnavailable { .. })));
        assert!(matches!(probe(0, Isa::Scalar), Err(Error::Threads { .. })));
    }

    #[test]
    fn each_loop_does_the_work_that_it_is_counted_for() {
        let bytes: Vec<u8> = (0..512u64).flat_map(u64::to_ne_bytes).collect();
        for read in READS {
            let mut sum = 0;
            read(&bytes, &mut sum);
            assert_eq!(sum, 511 * 512 / 2, "each word is read once");
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
