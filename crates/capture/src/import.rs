//! Captures without a manifest: APRT trees, `.npy` directories, `.npz`, foreign safetensors.
//!
//! They do not say which tokens they are of. Rows then have no positions, and whoever compares them has to
//! align them on the last row and say so.

mod tree;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use apr_model::{Axes, Site};
use apr_tensor::DType;

use crate::{
    Capture, CaptureStep, Dims, Error, OpenOptions, Result, capture::TensorInfo, names::Meaning,
    npy, npz, safetensors, source::Source,
};

/// An array of a foreign file.
#[derive(Clone, Debug)]
pub(crate) struct Array {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) source: Source,
}

/// Opens a single file.
pub(crate) fn file(path: &Path, options: &OpenOptions) -> Result<Capture> {
    let shared: Arc<Path> = path.into();
    let arrays: Vec<Array> = match path.extension().and_then(|e| e.to_str()) {
        Some("npz") => npz::read(path)?
            .into_iter()
            .map(|(entry, name, npy)| Array {
                name,
                dtype: npy.dtype,
                shape: npy.shape,
                source: Source::Zip { archive: shared.clone(), entry, range: npy.bytes },
            })
            .collect(),
        Some("safetensors") => safetensors::read(path)?
            .into_iter()
            .map(|found| Array {
                name: found.name,
                dtype: found.dtype,
                shape: found.shape,
                source: Source::File { path: shared.clone(), range: found.bytes },
            })
            .collect(),
        _ => {
            fs::metadata(path).map_err(Error::read(path))?;
            let problem = "expected a capture's directory, a .npz or a .safetensors file";
            return Err(Error::NotACapture { path: path.to_owned(), problem });
        }
    };
    let mut unknown = Vec::new();
    let step = step(arrays, options, &mut unknown)?;
    capture(path, vec![step], unknown)
}

/// Opens a directory: the files in it are one step, those in its `step-NNNN` directories one step each.
pub(crate) fn directory(path: &Path, options: &OpenOptions) -> Result<Capture> {
    let names = sorted_entries(path)?;
    let is_step = |path: &&PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        let digits = name.and_then(|name| name.strip_prefix("step-"));
        path.is_dir()
            && digits.is_some_and(|d| !d.is_empty() && d.bytes().all(|b| b.is_ascii_digit()))
    };
    let steps: Vec<&PathBuf> = names.iter().filter(is_step).collect();
    let here = path.to_owned();
    let mut unknown = Vec::new();
    let steps = if steps.is_empty() {
        vec![&here]
    } else {
        let beside = names.iter().filter(|path| has_extension(path, "npy") || is_of_tree(path));
        unknown.extend(beside.map(|path| format!("`{}` is in no step", path.display())));
        steps
    };

    let steps = steps.into_iter().map(|directory| step_in(directory, options, &mut unknown));
    let steps = steps.collect::<Result<_>>()?;
    capture(path, steps, unknown)
}

/// The step whose `.npy` files or, without any, whose APRT tree is in `directory`.
fn step_in(
    directory: &Path,
    options: &OpenOptions,
    unknown: &mut Vec<String>,
) -> Result<CaptureStep> {
    let arrays = npy_files(directory)?;
    if arrays.is_empty() {
        return tree::step(directory, options.dims.as_ref(), unknown);
    }
    for path in sorted_entries(directory)?.iter().filter(|path| is_of_tree(path)) {
        unknown.push(format!("`{}` is of an APRT tree among .npy files", path.display()));
    }
    step(arrays, options, unknown)
}

fn capture(path: &Path, steps: Vec<CaptureStep>, unknown: Vec<String>) -> Result<Capture> {
    if steps.iter().all(|step| step.tensors.is_empty()) {
        let problem = if unknown.is_empty() {
            "no manifest.json, no APRT tree (layer-N/STAGE.bin) and no .npy file in it"
        } else {
            "no array in it has a name that says a stage; write a map of names (--map)"
        };
        return Err(Error::NotACapture { path: path.to_owned(), problem });
    }
    Ok(Capture { path: path.to_owned(), provenance: None, complete: true, steps, unknown })
}

/// Whether an entry of a directory belongs to an APRT tree there.
fn is_of_tree(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    has_extension(path, "bin") || (name.starts_with("layer-") && path.is_dir())
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

/// The entries of a directory, numbers in names in their order.
fn sorted_entries(path: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = fs::read_dir(path)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, _>>())
        .map_err(Error::read(path))?;
    entries.sort_by_key(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (name.len(), name)
    });
    Ok(entries)
}

fn npy_files(directory: &Path) -> Result<Vec<Array>> {
    let mut arrays = Vec::new();
    for path in sorted_entries(directory)? {
        let Some(name) = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_suffix(".npy"))
        else {
            continue;
        };
        let header = npy::read(&path)?;
        arrays.push(Array {
            name: name.to_owned(),
            dtype: header.dtype,
            shape: header.shape,
            source: Source::File { path: path.into(), range: header.bytes },
        });
    }
    Ok(arrays)
}

/// Finds out which site each array is.
fn step(
    arrays: Vec<Array>,
    options: &OpenOptions,
    unknown: &mut Vec<String>,
) -> Result<CaptureStep> {
    let dims = options.dims.as_ref();
    let mut tensors = BTreeMap::new();
    let mut parts: BTreeMap<Site, [Option<Array>; 3]> = BTreeMap::new();
    for array in arrays {
        let name = array.name.clone();
        match options.names.resolve(&name, dims) {
            None => unknown.push(format!("`{name}` names no known stage")),
            Some(Meaning::NeedsDims) => unknown.push(format!(
                "`{name}` is before or after the bias, depending on the model: give its dimensions"
            )),
            Some(Meaning::Part(site, part)) => {
                let slot = &mut parts.entry(site).or_default()[part];
                if let Some(other) = slot.replace(array) {
                    return Err(twice(site, &other));
                }
            }
            Some(Meaning::Whole(site)) => insert(&mut tensors, site, array, dims)?,
        }
    }
    for (site, parts) in parts {
        match parts {
            [Some(q), Some(k), Some(v)] => {
                insert(&mut tensors, site, columns([q, k, v])?, dims)?;
            }
            some => {
                let names = some.iter().flatten().map(|part| part.name.as_str());
                let names = names.collect::<Vec<_>>().join("`, `");
                unknown.push(format!("`{names}`: {site} needs q, k and v together"));
            }
        }
    }
    Ok(CaptureStep { tensors, ..CaptureStep::default() })
}

fn insert(
    tensors: &mut BTreeMap<Site, TensorInfo>,
    site: Site,
    array: Array,
    dims: Option<&Dims>,
) -> Result<()> {
    let (shape, axes) = interpret(site, &array, dims)?;
    let Array { name, dtype, source, .. } = array;
    let info = TensorInfo { name, shape, axes, dtype, positions: None, blake3: None, source };
    match tensors.insert(site, info) {
        None => Ok(()),
        Some(TensorInfo { name, source, .. }) => {
            let what = format!("the arrays for {site}");
            Err(Error::malformed(source.path(), what, "one", format!("`{name}` and another")))
        }
    }
}

fn twice(site: Site, array: &Array) -> Error {
    let what = format!("the arrays for {site}");
    let found = format!("`{}` and another for the same columns", array.name);
    Error::malformed(array.source.path(), what, "one for each part", found)
}

/// The shape of `array` as one of `site`'s: without a batch dimension of 1, a vector being one row, heads apart
/// where dimensions are known.
fn interpret(site: Site, array: &Array, dims: Option<&Dims>) -> Result<(Vec<usize>, Axes)> {
    let axes = site.stage.axes();
    let rank = axes.names().len();
    let mut shape = array.shape.clone();
    while shape.len() > 2 && shape.len() > rank && shape[0] == 1 {
        shape.remove(0);
    }
    if axes == Axes::RowHeadChannel
        && let Some(dims) = dims
        && shape.len() == 2
        && let [_, heads, head_dim] = dims.shape(site.stage, 1, 1)[..]
        && heads.checked_mul(head_dim) == Some(shape[1])
    {
        shape = vec![shape[0], heads, head_dim];
    }
    let flat = match axes {
        Axes::RowHeadChannel if shape.len() == 2 => Axes::RowChannel,
        _ => axes,
    };
    if axes == Axes::RowChannel && shape.len() == 1 {
        shape.insert(0, 1);
    }
    let wrong = |expected: String| {
        let what = format!("the shape of `{}`", array.name);
        Err(Error::malformed(array.source.path(), what, expected, format!("{:?}", array.shape)))
    };
    if shape.len() != flat.names().len() {
        return wrong(format!("the dimensions {:?} of {site}", axes.names()));
    }
    // Rows of nothing take no bytes, so a file of any size could claim any number of them.
    if shape[flat.row_axis()] > 0 && shape.contains(&0) {
        return wrong("at least one value in a row".to_owned());
    }
    Ok((shape, flat))
}

/// Query, key and value side by side.
fn columns(parts: [Array; 3]) -> Result<Array> {
    let rows_and_width = |array: &Array| {
        let (&width, outer) = array.shape.split_last()?;
        Some((outer.iter().product::<usize>(), width))
    };
    let [q, ..] = &parts;
    let found = || parts.iter().map(|p| format!("{} {:?}", p.dtype, p.shape)).collect::<Vec<_>>();
    let wrong = || {
        let what = format!("`{}` and the other two parts", q.name);
        let expected = "the same type and number of rows";
        Error::malformed(q.source.path(), what, expected, found().join(", "))
    };
    let shapes: Vec<(usize, usize)> =
        parts.iter().map(rows_and_width).collect::<Option<_>>().ok_or_else(wrong)?;
    let (rows, dtype) = (shapes[0].0, q.dtype);
    if shapes.iter().any(|shape| shape.0 != rows) || parts.iter().any(|part| part.dtype != dtype) {
        return Err(wrong());
    }
    let width = shapes.iter().try_fold(0usize, |sum, shape| sum.checked_add(shape.1));
    let width = width.ok_or_else(wrong)?;
    let name = parts.iter().map(|part| part.name.as_str()).collect::<Vec<_>>().join("+");
    let parts = parts
        .into_iter()
        .zip(shapes)
        .map(|(part, (_, width))| (part.source, width * dtype.block_bytes()))
        .collect();
    Ok(Array { name, dtype, shape: vec![rows, width], source: Source::Columns { parts, rows } })
}
