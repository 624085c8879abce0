//! The dot products of each stored type on each instruction set, and what it costs to start a job.

use std::fmt;

use apr_cpu::{Cpu, CpuOptions, Isa, Tensor, Weight};
use apr_model::{Backend, HostTensor};
use apr_tensor::{DType, Stored};
use divan::{
    Bencher,
    counter::{BytesCount, ItemsCount},
};

const TYPES: [DType; 15] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Q8_0,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::IQ4_NL,
    DType::Q2_K,
    DType::Q3_K,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
    DType::IQ4_XS,
];

/// A matrix that fits in a second-level cache.
const ROWS: usize = 256;
const COLS: usize = 2048;

/// Bytes of a matrix that no cache holds.
const UNCACHED: usize = 256 << 20;

fn main() {
    divan::main();
}

fn setup(isa: Isa, threads: usize, dtype: DType, n: usize, rows: usize) -> (Cpu, Weight, Tensor) {
    let options = CpuOptions { isa: Some(isa), threads: Some(threads), ..CpuOptions::default() };
    let cpu = Cpu::new(options).expect("isa is available");
    let len = dtype.row_bytes(COLS).expect("whole blocks") * rows;
    // The same byte everywhere makes a number of every type, and kernels do not look at numbers.
    let stored = Stored::new(dtype, [rows, COLS].into(), vec![0x2c; len].into()).expect("fits");
    let w = cpu.weight(&[stored]).expect("supported");
    let x = HostTensor { shape: vec![n, COLS], values: vec![0.5; n * COLS] };
    let x = cpu.upload(x).expect("fits");
    (cpu, w, x)
}

#[derive(Clone, Copy, Debug)]
struct Case {
    isa: Isa,
    dtype: DType,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.isa, self.dtype)
    }
}

fn cases() -> Vec<Case> {
    let fast = Isa::available().filter(|&isa| isa != Isa::Scalar);
    fast.flat_map(|isa| TYPES.map(|dtype| Case { isa, dtype })).collect()
}

/// One row, as in decode. Items are multiply-adds.
#[divan::bench(args = cases())]
fn decode(bencher: Bencher, case: Case) {
    bench(bencher, case, 1);
}

/// One row against a matrix that no cache holds: a weight is read from memory each time. Bytes are those of the matrix.
#[divan::bench(args = cases(), sample_count = 20, sample_size = 1)]
fn decode_from_memory(bencher: Bencher, Case { isa, dtype }: Case) {
    let rows = UNCACHED / dtype.row_bytes(COLS).expect("whole blocks");
    let (cpu, w, x) = setup(isa, 1, dtype, 1, rows);
    let bytes = rows * dtype.row_bytes(COLS).expect("whole blocks");
    bencher.counter(BytesCount::new(bytes)).bench_local(|| cpu.linear(&x, &w));
}

/// A short prompt against such a matrix. Items are multiply-adds.
#[divan::bench(args = cases(), sample_count = 5, sample_size = 1)]
fn prefill_from_memory(bencher: Bencher, Case { isa, dtype }: Case) {
    const PROMPT: usize = 128;
    let rows = UNCACHED / dtype.row_bytes(COLS).expect("whole blocks");
    let (cpu, w, x) = setup(isa, 1, dtype, PROMPT, rows);
    let products = PROMPT * rows * COLS;
    bencher.counter(ItemsCount::new(products)).bench_local(|| cpu.linear(&x, &w));
}

/// Many rows, as in prefill. Items are multiply-adds.
#[divan::bench(args = cases())]
fn prefill(bencher: Bencher, case: Case) {
    bench(bencher, case, 64);
}

/// As many rows as a step of prefill has at most.
#[divan::bench(args = cases(), sample_size = 1)]
fn chunk(bencher: Bencher, case: Case) {
    bench(bencher, case, 512);
}

/// A job so small that starting and ending it is all there is to it.
#[divan::bench(args = [1, 2, 4])]
fn dispatch(bencher: Bencher, threads: usize) {
    let (cpu, w, x) = setup(Isa::best(), threads, DType::Q8_0, 1, 64);
    bencher.bench_local(|| cpu.linear(&x, &w));
}

fn bench(bencher: Bencher, Case { isa, dtype }: Case, n: usize) {
    let (cpu, w, x) = setup(isa, 1, dtype, n, ROWS);
    bencher.counter(ItemsCount::new(n * ROWS * COLS)).bench_local(|| cpu.linear(&x, &w));
}
