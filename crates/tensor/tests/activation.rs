//! Activations are rounded as ggml rounds them: by ggml's own output, and by an oracle in f64.

use std::path::Path;

use apr_tensor::{
    DType, Stored,
    activation::{ActivationType, Q8Row, SUM_GROUP},
};
use proptest::prelude::*;

const Q8: [ActivationType; 3] = [ActivationType::Q8_0, ActivationType::Q8_1, ActivationType::Q8_K];

/// What ggml made of 16 rows of 256; see `data/generate_activations.py`.
struct Golden {
    rows: Vec<Vec<f32>>,
    q8_0: Vec<Vec<u8>>,
    q8_1: Vec<Vec<u8>>,
    q8_k: Vec<Vec<u8>>,
    dots: [(DType, Vec<f32>); 2],
}

fn data(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn golden() -> Golden {
    let bytes = data("activations.bin");
    let mut rest = &bytes[..];
    let mut take = |size: usize| -> Vec<Vec<u8>> {
        let (part, tail) = rest.split_at(16 * size);
        rest = tail;
        part.chunks_exact(size).map(<[u8]>::to_vec).collect()
    };
    let rows = take(1024).iter().map(|row| f32s(row)).collect();
    let (q8_0, q8_1, q8_k) = (take(8 * 34), take(8 * 36), take(292));
    let dots = [DType::Q4_1, DType::Q5_1].map(|dtype| (dtype, f32s(&take(4).concat())));
    assert!(rest.is_empty());
    Golden { rows, q8_0, q8_1, q8_k, dots }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn half(bytes: &[u8]) -> f32 {
    half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

fn as_i8(bytes: &[u8]) -> Vec<i8> {
    bytes.iter().map(|&b| b as i8).collect()
}

#[test]
fn q8_0_blocks_are_those_of_ggml() {
    let golden = golden();
    for (i, (row, blocks)) in golden.rows.iter().zip(&golden.q8_0).enumerate() {
        let found = ActivationType::Q8_0.quantize_row(row).unwrap();
        let blocks = blocks.as_chunks::<34>().0;
        let scales: Vec<f32> = blocks.iter().map(|b| half(b)).collect();
        assert_eq!(bits(found.scales()), bits(&scales), "row {i}");
        let quants: Vec<i8> = blocks.iter().flat_map(|b| as_i8(&b[2..])).collect();
        assert_eq!(found.quants(), quants, "row {i}");
    }
}

#[test]
fn q8_1_blocks_are_those_of_ggml() {
    let golden = golden();
    for (i, (row, blocks)) in golden.rows.iter().zip(&golden.q8_1).enumerate() {
        let found = ActivationType::Q8_1.quantize_row(row).unwrap();
        let blocks = blocks.as_chunks::<36>().0;
        let scales: Vec<f32> = blocks.iter().map(|b| half(b)).collect();
        assert_eq!(bits(found.scales()), bits(&scales), "row {i}");
        let sums: Vec<f32> = blocks.iter().map(|b| half(&b[2..])).collect();
        assert_eq!(bits(found.scaled_sums()), bits(&sums), "row {i}");
        let quants: Vec<i8> = blocks.iter().flat_map(|b| as_i8(&b[4..])).collect();
        assert_eq!(found.quants(), quants, "row {i}");
    }
}

#[test]
fn q8_k_blocks_are_those_of_ggml() {
    let golden = golden();
    for (i, (row, block)) in golden.rows.iter().zip(&golden.q8_k).enumerate() {
        let found = ActivationType::Q8_K.quantize_row(row).unwrap();
        assert_eq!(bits(found.scales()), bits(&f32s(&block[..4])), "row {i}");
        assert_eq!(found.quants(), as_i8(&block[4..260]), "row {i}");
        let sums: Vec<i16> =
            block[260..].as_chunks().0.iter().map(|&b| i16::from_le_bytes(b)).collect();
        assert_eq!(found.sums(), sums, "row {i}");
    }
}

/// ggml's dot products are explained down to f32 accumulation, but only with the correction for the
/// minima.
#[test]
fn the_minima_of_weights_meet_a_sum_that_was_rounded_apart() {
    let golden = golden();
    for (dtype, dots) in &golden.dots {
        let size = dtype.block_bytes();
        let weights = data(&format!("{dtype}.bin"))[24 * size..32 * size].to_vec();
        let weights = Stored::new(*dtype, [256].into(), weights.into()).unwrap();
        let values = weights.to_f32().unwrap();
        let mut corrected_for = 0.0f64;
        for (i, (row, &dot)) in golden.rows.iter().zip(dots).enumerate() {
            if !dot.is_normal() {
                continue; // the rows of zeros and of infinite scales
            }
            let x = ActivationType::Q8_1.quantize_row(row).unwrap();
            let mut rounded = [0.0; 256];
            x.dequantize(&mut rounded);
            let products = values.iter().zip(&rounded).map(|(&w, x)| f64::from(w) * x);
            let correction = x.min_correction(*dtype, weights.row_bytes(0));
            let magnitude = products.clone().map(f64::abs).sum::<f64>() + correction.abs();
            let error = products.sum::<f64>() - f64::from(dot);
            // Eight blocks, each a few roundings of f32.
            let unexplained = (error + correction).abs() / magnitude;
            assert!(unexplained < 1e-6, "{dtype} row {i}: {unexplained:e}");
            // The scales of row 8 are zero in f16; there the sums are all that is left.
            if i != 8 {
                corrected_for = corrected_for.max(correction.abs() / magnitude);
            }
        }
        assert!(corrected_for > 1e-5, "{dtype}: {corrected_for:e} is too small to tell");
    }
}

#[test]
fn the_weight_decides_how_activations_are_rounded() {
    use ActivationType as A;
    let table: [(A, &[DType]); 6] = [
        (A::F32, &[DType::F32, DType::AprQ4, DType::AprQ8]),
        (A::F16, &[DType::F16]),
        (A::BF16, &[DType::BF16]),
        (A::Q8_0, &[DType::Q4_0, DType::Q5_0, DType::Q8_0, DType::IQ4_NL]),
        (A::Q8_1, &[DType::Q4_1, DType::Q5_1]),
        (
            A::Q8_K,
            &[DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::Q5_K, DType::Q6_K, DType::IQ4_XS],
        ),
    ];
    for (activation, weights) in table {
        for &weight in weights {
            assert_eq!(ActivationType::for_weight(weight), activation, "{weight}");
        }
    }
}

#[test]
fn blocks_of_activations_fit_every_row_that_blocks_of_weights_fit() {
    for weight in DType::all().filter(|d| d.can_dequantize()) {
        let activation = ActivationType::for_weight(weight);
        assert!(weight.block_len().is_multiple_of(activation.block_len()), "{weight}");
    }
}

/// The definitions in words, in f64 with a rounding to f32 or f16 wherever the words say so.
mod oracle {
    /// To the nearest multiple of a power of two, ties to even; f64 is wide enough for that to be
    /// exact.
    fn to_multiple(x: f64, step: f64) -> f64 {
        let (low, rest) = ((x / step).floor(), x / step - (x / step).floor());
        let up = rest > 0.5 || rest == 0.5 && low % 2.0 != 0.0;
        (low + f64::from(u8::from(up))) * step
    }

    pub(crate) fn f16(x: f64) -> f64 {
        let exponent = (((x.abs().to_bits() >> 52) as i32) - 1023).max(-14);
        let rounded = to_multiple(x, 2f64.powi(exponent - 10));
        if rounded.abs() > 65504.0 { f64::INFINITY * x.signum() } else { rounded }
    }

    fn f32(x: f64) -> f64 {
        f64::from(x as f32)
    }

    /// Scale and quants.
    pub(crate) fn q8_0(x: &[f32]) -> (f64, Vec<f64>) {
        let amax = x.iter().map(|x| f64::from(x.abs())).fold(0.0, f64::max);
        let inverse = if amax == 0.0 { 0.0 } else { f32(127.0 / amax) };
        let quants = x.iter().map(|&x| to_multiple(f32(f64::from(x) * inverse), 1.0));
        (f16(f32(amax / 127.0)), quants.collect())
    }

    pub(crate) fn q8_k(x: &[f32]) -> (f64, Vec<f64>) {
        let amax = x.iter().map(|x| f64::from(x.abs())).fold(0.0, f64::max);
        let Some(&max) = x.iter().find(|x| amax > 0.0 && f64::from(x.abs()) == amax) else {
            return (0.0, vec![0.0; x.len()]);
        };
        let inverse = f32(-127.0 / f64::from(max));
        let quants = x.iter().map(|&x| to_multiple(f32(f64::from(x) * inverse), 1.0).min(127.0));
        (f32(1.0 / inverse), quants.collect())
    }
}

/// Whole blocks of 256: of one magnitude or of all, with ties, zeros and opposite extremes among
/// them.
fn rows() -> impl Strategy<Value = Vec<f32>> {
    let element = (0..8u8, -1.0f32..1.0, -30..8i32);
    (prop::collection::vec(element, 1024), 0..4usize, -30..10i32).prop_map(
        |(elements, blocks, scale)| {
            let value = |&(kind, x, exponent): &(u8, f32, i32)| match kind {
                0 => x * 10f32.powi(exponent),
                1 => (x * 254.0).round() / 254.0,
                2 => 0.0,
                3 => x.signum(),
                _ => x,
            };
            elements[..256 * blocks].iter().map(value).map(|x| x * 10f32.powi(scale)).collect()
        },
    )
}

fn check(kind: ActivationType, row: &[f32], block: impl Fn(&[f32]) -> (f64, Vec<f64>)) {
    let found = kind.quantize_row(row).unwrap();
    let mut rounded = vec![0.0; row.len()];
    kind.round_row(row, &mut rounded);
    let len = kind.block_len();
    assert_eq!((found.scales().len(), found.quants().len()), (row.len() / len, row.len()));
    for (i, x) in row.chunks_exact(len).enumerate() {
        let (scale, quants) = block(x);
        assert_eq!(f64::from(found.scales()[i]), scale);
        for (j, &quant) in quants.iter().enumerate() {
            assert_eq!(f64::from(found.quants()[i * len + j]), quant, "{kind} of {}", x[j]);
            let expected = scale * quant;
            assert!(rounded[i * len + j] == expected || expected.is_nan());
        }
    }
}

proptest! {
    #[test]
    fn blocks_are_those_of_the_oracle(row in rows()) {
        check(ActivationType::Q8_0, &row, oracle::q8_0);
        check(ActivationType::Q8_1, &row, oracle::q8_0);
        check(ActivationType::Q8_K, &row, oracle::q8_k);
    }

    #[test]
    fn sums_are_those_of_the_quants(row in rows()) {
        for kind in Q8 {
            let found = kind.quantize_row(&row).unwrap();
            let sum = |group: &[i8]| group.iter().map(|&q| i16::from(q)).sum();
            let sums: Vec<i16> = found.quants().chunks(SUM_GROUP).map(sum).collect();
            prop_assert_eq!(found.sums(), sums);
            let scaled = if kind == ActivationType::Q8_1 { row.len() / 32 } else { 0 };
            prop_assert_eq!(found.scaled_sums().len(), scaled);
        }
    }

    #[test]
    fn rounding_moves_a_value_by_at_most_half_a_step(row in rows()) {
        for kind in Q8 {
            let mut rounded = vec![0.0; row.len()];
            kind.round_row(&row, &mut rounded);
            for (x, rounded) in row.chunks(kind.block_len()).zip(rounded.chunks(kind.block_len())) {
                let amax = x.iter().fold(0.0f64, |max, &x| max.max(f64::from(x).abs()));
                // Half a step; the f16 scale is off by 2^-11, or by 2^-25 where it is subnormal,
                // 127 times.
                let scale_error = (amax / 127.0 * 2f64.powi(-11)).max(2f64.powi(-25));
                let bound = amax / 254.0 * 1.0001 + 127.0 * scale_error;
                for (&x, rounded) in x.iter().zip(rounded) {
                    let error = (f64::from(x) - rounded).abs();
                    prop_assert!(amax > 8e6 || error <= bound, "{} {}", x, rounded);
                }
            }
        }
    }

    #[test]
    fn a_bad_value_is_seen_in_its_whole_block_and_nowhere_else(
        row in rows().prop_filter("not empty", |row| !row.is_empty()),
        at in any::<prop::sample::Index>(),
        bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
    ) {
        let at = at.index(row.len());
        let mut damaged = row.clone();
        damaged[at] = bad;
        for kind in Q8 {
            let (mut expected, mut found) = (vec![0.0; row.len()], vec![0.0; row.len()]);
            kind.round_row(&row, &mut expected);
            kind.round_row(&damaged, &mut found);
            for i in 0..row.len() {
                let same_block = i / kind.block_len() == at / kind.block_len();
                prop_assert_eq!(found[i].is_nan(), same_block || expected[i].is_nan());
                prop_assert!(found[i].is_nan() || found[i] == expected[i]);
            }
        }
        let q8_1 = ActivationType::Q8_1.quantize_row(&damaged).unwrap();
        prop_assert!(q8_1.scaled_sums()[at / 32].is_nan());
    }
}

#[test]
fn a_block_too_small_for_a_scale_is_zero() {
    for tiny in [f32::from_bits(1), -f32::MIN_POSITIVE, 3e-37] {
        let row = [tiny; 256];
        for kind in Q8 {
            let mut rounded = [1.0; 256];
            kind.round_row(&row, &mut rounded);
            assert!(rounded.iter().all(|&x| x == 0.0), "{kind} of {tiny:e}");
        }
    }
}

#[test]
fn a_scale_beyond_f16_is_infinite_rather_than_clipped() {
    let row = [-1e8f32; 32];
    let found = ActivationType::Q8_0.quantize_row(&row).unwrap();
    assert_eq!((found.scales(), found.quants()[0]), (&[f32::INFINITY][..], -127));
}

#[test]
fn the_first_of_two_largest_magnitudes_gives_q8_k_its_sign() {
    for first in [-2.0f32, 2.0] {
        let mut row = [0.5; 256];
        (row[3], row[9]) = (first, -first);
        let found = ActivationType::Q8_K.quantize_row(&row).unwrap();
        assert_eq!((found.quants()[3], found.quants()[9]), (-127, 127));
        assert_eq!(found.scales()[0].signum(), -first.signum());
    }
}

#[test]
fn float_types_round_each_value_alone() {
    let row = [1.0 + 1.0 / 4096.0, 1e6, -3e-8, f32::NAN];
    let rounded = |kind: ActivationType| {
        assert!(Q8Row::new(kind).is_none());
        let mut out = [0.0; 4];
        kind.round_row(&row, &mut out);
        assert!(out[3].is_nan());
        [out[0], out[1], out[2]]
    };
    assert_eq!(rounded(ActivationType::F32), [1.0 + 1.0 / 4096.0, 1e6, f64::from(-3e-8f32)]);
    assert_eq!(rounded(ActivationType::F16), [1.0, f64::INFINITY, oracle::f16(-3e-8)]);
    let [one, million, tiny] = rounded(ActivationType::BF16);
    assert_eq!((one, million), (1.0, 999_424.0));
    assert!((tiny / -3e-8 - 1.0).abs() < 1.0 / 256.0, "{tiny:e}");
}

#[test]
fn a_row_that_is_no_whole_number_of_blocks_is_refused() {
    for kind in Q8 {
        for len in [1, 31, 33, 255, 257] {
            let quantize = || kind.quantize_row(&vec![0.0; len]);
            assert!(std::panic::catch_unwind(quantize).is_err(), "{kind} of {len}");
        }
        assert_eq!(kind.quantize_row(&[]).unwrap().quants(), [0i8; 0]);
    }
}

#[test]
fn a_reused_row_keeps_nothing_of_the_row_before() {
    for kind in Q8 {
        let long: Vec<f32> = (0..512).map(|i| i as f32).collect();
        let mut reused = kind.quantize_row(&long).unwrap();
        reused.quantize(&long[..256]);
        let fresh = kind.quantize_row(&long[..256]).unwrap();
        assert_eq!(format!("{reused:?}"), format!("{fresh:?}"));
    }
}
