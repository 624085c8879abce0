//! Attention of a whole model in the shape of Qwen2.5 0.5B, all layers one after the other: a token that meets long
//! contexts, and a prompt.
//!
//! Items are multiply-adds, bytes are the keys and values in the cache. Decode is at the machine's limit if it reads as
//! `read` does, or multiplies at the peak of the processor: 32 a cycle and thread with AVX-512, 16 with AVX2.

use std::fmt;

use apr_cpu::{Cpu, CpuOptions, Kv, Tensor};
use apr_model::{AttentionInner, Backend, HostTensor, KvShape};
use divan::{
    Bencher,
    counter::{BytesCount, ItemsCount},
};

const LAYERS: usize = 24;
const HEADS: usize = 14;
const CACHED: KvShape = KvShape { heads: 2, head_dim: 64 };

/// Long contexts are filled by so many positions at a time.
const CHUNK: usize = 512;

fn main() {
    divan::main();
}

#[derive(Clone, Copy, Debug)]
struct Case {
    threads: usize,
    depth: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} threads, depth {}", self.threads, self.depth)
    }
}

fn cases(depths: &[usize]) -> Vec<Case> {
    let of = |threads| depths.iter().map(move |&depth| Case { threads, depth });
    [1, 2].into_iter().flat_map(of).collect()
}

fn cpu(threads: usize) -> Cpu {
    Cpu::new(CpuOptions { threads: Some(threads), ..CpuOptions::default() }).expect("it starts")
}

/// Numbers of the size that normed activations have.
fn tensor(cpu: &Cpu, shape: [usize; 3]) -> Tensor {
    let value = |i: usize| ((i * 7919) % 613) as f64 / 306.5 - 1.0;
    let values = (0..shape.iter().product()).map(value).collect();
    cpu.upload(HostTensor { shape: shape.to_vec(), values }).expect("fits")
}

fn caches(cpu: &Cpu, depth: usize) -> Vec<Kv> {
    let filled = || {
        let mut kv = cpu.kv(CACHED, depth).expect("fits");
        for start in (0..depth).step_by(CHUNK) {
            let n = CHUNK.min(depth - start);
            let x = tensor(cpu, [n, CACHED.heads, CACHED.head_dim]);
            cpu.kv_append(&mut kv, &x, &x).expect("fits");
        }
        kv
    };
    (0..LAYERS).map(|_| filled()).collect()
}

/// `n` tokens, of which the last one sees `depth` positions.
fn bench(bencher: Bencher, n: usize, Case { threads, depth }: Case) {
    let cpu = cpu(threads);
    let (caches, q) = (caches(&cpu, depth), tensor(&cpu, [n, HEADS, CACHED.head_dim]));
    let seen: usize = (depth - n + 1..=depth).sum();
    let cached = LAYERS * depth * CACHED.heads * CACHED.head_dim * 2 * size_of::<u16>();
    bencher
        .counter(ItemsCount::new(LAYERS * HEADS * seen * CACHED.head_dim * 2))
        .counter(BytesCount::new(cached))
        .bench_local(|| {
            for kv in &caches {
                divan::black_box(cpu.attention(&q, kv, 0.125, AttentionInner::default()).is_ok());
            }
        });
}

#[divan::bench(args = cases(&[128, 2048, 8192, 32768]))]
fn decode(bencher: Bencher, case: Case) {
    bench(bencher, 1, case);
}

#[divan::bench(args = cases(&[512, 4096]), sample_count = 10)]
fn prefill_512(bencher: Bencher, case: Case) {
    bench(bencher, 512, case);
}

/// What one thread reads from memory: the bytes of the deepest cache.
#[divan::bench]
fn read(bencher: Bencher) {
    let bytes = LAYERS * 32768 * CACHED.heads * CACHED.head_dim * 2 * size_of::<u16>();
    let memory = vec![1u64; bytes / size_of::<u64>()];
    bencher.counter(BytesCount::new(bytes)).bench_local(|| {
        divan::black_box(&memory).iter().fold(0, |sum: u64, &x| sum.wrapping_add(x))
    });
}
