//! Checksums and gaps are told of files that are read all the same.

mod common;

use std::fs;

use apr_format::Checkpoint;
use apr_tensor::Bytes;

/// What is stated and what should be, of each checksum.
fn checksums(checkpoint: &Checkpoint) -> Vec<(u32, u32)> {
    checkpoint.checksums().iter().map(|sum| (sum.stated, sum.compute(|_| ()))).collect()
}

#[test]
fn an_apr_file_states_two_checksums_and_the_other_containers_none() {
    let apr = common::open("whole.apr", &common::apr()).unwrap();
    let sums = checksums(&apr);
    assert_eq!(sums.len(), 2);
    assert!(sums.iter().all(|(stated, computed)| stated == computed), "{sums:x?}");
    let covered: Vec<u64> = apr.checksums().iter().map(|sum| sum.covered()).collect();
    assert_eq!(covered, [60, common::apr().len() as u64 - 4]);
    assert!(common::open("a.gguf", &common::gguf()).unwrap().checksums().is_empty());
    assert!(common::open("a.safetensors", &common::safetensors()).unwrap().checksums().is_empty());
}

#[test]
fn one_bit_of_data_spoils_the_checksum_of_the_file_and_keeps_no_one_from_reading() {
    let mut file = common::apr();
    let at = file.len() - 100;
    file[at] ^= 0x10;
    let damaged = common::open("damaged.apr", &file).unwrap();
    let [header, whole] = checksums(&damaged)[..] else { panic!("two checksums") };
    assert_eq!(header.0, header.1);
    assert_ne!(whole.0, whole.1);
}

#[test]
fn a_header_whose_checksum_is_wrong_is_refused_unless_damage_is_looked_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("damaged.apr");
    let mut file = common::apr();
    file[41] ^= 1;
    fs::write(&path, &file).unwrap();
    let refused = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(refused.contains("offset 40") && refused.contains("header's checksum"), "{refused}");
    let damaged = Checkpoint::open_damaged(&path).unwrap();
    let sums = checksums(&damaged);
    assert_ne!(sums[0].0, sums[0].1);
    assert_eq!(damaged.tensors().len(), common::open("x", &common::apr()).unwrap().tensors().len());
}

#[test]
fn what_is_written_here_has_padding_of_zeros_and_no_holes() {
    for (name, file) in [("a.gguf", common::gguf()), ("a.apr", common::apr())] {
        let file = common::open(name, &file).unwrap();
        assert!(!file.gaps().is_empty(), "{name}: its tensors end between multiples");
        for gap in file.gaps() {
            assert!(gap.is_padding && gap.bytes.iter().all(|&b| b == 0), "{name}: {gap:?}");
        }
    }
    assert!(common::open("a.safetensors", &common::safetensors()).unwrap().gaps().is_empty());
}

#[test]
fn bytes_after_the_last_tensor_are_a_gap_after_it() {
    let mut file = common::gguf();
    let end = file.len();
    file.extend([7; 100]);
    let longer = Checkpoint::from_bytes("longer.gguf", Bytes::from(file)).unwrap();
    let gap = longer.gaps().last().unwrap();
    let last = longer.tensors().last().unwrap().0;
    assert_eq!(gap.after.as_deref(), Some(last));
    assert!(!gap.is_padding && gap.start <= end as u64 && gap.bytes.ends_with(&[7; 100]));
}
