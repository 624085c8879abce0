//! Every ggml block type is read as the `gguf` Python package reads it, bit for bit.
//!
//! `data/generate.py` wrote the golden files. Numbers are compared by bits, NaNs by being NaN:
//! which payload an operation on a NaN returns is left open by Rust and by IEEE 754. BF16 is only
//! moved, never computed with, so its NaNs are compared by bits too.

use std::path::Path;

use apr_tensor::{DType, Stored};

const GOLDEN: [DType; 17] = [
    DType::F16,
    DType::BF16,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::Q2_K,
    DType::Q3_K,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
    DType::IQ4_NL,
    DType::IQ4_XS,
    DType::TQ1_0,
    DType::TQ2_0,
    DType::MXFP4,
];

/// The golden tensor of a type, and what it must be read as.
fn golden(dtype: DType) -> (Stored, Vec<f32>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/{dtype}.bin"));
    let mut bytes = std::fs::read(&path).unwrap();
    let per_block = dtype.block_bytes() + 4 * dtype.block_len();
    assert_eq!(bytes.len() % per_block, 0, "{}", path.display());
    let blocks = bytes.len() / per_block;

    let expected = bytes.split_off(blocks * dtype.block_bytes());
    let expected = expected.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    (Stored::new(dtype, [blocks, dtype.block_len()].into(), bytes.into()).unwrap(), expected)
}

#[test]
fn every_type_is_read_as_the_gguf_package_reads_it() {
    for dtype in GOLDEN {
        let (stored, expected) = golden(dtype);
        let found = stored.to_f32().unwrap();
        assert_eq!(found.len(), expected.len(), "{dtype}");
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let both_nan = found.is_nan() && expected.is_nan() && dtype != DType::BF16;
            let (block, element) = (i / dtype.block_len(), i % dtype.block_len());
            assert!(
                both_nan || found.to_bits() == expected.to_bits(),
                "{dtype} block {block} element {element}: {found:e}, not {expected:e}"
            );
        }
    }
}

#[test]
fn the_golden_blocks_reach_zeros_subnormals_infinities_and_nans() {
    for dtype in GOLDEN.into_iter().filter(|d| has_f16_scale(*d)) {
        let (_, expected) = golden(dtype);
        let has = |what: fn(f32) -> bool| expected.iter().any(|&x| what(x));
        assert!(has(|x| x.to_bits() == 0), "{dtype}: zero");
        assert!(has(|x| x.to_bits() == 1 << 31), "{dtype}: negative zero");
        assert!(has(f32::is_infinite), "{dtype}: infinity");
        assert!(has(f32::is_nan), "{dtype}: NaN");
    }
}

fn has_f16_scale(dtype: DType) -> bool {
    dtype.block_len() > 1 && dtype != DType::MXFP4
}
