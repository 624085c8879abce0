//! From a plan to files.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, Write},
    ops::Range,
    path::Path,
};

use apr_format::{
    apr::Apr,
    gguf::Gguf,
    safetensors::Safetensors,
    write::{Format, Writer},
};
use apr_tensor::DType;
use serde_json::json;

use crate::{
    Change, Output, Plan, Planned, Result, Target,
    output::{Complete, io_error, sync_directory},
    stream::stream,
    verify::verify,
};

/// Bytes that are collected before the system gets them.
const BUFFER: usize = 1 << 20;

/// The names of Hugging Face's files of weights.
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// How to write.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Bytes of tensors above which a Hugging Face directory gets another file of weights.
    pub shard_size: u64,
    /// Whether to read all again and compare it with the source before it gets its name.
    pub verify: bool,
}

impl Default for Settings {
    fn default() -> Self {
        // As Hugging Face's own writer.
        Self { shard_size: 5_000_000_000, verify: true }
    }
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The target is written.
    Writing,
    /// It is read again and compared.
    Verifying,
}

/// What has been done.
#[derive(Clone, Debug)]
pub struct Written {
    /// Bytes of all files.
    pub bytes: u64,
    /// What writing in each type has changed.
    pub changes: BTreeMap<DType, Change>,
}

/// Writes `plan` to `output`. `progress` is told of bytes of the source as they are done in each phase.
pub fn convert(
    plan: &Plan,
    output: &Output,
    settings: &Settings,
    progress: &mut dyn FnMut(Phase, u64),
) -> Result<Written> {
    let mut changes: BTreeMap<DType, Change> = BTreeMap::new();
    let mut run = Run::new(plan, settings, output)?;
    let complete = run.all(&mut |tensor, put| {
        let change = stream(tensor, plan.importance.as_ref(), &mut |piece, of_source| {
            put(piece)?;
            progress(Phase::Writing, of_source);
            Ok(())
        })?;
        if tensor.is_recoded() {
            changes.entry(tensor.dtype).or_default().add(change);
        }
        Ok(())
    })?;
    let bytes = run.bytes;
    if settings.verify {
        verify(plan, complete.path(), &mut |bytes| progress(Phase::Verifying, bytes))?;
    }
    output.publish(complete)?;
    Ok(Written { bytes, changes })
}

/// Writes `plan` to `output` with weights of the caller's in place of the source's, and returns the bytes of all files.
///
/// `weights` is asked for the tensors in the order of the file, and hands over all bytes of each. Nothing is verified: there is
/// nothing to compare with.
pub fn fill(
    plan: &Plan,
    output: &Output,
    settings: &Settings,
    weights: &mut Weights<'_>,
) -> Result<u64> {
    let mut run = Run::new(plan, settings, output)?;
    let complete = run.all(weights)?;
    output.publish(complete)?;
    Ok(run.bytes)
}

/// Who has the bytes of each tensor, and hands them over piece by piece.
pub type Weights<'a> = dyn FnMut(&Planned, &mut Put<'_>) -> Result<()> + 'a;

/// Who takes the next bytes of a tensor.
pub type Put<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

struct Run<'a> {
    plan: &'a Plan,
    settings: &'a Settings,
    output: &'a Output,
    bytes: u64,
}

impl<'a> Run<'a> {
    fn new(plan: &'a Plan, settings: &'a Settings, output: &'a Output) -> Result<Self> {
        output.check_room(plan)?;
        Ok(Self { plan, settings, output, bytes: 0 })
    }

    /// Writes everything under a temporary name.
    fn all(&mut self, weights: &mut Weights<'_>) -> Result<Complete> {
        match self.plan.target {
            Target::Gguf => self.file::<Gguf>(weights),
            Target::Apr => self.file::<Apr>(weights),
            Target::Safetensors if self.output.is_directory() => self.directory(weights),
            Target::Safetensors => self.file::<Safetensors>(weights),
        }
    }

    /// Writes everything into one file.
    fn file<F: Format>(&mut self, weights: &mut Weights<'_>) -> Result<Complete> {
        let file = self.output.temporary_file()?;
        self.tensors::<F>(file.as_file(), self.output.path(), &self.plan.tensors, weights)?;
        Ok(Complete::File(file))
    }

    /// Writes files of weights of a bounded size, with what else is in a Hugging Face directory.
    fn directory(&mut self, weights: &mut Weights<'_>) -> Result<Complete> {
        let directory = self.output.temporary_directory()?;
        let shards = shards(&self.plan.tensors, self.settings.shard_size);
        let mut homes = serde_json::Map::new();
        for (index, range) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => SINGLE.to_owned(),
                count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            let tensors = &self.plan.tensors[range.clone()];
            let path = directory.path().join(&name);
            let file = File::create_new(&path).map_err(io_error(&path))?;
            self.tensors::<Safetensors>(&file, &path, tensors, weights)?;
            homes.extend(tensors.iter().map(|tensor| (tensor.name.clone(), json!(name))));
        }
        if shards.len() > 1 {
            let metadata = json!({ "total_size": self.plan.bytes() });
            let index = json!({ "metadata": metadata, "weight_map": homes });
            let text = serde_json::to_vec_pretty(&index).expect("JSON of texts and numbers");
            self.companion(&directory.path().join(INDEX), &text)?;
        }
        for (name, content) in &self.plan.metadata.files {
            self.companion(&directory.path().join(name), content)?;
        }
        sync_directory(directory.path())?;
        Ok(Complete::Directory(directory))
    }

    fn companion(&mut self, path: &Path, content: &[u8]) -> Result<()> {
        let mut file = File::create_new(path).map_err(io_error(path))?;
        file.write_all(content).and_then(|()| file.sync_all()).map_err(io_error(path))?;
        self.bytes += content.len() as u64;
        Ok(())
    }

    /// Writes metadata and `tensors` to `file`, which will be called `path`.
    fn tensors<F: Format>(
        &mut self,
        file: &File,
        path: &Path,
        tensors: &[Planned],
        weights: &mut Weights<'_>,
    ) -> Result<()> {
        let mut writer = Writer::<F>::new();
        for (key, value) in self.plan.metadata.map.iter() {
            writer.set(key, value.clone());
        }
        for tensor in tensors {
            writer.tensor(&tensor.name, tensor.dtype, tensor.shape.clone())?;
        }
        let mut body = writer.begin(BufWriter::with_capacity(BUFFER, file))?;
        let by_name: BTreeMap<_, _> = tensors.iter().map(|t| (t.name.as_str(), t)).collect();
        while let Some((next, _)) = body.next_tensor() {
            let tensor = by_name[next];
            weights(tensor, &mut |piece| Ok(body.part(&tensor.name, piece)?))?;
            if body.next_tensor().is_some_and(|(next, _)| next == tensor.name) {
                // Not all of it came, which `finish` says.
                break;
            }
        }
        body.finish()?;
        file.sync_all().map_err(io_error(path))?;
        self.bytes += file.metadata().map_err(io_error(path))?.len();
        Ok(())
    }
}

/// Which tensors are in which file: as many as `size` has room for, and at least one.
fn shards(tensors: &[Planned], size: u64) -> Vec<Range<usize>> {
    let mut shards: Vec<Range<usize>> = Vec::new();
    let mut filled = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.bytes();
        match shards.last_mut() {
            Some(shard) if filled + bytes <= size => shard.end = index + 1,
            _ => {
                shards.push(index..index + 1);
                filled = 0;
            }
        }
        filled += bytes;
    }
    shards
}
