//! Grafts: a run with some stages put right.
//!
//! What a faulty stage should have given is known from its inputs. Put in its place, the rest of the run shows whether
//! that was all that is wrong. On an engine of ours the graft is a run of that very engine, so that a second fault
//! stays where it is ([`graft`]). Of an engine that cannot be run here, the rest is emulated in its declared arithmetic,
//! which shows what the faults do to the logits ([`consequence`]).

use std::{collections::BTreeMap, path::Path};

use apr_capture::Capture;
use apr_format::Checkpoint;
use apr_model::{HostTensor, Site, Stage, TapSet};
use apr_reference::Reference;
use serde::Serialize;

use crate::{
    Audit, Declared, Loaded, Progress, Result, Run, Script,
    engine::record_with,
    replay::{self, Replay},
    routing::is_id,
};

/// What some stages should have given, by step and site.
pub(crate) type Right = BTreeMap<(usize, Site), HostTensor>;

/// What the declared arithmetic makes of the captured inputs of `sites`.
pub(crate) fn right_values(
    capture: &Capture,
    checkpoint: &Checkpoint,
    declared: &Declared,
    sites: &[Site],
) -> Result<Right> {
    let Ok(steps) = replay::steps(capture) else { return Ok(Right::new()) };
    let (model, mailbox) = replay::load(checkpoint, declared)?;
    let mut quiet = |_: Progress| {};
    let replay = Replay::new(capture, &model, mailbox, &steps, &mut quiet);
    Ok(replay.keeping(sites.iter().copied().collect()).run(&model, &steps)?.kept)
}

/// Runs `steps` again with `right` values in place and records every stage at `output`.
pub(crate) fn graft(
    run: &dyn Run,
    steps: &[Vec<u32>],
    right: &Right,
    output: &Path,
) -> Result<Capture> {
    let taps = run.sites().iter().copied().collect();
    let sites = right.keys().map(|&(_, site)| site).collect();
    let script = Script::Steps(steps.to_vec());
    let mut values = |step, site| Ok(right.get(&(step, site)).cloned());
    Ok(record_with(run, &script, output, taps, Some((sites, &mut values)))?.0)
}

/// What the faults of a capture do to its logits.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Consequence {
    /// The first wrong stage: it and all after it were computed anew, in the declared arithmetic.
    #[serde(serialize_with = "crate::site")]
    pub from: Site,
    /// The relative L2 of the captured logits against those.
    #[serde(serialize_with = "crate::number")]
    pub relative_l2: f64,
    /// What that means for the tokens.
    pub logits: apr_diff::Logits,
}

/// What the faults that `audit` found in `capture` do to its logits; `None` if there are none, or no logits. A capture is
/// written to `place`, which does not exist.
pub fn consequence(
    capture: &Capture,
    checkpoint: &Checkpoint,
    audit: &Audit,
    place: &Path,
) -> Result<Option<Consequence>> {
    let (Some(fault), Some(replayed)) = (audit.faults().next(), &audit.replayed) else {
        return Ok(None);
    };
    let head = Site::whole(Stage::LmHead);
    if !capture.sites().contains(&head) {
        return Ok(None);
    }
    let (from, steps) = (fault.site, &replayed.steps);
    let backend = Reference::<f64>::new(replayed.declared.arithmetic.clone());
    let run = Loaded::new(backend, checkpoint, None)?;
    let unjudged = |site| audit.not_measured.iter().any(|gap| gap.site == Some(site));
    let sites = capture.sites().into_iter();
    let before = sites.filter(|&site| site < from && !unjudged(site)).collect();
    let experts = apr_model::read_config(checkpoint)?.moe.map_or(0, |moe| moe.num_experts);
    // Rows that are missing cannot be put in place; they are computed.
    let mut values = |step: usize, site| match capture.info(step, site) {
        Some(info) if info.rows() == steps[step].len() => {
            let tensor = capture.tensor(step, site)?;
            let value = HostTensor { shape: tensor.shape().to_vec(), values: tensor.to_f64() };
            // Nothing can be computed with ids that are of no expert.
            let usable = |id: &f64| !site.stage.holds_ids() || is_id(*id, experts);
            Ok(value.values.iter().all(usable).then_some(value))
        }
        _ => Ok(None),
    };
    let taps: TapSet = [head].into_iter().collect();
    let script = Script::Steps(steps.clone());
    let replaced = Some((before, &mut values as &mut _));
    let right = record_with(&run, &script, place, taps.clone(), replaced)?.0;
    let options = apr_diff::Options { sites: Some(taps), ..apr_diff::Options::default() };
    let comparison = apr_diff::compare(capture, &right, &options)?;
    let stage = comparison.stages.into_iter().next();
    Ok(stage.and_then(|stage| {
        let relative_l2 = stage.metrics.relative_l2?;
        Some(Consequence { from, relative_l2, logits: stage.logits? })
    }))
}
