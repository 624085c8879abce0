//! Grafts: a run with some stages put right.
//!
//! What a faulty stage should have given is known from its inputs. Put in its place, the rest of the run shows whether
//! that was all that is wrong. On an engine of ours the graft is a run of that very engine, so that a second fault
//! stays where it is ([`graft`]). Of an engine that cannot be run here, the rest is emulated in its declared arithmetic
//! ([`repaired`]), which shows what the fault does to the logits.

use std::{collections::BTreeMap, path::Path};

use apr_capture::Capture;
use apr_format::Checkpoint;
use apr_model::{HostTensor, Site, Stage};
use apr_reference::Reference;

use crate::{
    Declared, Loaded, NotMeasured, Progress, Result, Run, Script,
    engine::record_with,
    replay::{self, Replay},
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

/// The logits that the engine of `capture` would have given with the stages from `from` on done right, recorded at
/// `output`.
pub fn repaired(
    capture: &Capture,
    checkpoint: &Checkpoint,
    declared: &Declared,
    from: Site,
    output: &Path,
) -> Result<Result<Capture, NotMeasured>> {
    let steps = match replay::steps(capture) {
        Ok(steps) => steps,
        Err(why) => return Ok(Err(why)),
    };
    let run = Loaded::new(Reference::<f64>::new(declared.arithmetic.clone()), checkpoint, None)?;
    let before = capture.sites().into_iter().filter(|&site| site < from).collect();
    let script = Script::Steps(steps.clone());
    // Rows that are missing cannot be put in place; they are computed.
    let mut values = |step: usize, site| match capture.info(step, site) {
        Some(info) if info.rows() == steps[step].len() => {
            let tensor = capture.tensor(step, site)?;
            Ok(Some(HostTensor { shape: tensor.shape().to_vec(), values: tensor.to_f64() }))
        }
        _ => Ok(None),
    };
    let taps = [Site::whole(Stage::LmHead)].into_iter().collect();
    Ok(Ok(record_with(&run, &script, output, taps, Some((before, &mut values)))?.0))
}
