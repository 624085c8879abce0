//! Quantised weights are as near to the originals as ggml's.

mod inputs;
mod properties;

use apr_tensor::{DType, dequantize, quantize_row};
use inputs::{COLS, data, importance, rows};

/// What ggml made of one kind of input; a line of `data/quantize.txt`.
struct Golden {
    dtype: DType,
    kind: String,
    importance: bool,
    /// The weighted root mean square of the error.
    weighted: f64,
    /// The FNV-1a hash of the blocks.
    hash: u64,
}

fn golden() -> Vec<Golden> {
    let text = String::from_utf8(data("quantize.txt")).unwrap();
    let line = |line: &str| {
        let [dtype, kind, importance, weighted, hash] =
            line.split(' ').collect::<Vec<_>>().try_into().expect("five fields");
        Golden {
            dtype: DType::all().find(|d| d.name() == dtype).unwrap(),
            kind: kind.to_owned(),
            importance: importance == "importance",
            weighted: weighted.parse().unwrap(),
            hash: u64::from_str_radix(hash, 16).unwrap(),
        }
    };
    text.lines().map(line).collect()
}

/// Our blocks of the rows of `x`.
fn quantized(dtype: DType, x: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let size = dtype.row_bytes(COLS).unwrap();
    let mut out = vec![0; x.len() / COLS * size];
    for (x, out) in x.chunks_exact(COLS).zip(out.chunks_exact_mut(size)) {
        quantize_row(dtype, x, importance, out).unwrap();
    }
    out
}

/// What ggml weighs the square error of each element of a row with, as `weights` of the generator.
fn weights(dtype: DType, row: &[f32], importance: Option<&[f32]>) -> Vec<f64> {
    let mean_square = |i: usize, n: usize| {
        let block = &row[i / n * n..][..n];
        block.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64
    };
    let weight = |i: usize| {
        let x = f64::from(row[i]);
        let Some(importance) = importance else {
            return match dtype {
                DType::Q3_K | DType::Q6_K | DType::IQ4_NL | DType::IQ4_XS => x * x,
                DType::Q2_K => x.abs(),
                DType::Q4_K | DType::Q5_K => mean_square(i, 32).sqrt() + x.abs(),
                _ => 1.0,
            };
        };
        let spread = match dtype {
            DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 => mean_square(i, COLS),
            DType::IQ4_NL => 2.0 * mean_square(i, 32),
            DType::Q3_K | DType::Q4_K | DType::Q5_K | DType::IQ4_XS => 2.0 * mean_square(i, 256),
            DType::Q2_K => mean_square(i, 256),
            _ => return importance[i].into(),
        };
        f64::from(importance[i]) * (spread + x * x).sqrt()
    };
    (0..row.len()).map(weight).collect()
}

/// The weighted root mean square of the error of `bytes`, and of `x`.
fn weighted_error(dtype: DType, x: &[f32], importance: Option<&[f32]>, bytes: &[u8]) -> (f64, f64) {
    let mut found = vec![0.0; x.len()];
    dequantize(dtype, bytes, &mut found).unwrap();
    let (mut error, mut magnitude, mut total) = (0.0, 0.0, 0.0);
    for (x, found) in x.chunks_exact(COLS).zip(found.chunks_exact(COLS)) {
        for ((&x, &y), w) in x.iter().zip(found).zip(weights(dtype, x, importance)) {
            error += w * (f64::from(x) - f64::from(y)).powi(2);
            magnitude += w * f64::from(x).powi(2);
            total += w;
        }
    }
    let root = |sum: f64| (sum / f64::max(total, f64::MIN_POSITIVE)).sqrt();
    (root(error), root(magnitude))
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// Types without a choice to make, and those whose scale is that of the largest number.
fn is_only_rounded(dtype: DType, importance: bool) -> bool {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 | DType::Q8_0 => true,
        DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 | DType::AprQ4 => !importance,
        _ => false,
    }
}

/// A hundredth is what a user may ask for: it is below what the choice of rows changes. Run with
/// `--nocapture` for the table of docs/convert.md.
#[test]
#[expect(clippy::print_stdout, reason = "the table is a result")]
fn the_weighted_error_is_within_a_hundredth_of_that_of_ggml() {
    let importance = importance();
    let mut worse = vec![];
    println!("| type | importance | error | of ggml | ratio | worst of all kinds |");
    println!("|---|---|---|---|---|---|");
    for case in golden().chunk_by(|a, b| (a.dtype, a.importance) == (b.dtype, b.importance)) {
        let importance = case[0].importance.then_some(&importance[..]);
        let (mut line, mut worst) = (String::new(), 0.0f64);
        // The error of equal numbers is that of their one scale in half precision: luck.
        for golden in case.iter().filter(|golden| golden.kind != "constant") {
            let Golden { dtype, kind, weighted: of_ggml, .. } = golden;
            let x = rows(kind);
            let bytes = quantized(*dtype, &x, importance);
            let (error, magnitude) = weighted_error(*dtype, &x, importance, &bytes);
            let both_exact = (error, *of_ggml) == (0.0, 0.0);
            let ratio = if both_exact { 1.0 } else { error / of_ggml };
            worst = if both_exact { worst } else { worst.max(ratio) };
            if ratio > 1.01 {
                worse.push(format!("{dtype} {kind} {}: {ratio}", importance.is_some()));
            }
            if kind == "trained" {
                let (error, of_ggml) = (error / magnitude, of_ggml / magnitude);
                let given = if importance.is_some() { "yes" } else { "no" };
                line = format!("| {dtype} | {given} | {error:.3e} | {of_ggml:.3e} | {ratio:.3} |");
            }
        }
        println!("{line} {worst:.3} |");
    }
    assert!(worse.is_empty(), "worse than ggml:\n{}", worse.join("\n"));
}

#[test]
fn where_there_is_no_choice_the_bytes_are_those_of_ggml() {
    let importance = importance();
    let mut compared = 0;
    for golden in golden().iter().filter(|g| is_only_rounded(g.dtype, g.importance)) {
        let importance = golden.importance.then_some(&importance[..]);
        let bytes = quantized(golden.dtype, &rows(&golden.kind), importance);
        assert_eq!(fnv(&bytes), golden.hash, "{} {}", golden.dtype, golden.kind);
        compared += 1;
    }
    assert_eq!(compared, 10 * (3 * 2 + 4));
}
