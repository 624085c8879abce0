//! A capture in memory, to be compared or damaged and written back.

use std::{fs, path::Path};

use apr_capture::{Capture, Manifest, manifest};
use apr_format::safetensors;
use apr_model::Site;
use apr_tensor::{DType, Shape};

use crate::{Error, Result};

/// A whole capture.
#[derive(Clone, Debug)]
pub(crate) struct Recording {
    pub(crate) manifest: Manifest,
    /// The values of each step, parallel to the tensors of the manifest's step.
    pub(crate) steps: Vec<Vec<Vec<f64>>>,
}

impl Recording {
    /// Reads the capture in `directory`.
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        let manifest = Manifest::read(&directory.join(manifest::MANIFEST))?;
        let capture = Capture::open(directory)?;
        let mut steps = Vec::new();
        for (index, step) in manifest.steps.iter().enumerate() {
            let mut values = Vec::new();
            for tensor in &step.tensors {
                let site = tensor.name.parse().expect("the recorder names sites");
                values.push(capture.tensor(index, site)?.to_f64());
            }
            steps.push(values);
        }
        Ok(Self { manifest, steps })
    }

    /// Puts this in the place of the capture in `directory`, with all its hashes.
    pub(crate) fn write(mut self, directory: &Path) -> Result<()> {
        for (step, values) in self.manifest.steps.iter_mut().zip(&self.steps) {
            let mut writer = safetensors::Writer::new();
            for tensor in &step.tensors {
                let shape = Shape::new(tensor.shape.clone());
                writer.tensor(&tensor.name, dtype_of(tensor), shape)?;
            }
            let mut body = writer.begin(Vec::new())?;
            for (tensor, values) in step.tensors.iter_mut().zip(values) {
                let hash = blake3::hash(&bytes_of(tensor, values));
                tensor.blake3 = Some(hash.to_hex().to_string());
            }
            while let Some((name, _)) = body.next_tensor() {
                let name = name.to_owned();
                let index = step.tensors.iter().position(|tensor| tensor.name == name);
                let index = index.expect("declared from these tensors");
                body.tensor(&name, &bytes_of(&step.tensors[index], &values[index]))?;
            }
            let path = directory.join(&step.file);
            fs::write(&path, body.finish()?).map_err(|reason| Error::Io { path, reason })?;
        }
        let path = directory.join(manifest::MANIFEST);
        let json = serde_json::to_vec(&self.manifest).expect("a manifest is plain data");
        fs::write(&path, json).map_err(|reason| Error::Io { path, reason })
    }

    /// Where step `step` keeps `site`.
    pub(crate) fn index(&self, step: usize, site: Site) -> Option<usize> {
        let name = site.to_string();
        self.manifest.steps.get(step)?.tensors.iter().position(|tensor| tensor.name == name)
    }

    /// What the manifest says of `site`, and its values.
    pub(crate) fn get(&self, step: usize, site: Site) -> Option<(&manifest::Tensor, &[f64])> {
        let index = self.index(step, site)?;
        Some((&self.manifest.steps[step].tensors[index], &self.steps[step][index]))
    }

    /// The same, to be changed.
    pub(crate) fn get_mut(
        &mut self,
        step: usize,
        site: Site,
    ) -> Option<(&mut manifest::Tensor, &mut Vec<f64>)> {
        let index = self.index(step, site)?;
        Some((&mut self.manifest.steps[step].tensors[index], &mut self.steps[step][index]))
    }

    /// The sites that are in the first step and in that of `other`, in the order of computation.
    pub(crate) fn common_sites(&self, other: &Self) -> Vec<Site> {
        let tensors = self.manifest.steps.first().map(|step| &step.tensors[..]).unwrap_or_default();
        let sites = tensors.iter().filter_map(|tensor| tensor.name.parse().ok());
        sites.filter(|&site| other.index(0, site).is_some()).collect()
    }

    /// All values of `site`, step after step.
    pub(crate) fn values(&self, site: Site) -> Vec<f64> {
        let steps = 0..self.steps.len();
        steps.filter_map(|step| self.get(step, site)).flat_map(|(_, v)| v).copied().collect()
    }
}

fn dtype_of(tensor: &manifest::Tensor) -> DType {
    let known = [DType::F64, DType::I32].into_iter().find(|dtype| dtype.name() == tensor.dtype);
    known.unwrap_or(DType::F32)
}

/// `values` in the tensor's type.
fn bytes_of(tensor: &manifest::Tensor, values: &[f64]) -> Vec<u8> {
    match dtype_of(tensor) {
        DType::F64 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::I32 => values.iter().flat_map(|&x| (x as i32).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect(),
    }
}
