//! APRT v1: one stage tensor, one file, and trees of such files.
//!
//! The format has a layer, a count and F32 values; no shape, no type, no positions. What those mean is for
//! whoever reads a tree to know, see [`crate::Capture`].

use std::{
    fs::{self, File},
    io::{BufWriter, Read, Write},
    path::{Path, PathBuf},
};

use apr_model::Site;

use crate::{Error, Result};

const MAGIC: [u8; 4] = *b"APRT";
/// Bytes before the values.
pub(crate) const HEADER_BYTES: usize = 12;
/// The layer field of a stage of the whole model.
const WHOLE_MODEL: u32 = u32::MAX;

/// The content of an APRT file.
#[derive(Clone, Debug, PartialEq)]
pub struct Aprt {
    /// The layer; `None` for a stage of the whole model.
    pub layer: Option<u32>,
    /// The values, row-major.
    pub values: Vec<f32>,
}

impl Aprt {
    /// Reads the file at `path`, whose length must be exactly what its header says.
    pub fn read(path: &Path) -> Result<Self> {
        let (layer, count) = read_header(path)?;
        let bytes = fs::read(path).map_err(Error::read(path))?;
        check_length(path, count, bytes.len() as u64)?;
        let (values, _) = bytes[HEADER_BYTES..].as_chunks();
        Ok(Self { layer, values: values.iter().map(|&v| f32::from_le_bytes(v)).collect() })
    }

    /// Writes the file at `path`, under a temporary name until it is whole.
    pub fn write(&self, path: &Path) -> Result<()> {
        let count = self.values.len();
        let header = header(self.layer, count).ok_or_else(|| {
            Error::malformed(path, "the number of values", "less than 2^32", count)
        })?;
        let partial = path.with_added_extension(format!("partial-{}", std::process::id()));
        let write = || {
            let mut file = BufWriter::new(File::create(&partial)?);
            file.write_all(&header)?;
            for value in &self.values {
                file.write_all(&value.to_le_bytes())?;
            }
            file.flush()?;
            fs::rename(&partial, path)
        };
        write().map_err(|source| {
            let _ = fs::remove_file(&partial);
            Error::Write { path: path.to_owned(), source }
        })
    }
}

/// The first bytes of a file of `count` values; `None` if the format cannot say so many.
pub(crate) fn header(layer: Option<u32>, count: usize) -> Option<[u8; HEADER_BYTES]> {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MAGIC);
    header[4..8].copy_from_slice(&layer.unwrap_or(WHOLE_MODEL).to_le_bytes());
    header[8..].copy_from_slice(&u32::try_from(count).ok()?.to_le_bytes());
    Some(header)
}

/// The layer and the number of values of the file at `path`, whose length is checked.
pub(crate) fn read_header(path: &Path) -> Result<(Option<u32>, usize)> {
    let mut file = File::open(path).map_err(Error::read(path))?;
    let length = file.metadata().map_err(Error::read(path))?.len();
    let mut header = [0; HEADER_BYTES];
    file.read_exact(&mut header).map_err(|_| {
        Error::malformed(path, "the file", format!("at least {HEADER_BYTES} bytes"), length)
    })?;
    let [m0, m1, m2, m3, l0, l1, l2, l3, c0, c1, c2, c3] = header;
    if [m0, m1, m2, m3] != MAGIC {
        let found = format!("`{}`", header[..4].escape_ascii());
        return Err(Error::malformed(path, "the magic number", "`APRT`", found));
    }
    let layer = u32::from_le_bytes([l0, l1, l2, l3]);
    let count = u32::from_le_bytes([c0, c1, c2, c3]) as usize;
    check_length(path, count, length)?;
    Ok(((layer != WHOLE_MODEL).then_some(layer), count))
}

fn check_length(path: &Path, count: usize, found: u64) -> Result<()> {
    let expected = HEADER_BYTES as u64 + 4 * count as u64;
    if found != expected {
        let expected = format!("{expected} bytes for {count} values");
        return Err(Error::malformed(
            path,
            "the file's length",
            expected,
            format!("{found} bytes"),
        ));
    }
    Ok(())
}

/// Where a tree keeps the values of `site`.
pub(crate) fn tree_path(site: Site) -> PathBuf {
    let file = format!("{}.bin", site.stage);
    match site.layer {
        Some(layer) => Path::new(&format!("layer-{layer}")).join(file),
        None => file.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_round_trip_with_their_nan_payloads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.bin");
        let payload = f32::from_bits(0x7fa0_1234);
        let values = vec![1.0, -0.0, f32::INFINITY, payload];
        for layer in [None, Some(0), Some(7)] {
            Aprt { layer, values: values.clone() }.write(&path).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().len(), 12 + 16);
            let back = Aprt::read(&path).unwrap();
            assert_eq!(back.layer, layer);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&back.values), bits(&values));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_length_that_is_not_the_headers_is_refused_with_both() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.bin");
        let whole = [&b"APRT"[..], &[0; 4], &2u32.to_le_bytes(), &[0; 8]].concat();
        for (bytes, found) in [
            (whole[..19].to_vec(), "19 bytes"),
            ([&whole[..], &[0]].concat(), "21 bytes"),
            (whole[..11].to_vec(), "11"),
            ([&b"GGUF"[..], &whole[4..]].concat(), "`GGUF`"),
        ] {
            fs::write(&path, bytes).unwrap();
            let error = Aprt::read(&path).unwrap_err().to_string();
            assert!(error.contains("x.bin") && error.contains(found), "{error}");
        }
    }
}
