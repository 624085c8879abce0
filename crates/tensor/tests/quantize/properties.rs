//! What holds of every row, and what is refused.

use apr_tensor::{
    DType, Error, Stored, block, dequantize,
    quantize::{AprQ8Scale, can_quantize},
    quantize_row,
};
use proptest::prelude::*;

use crate::{
    inputs::{COLS, importance, normals, rows},
    is_only_rounded,
};

fn types() -> impl Iterator<Item = DType> {
    DType::all().filter(|&dtype| can_quantize(dtype))
}

fn quantize(dtype: DType, x: &[f32], importance: Option<&[f32]>) -> Result<Vec<u8>, Error> {
    let mut out = vec![0; dtype.row_bytes(x.len()).unwrap()];
    quantize_row(dtype, x, importance, &mut out).map(|()| out)
}

fn numbers(dtype: DType, bytes: &[u8], len: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    dequantize(dtype, bytes, &mut out).unwrap();
    out
}

/// The numbers that blocks of a row stand for.
fn round_trip(dtype: DType, x: &[f32], importance: Option<&[f32]>) -> Vec<f32> {
    numbers(dtype, &quantize(dtype, x, importance).unwrap(), x.len())
}

fn gaussian(len: usize) -> Vec<f32> {
    normals(11, len).iter().map(|&x| x as f32).collect()
}

#[test]
fn all_types_that_common_files_hold_can_be_written() {
    let names: Vec<_> = types().map(DType::name).collect();
    assert_eq!(
        names.join(" "),
        "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS APR_Q4"
    );
    let error = quantize(DType::IQ1_S, &[0.0; 256], None).unwrap_err();
    assert!(error.to_string().starts_with("rows cannot be quantised to IQ1_S"), "{error}");
}

proptest! {
    #[test]
    fn every_finite_row_is_refused_or_becomes_finite_numbers(
        bits in prop::collection::vec(any::<u32>(), 256), exponent in -60i32..60,
        important in prop::option::of(prop::collection::vec(0f32..f32::MAX, 256)),
    ) {
        // Numbers of all magnitudes, and numbers of like magnitudes.
        let finite = |x: f32| if x.is_finite() { x } else { 0.0 };
        let wild: Vec<f32> = bits.iter().map(|&b| finite(f32::from_bits(b))).collect();
        let unit = 2f32.powi(exponent - 31);
        let mild: Vec<f32> = bits.iter().map(|&b| b as i32 as f32 * unit).collect();
        for dtype in types() {
            for x in [&wild, &mild] {
                match quantize(dtype, x, important.as_deref()) {
                    Ok(bytes) => {
                        let found = numbers(dtype, &bytes, 256);
                        prop_assert!(found.iter().all(|y| y.is_finite()), "{dtype}");
                    }
                    // Every type reaches nearly to the largest number of half precision; a minimum
                    // may be fitted beyond the smallest number.
                    Err(Error::TooLarge { index, value, .. }) => {
                        prop_assert!(value == x[index] && value.abs() > 60000.0, "{dtype} {value}");
                    }
                    Err(other) => prop_assert!(false, "{dtype}: {other}"),
                }
            }
        }
    }

    #[test]
    fn a_row_times_a_power_of_two_becomes_the_numbers_times_that(seed: u64, exponent in -4i32..8) {
        let x: Vec<f32> = normals(seed, 256).iter().map(|&x| x as f32).collect();
        let factor = 2f32.powi(exponent);
        let scaled: Vec<f32> = x.iter().map(|x| x * factor).collect();
        // Scales of scales are subnormal in half precision, where they have fewer bits.
        for dtype in types().filter(|dtype| dtype.block_len() == 32) {
            let mut expected = round_trip(dtype, &x, None);
            expected.iter_mut().for_each(|x| *x *= factor);
            prop_assert_eq!(round_trip(dtype, &scaled, None), expected, "{}", dtype);
        }
    }
}

#[test]
fn numbers_that_a_type_can_hold_come_back_within_half_a_step() {
    let importance = importance();
    for dtype in types() {
        for kind in ["gaussian", "heavy_tailed", "one_sided", "trained"] {
            for importance in [None, Some(&importance[..])] {
                let x = round_trip(dtype, &rows(kind)[..COLS], importance);
                let bytes = quantize(dtype, &x, importance).unwrap();
                let again = numbers(dtype, &bytes, COLS);
                let mut steps = vec![0.0; COLS];
                block::steps(dtype, &bytes, &mut steps).unwrap();
                // One by one where numbers are only rounded; a search may cut off an unimportant
                // one.
                let off = |i: usize| f64::from((x[i] - again[i]).abs() / steps[i]);
                let worst = (0..COLS).map(off).fold(0.0, f64::max);
                let mean = ((0..COLS).map(|i| off(i).powi(2)).sum::<f64>() / COLS as f64).sqrt();
                let of = if is_only_rounded(dtype, importance.is_some()) { worst } else { mean };
                assert!(of <= 0.5, "{dtype} {kind} {}: {of} steps", importance.is_some());
            }
        }
    }
}

#[test]
fn rounding_twice_is_rounding_once() {
    for dtype in types().filter(|&dtype| is_only_rounded(dtype, false)) {
        for kind in ["gaussian", "heavy_tailed", "one_sided", "outliers"] {
            let once = quantize(dtype, &rows(kind)[..COLS], None).unwrap();
            let twice = quantize(dtype, &numbers(dtype, &once, COLS), None).unwrap();
            assert_eq!(once, twice, "{dtype} {kind}");
        }
    }
}

#[test]
fn equal_numbers_stay_equal_within_half_a_step() {
    for dtype in types() {
        for value in [0.1, -0.1, 3.0, -1e-3] {
            let x = [value; 256];
            let bytes = quantize(dtype, &x, None).unwrap();
            let mut steps = [0.0; 256];
            block::steps(dtype, &bytes, &mut steps).unwrap();
            let found = numbers(dtype, &bytes, 256);
            assert!(found.iter().all(|&y| y == found[0]), "{dtype} {value}");
            assert!((found[0] - value).abs() <= steps[0] / 2.0, "{dtype} {value}: {}", found[0]);
        }
    }
}

#[test]
fn zeros_stay_zeros() {
    for dtype in types() {
        assert_eq!(round_trip(dtype, &[0.0; 256], None), [0.0; 256], "{dtype}");
        assert_eq!(round_trip(dtype, &[0.0; 256], Some(&[2.0; 256])), [0.0; 256], "{dtype}");
    }
}

#[test]
fn blocks_without_importance_do_not_look_at_each_other() {
    let x = rows("trained");
    for dtype in types() {
        let whole = quantize(dtype, &x[..COLS], None).unwrap();
        let parts = x[..COLS].chunks_exact(256).map(|x| quantize(dtype, x, None).unwrap());
        assert_eq!(whole, parts.collect::<Vec<_>>().concat(), "{dtype}");
    }
}

#[test]
fn an_important_column_comes_back_closer() {
    let x = gaussian(256);
    let mut important = [1.0; 256];
    let columns: Vec<usize> = (5..256).step_by(32).collect();
    columns.iter().for_each(|&i| important[i] = 1000.0);
    for dtype in types().filter(|&dtype| !is_only_rounded(dtype, true)) {
        let error = |importance: &[f32; 256]| -> f32 {
            let found = round_trip(dtype, &x, Some(importance));
            columns.iter().map(|&i| (x[i] - found[i]).powi(2)).sum()
        };
        let (without, with) = (error(&[1.0; 256]), error(&important));
        assert!(with < 0.7 * without, "{dtype}: {with} is not below {without}");
    }
}

#[test]
fn no_importance_at_all_is_none_and_its_unit_does_not_matter() {
    let (x, importance) = (gaussian(256), &importance()[..256]);
    let scaled: Vec<f32> = importance.iter().map(|x| x * 2f32.powi(90)).collect();
    for dtype in types() {
        let plain = quantize(dtype, &x, None).unwrap();
        assert_eq!(quantize(dtype, &x, Some(&[0.0; 256])).unwrap(), plain, "{dtype}");
        let weighted = quantize(dtype, &x, Some(importance)).unwrap();
        assert_eq!(quantize(dtype, &x, Some(&scaled)).unwrap(), weighted, "{dtype}");
    }
}

#[test]
fn columns_without_importance_are_still_quantised_well() {
    let x = gaussian(256);
    let mut importance = [1.0; 256];
    importance[..64].fill(0.0);
    for dtype in types().filter(|dtype| dtype.is_quantized()) {
        let found = round_trip(dtype, &x, Some(&importance));
        let error: f32 = x.iter().zip(&found).take(64).map(|(x, y)| (x - y).powi(2)).sum();
        // A third of the standard deviation of the numbers is more than 2 bits need.
        assert!((error / 64.0).sqrt() < 0.35, "{dtype}: {}", (error / 64.0).sqrt());
    }
}

#[test]
fn what_is_no_number_is_refused_by_its_place() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = [1.0; 256];
        x[77] = value;
        for dtype in types() {
            let error = quantize(dtype, &x, None).unwrap_err();
            assert!(matches!(error, Error::NotFinite { index: 77, .. }), "{dtype}: {error}");
        }
    }
}

#[test]
fn what_is_too_large_is_refused_by_its_place_and_value() {
    let mut x = [1.0; 512];
    x[300] = -1e10;
    for dtype in types().filter(|&dtype| !matches!(dtype, DType::F32 | DType::BF16)) {
        for importance in [None, Some(&[1.0; 512][..])] {
            let error = quantize(dtype, &x, importance).unwrap_err();
            assert!(matches!(error, Error::TooLarge { index: 300, value: -1e10, .. }), "{error}");
        }
    }
    let error = quantize(DType::BF16, &[f32::MAX], None).unwrap_err();
    assert!(matches!(error, Error::TooLarge { index: 0, .. }), "{error}");
}

#[test]
fn lengths_must_fit() {
    let refused = |dtype, cols, out: usize| {
        let error = quantize_row(dtype, &vec![0.0; cols], None, &mut vec![0; out]).unwrap_err();
        assert!(matches!(error, Error::Length { found, .. } if found == out), "{error}");
    };
    refused(DType::Q4_K, 128, 72);
    refused(DType::Q4_0, 64, 18);
    refused(DType::F16, 3, 5);
    let error = quantize(DType::Q4_0, &[0.0; 32], Some(&[1.0; 33])).unwrap_err();
    assert!(matches!(error, Error::ImportanceLength { expected: 32, found: 33 }), "{error}");
    for dtype in types() {
        assert_eq!(quantize(dtype, &[], Some(&[])).unwrap(), [], "{dtype}");
    }
}

#[test]
fn an_importance_that_is_no_weight_is_refused() {
    for value in [-1.0, f32::NAN, f32::INFINITY] {
        let mut importance = [1.0; 32];
        importance[3] = value;
        let error = quantize(DType::Q4_0, &[0.5; 32], Some(&importance)).unwrap_err();
        assert!(matches!(error, Error::Importance { index: 3, .. }), "{error}");
    }
}

#[test]
fn a_tensor_with_one_scale_is_its_scale_and_then_its_rows() {
    let x = [0.5, -1.27, 0.0, 0.014, 1.27, 0.3];
    let scale = AprQ8Scale::of_largest(1.27);
    let mut bytes = scale.to_le_bytes().to_vec();
    for row in x.chunks_exact(3) {
        let mut out = [0; 3];
        scale.quantize_row(row, &mut out).unwrap();
        bytes.extend(out);
    }
    assert_eq!(bytes[4..], [50, -127i8 as u8, 0, 1, 127, 30]);
    let stored = Stored::new(DType::AprQ8, [2, 3].into(), bytes.into()).unwrap();
    for (x, y) in x.iter().zip(stored.to_f32().unwrap()) {
        assert!((x - y).abs() <= 0.005 + 1e-6, "{x} {y}");
    }
    let zeros = AprQ8Scale::of_largest(0.0);
    let mut out = [1; 2];
    zeros.quantize_row(&[0.0; 2], &mut out).unwrap();
    assert_eq!(out, [0; 2]);
}
