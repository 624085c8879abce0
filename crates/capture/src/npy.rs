//! NumPy's `.npy`: a header of one Python dict, then the elements.
//!
//! Reads versions 1 to 3, little-endian floats and integers in C order; the rest is refused with what to do.

use std::{fs::File, io::Read, ops::Range, path::Path};

use apr_tensor::DType;

use crate::{Error, Result, tensor::checked_bytes};

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Headers beyond this are refused; NumPy itself stops at 10,000 characters.
const MAX_HEADER_BYTES: usize = 65_536;

/// What a header says.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Npy {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// Where the elements stand.
    pub(crate) bytes: Range<u64>,
}

/// Reads and checks the header of the file at `path`.
pub(crate) fn read(path: &Path) -> Result<Npy> {
    let file = File::open(path).map_err(Error::read(path))?;
    let length = file.metadata().map_err(Error::read(path))?.len();
    parse(file, length, path)
}

/// Checks the header at the beginning of `input`, which is `length` bytes long; `path` is named in errors.
pub(crate) fn parse(mut input: impl Read, length: u64, path: &Path) -> Result<Npy> {
    let mut take = |bytes: usize| {
        let mut buffer = vec![0; bytes];
        match input.read_exact(&mut buffer) {
            Ok(()) => Ok(buffer),
            Err(_) => Err(Error::malformed(path, "the npy header", "whole", "cut short")),
        }
    };
    let start = take(8)?;
    if start[..6] != MAGIC[..] {
        let found = format!("`{}`", start[..6].escape_ascii());
        return Err(Error::malformed(path, "the magic number", "`\\x93NUMPY`", found));
    }
    let width = match start[6] {
        1 => 2,
        2 | 3 => 4,
        other => return Err(Error::malformed(path, "the npy version", "1, 2 or 3", other)),
    };
    let header_len = take(width)?.iter().rev().fold(0usize, |n, &byte| n << 8 | usize::from(byte));
    if header_len > MAX_HEADER_BYTES {
        let expected = format!("at most {MAX_HEADER_BYTES} bytes");
        return Err(Error::malformed(path, "the npy header", expected, header_len));
    }
    let header = String::from_utf8_lossy(&take(header_len)?).into_owned();
    let wrong =
        |what: &str, expected: &str, found: &str| Error::malformed(path, what, expected, found);

    let dtype = match quoted(value_of(&header, "descr")).unwrap_or("") {
        "<f8" => DType::F64,
        "<f4" => DType::F32,
        "<f2" => DType::F16,
        "<i8" => DType::I64,
        "<i4" => DType::I32,
        other => {
            let expected = "<f4, <f8, <f2, <i4 or <i8 (write it with array.astype('<f4'))";
            return Err(wrong("the npy type", expected, other));
        }
    };
    match value_of(&header, "fortran_order").map(word) {
        Some("False") => {}
        Some("True") => {
            let expected = "C order (write it with numpy.ascontiguousarray)";
            return Err(wrong("the npy order", expected, "Fortran order"));
        }
        other => return Err(wrong("fortran_order", "True or False", other.unwrap_or("nothing"))),
    }
    let shape = value_of(&header, "shape").and_then(tuple);
    let shape = shape.ok_or_else(|| wrong("the npy shape", "a tuple of numbers", &header))?;

    let body = (8 + width + header_len) as u64;
    let bytes = checked_bytes(dtype, &shape)
        .and_then(|bytes| body.checked_add(bytes))
        .filter(|&end| end == length);
    let Some(end) = bytes else {
        let expected = format!("the bytes of {dtype} {shape:?} after a header of {body}");
        return Err(Error::malformed(path, "the npy length", expected, length));
    };
    Ok(Npy { dtype, shape, bytes: body..end })
}

/// What follows `'key':`.
fn value_of<'a>(header: &'a str, key: &str) -> Option<&'a str> {
    ['\'', '"'].iter().find_map(|quote| {
        let (_, rest) = header.split_once(&format!("{quote}{key}{quote}"))?;
        Some(rest.trim_start().strip_prefix(':')?.trim_start())
    })
}

fn quoted(value: Option<&str>) -> Option<&str> {
    let value = value?;
    let quote = value.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    value[1..].split(quote).next()
}

fn word(value: &str) -> &str {
    value.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or("")
}

fn tuple(value: &str) -> Option<Vec<usize>> {
    let (inside, _) = value.strip_prefix('(')?.split_once(')')?;
    let inside = inside.trim();
    let inside = inside.strip_suffix(',').unwrap_or(inside);
    if inside.is_empty() {
        return Some(Vec::new());
    }
    inside.split(',').map(|d| d.trim().trim_end_matches('L').parse().ok()).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A version 1 file.
    pub(crate) fn npy(descr: &str, order: &str, shape: &str, body: &[u8]) -> Vec<u8> {
        let mut dict =
            format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}");
        while (10 + dict.len() + 1) % 64 != 0 {
            dict.push(' ');
        }
        dict.push('\n');
        let mut file = MAGIC.to_vec();
        file.extend([1, 0]);
        file.extend((dict.len() as u16).to_le_bytes());
        file.extend(dict.as_bytes());
        file.extend(body);
        file
    }

    fn parse_bytes(file: &[u8]) -> Result<Npy> {
        parse(file, file.len() as u64, Path::new("x.npy"))
    }

    #[test]
    fn numpys_shapes_and_types_are_read() {
        for (descr, dtype, size) in [
            ("<f8", DType::F64, 8),
            ("<f4", DType::F32, 4),
            ("<f2", DType::F16, 2),
            ("<i4", DType::I32, 4),
            ("<i8", DType::I64, 8),
        ] {
            let npy = parse_bytes(&npy(descr, "False", "(2, 3)", &vec![0; 6 * size])).unwrap();
            assert_eq!((npy.dtype, npy.shape), (dtype, vec![2, 3]));
            assert_eq!(npy.bytes.start % 64, 0);
        }
        assert_eq!(parse_bytes(&npy("<f4", "False", "(3,)", &[0; 12])).unwrap().shape, [3]);
        assert_eq!(parse_bytes(&npy("<f4", "False", "()", &[0; 4])).unwrap().shape, [0usize; 0]);
    }

    #[test]
    fn version_2_has_a_wider_length() {
        let one = npy("<f4", "False", "(1,)", &[0; 4]);
        let mut two = one[..6].to_vec();
        two.extend([2, 0]);
        two.extend(&one[8..10]);
        two.extend([0, 0]);
        two.extend(&one[10..]);
        assert_eq!(parse_bytes(&two).unwrap().shape, [1]);
    }

    #[test]
    fn what_is_refused_is_refused_with_what_to_do() {
        for (file, word) in [
            (npy(">f4", "False", "(1,)", &[0; 4]), "astype"),
            (npy("<f4", "True", "(1,)", &[0; 4]), "ascontiguousarray"),
            (npy("<f4", "False", "(1,)", &[0; 5]), "length"),
            (npy("<f4", "False", "(2,)", &[0; 4]), "length"),
            (npy("<f4", "False", "(18446744073709551615, 2)", &[]), "length"),
            (npy("<f4", "False", "(0, 4294967296, 4294967296)", &[]), "length"),
            (npy("<f4", "False", "(-1,)", &[]), "shape"),
            (b"\x93NUMPY\x01\0\xff\xff{".to_vec(), "cut short"),
            (b"\x93NUMPY\x02\0\xff\xff\xff\xff{".to_vec(), "at most"),
            (b"PK\x03\x04 not npy".to_vec(), "magic"),
        ] {
            let error = parse_bytes(&file).unwrap_err().to_string();
            assert!(error.contains("x.npy") && error.contains(word), "{word}: {error}");
        }
    }
}
