//! From "it prints gibberish" to the faulty stage, tensor, key or token.
//!
//! [`bisect`] asks in the order of what an answer costs: the same tokens, the same configuration, the same weights to
//! within what their types resolve, and then stage by stage whether each side computes what its own file says. Two
//! replays tell a fault of the *engine* (its values are not what its file says) from one of the *file* (they are, but the
//! reference's file says otherwise). A faulty stage is put right and the run repeated, to see whether that was all.

mod harm;
mod parts;
mod prompt;
mod verdict;

use std::path::Path;

use apr_capture::{Capture, Dims};
use apr_diff::{CheckpointComparison, Comparison, TensorOptions, compare, compare_checkpoints};
use apr_format::Checkpoint;
use apr_model::{Site, Stage, read_config};
use serde::Serialize;

use crate::{
    Audit, Declared, Diagnosis, Engine, Options, Progress, Result, Run, Script, audit, diagnose,
    engine::record,
    graft::{Right, graft, right_values},
};

pub use harm::Harm;
pub use parts::Parts;
pub use prompt::PromptDifference;
pub use verdict::{BisectVerdict, Blame, Culprit};

/// What a model is held against.
#[allow(missing_debug_implementations, reason = "engines need not be printable")]
pub enum Against<'a> {
    /// What some engine computed.
    Capture {
        /// The capture.
        capture: &'a Capture,
        /// The model file that it was computed from, if that is at hand.
        checkpoint: Option<&'a Checkpoint>,
    },
    /// Another model file, or the same one, on an engine.
    Model {
        /// The file.
        checkpoint: &'a Checkpoint,
        /// The engine.
        engine: &'a dyn Engine,
    },
}

/// How to bisect.
#[derive(Clone, Debug)]
pub struct BisectOptions {
    /// The arithmetic of the reference's capture, where it does not declare it.
    pub arithmetic: Option<Declared>,
    /// How many faults to explain and to graft.
    pub faults: usize,
    /// How many tensors to measure the harm of, by putting the reference's in their place. Each costs a run.
    pub harm: usize,
}

impl Default for BisectOptions {
    fn default() -> Self {
        Self { arithmetic: None, faults: 4, harm: 8 }
    }
}

/// What is being done, and how far it is.
#[derive(Clone, Copy, Debug)]
pub struct BisectProgress {
    /// In words.
    pub doing: &'static str,
    /// Within it, where that is known.
    pub part: Option<Progress>,
}

/// What a bisection found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bisect {
    /// The version of this form: `apr-bisect/1`.
    pub schema: &'static str,
    /// The side under test.
    pub a: SideReport,
    /// The reference.
    pub b: SideReport,
    /// Differences of tokenization.
    pub prompt: Vec<PromptDifference>,
    /// How the files differ, where there are two.
    pub files: Option<CheckpointComparison>,
    /// How the values differ, errors of all stages adding up.
    pub comparison: Comparison,
    /// The reference's values, held against the weights of the side under test, which may be off by what their types do not
    /// resolve: where the reference's own file is not at hand.
    pub reference_with_our_weights: Option<Audit>,
    /// Stage by stage, what is due to what.
    pub parts: Vec<Parts>,
    /// Which tensors' rounding hurts the logits most, the worst first.
    pub harm: Vec<Harm>,
    /// Runs with faulty stages put right.
    pub grafts: Vec<Graft>,
    /// What follows.
    pub verdict: BisectVerdict,
}

/// One side of a bisection.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SideReport {
    /// The model file or capture.
    pub path: String,
    /// What computed the values.
    pub engine: String,
    /// Whether each stage does what its file and arithmetic say; `None` if its file is not at hand.
    pub audit: Option<Audit>,
    /// What is wrong with the stages that do not.
    pub diagnoses: Vec<Diagnosis>,
}

/// A run with some stages put right.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Graft {
    /// The stages that were put right.
    #[serde(serialize_with = "crate::sites")]
    pub sites: Vec<Site>,
    /// The stages that are wrong nevertheless: other faults.
    #[serde(serialize_with = "crate::sites")]
    pub remaining: Vec<Site>,
    /// The cumulative error of the logits against the reference, before and after.
    pub logits_before: Option<f64>,
    /// See there.
    pub logits_after: Option<f64>,
    /// Rows whose favourite token agrees with the reference's, before and after, of how many.
    pub favourites: Option<[usize; 3]>,
}

/// Finds out where and why `a` on `engine` differs from what it is held `against`. Captures are kept in `place`, which is an
/// empty directory.
pub fn bisect(
    a: &Checkpoint,
    engine: &dyn Engine,
    against: &Against<'_>,
    script: &Script,
    place: &Path,
    options: &BisectOptions,
    progress: &mut dyn FnMut(BisectProgress),
) -> Result<Bisect> {
    let mut say = |doing| progress(BisectProgress { doing, part: None });
    let reference_file = match against {
        Against::Capture { checkpoint, .. } => *checkpoint,
        Against::Model { checkpoint, .. } => Some(*checkpoint),
    };
    // The same file twice has no differences to look for.
    let other_file = reference_file.filter(|b| !std::ptr::eq(*b, a));

    say("comparing prompts");
    let prompt = prompt::differences(a, against, script);
    say("comparing files");
    let tensors = TensorOptions::default();
    let files = other_file.map(|b| compare_checkpoints(a, b, &tensors)).transpose()?;

    say("running");
    let run = engine.load(a)?;
    let (ours, steps) = record(&*run, script, &place.join("a"))?;
    say("running the reference");
    let made;
    let (theirs, their_name) = match against {
        Against::Capture { capture, .. } => (*capture, "a capture".to_owned()),
        Against::Model { checkpoint, engine } => {
            let run = engine.load(checkpoint)?;
            let script = Script::Steps(steps.clone());
            made = record(&*run, &script, &place.join("b"))?.0;
            (&made, engine.name())
        }
    };

    let mut audited = |doing, capture: &Capture, file: &Checkpoint, options: &Options| {
        let mut part = |part| progress(BisectProgress { doing, part: Some(part) });
        audit(capture, file, options, &mut part)
    };
    let own = Options::default();
    let audit_a = audited("auditing the run", &ours, a, &own)?;
    let given = Options { arithmetic: options.arithmetic.clone(), common: true, ..own.clone() };
    let mut audit_b = match reference_file.or(may_be_of(theirs, a).then_some(a)) {
        Some(file) => Some(audited("auditing the reference", theirs, file, &given)?),
        None => None,
    };
    let mut reference_with_our_weights = None;
    if reference_file.is_none() {
        // Names, types and shapes of tensors may agree where their values do not.
        audit_b = audit_b.filter(|audit| audit.faults().next().is_none());
        if audit_b.is_none() {
            let options = Options { rounded_weights: true, ..given.clone() };
            let doing = "holding the reference against our weights";
            reference_with_our_weights = Some(audited(doing, theirs, a, &options)?);
        }
    }
    // A model of other dimensions computes other values; that its config differs is said.
    let dims = |file: &Checkpoint| read_config(file).map(|config| Dims::from(&config));
    let our_dims = dims(a)?;
    let with_their_weights = match other_file.filter(|b| dims(b).is_ok_and(|d| d == our_dims)) {
        Some(file) => Some(audited("replaying with the reference's weights", &ours, file, &own)?),
        None => None,
    };

    let mut say = |doing| progress(BisectProgress { doing, part: None });
    say("comparing values");
    let comparison = compare(&ours, theirs, &apr_diff::Options::default())?;
    let parts = parts::of(&audit_a, with_their_weights.as_ref(), &comparison);
    say("explaining");
    let diagnoses_a = diagnose(&ours, a, &audit_a, options.faults)?;
    let diagnoses_b = match (&audit_b, &reference_with_our_weights) {
        (Some(audit), _) => diagnose(theirs, reference_file.unwrap_or(a), audit, options.faults)?,
        (None, Some(audit)) => diagnose(theirs, a, audit, options.faults)?,
        (None, None) => Vec::new(),
    };
    say("grafting");
    let case = GraftCase { file: a, run: &*run, steps: &steps, theirs, place };
    let grafts = case.grafts(&ours, &audit_a, &comparison, options.faults)?;
    say("measuring harm");
    let harm = match (&files, other_file) {
        (Some(files), Some(b)) if audit_a.faults().next().is_none() => {
            let case = harm::Case { a, b, engine, steps: &steps, theirs, place };
            case.worst(files, &parts, options.harm, &mut say)?
        }
        _ => Vec::new(),
    };

    let mut found = Bisect {
        schema: "apr-bisect/1",
        a: SideReport {
            path: a.path().display().to_string(),
            engine: engine.name(),
            audit: Some(audit_a),
            diagnoses: diagnoses_a,
        },
        b: SideReport {
            path: reference_file.map_or(theirs.path(), Checkpoint::path).display().to_string(),
            engine: their_name,
            audit: audit_b,
            diagnoses: diagnoses_b,
        },
        prompt,
        files,
        comparison,
        reference_with_our_weights,
        parts,
        harm,
        grafts,
        verdict: BisectVerdict::Match,
    };
    found.verdict = verdict::of(&found);
    Ok(found)
}

/// Whether `capture` may have been made of `file`, by the names, types and shapes of tensors that it declares.
fn may_be_of(capture: &Capture, file: &Checkpoint) -> bool {
    let declared = capture.provenance().and_then(|p| p.model.index_sha256.as_ref());
    declared.is_none_or(|declared| *declared == file.index_sha256())
}

/// What grafts are made of.
struct GraftCase<'a> {
    file: &'a Checkpoint,
    run: &'a dyn Run,
    steps: &'a [Vec<u32>],
    theirs: &'a Capture,
    place: &'a Path,
}

impl GraftCase<'_> {
    /// Puts the first faulty stage right, and the next one that is still wrong, until none is or `limit` have been.
    fn grafts(
        &self,
        ours: &Capture,
        audited: &Audit,
        comparison: &Comparison,
        limit: usize,
    ) -> Result<Vec<Graft>> {
        let before = logits(comparison);
        let mut grafts: Vec<Graft> = Vec::new();
        let mut right = Right::new();
        let mut sites = Vec::new();
        let mut wrong: Vec<Site> = audited.faults().map(|stage| stage.site).collect();
        let mut last = None;
        while let Some(&first) = wrong.first().filter(|_| grafts.len() < limit) {
            // What is upstream of a fault does not depend on it, so its inputs are those of the run at hand.
            let capture = last.as_ref().unwrap_or(ours);
            let declared = Declared::by(capture).map_or_else(|| Declared::named("f32"), Ok)?;
            right.extend(right_values(capture, self.file, &declared, &[first])?);
            sites.push(first);
            let place = self.place.join(format!("graft-{}", grafts.len()));
            let grafted = graft(self.run, self.steps, &right, &place)?;
            let options = Options { common: true, ..Options::default() };
            let after = audit(&grafted, self.file, &options, &mut |_| {})?;
            wrong = after.faults().map(|stage| stage.site).filter(|s| !sites.contains(s)).collect();
            let logits_only = apr_diff::Options {
                sites: Some([Site::whole(Stage::LmHead)].into_iter().collect()),
                ..apr_diff::Options::default()
            };
            let after = logits(&compare(&grafted, self.theirs, &logits_only)?);
            grafts.push(Graft {
                sites: sites.clone(),
                remaining: wrong.clone(),
                logits_before: before.map(|(error, ..)| error),
                logits_after: after.map(|(error, ..)| error),
                favourites: before
                    .zip(after)
                    .map(|((_, before, rows), (_, after, _))| [before, after, rows]),
            });
            last = Some(grafted);
        }
        Ok(grafts)
    }
}

/// The error of the logits, the rows whose favourites agree, and the rows.
fn logits(comparison: &Comparison) -> Option<(f64, usize, usize)> {
    let stage = comparison.stages.iter().find(|stage| stage.site.stage == Stage::LmHead)?;
    let logits = stage.logits.as_ref()?;
    Some((stage.metrics.relative_l2?, logits.argmax_agree, logits.rows + logits.rows_with_nan))
}
