//! How fast one core quantises: bytes of f32 in.

use apr_tensor::{DType, quantize::can_quantize, quantize_row};
use divan::{Bencher, counter::BytesCount};

/// A row of a large matrix.
const COLS: usize = 8192;

fn main() {
    divan::main();
}

fn types() -> impl Iterator<Item = DType> {
    DType::all().filter(|&dtype| can_quantize(dtype))
}

#[divan::bench(args = types())]
fn plain(bencher: Bencher, dtype: DType) {
    bench(bencher, dtype, None);
}

#[divan::bench(args = types())]
fn with_importance(bencher: Bencher, dtype: DType) {
    let importance: Vec<f32> = noise(7).map(|x| x * x + 0.01).take(COLS).collect();
    bench(bencher, dtype, Some(&importance));
}

fn bench(bencher: Bencher, dtype: DType, importance: Option<&[f32]>) {
    // Sums of uniform numbers, hence of a shape like that of weights.
    let [mut a, mut b, mut c] = [1, 2, 3].map(noise);
    let row: Vec<f32> =
        std::iter::repeat_with(|| a.next().unwrap() + b.next().unwrap() + c.next().unwrap())
            .take(COLS)
            .collect();
    let mut out = vec![0; dtype.row_bytes(COLS).expect("whole blocks")];
    bencher.counter(BytesCount::of_slice(&row)).bench_local(|| {
        quantize_row(dtype, &row, importance, &mut out).expect("finite");
    });
}

/// Uniform numbers from -0.5 to 0.5.
fn noise(seed: u32) -> impl Iterator<Item = f32> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    })
}
