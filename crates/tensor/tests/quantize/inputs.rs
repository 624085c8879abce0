//! The inputs of `../data/generate_quantize.py`, made in the same way.

use std::path::Path;

use apr_tensor::{DType, dequantize};

pub(crate) const ROWS: usize = 8;
pub(crate) const COLS: usize = 512;

pub(crate) fn data(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The rows of a kind of input, one after the other.
pub(crate) fn rows(kind: &str) -> Vec<f32> {
    let column_of = |i: usize| (i / 16 % 8) as i32;
    let values: Vec<f64> = match kind {
        "gaussian" => normals(1, ROWS * COLS),
        "heavy_tailed" => normals(2, ROWS * COLS).iter().map(|x| x * x * x).collect(),
        "one_sided" => normals(3, ROWS * COLS).iter().map(|x| x.abs() + 0.5).collect(),
        "outliers" => {
            let all = normals(4, ROWS * COLS).into_iter().enumerate();
            all.map(|(i, x)| if i % 256 == 77 { 40.0 } else { x }).collect()
        }
        "uneven" => {
            let all = normals(5, ROWS * COLS).into_iter().enumerate();
            all.map(|(i, x)| x * 2f64.powi(column_of(i) - 3)).collect()
        }
        "small" => normals(6, ROWS * COLS).iter().map(|x| x * 1e-4).collect(),
        "tiny" => normals(7, ROWS * COLS).iter().map(|x| x * 1e-6).collect(),
        "constant" => vec![0.1; ROWS * COLS],
        "zeros" => vec![0.0; ROWS * COLS],
        "trained" => {
            let mut values = vec![0.0; ROWS * COLS];
            dequantize(DType::BF16, &data("quantize_trained.bin"), &mut values).unwrap();
            return values;
        }
        _ => panic!("{kind} is no kind of input"),
    };
    values.iter().map(|&x| x as f32).collect()
}

/// How much each column matters.
pub(crate) fn importance() -> Vec<f32> {
    normals(8, COLS).iter().map(|x| (x * x * (x * x) + 1e-3) as f32).collect()
}

/// Nearly normal numbers: sums of twelve uniform ones, which are the same on every machine.
pub(crate) fn normals(seed: u64, count: usize) -> Vec<f64> {
    let mut state = seed;
    let mut next = || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut normal = || (0..12).map(|_| next() >> 40).sum::<u64>() as f64 / 2f64.powi(24) - 6.0;
    (0..count).map(|_| normal()).collect()
}
