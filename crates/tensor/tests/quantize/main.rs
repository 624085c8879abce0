//! Quantised weights are as near to the originals as ggml's.

mod inputs;

use apr_tensor::{DType, dequantize, quantize_row};
use inputs::{COLS, data, importance, rows};

/// What ggml made of one kind of input; a line of `data/quantize.txt`.
struct Golden {
    dtype: DType,
    kind: String,
    importance: bool,
    /// Root mean squares.
    weighted: f64,
    plain: f64,
    /// FNV-1a.
    hash: u64,
}

fn golden() -> Vec<Golden> {
    let text = String::from_utf8(data("quantize.txt")).unwrap();
    let line = |line: &str| {
        let [dtype, kind, importance, weighted, plain, hash] =
            line.split(' ').collect::<Vec<_>>().try_into().expect("six fields");
        Golden {
            dtype: DType::all().find(|d| d.name() == dtype).unwrap(),
            kind: kind.to_owned(),
            importance: importance == "importance",
            weighted: weighted.parse().unwrap(),
            plain: plain.parse().unwrap(),
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

/// The weighted and the plain root mean square of the error of `bytes`.
fn errors(dtype: DType, x: &[f32], importance: Option<&[f32]>, bytes: &[u8]) -> (f64, f64) {
    let mut found = vec![0.0; x.len()];
    dequantize(dtype, bytes, &mut found).unwrap();
    let (mut weighted, mut plain, mut total) = (0.0, 0.0, 0.0);
    for (x, found) in x.chunks_exact(COLS).zip(found.chunks_exact(COLS)) {
        for ((&x, &y), w) in x.iter().zip(found).zip(weights(dtype, x, importance)) {
            let square = (f64::from(x) - f64::from(y)).powi(2);
            weighted += w * square;
            plain += square;
            total += w;
        }
    }
    ((weighted / f64::max(total, 1e-300)).sqrt(), (plain / x.len() as f64).sqrt())
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

#[test]
fn the_weighted_error_is_within_a_hundredth_of_that_of_ggml() {
    let importance = importance();
    let mut worse = vec![];
    for golden in golden() {
        let Golden { dtype, kind, .. } = &golden;
        let importance = golden.importance.then_some(&importance[..]);
        let x = rows(kind);
        let bytes = quantized(*dtype, &x, importance);
        let (weighted, plain) = errors(*dtype, &x, importance, &bytes);
        let ratio = |ours: f64, ggml: f64| if ours == ggml { 1.0 } else { ours / ggml };
        let line = format!(
            "{dtype:<7}{kind:<13}{:<11}{weighted:>10.3e}{:>10.3e} {:>7.4} {:>7.4} {}",
            if golden.importance { "importance" } else { "none" },
            golden.weighted,
            ratio(weighted, golden.weighted),
            ratio(plain, golden.plain),
            if fnv(&bytes) == golden.hash { "same bytes" } else { "" }
        );
        println!("{line}");
        if weighted > 1.01 * golden.weighted {
            worse.push(line);
        }
    }
    assert!(worse.is_empty(), "worse than ggml:\n{}", worse.join("\n"));
}
