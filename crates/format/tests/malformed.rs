//! Tables of files with one thing wrong: the refusal names the file, the place, and what is wrong there.

mod common;

use apr_format::{apr, gguf, safetensors};
use apr_tensor::DType;
use common::open;

/// What is wrong, the file, and what its refusal must say besides its name.
type Case = (&'static str, Vec<u8>, &'static [&'static str]);

fn assert_refused(name: &str, cases: Vec<Case>) {
    for (what, file, parts) in cases {
        let text = match open(name, &file) {
            Ok(_) => panic!("{name}: {what}: was accepted"),
            Err(error) => error.to_string(),
        };
        for part in [name].iter().chain(parts) {
            assert!(text.contains(part), "{what}: `{part}` is not in: {text}");
        }
    }
}

fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn text(text: &str) -> Vec<u8> {
    join(&[&(text.len() as u64).to_le_bytes(), text.as_bytes()])
}

fn u32(n: u32) -> [u8; 4] {
    n.to_le_bytes()
}

fn u64(n: u64) -> [u8; 8] {
    n.to_le_bytes()
}

/// A GGUF of this many tensors and keys, and what follows the header.
fn raw_gguf(tensors: u64, keys: u64, rest: &[&[u8]]) -> Vec<u8> {
    join(&[b"GGUF", &u32(3), &u64(tensors), &u64(keys), &rest.concat()])
}

/// A line of a GGUF index, dimensions fastest first.
fn line(name: &str, dims: &[u64], dtype: u32, offset: u64) -> Vec<u8> {
    let dims_bytes: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
    join(&[&text(name), &u32(dims.len() as u32), &dims_bytes, &u32(dtype), &u64(offset)])
}

/// A GGUF of tensors only, with `data` bytes after the padded index.
fn gguf_of(lines: &[Vec<u8>], data: usize) -> Vec<u8> {
    let mut file = raw_gguf(lines.len() as u64, 0, &[&lines.concat()]);
    file.resize(file.len().next_multiple_of(32) + data, 0);
    file
}

#[test]
fn a_malformed_gguf_is_refused_with_the_place() {
    let deep = {
        let mut value = u32(9).to_vec();
        for _ in 0..5 {
            value.extend(join(&[&u32(9), &u64(1)]));
        }
        join(&[&text("deep"), &value, &u32(0), &u64(1), &[0]])
    };
    let cases: Vec<Case> = vec![
        (
            "only a magic number",
            b"GGUF".to_vec(),
            &["offset 4", "version", "needs bytes 4..8, the file has 4"],
        ),
        (
            "version 1",
            join(&[b"GGUF", &u32(1)]),
            &["offset 4", "version 1", "convert the original"],
        ),
        (
            "version 4",
            join(&[b"GGUF", &u32(4)]),
            &["offset 4", "expected GGUF version 2 or 3", "found 4"],
        ),
        (
            "big-endian",
            join(&[b"GGUF", &[0, 0, 0, 3]]),
            &["offset 4", "big-endian", "gguf_convert_endian"],
        ),
        ("no counts", join(&[b"GGUF", &u32(3)]), &["offset 8", "number of tensors"]),
        (
            "huge key count",
            raw_gguf(0, 1 << 60, &[]),
            &["offset 16", "at most 0 metadata keys", "1152921504606846976"],
        ),
        ("huge tensor count", raw_gguf(u64::MAX, 0, &[]), &["offset 8", "at most 0 tensors"]),
        (
            "huge key",
            raw_gguf(0, 1, &[&u64(1 << 40), &[0; 16]]),
            &["offset 24", "length of a metadata key", "65535"],
        ),
        (
            "cut key",
            raw_gguf(0, 1, &[&u64(9), &[b'k'; 5]]),
            &["offset 32", "metadata key", "4 bytes are missing"],
        ),
        (
            "key no UTF-8",
            raw_gguf(0, 1, &[&u64(2), b"a\xff", &u32(0), &[0]]),
            &["offset 33", "UTF-8", "0xff"],
        ),
        (
            "value type 13",
            raw_gguf(0, 1, &[&text("k"), &u32(13), &[0; 8]]),
            &["offset 33", "`k`", "found 13"],
        ),
        (
            "truth value 2",
            raw_gguf(0, 1, &[&text("k"), &u32(7), &[2]]),
            &["offset 37", "`k`", "0 or 1", "found 2"],
        ),
        (
            "huge string",
            raw_gguf(0, 1, &[&text("k"), &u32(8), &u64(u64::MAX)]),
            &["offset 45", "value of key `k`", "the file has 45"],
        ),
        (
            "huge array",
            raw_gguf(0, 1, &[&text("k"), &u32(9), &u32(4), &u64(1 << 61), &[0; 8]]),
            &["offset 41", "at most 2 elements of key `k`"],
        ),
        (
            "element type 99",
            raw_gguf(0, 1, &[&text("k"), &u32(9), &u32(99), &u64(0)]),
            &["offset 37", "element type", "`k`", "found 99"],
        ),
        ("nested arrays", raw_gguf(0, 1, &[&deep]), &["nested at most 4 deep", "`deep`"]),
        (
            "a key twice",
            raw_gguf(0, 2, &[&text("k"), &u32(0), &[0], &text("k"), &u32(0), &[1]]),
            &["key `k`", "twice"],
        ),
        (
            "a part",
            raw_gguf(0, 1, &[&text("split.count"), &u32(2), &3u16.to_le_bytes()]),
            &["key `split.count`", "one of 3 parts", "--merge"],
        ),
        (
            "alignment 48",
            raw_gguf(0, 1, &[&text("general.alignment"), &u32(4), &u32(48)]),
            &["key `general.alignment`", "power of two", "48"],
        ),
        (
            "alignment of a wrong type",
            raw_gguf(0, 1, &[&text("general.alignment"), &u32(8), &text("32")]),
            &["key `general.alignment`", "power of two", "\"32\""],
        ),
        (
            "a name too long",
            gguf_of(&[line(&"n".repeat(1025), &[1], 0, 0)], 32),
            &["offset 24", "1025", "1024"],
        ),
        (
            "nine dimensions",
            gguf_of(&[line("w", &[1; 9], 0, 0)], 32),
            &["offset 33", "dimensions is 9", "limit is 8"],
        ),
        (
            "overflowing shape",
            gguf_of(&[line("w", &[u64::MAX, 2], 0, 0)], 32),
            &["tensor `w`", "memory can hold"],
        ),
        (
            "half a block",
            gguf_of(&[line("w", &[100, 2], 12, 0)], 999),
            &["tensor `w`", "Q4_K", "blocks of 256", "[2, 100]"],
        ),
        (
            "offset not aligned",
            gguf_of(&[line("w", &[1], 0, 4)], 32),
            &["offset 49", "multiple of 32", "`w`", "found 4"],
        ),
        (
            "overflowing offset",
            gguf_of(&[line("w", &[1], 0, u64::MAX - 31)], 32),
            &["tensor `w`", "truncated"],
        ),
        (
            "a tensor twice",
            gguf_of(&[line("w", &[1], 0, 0), line("w", &[1], 0, 32)], 64),
            &["tensor `w`", "twice"],
        ),
        (
            "an overlap",
            gguf_of(&[line("a", &[16], 0, 0), line("b", &[1], 0, 32)], 64),
            &["tensor `b`", "tensor `a` ends at"],
        ),
        (
            "an overlap with a tensor of unknown size",
            gguf_of(&[line("a", &[16], 0, 0), line("b", &[1], 999, 32)], 64),
            &["tensor `b`", "tensor `a` ends at"],
        ),
        (
            "cut data",
            gguf_of(&[line("a", &[8], 0, 0), line("b", &[8], 0, 32)], 33),
            &["tensor `b`", "needs bytes 128..160, the file has 129", "31 bytes are missing"],
        ),
    ];
    assert_refused("model.gguf", cases);
}

#[test]
fn a_gguf_of_version_2_is_read() {
    let mut file = common::gguf();
    file[4] = 2;
    let model = open("model.gguf", &file).unwrap();
    assert_eq!(model.container(), apr_format::Container::Gguf { version: 2 });
}

#[test]
fn a_gguf_tensor_of_unknown_type_is_listed_and_not_read() {
    let file = gguf_of(&[line("known", &[8], 0, 0), line("odd", &[64, 2], 999, 32)], 64);
    let model = open("model.gguf", &file).unwrap();
    assert_eq!(model.tensors().map(|(name, _)| name).collect::<Vec<_>>(), ["known"]);
    let (name, odd) = model.unreadable().next().unwrap();
    assert_eq!(
        (name, odd.dtype.as_str(), odd.shape.dims(), odd.bytes),
        ("odd", "ggml-999", &[2, 64][..], None)
    );
    let text = model.require("odd").unwrap_err().to_string();
    assert!(text.contains("model.gguf") && text.contains("ggml-999"), "{text}");
    // printf 'known F32 8\nodd ggml-999 2,64\n' | sha256sum
    assert_eq!(
        model.index_sha256(),
        "e2535694a344b33f1c4e4f054c7aa895eeb6b49278ccdc223859068218c2851d"
    );
}

/// A safetensors file of this header and so many bytes of data.
fn raw_safetensors(header: &str, data: usize) -> Vec<u8> {
    join(&[&u64(header.len() as u64), header.as_bytes(), &vec![0; data]])
}

#[test]
fn a_malformed_safetensors_file_is_refused_with_the_place() {
    let cases: Vec<Case> = vec![
        ("huge header", join(&[&u64(100_000_001), b"{}"]), &["offset 0", "100000001", "100000000"]),
        (
            "a header of 2^60 bytes",
            join(&[&u64(1 << 60), b"{}"]),
            &["offset 0", "1152921504606846976"],
        ),
        (
            "cut header",
            join(&[&u64(64), b"{}"]),
            &["offset 8", "header needs bytes 8..72, the file has 10", "62 bytes"],
        ),
        ("no JSON", raw_safetensors("{\"a\":", 0), &["offset 12", "EOF"]),
        ("no UTF-8", join(&[&u64(5), b"{\"\xff\":", &[0; 8]]), &["offset", "JSON"]),
        ("more than an object", raw_safetensors("{} {}", 0), &["offset 11", "trailing"]),
        (
            "a list for a tensor",
            raw_safetensors(r#"{"a":[]}"#, 0),
            &["offset", "dtype, shape and data_offsets", "`a`"],
        ),
        (
            "no shape",
            raw_safetensors(r#"{"a":{"dtype":"F32","data_offsets":[0,4]}}"#, 4),
            &["offset", "`a` lacks"],
        ),
        (
            "a tensor twice",
            raw_safetensors(
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
                2,
            ),
            &["tensor `a`", "twice"],
        ),
        (
            "a field twice",
            raw_safetensors(
                r#"{"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}"#,
                1,
            ),
            &["offset", "tensor `a`", "`shape` occurs twice"],
        ),
        (
            "a text twice",
            raw_safetensors(r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0),
            &["offset", "`k` occurs twice"],
        ),
        (
            "metadata twice",
            raw_safetensors(r#"{"__metadata__":{},"__metadata__":{}}"#, 0),
            &["offset", "`__metadata__` occurs twice"],
        ),
        (
            "a number for a text",
            raw_safetensors(r#"{"__metadata__":{"k":1}}"#, 0),
            &["offset 29", "integer `1`, expected a text"],
        ),
        (
            "nine dimensions",
            raw_safetensors(
                r#"{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}"#,
                1,
            ),
            &["offset", "at most 8 dimensions"],
        ),
        (
            "a negative dimension",
            raw_safetensors(r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#, 1),
            &["offset", "`-1`"],
        ),
        (
            "overflowing shape",
            raw_safetensors(
                r#"{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}"#,
                4,
            ),
            &["tensor `a`", "memory can hold"],
        ),
        (
            "size and shape differ",
            raw_safetensors(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4),
            &["tensor `a`", "8 bytes for F32 [2]", "4 bytes"],
        ),
        (
            "descending offsets",
            raw_safetensors(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4),
            &["tensor `a`", "descend", "[4, 0]"],
        ),
        (
            "overflowing offsets",
            raw_safetensors(
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[18446744073709551611,18446744073709551615]}}"#,
                4,
            ),
            &["tensor `a`", "within the file"],
        ),
        (
            "a hole at the start",
            raw_safetensors(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#, 2),
            &["tensor `a`", "hole"],
        ),
        (
            "a hole between",
            raw_safetensors(
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}"#,
                3,
            ),
            &["tensor `b`", "hole"],
        ),
        (
            "an overlap",
            raw_safetensors(
                r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
                3,
            ),
            &["tensor `b`", "tensor `a` ends at"],
        ),
        (
            "bytes after the last tensor",
            raw_safetensors(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, 3),
            &["offset 62", "2 more bytes"],
        ),
        (
            "cut data",
            raw_safetensors(r#"{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}"#, 2),
            &["tensor `a`", "needs bytes 61..70, the file has 63", "7 bytes are missing"],
        ),
    ];
    assert_refused("model.safetensors", cases);
}

#[test]
fn a_safetensors_type_that_is_not_ours_is_listed_and_not_read() {
    let header = r#"{"odd":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[0,3]},"a":{"dtype":"U8","shape":[1],"data_offsets":[3,4]}}"#;
    let model = open("model.safetensors", &raw_safetensors(header, 4)).unwrap();
    let (name, odd) = model.unreadable().next().unwrap();
    assert_eq!((name, odd.dtype.as_str(), odd.bytes), ("odd", "F8_E4M3", Some(3)));
    assert_eq!(model.tensors().len(), 1);
}

/// An `.apr` with two tensors, changed by `change`, with checksums that fit again.
fn changed_apr(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut file = apr_of(&[]);
    change(&mut file);
    common::fix_apr_checksums(&mut file);
    file
}

/// An `.apr` with the tensors `a` and `b`, of 16 and 4 bytes, and these keys.
///
/// Metadata is at 64, the index at 128 (26 bytes per line) and the data at 192 if the keys are few.
fn apr_of(keys: &[(&str, u32)]) -> Vec<u8> {
    let mut writer = apr::Writer::new();
    for &(key, value) in keys {
        writer.set(key, value);
    }
    writer.tensor("a", DType::F32, [4]).unwrap().tensor("b", DType::F32, [1]).unwrap();
    let mut body = writer.begin(Vec::new()).unwrap();
    body.tensor("a", &[1; 16]).unwrap();
    body.tensor("b", &[2; 4]).unwrap();
    body.finish().unwrap()
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Where the parts of the index line of `a` are; those of `b` are `LINE` further.
const INDEX: usize = 128;
const LINE: usize = 2 + 1 + 1 + 1 + 8 + 8 + 8;
const NAME: usize = INDEX + 2;
const TYPE: usize = INDEX + 3;
const NDIM: usize = INDEX + 4;
const OFFSET: usize = INDEX + 13;
const SIZE: usize = INDEX + 21;

#[test]
fn a_malformed_apr_file_is_refused_with_the_place() {
    let flagged = |flag: u16| changed_apr(|file| put(file, 6, &(0x400 | flag).to_le_bytes()));
    let whole = apr_of(&[]);
    assert_eq!(whole.len(), 192 + 128 + 4, "the offsets below are those of this file");
    let cases: Vec<Case> = vec![
        (
            "only a magic number",
            b"APR\0".to_vec(),
            &["offset 0", "header needs bytes 0..64, the file has 4"],
        ),
        ("version 1", changed_apr(|file| file[4] = 1), &["offset 4", "version 1.0", "convert"]),
        (
            "a damaged header",
            {
                let mut file = whole.clone();
                file[10] ^= 1;
                file
            },
            &["offset 40", "header's checksum"],
        ),
        ("LZ4", flagged(0x1), &["offset 6", "LZ4", "without compression"]),
        ("ZSTD", flagged(0x2), &["offset 6", "ZSTD", "without compression"]),
        ("encrypted", flagged(0x4), &["offset 6", "encryption", "decrypt"]),
        ("sharded", flagged(0x10), &["offset 6", "sharding", "merge"]),
        ("column-major", flagged(0x800), &["offset 6", "column-major", "row-major"]),
        ("an unknown flag", flagged(0x8000), &["offset 6", "unknown flag", "0x8400"]),
        (
            "much metadata",
            changed_apr(|file| put(file, 20, &u32(u32::MAX))),
            &["offset 20", "size of the metadata", "4294967295"],
        ),
        (
            "metadata in the header",
            changed_apr(|file| put(file, 12, &u64(0))),
            &["offset 12", "metadata", "found 0"],
        ),
        (
            "index in the metadata",
            changed_apr(|file| put(file, 24, &u64(64))),
            &["offset 24", "tensor index", "found 64"],
        ),
        (
            "data before the index",
            changed_apr(|file| put(file, 32, &u64(64))),
            &["offset 32", "data", "found 64"],
        ),
        (
            "data not aligned",
            changed_apr(|file| put(file, 32, &u64(193))),
            &["offset 32", "multiple of 64", "193"],
        ),
        (
            "data beyond the end",
            changed_apr(|file| put(file, 32, &u64(1 << 40))),
            &["offset 32", "truncated"],
        ),
        (
            "huge tensor count",
            changed_apr(|file| put(file, 8, &u32(u32::MAX))),
            &["offset 8", "at most", "4294967295"],
        ),
        ("no JSON", changed_apr(|file| file[64] = b'['), &["offset", "JSON"]),
        (
            "a name too long",
            changed_apr(|file| put(file, INDEX, &[0xff, 0xff])),
            &["offset 128", "256", "65535"],
        ),
        (
            "a name not UTF-8",
            changed_apr(|file| file[NAME] = 0xff),
            &["offset 130", "UTF-8", "0xff"],
        ),
        (
            "nine dimensions",
            changed_apr(|file| file[NDIM] = 9),
            &["offset 132", "at most 8 dimensions", "`a`"],
        ),
        (
            "names not sorted",
            changed_apr(|file| file[NAME] = b'c'),
            &["offset 157", "after `c`", "`b`"],
        ),
        (
            "a name twice",
            changed_apr(|file| file[NAME] = b'b'),
            &["offset 157", "after `b`", "`b`"],
        ),
        (
            "offset not aligned",
            changed_apr(|file| file[OFFSET] = 1),
            &["offset 141", "multiple of 64", "`a`", "found 1"],
        ),
        (
            "size and shape differ",
            changed_apr(|file| file[SIZE] = 15),
            &["offset 149", "16 bytes for F32 [4]", "found 15"],
        ),
        (
            "an overlap",
            changed_apr(|file| put(file, OFFSET + LINE, &u64(0))),
            &["tensor `", "ends at"],
        ),
        (
            "data beyond the file",
            changed_apr(|file| put(file, OFFSET, &u64(1 << 50))),
            &["tensor `a`", "truncated"],
        ),
        (
            "cut data",
            changed_apr(|file| file.truncate(250)),
            &["tensor `b`", "needs bytes 256..264, the file has 250", "14 bytes are missing"],
        ),
        (
            "two spellings that differ",
            apr_of(&[("num_layers", 2), ("num_hidden_layers", 3)]),
            &["key", "`num_layers`", "2", "`num_hidden_layers`", "3"],
        ),
    ];
    assert_refused("model.apr", cases);
}

#[test]
fn an_apr_key_is_found_under_both_of_its_spellings() {
    let model = open("model.apr", &apr_of(&[("num_layers", 2)])).unwrap();
    assert_eq!(model.metadata().u64("num_hidden_layers").unwrap(), Some(2));
    assert_eq!(model.metadata().u64("num_layers").unwrap(), Some(2));
    let both = [("num_kv_heads", 4), ("num_key_value_heads", 4)];
    let model = open("model.apr", &apr_of(&both)).unwrap();
    assert_eq!(model.metadata().u64("num_key_value_heads").unwrap(), Some(4));
}

#[test]
fn the_legacy_numbers_of_apr_types_are_read_and_unknown_ones_are_listed() {
    let mut writer = apr::Writer::new();
    writer.tensor("q", DType::AprQ4, [32]).unwrap();
    let mut body = writer.begin(Vec::new()).unwrap();
    body.tensor("q", &[7; 18]).unwrap();
    let mut file = body.finish().unwrap();
    file[TYPE] = 8;
    common::fix_apr_checksums(&mut file);
    assert_eq!(open("q.apr", &file).unwrap().require("q").unwrap().dtype(), DType::AprQ4);
    file[TYPE] = 77;
    common::fix_apr_checksums(&mut file);
    let model = open("q.apr", &file).unwrap();
    let (name, tensor) = model.unreadable().next().unwrap();
    assert_eq!((name, tensor.dtype.as_str(), tensor.bytes), ("q", "apr-77", Some(18)));
}

#[test]
fn a_file_of_another_kind_is_named_for_what_it_is() {
    let cases: Vec<Case> = vec![
        ("empty", vec![], &["an empty file", "download it again"]),
        ("HTML", b"\n<!DOCTYPE html><html>".to_vec(), &["HTML", "download"]),
        (
            "git-lfs",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n".to_vec(),
            &["git-lfs pointer", "git lfs pull"],
        ),
        (
            "zip",
            b"PK\x03\x04\x14\0\0\0\0\0".to_vec(),
            &["zip", ".npz", "convert it to safetensors"],
        ),
        (
            "pickle",
            b"\x80\x04\x95\x10\0\0\0\0\0\0\0".to_vec(),
            &["pickle", "convert it to safetensors"],
        ),
        ("npy", b"\x93NUMPY\x01\0v\0{'descr'".to_vec(), &["NumPy"]),
        ("stage", b"APRT\0\0\0\0\0\0\0\0".to_vec(), &["stage tensor"]),
        ("ggml", b"lmgg\x01\0\0\0".to_vec(), &["before GGUF"]),
        ("JSON", b" {\"a\": 1}".to_vec(), &["JSON", "directory"]),
        ("text", "Hello, W\u{f6}rld".as_bytes().to_vec(), &["a text file"]),
        ("noise", vec![1, 2, 3, 4, 5, 6, 7, 8, 9], &["unknown bytes"]),
    ];
    for case in &cases {
        assert!(
            open("x", &case.1).unwrap_err().to_string().contains("x, offset 0: "),
            "{}",
            case.0
        );
    }
    assert_refused("model.gguf", cases);
}

#[test]
fn the_kind_is_told_by_content_and_not_by_name() {
    let file = common::safetensors();
    assert_eq!(open("wrong.gguf", &file).unwrap().container().to_string(), "safetensors");
    assert_eq!(open("noextension", &common::gguf()).unwrap().container().to_string(), "gguf");
    assert_eq!(open("model.bin", &common::apr()).unwrap().container().to_string(), "apr");
}

#[test]
fn a_missing_tensor_is_answered_with_the_names_most_like_it() {
    let mut writer = safetensors::Writer::new();
    for name in ["lm_head.weight", "model.layers.3.self_attn.q_proj.weight", "model.norm.weight"] {
        writer.tensor(name, DType::U8, [0]).unwrap();
    }
    let mut body = writer.begin(Vec::new()).unwrap();
    while let Some((name, _)) = body.next_tensor() {
        let name = name.to_owned();
        body.tensor(&name, &[]).unwrap();
    }
    let model = open("m.safetensors", &body.finish().unwrap()).unwrap();
    let text = model.require("model.layers.3.attn.q.weight").unwrap_err().to_string();
    let nearest = text.find("nearest names are `model.layers.3.self_attn.q_proj.weight`");
    assert!(text.contains("m.safetensors") && nearest.is_some(), "{text}");
    assert!(model.tensor("model.norm.weight").is_some());
}

#[test]
fn a_value_of_another_type_is_refused_with_key_and_value() {
    let mut writer = gguf::Writer::new();
    writer.set("n", -3).set("t", "text").set("f", 1.5f32).set("mixed", vec![1u32]);
    let model = open("m.gguf", &writer.begin(Vec::new()).unwrap().finish().unwrap()).unwrap();
    let metadata = model.metadata();
    let refused = |text: String, parts: &[&str]| {
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    };
    refused(metadata.u64("n").unwrap_err().to_string(), &["m.gguf", "`n`", "not negative", "-3"]);
    refused(metadata.u64("f").unwrap_err().to_string(), &["`f`", "integer", "1.5"]);
    refused(metadata.bool("t").unwrap_err().to_string(), &["`t`", "true or false", "\"text\""]);
    refused(metadata.f64("t").unwrap_err().to_string(), &["`t`", "a number"]);
    refused(metadata.str("n").unwrap_err().to_string(), &["`n`", "a string"]);
    refused(metadata.strings("mixed").unwrap_err().to_string(), &["`mixed`", "list of strings"]);
    assert_eq!(metadata.f64("n").unwrap(), Some(-3.0));
    assert_eq!(metadata.u64("absent").unwrap(), None);
}
