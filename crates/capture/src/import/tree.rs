//! Bare APRT trees: `layer-N/STAGE.bin`, and `STAGE.bin` for stages of the whole model.

use std::{collections::BTreeMap, path::Path};

use apr_model::{Axes, Site, Stage};
use apr_tensor::DType;

use super::sorted_entries;
use crate::{
    CaptureStep, Dims, Error, Result, aprt, capture::TensorInfo, source::Source,
    tensor::checked_bytes,
};

struct Leaf {
    site: Site,
    path: Box<Path>,
    count: usize,
}

/// The tree in `directory`. The files hold numbers of values and no shapes; those come from `dims`.
pub(super) fn step(
    directory: &Path,
    dims: Option<&Dims>,
    unknown: &mut Vec<String>,
) -> Result<CaptureStep> {
    let leaves = leaves(directory, unknown)?;
    let Some(dims) = dims else {
        return match leaves.is_empty() {
            true => Ok(CaptureStep::default()),
            false => Err(Error::NeedsDims { path: directory.to_owned() }),
        };
    };
    let rows = |leaf: &Leaf| {
        let width: usize =
            dims.shape(leaf.site.stage, 1, 1).iter().fold(1, |n, &d| n.saturating_mul(d));
        match leaf.count {
            0 => None,
            count => count.is_multiple_of(width).then(|| count / width),
        }
    };
    let has_keys = |leaf: &Leaf| leaf.site.stage.axes() == Axes::HeadRowKey;
    // Scores have two unknown dimensions; the other stages tell one of them.
    let step_rows = leaves
        .iter()
        .filter(|leaf| !has_keys(leaf) && leaf.site.stage != Stage::LmHead)
        .filter_map(rows)
        .max();
    let mut tensors = BTreeMap::new();
    for leaf in &leaves {
        let shape = match has_keys(leaf) {
            false => rows(leaf).map(|rows| dims.shape(leaf.site.stage, rows, 1)),
            true => rows_and_keys(leaf.count, dims.num_attention_heads, step_rows)
                .map(|(rows, keys)| dims.shape(leaf.site.stage, rows, keys)),
        };
        let Some(shape) = shape.filter(|shape| checked_bytes(DType::F32, shape).is_some()) else {
            let expected = format!("a multiple of {:?}", dims.shape(leaf.site.stage, 1, 1));
            return Err(Error::malformed(&leaf.path, "the number of values", expected, leaf.count));
        };
        let start = aprt::HEADER_BYTES as u64;
        let info = TensorInfo {
            name: leaf.site.to_string(),
            shape,
            axes: leaf.site.stage.axes(),
            dtype: DType::F32,
            positions: None,
            blake3: None,
            source: Source::File {
                path: leaf.path.clone().into(),
                range: start..start + 4 * leaf.count as u64,
            },
        };
        if tensors.insert(leaf.site, info).is_some() {
            let what = format!("the files for {}", leaf.site);
            return Err(Error::malformed(&leaf.path, what, "one", "two"));
        }
    }
    Ok(CaptureStep { tensors, ..CaptureStep::default() })
}

/// The rows and keys of `count` scores. Without another stage, a whole prompt is assumed: as many keys as rows.
fn rows_and_keys(count: usize, heads: usize, step_rows: Option<usize>) -> Option<(usize, usize)> {
    let per_head = count.checked_div(heads).filter(|n| n * heads == count && count > 0)?;
    let rows = step_rows.unwrap_or_else(|| per_head.isqrt());
    let keys = per_head.checked_div(rows)?;
    (rows * keys == per_head && keys >= rows).then_some((rows, keys))
}

fn leaves(directory: &Path, unknown: &mut Vec<String>) -> Result<Vec<Leaf>> {
    let mut leaves = Vec::new();
    for path in sorted_entries(directory)? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
        let layer = name.strip_prefix("layer-").and_then(|n| n.parse::<u32>().ok());
        match layer {
            Some(layer) if path.is_dir() => {
                for path in sorted_entries(&path)? {
                    leaves.extend(leaf(&path, Some(layer), unknown)?);
                }
            }
            _ => leaves.extend(leaf(&path, None, unknown)?),
        }
    }
    Ok(leaves)
}

/// The file at `path`, if it is of the tree: `layer` is that of its directory.
fn leaf(path: &Path, layer: Option<u32>, unknown: &mut Vec<String>) -> Result<Option<Leaf>> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
    let Some(stage) = name.strip_suffix(".bin") else { return Ok(None) };
    let site = match (stage.parse::<Stage>(), layer) {
        // Established trees keep the embedding among the stages of layer 0.
        (Ok(Stage::Embedding), None | Some(0)) => Site::whole(Stage::Embedding),
        (Ok(stage), layer) if stage.is_whole_model() == layer.is_none() => Site { layer, stage },
        _ => {
            unknown.push(format!("`{}` names no known stage", path.display()));
            return Ok(None);
        }
    };
    let (found, count) = aprt::read_header(path)?;
    if found != layer && found != site.layer {
        let expected = layer.map_or("none".to_owned(), |layer| layer.to_string());
        let found = found.map_or("none".to_owned(), |layer| layer.to_string());
        return Err(Error::malformed(path, "the layer", expected, found));
    }
    Ok(Some(Leaf { site, path: path.into(), count }))
}
