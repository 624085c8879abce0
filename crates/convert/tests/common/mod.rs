//! Conversions of the fixtures.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::path::{Path, PathBuf};

use apr_convert::{Options, Output, Plan, Recipe, Result, Settings, Target, Written, convert};
use apr_format::{Checkpoint, Draft, gguf, write::Body};
use apr_tensor::{DType, Stored};

/// Hugging Face directories, one for each architecture and way to be one.
pub(crate) const MODELS: [&str; 6] =
    ["pycoder-3m", "tiny/llama", "tiny/llama3-rope", "tiny/qwen2", "tiny/qwen3", "tiny/qwen3-moe"];

pub(crate) fn fixture(name: &str) -> Checkpoint {
    open(&apr_testkit::fixture(name))
}

#[track_caller]
pub(crate) fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(path).unwrap_or_else(|error| panic!("{error}"))
}

/// Writes `source` to `path`, in the container that its name ends in.
pub(crate) fn try_convert(source: &Checkpoint, path: &Path, options: Options) -> Result<Written> {
    let extension = path.extension().and_then(|extension| extension.to_str());
    let target = extension.and_then(|e| e.parse().ok()).unwrap_or(Target::Safetensors);
    let output = Output::new(path, target, source, false)?;
    let options = Options { weights_alone: output.is_weights_alone(), ..options };
    let plan = Plan::new(source, target, options)?;
    convert(&plan, &output, &Settings::default(), &mut |_, _| ())
}

/// The same, and opens it.
#[track_caller]
pub(crate) fn converted(source: &Checkpoint, path: PathBuf, recipe: Option<Recipe>) -> Checkpoint {
    let options = Options { recipe, ..Options::default() };
    let written = try_convert(source, &path, options);
    written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    open(&path)
}

pub(crate) fn vector(values: &[f32]) -> Stored {
    matrix(values, [values.len()])
}

pub(crate) fn matrix<const N: usize>(values: &[f32], shape: [usize; N]) -> Stored {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Stored::new(DType::F32, shape.into(), bytes.into()).unwrap()
}

/// An importance matrix as `llama-imatrix` writes it: name, counts, sums.
pub(crate) fn imatrix(path: &Path, entries: &[(&str, Vec<f32>, Vec<f32>)]) {
    let mut draft = Draft::default();
    draft.metadata.insert("general.type", "imatrix");
    for (name, counts, sums) in entries {
        let (rows, cols) = (counts.len(), sums.len() / counts.len().max(1));
        draft.tensors.push((format!("{name}.in_sum2"), matrix(sums, [rows, cols])));
        draft.tensors.push((format!("{name}.counts"), matrix(counts, [rows, 1])));
    }
    save_gguf(&draft, path);
}

pub(crate) fn save_gguf(draft: &Draft, path: &Path) {
    let mut writer = gguf::Writer::new();
    for (key, value) in draft.metadata.iter() {
        writer.set(key, value.clone());
    }
    for (name, stored) in &draft.tensors {
        writer.tensor(name, stored.dtype(), stored.shape().clone()).unwrap();
    }
    let mut body: Body<Vec<u8>> = writer.begin(Vec::new()).unwrap();
    for (name, stored) in &draft.tensors {
        body.tensor(name, stored.bytes()).unwrap();
    }
    std::fs::write(path, body.finish().unwrap()).unwrap();
}
