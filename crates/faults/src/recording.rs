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
    pub(crate) steps: Vec<Vec<Vec<f32>>>,
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
                values.push(capture.tensor(index, site)?.to_f32());
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
                writer.tensor(&tensor.name, DType::F32, Shape::new(tensor.shape.clone()))?;
            }
            let mut body = writer.begin(Vec::new())?;
            let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect();
            for (tensor, values) in step.tensors.iter_mut().zip(values) {
                let bytes: Vec<u8> = bytes(values);
                tensor.blake3 = Some(blake3::hash(&bytes).to_hex().to_string());
            }
            while let Some((name, _)) = body.next_tensor() {
                let name = name.to_owned();
                let index = step.tensors.iter().position(|tensor| tensor.name == name);
                let values = &values[index.expect("declared from these tensors")];
                let bytes: Vec<u8> = bytes(values);
                body.tensor(&name, &bytes)?;
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
    pub(crate) fn get(&self, step: usize, site: Site) -> Option<(&manifest::Tensor, &[f32])> {
        let index = self.index(step, site)?;
        Some((&self.manifest.steps[step].tensors[index], &self.steps[step][index]))
    }

    /// The same, to be changed.
    pub(crate) fn get_mut(
        &mut self,
        step: usize,
        site: Site,
    ) -> Option<(&mut manifest::Tensor, &mut Vec<f32>)> {
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
    pub(crate) fn values(&self, site: Site) -> Vec<f32> {
        let steps = 0..self.steps.len();
        steps.filter_map(|step| self.get(step, site)).flat_map(|(_, v)| v).copied().collect()
    }
}
