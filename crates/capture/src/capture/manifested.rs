//! Captures with a manifest: every claim of the manifest is checked against the files.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::{Component, Path},
    sync::Arc,
};

use apr_model::Site;

use super::{Capture, CaptureStep, OpenOptions, TensorInfo};
use crate::{
    Error, Layout, Manifest, Result, aprt,
    manifest::{self, MANIFEST},
    recorder::JOURNAL,
    safetensors::{self, Found},
    source::Source,
    tensor::{PLAIN_NAMES, checked_bytes, plain_dtype},
};

/// Opens the capture in `directory`, which has this manifest.
pub(super) fn open(
    directory: &Path,
    mut manifest: Manifest,
    options: &OpenOptions,
) -> Result<Capture> {
    if !manifest.complete {
        if !options.allow_partial {
            return Err(Error::Incomplete { path: directory.to_owned() });
        }
        manifest.steps.extend(journal(directory)?);
    }
    let mut unknown = Vec::new();
    let steps = manifest
        .steps
        .into_iter()
        .enumerate()
        .map(|(index, entry)| {
            Reader { directory, index, layout: manifest.layout }.step(entry, &mut unknown)
        })
        .collect::<Result<_>>()?;
    Ok(Capture {
        path: directory.to_owned(),
        provenance: Some(manifest.provenance),
        complete: manifest.complete,
        steps,
        unknown,
    })
}

/// The steps that an interrupted writer has completed. It may have died in the middle of a line.
fn journal(directory: &Path) -> Result<Vec<manifest::Step>> {
    let path = directory.join(JOURNAL);
    if !path.try_exists().map_err(Error::read(&path))? {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(&path).map_err(Error::read(&path))?;
    text.split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
        .map(|line| {
            serde_json::from_str(line)
                .map_err(|source| Error::Manifest { path: path.clone(), source })
        })
        .collect()
}

struct Reader<'a> {
    directory: &'a Path,
    index: usize,
    layout: Layout,
}

impl Reader<'_> {
    fn step(&self, entry: manifest::Step, unknown: &mut Vec<String>) -> Result<CaptureStep> {
        let tokens = entry.token_ids.len();
        if entry.positions.len() != tokens {
            let expected = format!("one position for each of {tokens} tokens");
            return Err(self.wrong("positions", expected, entry.positions.len()));
        }
        if let Some(texts) = &entry.tokens_text
            && texts.len() != tokens
        {
            let expected = format!("one text for each of {tokens} tokens");
            return Err(self.wrong("tokens_text", expected, texts.len()));
        }
        let mut files = Files::open(self, &entry.file)?;
        let mut tensors = BTreeMap::new();
        let positions: HashSet<usize> = entry.positions.iter().copied().collect();
        for tensor in entry.tensors {
            let name = tensor.name.clone();
            // A row of which the token is not known could be compared with one of another token.
            if let Some(position) = tensor.positions.iter().find(|p| !positions.contains(p)) {
                let what = format!("positions of tensor `{name}`");
                return Err(self.wrong(&what, "those of the step's tokens", position));
            }
            let Ok(site) = name.parse::<Site>() else {
                files.discard(&name);
                unknown.push(format!("`{name}` of step {} names no known stage", self.index));
                continue;
            };
            let info = self.tensor(site, tensor, &mut files)?;
            if tensors.insert(site, info).is_some() {
                return Err(self.wrong(&format!("tensor `{name}`"), "one entry", "two"));
            }
        }
        files.finish()?;
        Ok(CaptureStep {
            phase: Some(entry.phase),
            chunk: entry.chunk,
            slot: entry.slot,
            token_ids: Some(entry.token_ids),
            positions: Some(entry.positions),
            tokens_text: entry.tokens_text,
            tensors,
        })
    }

    fn tensor(&self, site: Site, entry: manifest::Tensor, files: &mut Files) -> Result<TensorInfo> {
        let name = &entry.name;
        let wrong = |what: &str, expected: String, found: String| {
            Err(self.wrong(&format!("{what} of tensor `{name}`"), expected, found))
        };
        let stage = site.stage.name();
        if entry.stage.parse() != Ok(site.stage) || entry.layer != site.layer {
            let found = format!("`{}` of layer {:?}", entry.stage, entry.layer);
            return wrong("stage and layer", format!("`{stage}` of layer {:?}", site.layer), found);
        }
        let axes = site.stage.axes();
        if entry.axes != axes.names() {
            return wrong("axes", format!("{:?}", axes.names()), format!("{:?}", entry.axes));
        }
        if entry.shape.len() != axes.names().len() {
            let expected = format!("{} dimensions", axes.names().len());
            return wrong("shape", expected, format!("{:?}", entry.shape));
        }
        let rows = entry.shape[axes.row_axis()];
        if entry.positions.len() != rows {
            let expected = format!("one for each of {rows} rows");
            return wrong("positions", expected, entry.positions.len().to_string());
        }
        let Some(dtype) = plain_dtype(&entry.dtype) else {
            let expected = format!("one of {}", PLAIN_NAMES);
            return wrong("dtype", expected, entry.dtype);
        };
        let hash = match entry.blake3.as_deref().map(blake3::Hash::from_hex) {
            Some(Err(error)) => return wrong("blake3", "64 hex digits".into(), error.to_string()),
            Some(Ok(hash)) => Some(hash),
            None => None,
        };
        let found = files.take(self, site, name)?;
        let bytes = checked_bytes(dtype, &entry.shape);
        let shape_fits = match files {
            Files::Safetensors { .. } => found.shape == entry.shape,
            Files::Aprt { .. } => bytes == Some(found.bytes.end - found.bytes.start),
        };
        if found.dtype != dtype || !shape_fits {
            let expected = format!("{dtype} {:?} as the manifest says", entry.shape);
            let found = format!("{} {:?} in the file", found.dtype, found.shape);
            return wrong("type and shape", expected, found);
        }
        Ok(TensorInfo {
            name: entry.name,
            shape: entry.shape,
            axes,
            dtype,
            positions: Some(entry.positions),
            blake3: hash,
            source: Source::File { path: files.path(site), range: found.bytes },
        })
    }

    fn wrong(&self, what: &str, expected: impl ToString, found: impl ToString) -> Error {
        let what = format!("step {}: {what}", self.index);
        Error::malformed(&self.directory.join(MANIFEST), what, expected, found)
    }
}

/// The files of a step.
enum Files {
    Safetensors { path: Arc<Path>, found: HashMap<String, Found> },
    Aprt { directory: Arc<Path> },
}

impl Files {
    fn open(reader: &Reader<'_>, name: &str) -> Result<Self> {
        let mut components = Path::new(name).components();
        let plain = match (components.next(), components.next()) {
            (Some(Component::Normal(_)), None) => true,
            (Some(Component::CurDir), None) => reader.layout == Layout::Aprt,
            _ => false,
        };
        if !plain {
            return Err(reader.wrong("file", "a name within the capture", format!("`{name}`")));
        }
        let path: Arc<Path> = reader.directory.join(name).into();
        Ok(match reader.layout {
            Layout::Safetensors => {
                let found = safetensors::read(&path)?.into_iter();
                Self::Safetensors { found: found.map(|f| (f.name.clone(), f)).collect(), path }
            }
            Layout::Aprt => Self::Aprt { directory: path },
        })
    }

    /// The tensor called `name`. An APRT file has no shape but a number of values.
    fn take(&mut self, reader: &Reader<'_>, site: Site, name: &str) -> Result<Found> {
        match self {
            Self::Safetensors { path, found } => found.remove(name).ok_or_else(|| {
                Error::malformed(path, format!("tensor `{name}`"), "in the file", "no such tensor")
            }),
            Self::Aprt { directory } => {
                let path = directory.join(aprt::tree_path(site));
                let (layer, count) = aprt::read_header(&path)?;
                if layer != site.layer {
                    let (expected, found) = (site.layer, layer);
                    let expected = format!("layer {expected:?}");
                    return Err(reader.wrong(&format!("`{name}`"), expected, format!("{found:?}")));
                }
                let start = aprt::HEADER_BYTES as u64;
                Ok(Found {
                    name: name.to_owned(),
                    dtype: apr_tensor::DType::F32,
                    shape: vec![count],
                    bytes: start..start + 4 * count as u64,
                })
            }
        }
    }

    /// Forgets a tensor that is not going to be read.
    fn discard(&mut self, name: &str) {
        if let Self::Safetensors { found, .. } = self {
            found.remove(name);
        }
    }

    fn path(&self, site: Site) -> Arc<Path> {
        match self {
            Self::Safetensors { path, .. } => path.clone(),
            Self::Aprt { directory } => directory.join(aprt::tree_path(site)).into(),
        }
    }

    /// A tensor that the manifest does not mention has no meaning; a capture that holds one was tampered with.
    fn finish(self) -> Result<()> {
        match self {
            Self::Safetensors { path, found } => match found.keys().min() {
                Some(name) => {
                    let what = format!("tensor `{name}`");
                    Err(Error::malformed(&path, what, "mentioned in the manifest", "not mentioned"))
                }
                None => Ok(()),
            },
            Self::Aprt { .. } => Ok(()),
        }
    }
}
