//! Which tensors' rounding hurts the logits most.
//!
//! How much a tensor's error matters cannot be seen at the tensor: it is measured, by a run with the reference's tensor in
//! its place. Each costs a run, so those that change their own stage's value most go first.

use std::{collections::BTreeSet, path::Path};

use apr_capture::Capture;
use apr_diff::{CheckpointComparison, Options, TensorComparison, compare};
use apr_format::Checkpoint;
use apr_model::{Role, Site, Stage, head_rows, read_config};
use apr_tensor::{Shape, Stored};
use serde::Serialize;

use super::Parts;
use crate::{Engine, Result, Script, engine::record_with};

/// What one tensor does to the logits.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Harm {
    /// The tensor, in the spelling of the side under test.
    pub tensor: String,
    /// How it is stored there.
    pub dtype: String,
    /// The relative L2 of the logits against the reference, with the tensor as it is.
    pub error: f64,
    /// With the reference's in its place.
    pub error_without: f64,
    /// The mean KL divergence from the reference, in nats, likewise.
    pub kl: Option<f64>,
    /// See there.
    pub kl_without: Option<f64>,
}

/// What harm is measured on.
pub(super) struct Case<'a> {
    pub(super) a: &'a Checkpoint,
    pub(super) b: &'a Checkpoint,
    pub(super) engine: &'a dyn Engine,
    pub(super) steps: &'a [Vec<u32>],
    pub(super) theirs: &'a Capture,
    pub(super) place: &'a Path,
}

impl Case<'_> {
    /// The tensors that do most harm among the `limit` that change their stages most.
    pub(super) fn worst(
        &self,
        files: &CheckpointComparison,
        parts: &[Parts],
        limit: usize,
        say: &mut dyn FnMut(&'static str),
    ) -> Result<Vec<Harm>> {
        let mut tensors: Vec<(f64, &TensorComparison)> = files
            .tensors
            .iter()
            .filter(|tensor| !tensor.within && tensor.shape == tensor.shape_b)
            .filter_map(|tensor| Some((change(tensor.role?, parts)?, tensor)))
            .collect();
        tensors.sort_by(|a, b| b.0.total_cmp(&a.0));
        // Experts that one tensor holds are exchanged together: in it they are all of one type.
        let mut seen = BTreeSet::new();
        tensors.retain(|(_, tensor)| seen.insert(holder(&tensor.name_a)));
        tensors.truncate(limit);
        let Some((error, kl)) =
            (if tensors.is_empty() { None } else { self.logits(self.a, "as-it-is")? })
        else {
            return Ok(Vec::new());
        };
        let mut harm = Vec::new();
        for (index, (_, tensor)) in tensors.into_iter().enumerate() {
            say("measuring harm");
            let Some(changed) = self.exchanged(tensor)? else { continue };
            let Some((error_without, kl_without)) =
                self.logits(&changed, &format!("without-{index}"))?
            else {
                continue;
            };
            harm.push(Harm {
                tensor: holder(&tensor.name_a).to_owned(),
                dtype: tensor.dtype_a.clone(),
                error,
                error_without,
                kl,
                kl_without,
            });
        }
        harm.sort_by(|a, b| a.error_without.total_cmp(&b.error_without));
        Ok(harm)
    }

    /// The file under test with the reference's tensor in place of its own.
    fn exchanged(&self, tensor: &TensorComparison) -> Result<Option<Checkpoint>> {
        let Some(role) = tensor.role else { return Ok(None) };
        let Some(theirs) = self.theirs(tensor, role)? else { return Ok(None) };
        let (ours_config, theirs_config) = (read_config(self.a)?, read_config(self.b)?);
        let head_dim = ours_config.head_dim;
        let halves = head_rows(self.b, &theirs_config)?.to_halves(role, &theirs, head_dim)?;
        let stored = head_rows(self.a, &ours_config)?.from_halves(role, &halves, head_dim)?;
        Ok(Some(self.a.with_tensors([(holder(&tensor.name_a).to_owned(), stored)])))
    }

    /// What the reference has for the tensor under test that `tensor` is, or is an expert's part of.
    fn theirs(&self, tensor: &TensorComparison, role: Role) -> Result<Option<Stored>> {
        let Some(theirs) = self.b.tensor(holder(&tensor.name_b)) else { return Ok(None) };
        let is_part = |name: &str| holder(name) != name;
        match (role, is_part(&tensor.name_a), is_part(&tensor.name_b)) {
            (Role::Expert(layer, of, _), true, false) => {
                let ours = self.a.tensor(holder(&tensor.name_a));
                let experts = ours.map_or(0, |ours| ours.shape().dims()[0]);
                let part = |expert| self.b.tensor(&Role::Expert(layer, of, expert).hf_name());
                (0..experts)
                    .map(part)
                    .collect::<Option<Vec<_>>>()
                    .map_or(Ok(None), |all| stack(&all))
            }
            (Role::Expert(_, _, expert), false, true) => {
                let rows = theirs.shape().rows() / theirs.shape().dims()[0];
                Ok(Some(theirs.slice_rows(expert * rows..(expert + 1) * rows)))
            }
            _ => Ok(Some(theirs.clone())),
        }
    }

    /// The error of the logits of `checkpoint` against the reference, and the mean KL divergence.
    fn logits(&self, checkpoint: &Checkpoint, name: &str) -> Result<Option<(f64, Option<f64>)>> {
        let run = self.engine.load(checkpoint)?;
        let head: apr_model::TapSet = [Site::whole(Stage::LmHead)].into_iter().collect();
        let script = Script::Steps(self.steps.to_vec());
        let capture = record_with(&*run, &script, &self.place.join(name), head.clone(), None)?.0;
        let options = Options { sites: Some(head), ..Options::default() };
        let comparison = compare(&capture, self.theirs, &options)?;
        let stage = comparison.stages.first();
        Ok(stage.and_then(|stage| {
            Some((stage.metrics.relative_l2?, stage.logits.as_ref().and_then(|l| l.kl_mean)))
        }))
    }
}

/// The tensor in the file that `name` is of: a matrix of one expert may be a part of it, `blk.0.ffn_up_exps.weight[3]`.
fn holder(name: &str) -> &str {
    name.split_once('[').map_or(name, |(holder, _)| holder)
}

/// Matrices of experts in one tensor, if they are of one type.
fn stack(parts: &[&Stored]) -> Result<Option<Stored>> {
    let Some(&first) = parts.first() else { return Ok(None) };
    let alike = |part: &&Stored| part.dtype() == first.dtype() && part.shape() == first.shape();
    if !parts.iter().all(alike) {
        return Ok(None);
    }
    let dims = [&[parts.len()], first.shape().dims()].concat();
    let bytes: Vec<u8> = parts.iter().flat_map(|part| part.bytes().to_vec()).collect();
    Ok(Some(Stored::new(first.dtype(), Shape::new(dims), bytes.into())?))
}

/// How much the weights change the stage that the tensor of `role` is used in.
fn change(role: Role, parts: &[Parts]) -> Option<f64> {
    let site = role.site()?;
    parts.iter().find(|part| part.site == site)?.weights
}
