//! Damaged files: whatever is in them, opening neither panics nor takes memory without bound, and every
//! refusal says where.

mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use apr_testkit::Mutants;

const MUTANTS: u64 = 10_000;

/// Counts what the current thread has allocated, and the most that it was.
struct Counting;

thread_local! {
    static NOW: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(change: isize) {
    let now = NOW.get() + change;
    NOW.set(now);
    PEAK.set(PEAK.get().max(now));
}

// SAFETY: every call goes to the system's allocator as it came; the counters are plain thread-local cells that
// allocate nothing themselves.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    // `realloc` is left to its default, which counts the old and the new block while both are alive.
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Opens mutants of `base`; returns how many of them were refused.
fn survive(name: &str, base: &[u8], hot: usize, fix: fn(&mut [u8])) -> u64 {
    let mut mutants = Mutants::new(name.len() as u64);
    let mut refused = 0;
    for mutant in 0..MUTANTS {
        let mut file = base.to_vec();
        mutants.mutate(&mut file, hot);
        if mutant % 4 != 0 {
            fix(&mut file);
        }
        let bytes = apr_tensor::Bytes::from(file);
        let limit = 2 * bytes.len() as isize + (64 << 20);
        let before = NOW.get();
        PEAK.set(before);
        let result = apr_format::Checkpoint::from_bytes(name, bytes);
        let peak = PEAK.get() - before;
        assert!(peak <= limit, "mutant {mutant} of {name}: {peak} bytes allocated");
        match result {
            Ok(model) => {
                let total: usize = model.tensors().map(|(_, stored)| stored.bytes().len()).sum();
                assert!(
                    total as u64 <= model.files()[0].size(),
                    "mutant {mutant}: tensors overlap"
                );
            }
            Err(error) => {
                refused += 1;
                let text = error.to_string();
                assert!(text.contains(name), "mutant {mutant}: which file? {text}");
                assert!(
                    ["offset ", "key ", "keys ", "tensor "]
                        .iter()
                        .any(|place| text.contains(place)),
                    "mutant {mutant} of {name}: where? {text}"
                );
                assert!(text.len() < 1000, "mutant {mutant} of {name}: {text}");
            }
        }
    }
    refused
}

/// The part of `file` before its data begins, for bodies of the sizes in `common`.
fn structure(file: &[u8]) -> usize {
    let data: usize = common::PLAIN.iter().map(|tensor| common::body(tensor).len()).sum();
    file.len().saturating_sub(data)
}

#[test]
fn damaged_gguf_files_are_refused_or_read_but_never_believed() {
    let base = common::gguf();
    let refused = survive("damaged.gguf", &base, structure(&base), |_| ());
    assert!(refused > MUTANTS / 2, "{refused} refused");
    assert!(refused < MUTANTS, "some mutants must be deep enough to pass");
}

#[test]
fn damaged_safetensors_files_are_refused_or_read_but_never_believed() {
    let base = common::safetensors();
    let refused = survive("damaged.safetensors", &base, structure(&base), |_| ());
    assert!(refused > MUTANTS / 2, "{refused} refused");
    assert!(refused < MUTANTS, "some mutants must be deep enough to pass");
}

#[test]
fn damaged_apr_files_are_refused_or_read_but_never_believed() {
    let base = common::apr();
    let refused = survive("damaged.apr", &base, structure(&base), common::fix_apr_checksums);
    assert!(refused > MUTANTS / 4, "{refused} refused");
    assert!(refused < MUTANTS, "some mutants must be deep enough to pass");
}

/// The most that opening `file` allocates.
fn peak_of(
    name: &str,
    file: Vec<u8>,
) -> (isize, isize, apr_format::Result<apr_format::Checkpoint>) {
    let bytes = apr_tensor::Bytes::from(file);
    let limit = 2 * bytes.len() as isize + (64 << 20);
    let before = NOW.get();
    PEAK.set(before);
    let result = apr_format::Checkpoint::from_bytes(name, bytes);
    (PEAK.get() - before, limit, result)
}

/// A GGUF file of one key, up to the values of its array.
fn gguf_with_array(kind: u8, count: usize) -> Vec<u8> {
    let mut file =
        b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0k\x09\0\0\0".to_vec();
    file.extend([kind, 0, 0, 0]);
    file.extend((count as u64).to_le_bytes());
    file
}

#[test]
fn files_made_to_cost_memory_stay_within_the_bound() {
    let mib = 1 << 20;
    let mut files: Vec<(&str, Vec<u8>)> = Vec::new();

    // A GGUF array of one-byte values, each of which is a `Value` in memory.
    let mut gguf = gguf_with_array(0, 8 * mib);
    gguf.resize(gguf.len() + 8 * mib, 0);
    files.push(("array.gguf", gguf));

    let safetensors = |header: String| {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.into_bytes());
        file
    };
    let lines: Vec<_> = (0..150_000)
        .map(|i| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#))
        .collect();
    files.push(("tensors.safetensors", safetensors(format!("{{{}}}", lines.join(",")))));
    let zeros = "0,".repeat(4 * mib);
    files.push(("shape.safetensors", safetensors(format!(r#"{{"a":{{"shape":[{zeros}0]}}}}"#))));
    let escapes = "\\n".repeat(8 * mib);
    files.push(("name.safetensors", safetensors(format!(r#"{{"{escapes}":1}}"#))));
    files.push(("dtype.safetensors", safetensors(format!(r#"{{"a":{{"dtype":"{escapes}"}}}}"#))));

    let apr = |metadata: String| {
        let mut file = b"APR\0\x02\0\0\x04\0\0\0\0".to_vec();
        let end = 64 + (metadata.len() as u64).next_multiple_of(64);
        file.extend(64u64.to_le_bytes());
        file.extend((metadata.len() as u32).to_le_bytes());
        file.extend(end.to_le_bytes());
        file.extend(end.to_le_bytes());
        file.resize(64, 0);
        file.extend(metadata.into_bytes());
        file.resize(end as usize + 4, 0);
        common::fix_apr_checksums(&mut file);
        file
    };
    files.push(("numbers.apr", apr(format!(r#"{{"a":[{}0]}}"#, "0,".repeat(7 * mib)))));
    files.push(("texts.apr", apr(format!(r#"{{"a":[{}0]}}"#, "\"\",".repeat(5 * mib)))));
    let keys: Vec<_> = (0..1_000_000).map(|i| format!(r#""{i}":0"#)).collect();
    files.push(("keys.apr", apr(format!("{{{}}}", keys.join(",")))));
    let nested: Vec<_> = (0..800_000).map(|i| format!(r#"{{"":{i}}}"#)).collect();
    files.push(("objects.apr", apr(format!(r#"{{"a":[{}]}}"#, nested.join(",")))));

    for (name, file) in files {
        let (peak, limit, result) = peak_of(name, file);
        assert!(peak <= limit, "{name}: {peak} bytes allocated, the limit is {limit}");
        let text = result.map(drop).expect_err(name).to_string();
        assert!(text.contains(name), "{text}");
    }

    // Lists that have just grown, up to those that are too long.
    let list = |kind: u8, count: usize, value: &[u8]| {
        let mut file = gguf_with_array(kind, count);
        file.extend(value.repeat(count));
        file
    };
    let lists = |count: usize| {
        let tail = |text: &str, end: &str| apr(format!(r#"{{"a":[{}{end}]}}"#, text.repeat(count)));
        [
            ("bytes.gguf", list(0, count, &[0])),
            ("truths.gguf", list(7, count, &[1])),
            ("integers.gguf", list(1, count, &[1])),
            ("texts.gguf", list(8, count, b"\x01\0\0\0\0\0\0\0a")),
            ("numbers.apr", tail("0,", "0")),
            ("texts.apr", tail("\"\",", "\"\"")),
            ("mixed.apr", tail("\"\",", "0,0")),
            ("mixed.apr", tail("-1,", "0,0")),
        ]
    };
    let mut accepted = 0;
    for count in (12..=23).map(|i| (1 << i) + 1) {
        for (name, file) in lists(count) {
            let (peak, limit, result) = peak_of(name, file);
            assert!(peak <= limit, "{count} in {name}: {peak} bytes, the limit is {limit}");
            accepted += u32::from(result.is_ok());
        }
    }
    assert!(accepted > 50, "{accepted} accepted");

    let texts = list(8, 140_000, &[&1000u64.to_le_bytes(), &[b'a'; 1000][..]].concat());
    let (peak, limit, _) = peak_of("texts.gguf", texts);
    assert!(peak <= limit, "long texts: {peak} bytes, the limit is {limit}");
}
