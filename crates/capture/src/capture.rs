//! Reading captures, whoever wrote them.

mod manifested;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use apr_model::{Axes, Site};
use apr_tensor::DType;

use crate::{
    CaptureTensor, Dims, Error, NameMap, Provenance, Result, import,
    manifest::{MANIFEST, Manifest},
    source::Source,
};

/// How to open a capture.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Read the whole steps of a capture whose writer was interrupted.
    pub allow_partial: bool,
    /// The model's dimensions, for files that hold no shapes.
    pub dims: Option<Dims>,
    /// Names of other programs, beside those that are known.
    pub names: NameMap,
}

/// What a forward pass computed, read back.
///
/// Opening reads and checks what the files say about themselves; values are loaded one tensor at a time, so a capture
/// may be larger than memory.
#[derive(Debug)]
pub struct Capture {
    pub(crate) path: PathBuf,
    pub(crate) provenance: Option<Provenance>,
    pub(crate) complete: bool,
    pub(crate) steps: Vec<CaptureStep>,
    pub(crate) unknown: Vec<String>,
}

/// One forward step of a capture. What a foreign file does not say is `None`.
#[derive(Clone, Debug, Default)]
pub struct CaptureStep {
    /// `prefill` or `decode`.
    pub phase: Option<String>,
    /// The number of the prefill chunk.
    pub chunk: usize,
    /// The sequence within a batch.
    pub slot: usize,
    /// The input tokens.
    pub token_ids: Option<Vec<u32>>,
    /// Their positions.
    pub positions: Option<Vec<usize>>,
    /// Their texts.
    pub tokens_text: Option<Vec<String>>,
    pub(crate) tensors: BTreeMap<Site, TensorInfo>,
}

/// What is known of a recorded value before it is loaded.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) axes: Axes,
    pub(crate) dtype: DType,
    pub(crate) positions: Option<Vec<usize>>,
    pub(crate) blake3: Option<blake3::Hash>,
    pub(crate) source: Source,
}

impl TensorInfo {
    /// Its name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Row-major dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// What the dimensions mean.
    pub fn axes(&self) -> Axes {
        self.axes
    }

    /// The stored type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The position of each row, where the capture knows it.
    pub fn positions(&self) -> Option<&[usize]> {
        self.positions.as_deref()
    }

    /// The number of rows, that is of token positions.
    pub fn rows(&self) -> usize {
        self.shape[self.axes.row_axis()]
    }
}

/// One row of a site: where its values are, and which token they belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RowRef {
    /// The sequence within a batch.
    pub slot: usize,
    /// The position in the sequence, where the capture knows it.
    pub position: Option<usize>,
    /// The step that computed the row.
    pub step: usize,
    /// The row's index in that step's tensor.
    pub row: usize,
}

impl Capture {
    /// Opens the capture, APRT tree, directory of `.npy` files, `.npz` or `.safetensors` at `path`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, &OpenOptions::default())
    }

    /// The same with options.
    pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let manifest = path.join(MANIFEST);
        if !path.is_dir() {
            import::file(path, options)
        } else if manifest.try_exists().map_err(Error::read(&manifest))? {
            manifested::open(path, Manifest::read(&manifest)?, options)
        } else {
            import::directory(path, options)
        }
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What computed the values and from what, where there is a manifest.
    pub fn provenance(&self) -> Option<&Provenance> {
        self.provenance.as_ref()
    }

    /// The model's dimensions, where there is a manifest that has them. A bare tree of the same model can be opened
    /// with them, see [`OpenOptions::dims`].
    pub fn dims(&self) -> Option<&Dims> {
        self.provenance.as_ref()?.model.config.as_ref()
    }

    /// Whether the writer came to its end.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// The steps, in order.
    pub fn steps(&self) -> &[CaptureStep] {
        &self.steps
    }

    /// Every site of which some step holds a value, in the order of computation.
    pub fn sites(&self) -> Vec<Site> {
        let sites: BTreeSet<Site> =
            self.steps.iter().flat_map(|step| step.tensors.keys().copied()).collect();
        sites.into_iter().collect()
    }

    /// Whether the position of every row is known.
    pub fn knows_positions(&self) -> bool {
        let mut tensors = self.steps.iter().flat_map(|step| step.tensors.values());
        tensors.all(|tensor| tensor.positions.is_some())
    }

    /// Values that were left out, because their names say no known site; each with the reason.
    pub fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// What is known of a value before it is loaded; `None` if step `step` holds no `site`.
    pub fn info(&self, step: usize, site: Site) -> Option<&TensorInfo> {
        self.steps.get(step)?.tensors.get(&site)
    }

    /// Loads a value and checks that its bytes are those that were written.
    pub fn tensor(&self, step: usize, site: Site) -> Result<CaptureTensor> {
        let Some(info) = self.info(step, site) else {
            return Err(Error::NotCaptured { path: self.path.clone(), step, site });
        };
        let bytes = info.source.load()?;
        if info.blake3.is_some_and(|hash| hash != blake3::hash(&bytes)) {
            let path = info.source.path().to_owned();
            return Err(Error::Damaged { path, name: info.name.clone() });
        }
        Ok(CaptureTensor {
            site,
            shape: info.shape.clone(),
            axes: info.axes,
            dtype: info.dtype,
            positions: info.positions.clone(),
            bytes,
        })
    }

    /// All rows of `site`: by slot and position where positions are known, in the order of the steps where not.
    pub fn rows(&self, site: Site) -> Vec<RowRef> {
        let mut rows = Vec::new();
        for (step, captured) in self.steps.iter().enumerate() {
            let Some(info) = captured.tensors.get(&site) else { continue };
            rows.extend((0..info.rows()).map(|row| RowRef {
                slot: captured.slot,
                position: info.positions.as_ref().map(|positions| positions[row]),
                step,
                row,
            }));
        }
        if rows.iter().all(|row| row.position.is_some()) {
            rows.sort();
        }
        rows
    }
}
