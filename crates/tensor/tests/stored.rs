//! Tensors as stored: lengths that must fit, rows that are moved, cut and read without loss.

use apr_tensor::{Bytes, DType, Error, Shape, Stored};
use half::f16;
use proptest::prelude::*;

/// A tensor of `rows` rows of `blocks` blocks; its bytes count upwards, so that all rows differ.
fn counting(dtype: DType, rows: usize, blocks: usize) -> Stored {
    let shape = Shape::from([rows, blocks * dtype.block_len()]);
    let len = dtype.tensor_bytes(&shape).unwrap();
    let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + i / 251) as u8).collect();
    Stored::new(dtype, shape, bytes.into()).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn any_dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(DType::all().collect::<Vec<_>>())
}

fn numeric_dtype() -> impl Strategy<Value = DType> {
    any_dtype().prop_filter("numeric", |dtype| dtype.can_dequantize())
}

proptest! {
    #[test]
    fn only_the_exact_number_of_bytes_makes_a_tensor(
        dtype in any_dtype(), rows in 0usize..4, blocks in 0usize..4, found in 0usize..4000,
    ) {
        let shape = Shape::from([rows, blocks * dtype.block_len()]);
        let expected = dtype.tensor_bytes(&shape).unwrap();
        match Stored::new(dtype, shape, vec![0; found].into()) {
            Ok(_) => prop_assert_eq!(found, expected),
            Err(Error::Length { expected: e, found: f, .. }) => {
                prop_assert_eq!((e, f), (Some(expected), found));
                prop_assert_ne!(found, expected);
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn permuting_rows_there_and_back_changes_no_byte(
        dtype in any_dtype(), order in Just((0..9).collect::<Vec<usize>>()).prop_shuffle(),
    ) {
        let tensor = counting(dtype, order.len(), 2);
        let permuted = tensor.permute_rows(|row| order[row]);
        for (row, &source) in order.iter().enumerate() {
            prop_assert_eq!(permuted.row_bytes(row), tensor.row_bytes(source));
        }
        let back = permuted.permute_rows(|row| order.iter().position(|&s| s == row).unwrap());
        prop_assert_eq!(&back.bytes()[..], &tensor.bytes()[..]);
    }

    #[test]
    fn a_row_reads_the_same_alone_in_a_slice_and_in_the_whole(
        dtype in numeric_dtype(), rows in 1usize..6, blocks in 0usize..4,
        cut in any::<[prop::sample::Index; 2]>(),
    ) {
        let tensor = counting(dtype, rows, blocks);
        let cols = tensor.shape().cols();
        let whole = tensor.to_f32().unwrap();
        let start = cut[0].index(rows);
        let end = start + cut[1].index(rows - start + 1);

        let slice = tensor.slice_rows(start..end);
        prop_assert_eq!(slice.shape(), &Shape::from([end - start, cols]));
        prop_assert_eq!(bits(&slice.to_f32().unwrap()), bits(&whole[start * cols..end * cols]));

        let mut row = vec![0.0; cols];
        tensor.dequantize_row(start, &mut row).unwrap();
        prop_assert_eq!(bits(&row), bits(&whole[start * cols..][..cols]));
    }

    #[test]
    fn bytes_need_no_alignment(dtype in numeric_dtype(), offset in 0usize..8) {
        let tensor = counting(dtype, 2, 3);
        let mut shifted = vec![0xaa; offset];
        shifted.extend_from_slice(tensor.bytes());
        let bytes = Bytes::from(shifted);
        let bytes = bytes.slice(offset..bytes.len()).unwrap();
        let moved = Stored::new(dtype, tensor.shape().clone(), bytes).unwrap();
        prop_assert_eq!(bits(&moved.to_f32().unwrap()), bits(&tensor.to_f32().unwrap()));
    }
}

#[test]
fn an_output_of_another_length_than_a_row_is_an_error() {
    for dtype in DType::all().filter(|dtype| dtype.can_dequantize()) {
        let tensor = counting(dtype, 1, 2);
        let len = dtype.block_len();
        for wrong in [0, len - 1, len, len + 1, 2 * len - 1, 2 * len + 1, 3 * len] {
            if wrong != 2 * len {
                let error = tensor.dequantize_row(0, &mut vec![0.0; wrong]).unwrap_err();
                assert!(matches!(error, Error::Length { .. }), "{dtype}: {error}");
            }
        }
        tensor.dequantize_row(0, &mut vec![0.0; 2 * len]).unwrap();
    }
}

#[test]
fn a_type_without_numbers_says_which_types_have_them() {
    let error = counting(DType::IQ2_XS, 1, 1).to_f32().unwrap_err();
    assert!(matches!(error, Error::NotNumeric(DType::IQ2_XS)));
    let message = error.to_string();
    assert!(message.contains("IQ2_XS weights cannot be read"), "{message}");
    assert!(message.contains("Q4_K, Q5_K, Q6_K, IQ4_NL"), "{message}");
}

#[test]
fn a_ragged_row_says_which_block_it_does_not_fill() {
    let error = Stored::new(DType::Q4_K, [2, 896].into(), vec![0; 1008].into()).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("a row of 896 is no whole number of blocks of 256"), "{message}");
}

#[test]
fn another_shape_must_hold_as_many_elements_in_whole_blocks() {
    let tensor = counting(DType::Q8_0, 4, 2);
    let experts = tensor.with_shape([2, 2, 64]).unwrap();
    assert_eq!((experts.shape().rows(), experts.row_bytes(3)), (4, tensor.row_bytes(3)));
    assert!(tensor.with_shape([4, 65]).is_err());
    assert!(tensor.with_shape([16, 16]).is_err());
}

#[test]
fn apr_q8_has_one_scale_for_all_rows() {
    let mut bytes = 0.5f32.to_le_bytes().to_vec();
    bytes.extend([1i8, -128, 127, 0, -1, 3].map(|q| q as u8));
    let tensor = Stored::new(DType::AprQ8, [3, 2].into(), bytes.into()).unwrap();
    assert_eq!(tensor.to_f32().unwrap(), [0.5, -64.0, 63.5, 0.0, -0.5, 1.5]);
    assert_eq!(tensor.slice_rows(2..3).to_f32().unwrap(), [-0.5, 1.5]);
    assert_eq!(tensor.permute_rows(|r| 2 - r).to_f32().unwrap()[..2], [-0.5, 1.5]);

    let row = tensor.row_bytes(0);
    let error = apr_tensor::dequantize(DType::AprQ8, row, &mut [0.0; 2]).unwrap_err();
    assert!(matches!(error, Error::NoScale));
}

#[test]
fn apr_q4_holds_neighbours_in_one_byte() {
    let mut bytes = f16::from_f32(-0.25).to_le_bytes().to_vec();
    bytes.extend((0..16).map(|j| j | (15 - j) << 4));
    let tensor = Stored::new(DType::AprQ4, [32].into(), bytes.into()).unwrap();
    let expected: Vec<f32> =
        (0..16).flat_map(|j| [-0.25 * (j as f32 - 8.0), -0.25 * (7.0 - j as f32)]).collect();
    assert_eq!(tensor.to_f32().unwrap(), expected);
}

#[test]
fn every_half_is_its_sign_times_its_mantissa_times_a_power_of_two() {
    for bits in 0..=u16::MAX {
        let (sign, exponent, mantissa) = (bits >> 15, (bits >> 10) & 31, f64::from(bits & 1023));
        let magnitude = match exponent {
            0 => mantissa * 2f64.powi(-24),
            31 if mantissa == 0.0 => f64::INFINITY,
            31 => f64::NAN,
            e => (1024.0 + mantissa) * 2f64.powi(i32::from(e) - 25),
        };
        let expected = if sign == 1 { -magnitude } else { magnitude } as f32;
        let found = Stored::new(DType::F16, [1].into(), bits.to_le_bytes().to_vec().into());
        let found = found.unwrap().to_f32().unwrap()[0];
        let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
        assert!(same, "{bits:#06x}: {found:e}, not {expected:e}");
    }
}

#[test]
fn plain_numbers_are_widened_or_rounded_to_f32() {
    fn read<const N: usize>(dtype: DType, elements: &[[u8; N]]) -> Vec<f32> {
        let bytes = elements.concat();
        Stored::new(dtype, [elements.len()].into(), bytes.into()).unwrap().to_f32().unwrap()
    }
    let third = 1.0f64 / 3.0;
    assert_eq!(read(DType::F64, &[third, 1e300].map(f64::to_le_bytes)), [1.0 / 3.0, f32::INFINITY]);
    assert_eq!(read(DType::F32, &[-0.1f32].map(f32::to_le_bytes)), [-0.1]);
    assert_eq!(read(DType::I64, &[i64::MIN, 3].map(i64::to_le_bytes)), [-9.223_372e18, 3.0]);
    assert_eq!(read(DType::I32, &[16_777_217i32].map(i32::to_le_bytes)), [16_777_216.0]);
    assert_eq!(read(DType::I16, &[-32768i16].map(i16::to_le_bytes)), [-32768.0]);
    assert_eq!(read(DType::I8, &[[0x80]]), [-128.0]);
    assert_eq!(read(DType::U8, &[[0x80]]), [128.0]);
    assert_eq!(read(DType::Bool, &[[0], [1], [2]]), [0.0, 1.0, 1.0]);
}
