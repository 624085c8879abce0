//! Steps: how far apart the numbers are that a stored type can hold.

use std::ops::Range;

use apr_tensor::{DType, Stored, block::steps, dequantize};
use half::{bf16, f16};
use proptest::prelude::*;

/// The bytes of a block whose lowest bit is that of a code.
const CODES: [(DType, Range<usize>); 14] = [
    (DType::Q4_0, 2..18),
    (DType::Q4_1, 4..20),
    (DType::Q5_0, 6..22),
    (DType::Q5_1, 8..24),
    (DType::Q8_0, 2..34),
    (DType::Q2_K, 16..80),
    (DType::Q3_K, 32..96),
    (DType::Q4_K, 16..144),
    (DType::Q5_K, 48..176),
    (DType::Q6_K, 0..128),
    (DType::IQ4_NL, 2..18),
    (DType::IQ4_XS, 8..136),
    (DType::MXFP4, 1..17),
    (DType::TQ2_0, 0..64),
];

fn step_of(dtype: DType, bytes: &[u8]) -> f32 {
    let mut step = [0.0];
    steps(dtype, bytes, &mut step).unwrap();
    step[0]
}

/// The steps of one block of these bytes, and its numbers.
fn block(dtype: DType, bytes: &[u8]) -> (Vec<f32>, Vec<f32>) {
    let (mut of, mut values) = (vec![0.0; dtype.block_len()], vec![0.0; dtype.block_len()]);
    steps(dtype, bytes, &mut of).unwrap();
    dequantize(dtype, bytes, &mut values).unwrap();
    (of, values)
}

proptest! {
    #[test]
    fn a_float_rounded_to_a_narrower_one_is_off_by_at_most_half_a_step(x in -60000f32..60000.0, tiny: bool) {
        let x = if tiny { x * 1e-9 } else { x };
        let half = f16::from_f32(x);
        prop_assert!((half.to_f32() - x).abs() <= step_of(DType::F16, &half.to_le_bytes()) / 2.0);
        let brain = bf16::from_f32(x);
        prop_assert!((brain.to_f32() - x).abs() <= step_of(DType::BF16, &brain.to_le_bytes()) / 2.0);
    }

    #[test]
    fn a_code_that_is_one_off_moves_its_number_by_at_most_a_step(
        bytes in prop::collection::vec(any::<u8>(), 210), at in any::<prop::sample::Index>(),
    ) {
        for (dtype, codes) in CODES {
            let mut bytes = bytes[..dtype.block_bytes()].to_vec();
            let (of, before) = block(dtype, &bytes);
            bytes[codes.start + at.index(codes.len())] ^= 1;
            let (_, after) = block(dtype, &bytes);
            for ((step, x), y) in of.iter().zip(before).zip(after) {
                let diff = (x - y).abs();
                // A scale that is no number makes none. Each number is rounded to f32.
                let rounding = 1e-6 * x.abs().max(y.abs());
                let within = diff <= *step + rounding || !(diff.is_finite() && step.is_finite());
                prop_assert!(within, "{dtype}: {x} and {y} are more than {step} apart");
            }
        }
    }
}

#[test]
fn the_largest_float_has_the_step_below_it_so_that_saturation_is_no_rounding() {
    assert_eq!(step_of(DType::F16, &f16::MAX.to_le_bytes()), 32.0);
    assert_eq!(step_of(DType::F32, &f32::MAX.to_le_bytes()), 2f32.powi(104));
}

#[test]
fn a_code_without_a_mirror_image_has_twice_the_step() {
    let mut bytes = [0x77; 18];
    bytes[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
    bytes[2] = 0x7f;
    let (of, values) = block(DType::Q4_0, &bytes);
    // Half of 8 steps of the scale's own last bit come on top.
    let step = 0.5 + 8.0 * 2f32.powi(-11);
    assert_eq!((values[0], of[0]), (3.5, 2.0 * step));
    assert_eq!((values[1], of[1]), (-0.5, step));
}

#[test]
fn a_sub_block_of_scale_zero_has_the_step_of_the_unit_of_its_scale() {
    let mut bytes = [0; 144];
    bytes[..2].copy_from_slice(&f16::from_f32(1.0).to_le_bytes());
    let (of, values) = block(DType::Q4_K, &bytes);
    assert_eq!(values[0], 0.0);
    assert!((15.0..16.0).contains(&of[0]), "{}", of[0]);
}

#[test]
fn all_elements_of_a_tensor_with_one_scale_have_it_as_their_step() {
    let bytes: Vec<u8> = [&0.25f32.to_le_bytes()[..], &[1, 2, 3]].concat();
    let stored = Stored::new(DType::AprQ8, [1, 3].into(), bytes.into()).unwrap();
    let mut of = [0.0; 3];
    stored.row_steps(0, &mut of).unwrap();
    assert_eq!(of, [0.25; 3]);
}
