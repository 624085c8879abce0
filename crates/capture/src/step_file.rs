//! The tensors of one step on their way to disk.
//!
//! All sizes are known before the step runs, so each value goes straight to its place and at most one is looked
//! at at a time. A file that was not closed is removed: what is left on disk is always a whole step.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Seek, SeekFrom, Write},
    ops::Range,
    path::{Path, PathBuf},
};

use apr_model::{Site, Values, View};
use apr_tensor::DType;

use crate::{Error, Result, aprt, manifest::Layout, safetensors};

/// A value that the step will show, and the part of it to keep.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub(crate) site: Site,
    /// The shape that the engine will show.
    pub(crate) shown: Vec<usize>,
    /// The rows to keep, as indices.
    pub(crate) rows: Range<usize>,
    /// The position of the first kept row.
    pub(crate) first_position: usize,
    /// What the elements are stored as: F32, F64, or I32 where they are ids.
    pub(crate) dtype: DType,
}

impl Planned {
    /// The shape that is stored.
    pub(crate) fn shape(&self) -> Vec<usize> {
        let mut shape = self.shown.clone();
        shape[self.site.stage.axes().row_axis()] = self.rows.len();
        shape
    }

    /// The stored elements as ranges of the shown ones: one range, or one per head.
    fn ranges(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let axis = self.site.stage.axes().row_axis();
        let outer: usize = self.shown[..axis].iter().product();
        let inner: usize = self.shown[axis + 1..].iter().product();
        let (all_rows, rows) = (self.shown[axis], self.rows.clone());
        (0..outer).map(move |o| {
            let base = o * all_rows;
            (base + rows.start) * inner..(base + rows.end) * inner
        })
    }
}

/// The files of a step being written.
#[derive(Debug)]
pub(crate) struct StepFile {
    /// The safetensors file, or the APRT tree's directory.
    path: PathBuf,
    tensors: Vec<(Planned, Option<blake3::Hash>)>,
    kind: Kind,
    closed: bool,
}

#[derive(Debug)]
enum Kind {
    Safetensors { file: BufWriter<File>, starts: Vec<u64>, at: u64 },
    Aprt,
}

impl StepFile {
    /// Begins step number `index` in `directory`.
    pub(crate) fn create(
        directory: &Path,
        index: usize,
        layout: Layout,
        tensors: Vec<Planned>,
    ) -> Result<Self> {
        let (path, kind) = match layout {
            Layout::Safetensors => {
                let path = directory.join(format!("step-{index:04}.safetensors"));
                let kind = begin_safetensors(&path, &tensors)?;
                (path, kind)
            }
            Layout::Aprt => {
                let path = directory.join(format!("step-{index:04}"));
                fs::create_dir(&path).map_err(Error::write(&path))?;
                (path, Kind::Aprt)
            }
        };
        let tensors = tensors.into_iter().map(|tensor| (tensor, None)).collect();
        Ok(Self { path, tensors, kind, closed: false })
    }

    /// The name of the file or directory.
    pub(crate) fn name(&self) -> String {
        let name = self.path.file_name().expect("steps are named by `create`");
        name.to_string_lossy().into_owned()
    }

    /// Stores the planned part of `view`.
    pub(crate) fn put(&mut self, step: usize, site: Site, view: View<'_>) -> Result<()> {
        let unexpected = |problem: String| Err(Error::Unexpected { step, site, problem });
        let found = self.tensors.iter().position(|(tensor, _)| tensor.site == site);
        let Some(index) = found else {
            return Ok(()); // No row of it is wanted in this step.
        };
        let (planned, hash) = &self.tensors[index];
        if hash.is_some() {
            return unexpected("was shown twice".to_owned());
        }
        if view.shape != planned.shown {
            let Planned { shown, .. } = planned;
            return unexpected(format!("has shape {:?}, expected {shown:?}", view.shape));
        }

        let mut hasher = blake3::Hasher::new();
        match &mut self.kind {
            Kind::Safetensors { file, starts, at } => {
                let start = starts[index];
                let mut write = |file: &mut BufWriter<File>| {
                    if *at != start {
                        file.seek(SeekFrom::Start(start))?;
                    }
                    write_elements(file, &mut hasher, planned, view.values)
                };
                *at = start + write(file).map_err(Error::write(&self.path))?;
            }
            Kind::Aprt => {
                let path = self.path.join(aprt::tree_path(site));
                let parent = path.parent().expect("the tree has a root");
                fs::create_dir_all(parent).map_err(Error::write(parent))?;
                let count = planned.shape().iter().product();
                let header = aprt::header(site.layer, count).ok_or_else(|| {
                    Error::malformed(&path, "the number of values", "less than 2^32", count)
                })?;
                let mut write = || {
                    let mut file = BufWriter::new(File::create(&path)?);
                    file.write_all(&header)?;
                    write_elements(&mut file, &mut hasher, planned, view.values)?;
                    file.flush()
                };
                write().map_err(Error::write(&path))?;
            }
        }
        self.tensors[index].1 = Some(hasher.finalize());
        Ok(())
    }

    /// Ends the step: what was stored, with hashes. A planned value that never came is an error, not a hole.
    pub(crate) fn close(mut self, step: usize) -> Result<Vec<(Planned, blake3::Hash)>> {
        let missing: Vec<String> = self
            .tensors
            .iter()
            .filter(|(_, hash)| hash.is_none())
            .map(|(tensor, _)| tensor.site.to_string())
            .collect();
        if !missing.is_empty() {
            return Err(Error::NotShown { step, missing: missing.join(", ") });
        }
        if let Kind::Safetensors { file, .. } = &mut self.kind {
            file.flush().map_err(Error::write(&self.path))?;
        }
        self.closed = true;
        let tensors = std::mem::take(&mut self.tensors);
        Ok(tensors.into_iter().filter_map(|(tensor, hash)| Some((tensor, hash?))).collect())
    }
}

impl Drop for StepFile {
    fn drop(&mut self) {
        if !self.closed {
            // Nothing is left to tell of a failure here; readers ignore steps without an entry.
            let _ = match self.kind {
                Kind::Safetensors { .. } => fs::remove_file(&self.path),
                Kind::Aprt => fs::remove_dir_all(&self.path),
            };
        }
    }
}

fn begin_safetensors(path: &Path, tensors: &[Planned]) -> Result<Kind> {
    let entries: Vec<_> = tensors
        .iter()
        .map(|tensor| safetensors::Entry {
            name: tensor.site.to_string(),
            dtype: tensor.dtype,
            shape: tensor.shape(),
        })
        .collect();
    let (header, starts) = safetensors::header(&entries).ok_or_else(|| {
        Error::malformed(path, "the size of the step", "less than 2^64 bytes", "more")
    })?;
    let file = File::create_new(path).map_err(Error::write(path))?;
    let mut file = BufWriter::with_capacity(1 << 18, file);
    file.write_all(&header).map_err(Error::write(path))?;
    Ok(Kind::Safetensors { file, starts, at: header.len() as u64 })
}

/// Writes and hashes the planned elements; returns the number of bytes.
fn write_elements(
    out: &mut impl Write,
    hasher: &mut blake3::Hasher,
    planned: &Planned,
    values: Values<'_>,
) -> io::Result<u64> {
    const CHUNK: usize = 8192;
    let mut buffer = [0; CHUNK * size_of::<f64>()];
    let mut bytes = 0;
    for range in planned.ranges() {
        for start in range.clone().step_by(CHUNK) {
            let chunk = start..range.end.min(start + CHUNK);
            let len = chunk.len() * planned.dtype.block_bytes();
            let encoded = &mut buffer[..len];
            match (values, planned.dtype) {
                (Values::F32(v), DType::I32) => {
                    encode(&v[chunk], encoded, |x| (x as i32).to_le_bytes());
                }
                (Values::F64(v), DType::I32) => {
                    encode(&v[chunk], encoded, |x| (x as i32).to_le_bytes());
                }
                (Values::F32(v), DType::F64) => {
                    encode(&v[chunk], encoded, |x| f64::from(x).to_le_bytes());
                }
                (Values::F32(v), _) => encode(&v[chunk], encoded, f32::to_le_bytes),
                (Values::F64(v), DType::F64) => encode(&v[chunk], encoded, f64::to_le_bytes),
                (Values::F64(v), _) => encode(&v[chunk], encoded, |x| (x as f32).to_le_bytes()),
            }
            hasher.update(encoded);
            out.write_all(encoded)?;
            bytes += len as u64;
        }
    }
    Ok(bytes)
}

fn encode<T: Copy, const N: usize>(values: &[T], out: &mut [u8], bytes: impl Fn(T) -> [u8; N]) {
    out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(out, &value)| *out = bytes(value));
}
