//! The safetensors container, as far as captures need it: a header whose sizes are known before the values are,
//! and a header read without trusting any number in it.

use std::{
    fs::File,
    io::{BufReader, Read},
    ops::Range,
    path::Path,
};

use apr_tensor::DType;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    Error, Result,
    tensor::{PLAIN_NAMES, checked_bytes, plain_dtype},
};

/// Headers beyond this are refused; the reference implementation has the same limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
}

/// A tensor found in a file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// Where its bytes stand in the file.
    pub(crate) bytes: Range<u64>,
}

/// The header for `entries` in this order, and where the bytes of each begin in the file.
///
/// `None` if a size overflows.
pub(crate) fn header(entries: &[Entry]) -> Option<(Vec<u8>, Vec<u64>)> {
    let mut json = Map::new();
    let mut starts = Vec::with_capacity(entries.len());
    let mut end = 0u64;
    for Entry { name, dtype, shape } in entries {
        let start = end;
        end = end.checked_add(checked_bytes(*dtype, shape)?)?;
        starts.push(start);
        let entry = json!({ "dtype": dtype.name(), "shape": shape, "data_offsets": [start, end] });
        json.insert(name.clone(), entry);
    }
    let mut json = serde_json::to_vec(&json).expect("a header is plain data");
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    let body = header.len() as u64;
    Some((header, starts.into_iter().map(|start| body + start).collect()))
}

/// Reads and checks the header of the file at `path`. Tensors come in the order of the header.
pub(crate) fn read(path: &Path) -> Result<Vec<Found>> {
    let file = File::open(path).map_err(Error::read(path))?;
    let file_bytes = file.metadata().map_err(Error::read(path))?.len();
    parse(BufReader::new(file), file_bytes, path)
}

/// Checks the header at the beginning of `input`, the first bytes of `file_bytes`; `path` is named in errors.
pub(crate) fn parse(mut input: impl Read, file_bytes: u64, path: &Path) -> Result<Vec<Found>> {
    let mut length = [0; 8];
    input
        .read_exact(&mut length)
        .map_err(|_| Error::malformed(path, "the file", "at least 8 bytes", file_bytes))?;
    let length = u64::from_le_bytes(length);
    let limit = MAX_HEADER_BYTES.min(file_bytes.saturating_sub(8));
    if length > limit {
        let expected = format!("at most {limit} bytes");
        return Err(Error::malformed(path, "the header's length", expected, length));
    }
    let mut json = Vec::new();
    input.take(length).read_to_end(&mut json).map_err(Error::read(path))?;
    let header: Map<String, Value> = serde_json::from_slice(&json)
        .map_err(|error| Error::malformed(path, "the header", "a JSON object", error))?;

    let body = 8 + length;
    let mut tensors = Vec::new();
    for (name, value) in header {
        if name != "__metadata__" {
            tensors.push(entry(name, value, body, file_bytes, path)?);
        }
    }
    Ok(tensors)
}

fn entry(name: String, value: Value, body: u64, file_bytes: u64, path: &Path) -> Result<Found> {
    #[derive(Deserialize)]
    struct Raw {
        dtype: String,
        shape: Vec<usize>,
        data_offsets: (u64, u64),
    }
    let wrong = |expected: String, found: String| {
        Err(Error::malformed(path, format!("tensor `{name}`"), expected, found))
    };
    let raw: Raw = match serde_json::from_value(value) {
        Ok(raw) => raw,
        Err(error) => return wrong("dtype, shape and data_offsets".into(), error.to_string()),
    };
    let Some(dtype) = plain_dtype(&raw.dtype) else {
        return wrong(format!("one of {PLAIN_NAMES}"), raw.dtype);
    };
    let (shape, (start, end)) = (raw.shape, raw.data_offsets);
    match checked_bytes(dtype, &shape) {
        Some(bytes) if Some(bytes) == end.checked_sub(start) => {}
        expected => {
            let expected = expected.map_or("a size that exists".into(), |n| format!("{n} bytes"));
            return wrong(format!("{expected} for {dtype} {shape:?}"), format!("{start}..{end}"));
        }
    }
    match end.checked_add(body) {
        Some(file_end) if file_end <= file_bytes => {}
        _ => {
            return wrong(
                format!("bytes within a file of {file_bytes}"),
                format!("{start}..{end}"),
            );
        }
    }
    let bytes = body + start..body + end;
    Ok(Found { name, dtype, shape, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> Vec<Entry> {
        vec![
            Entry { name: "a".into(), dtype: DType::F32, shape: vec![2, 3] },
            Entry { name: "b".into(), dtype: DType::F64, shape: vec![0, 3] },
            Entry { name: "c".into(), dtype: DType::F16, shape: vec![5] },
        ]
    }

    #[test]
    fn a_header_reads_back_as_it_was_laid_out() {
        let (header, starts) = header(&entries()).unwrap();
        assert_eq!(header.len() % 8, 0);
        let file_bytes = header.len() as u64 + 24 + 10;
        let found = parse(&header[..], file_bytes, Path::new("x")).unwrap();
        for ((found, entry), start) in found.iter().zip(entries()).zip(starts) {
            assert_eq!(
                (&found.name, found.dtype, &found.shape),
                (&entry.name, entry.dtype, &entry.shape)
            );
            assert_eq!(found.bytes.start, start);
        }
        assert_eq!(found[2].bytes.end, file_bytes);
        let error = parse(&header[..], file_bytes - 1, Path::new("x")).unwrap_err().to_string();
        assert!(error.contains("`c`"), "{error}");
    }

    #[test]
    fn sizes_that_overflow_are_refused_and_not_computed() {
        let huge = Entry { name: "a".into(), dtype: DType::F32, shape: vec![usize::MAX, 2] };
        assert!(header(&[huge]).is_none());
        let json = r#"{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#;
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend(json.as_bytes());
        let error = parse(&file[..], file.len() as u64 + 8, Path::new("x")).unwrap_err();
        assert!(error.to_string().contains("`a`"), "{error}");
        assert!(parse(&u64::MAX.to_le_bytes()[..], 8, Path::new("x")).is_err());
    }
}
