//! What the mistake is.
//!
//! A stage that an audit found wrong computes something else from its inputs than it should. Each
//! [hypothesis](hypotheses) is such a something else; it is stated only if it brings the stage to its floor, by the same
//! tests that found it wrong. If none does, that is said, and where the error lies.

mod case;
mod geometry;
mod hypotheses;
mod suspect;

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
};

use apr_capture::Capture;
use apr_format::Checkpoint;
use apr_model::Site;
use serde::Serialize;

use crate::{Audit, Result, StageAudit, replay};

use case::{Case, Evidence, Extent, NoCase};
pub use geometry::Geometry;
use hypotheses::{Hypothesis, Tier};
use suspect::Suspect;

/// What is found out about one wrong stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Diagnosis {
    /// The stage.
    #[serde(serialize_with = "crate::site")]
    pub site: Site,
    /// The mistake, if one is known that explains the stage.
    pub finding: Option<Explained>,
    /// The same stage of other layers, where the same mistake explains it: one of the model's constants is wrong, or a
    /// kernel is.
    #[serde(serialize_with = "crate::sites", skip_serializing_if = "Vec::is_empty")]
    pub same_at: Vec<Site>,
    /// Other mistakes that explain it just as well: on these values they cannot be told apart.
    pub also_fits: Vec<Explained>,
    /// How many were tried.
    pub tried: usize,
    /// Where the error lies.
    pub geometry: Option<Geometry>,
    /// Stages that would be needed to try any and that the capture does not hold.
    #[serde(serialize_with = "crate::sites", skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<Site>,
}

/// A mistake that explains a stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explained {
    /// The name of the hypothesis.
    pub hypothesis: &'static str,
    /// The stage at which the mistake is: the one diagnosed, or one before it that nobody captured.
    #[serde(serialize_with = "crate::site")]
    pub at: Site,
    /// The mistake in a sentence, without a full stop.
    pub sentence: String,
    /// The error in units of what it may be, taking the stage to be right.
    #[serde(serialize_with = "crate::number")]
    pub excess_before: f64,
    /// The same, taking the mistake into account: at most 1.
    #[serde(serialize_with = "crate::number")]
    pub excess_after: f64,
    /// Numbers that were fitted.
    pub parameters: BTreeMap<&'static str, f64>,
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.finding {
            Some(finding) => {
                write!(f, "{}: {}", finding.hypothesis, finding.sentence)?;
                if finding.at != self.site {
                    write!(f, " (at {}, which was not captured)", finding.at)?;
                }
                for other in &self.also_fits {
                    write!(f, "; or {}: {}", other.hypothesis, other.sentence)?;
                }
                let layers = self.same_at.iter().filter_map(|site| site.layer);
                let layers = geometry::ranges(layers.map(|layer| layer as usize));
                match self.same_at.len() {
                    0 => Ok(()),
                    1 => write!(f, "; the same in layer {layers}"),
                    _ => write!(f, "; the same in layers {layers}"),
                }
            }
            None if !self.missing.is_empty() => {
                // The last ones are the nearest.
                const NAMED: usize = 4;
                let further = self.missing.len().saturating_sub(NAMED);
                let named: Vec<String> =
                    self.missing[further..].iter().map(Site::to_string).collect();
                write!(f, "no diagnosis without its inputs; capture {}", named.join(", "))?;
                if further > 0 { write!(f, " (and {further} before)") } else { Ok(()) }
            }
            None => {
                f.write_str("no hypothesis fits")?;
                match &self.geometry {
                    Some(geometry) => write!(f, "; the error is in {geometry}"),
                    None => Ok(()),
                }
            }
        }
    }
}

/// Says of the first `limit` faults of `audit`, in the order of computation, what the mistake is. The same mistake at
/// the same stage of other layers counts once.
pub fn diagnose(
    capture: &Capture,
    checkpoint: &Checkpoint,
    audit: &Audit,
    limit: usize,
) -> Result<Vec<Diagnosis>> {
    let mut faults: VecDeque<&StageAudit> = audit.faults().collect();
    let Some(replayed) = audit.replayed.as_ref().filter(|_| !faults.is_empty()) else {
        return Ok(Vec::new());
    };
    let (model, _mailbox) = replay::load(checkpoint, &replayed.declared)?;
    let evidence = Evidence::new(capture, model, replayed);
    let mut diagnoses: Vec<Diagnosis> = Vec::new();
    while let Some(fault) = faults.pop_front().filter(|_| diagnoses.len() < limit) {
        let mut diagnosis = diagnose_one(&evidence, fault)?;
        if let Some(finding) = &diagnosis.finding {
            let mut others = VecDeque::new();
            for other in faults {
                match recurs(&evidence, finding, fault.site, other)? {
                    true => diagnosis.same_at.push(other.site),
                    false => others.push_back(other),
                }
            }
            faults = others;
        }
        diagnoses.push(diagnosis);
    }
    Ok(diagnoses)
}

/// Whether what was found at `site` also explains the same stage in the layer of `other`.
fn recurs(
    evidence: &Evidence<'_>,
    finding: &Explained,
    site: Site,
    other: &StageAudit,
) -> Result<bool> {
    if other.site.stage != site.stage {
        return Ok(false);
    }
    let at = match finding.at.layer {
        // Relative to the stage's own layer, as in the finding.
        Some(layer) => {
            let offset = i64::from(layer) - site.layer.map_or(0, i64::from);
            let layer = other.site.layer.map_or(0, i64::from) + offset;
            Site { layer: u32::try_from(layer).ok(), ..finding.at }
        }
        None => finding.at,
    };
    if at.layer.is_some() != finding.at.layer.is_some() {
        return Ok(false);
    }
    let mut known = hypotheses::at(at, evidence.config());
    // A layer without experts knows other mistakes.
    let Some(hypothesis) = known.find(|hypothesis| hypothesis.name == finding.hypothesis) else {
        return Ok(false);
    };
    let extent = match hypothesis.tier {
        Tier::General => Extent::All,
        _ => Extent::Sample,
    };
    match Case::new(evidence, other, extent) {
        Ok(case) => {
            let explained = attempt(hypothesis, at, &case, &case)?;
            // Another place or number in it is another mistake.
            Ok(explained.is_some_and(|explained| explained.sentence == finding.sentence))
        }
        Err(NoCase::Missing(_)) => Ok(false),
        Err(NoCase::Failed(error)) => Err(error),
    }
}

fn diagnose_one(evidence: &Evidence<'_>, fault: &StageAudit) -> Result<Diagnosis> {
    let mut diagnosis = Diagnosis {
        site: fault.site,
        finding: None,
        same_at: Vec::new(),
        also_fits: Vec::new(),
        tried: 0,
        geometry: None,
        missing: Vec::new(),
    };
    let sample = match Case::new(evidence, fault, Extent::Sample) {
        Ok(case) => case,
        Err(NoCase::Missing(missing)) => return Ok(Diagnosis { missing, ..diagnosis }),
        Err(NoCase::Failed(error)) => return Err(error),
    };
    let whole;
    let all = match sample.is_all() {
        true => &sample,
        false => {
            whole = match Case::new(evidence, fault, Extent::All) {
                Ok(case) => case,
                Err(NoCase::Missing(missing)) => return Ok(Diagnosis { missing, ..diagnosis }),
                Err(NoCase::Failed(error)) => return Err(error),
            };
            &whole
        }
    };
    diagnosis.geometry = Some(Geometry::of(all));
    // The stage itself first, then those before it that nobody captured, nearest first.
    let sites: Vec<Site> =
        [fault.site].into_iter().chain(fault.span.iter().rev().copied()).collect();
    for tier in [Tier::Named, Tier::Fitted, Tier::General] {
        for &site in &sites {
            let known = hypotheses::at(site, evidence.config());
            for hypothesis in known.filter(|hypothesis| hypothesis.tier == tier) {
                diagnosis.tried += 1;
                let found = attempt(hypothesis, site, &sample, all)?;
                match diagnosis.finding {
                    None => diagnosis.finding = found,
                    Some(_) => diagnosis.also_fits.extend(found),
                }
            }
        }
        if diagnosis.finding.is_some() {
            break;
        }
    }
    Ok(diagnosis)
}

/// What explains the case, if `hypothesis` at `site` does: in the sample, which is fast, and then in all of it.
fn attempt(
    hypothesis: &Hypothesis,
    site: Site,
    sample: &Case<'_>,
    all: &Case<'_>,
) -> Result<Option<Explained>> {
    // What a value looks like is cheap to see, and seen in the whole of it only.
    let cases: &[&Case<'_>] = match hypothesis.tier {
        Tier::General => &[all],
        _ if std::ptr::eq(sample, all) => &[all],
        _ => &[sample, all],
    };
    let mut explained = None;
    for case in cases {
        let suspect = Suspect::new(case, site)?;
        let Some(guess) = (hypothesis.compute)(&suspect)? else { return Ok(None) };
        let excess_before = case.excess(&case.record);
        let excess_after = suspect.excess(&guess.value)?;
        // Where the sample is right, as it stands, it says nothing.
        if !(excess_after <= 1.0 && excess_after < excess_before / 2.0) {
            return Ok(None);
        }
        explained = Some(Explained {
            hypothesis: hypothesis.name,
            at: site,
            sentence: guess.sentence,
            excess_before,
            excess_after,
            parameters: guess.parameters,
        });
    }
    Ok(explained)
}

#[cfg(test)]
mod tests {
    use apr_capture::{Dims, Provenance, Recorder, RecorderOptions};
    use apr_model::{LogitRows, Model, Phase, Stage, StepInput};
    use apr_reference::{Arithmetic, Reference};
    use apr_testkit::{TINY, fixture, invariants};

    use super::*;
    use crate::{Options, audit};

    /// A case computes a stage by itself, the audit in the one forward pass: here they are held together.
    #[test]
    fn a_case_finds_of_each_stage_what_the_audit_found() {
        use Stage::*;
        let fused = [AttnScores, AttnSoftmax, FfnSilu, MoeExpertSilu, QkvMatmul];
        for name in TINY {
            for without in [&[][..], &fused] {
                let checkpoint = Checkpoint::open(fixture(&format!("tiny/{name}"))).unwrap();
                let backend = Reference::<f32>::new(Arithmetic::LLAMA_CPP);
                let model = Model::load(backend, &checkpoint).unwrap();
                let captured = model.all_taps();
                let captured = captured.iter().filter(|site| !without.contains(&site.stage));
                let directory = tempfile::tempdir().unwrap();
                let path = directory.path().join("capture");
                let mut recorder = Recorder::create(
                    &path,
                    Provenance::of(&model, &checkpoint, None),
                    Dims::from(model.config()),
                    RecorderOptions::new(captured.collect()),
                )
                .unwrap();
                let mut cache = model.cache(11).unwrap();
                for (chunk, tokens) in invariants::tokens(11).chunks(6).enumerate() {
                    let logits = LogitRows::All;
                    let input = StepInput { tokens, phase: Phase::Prefill, chunk, logits };
                    model.step(input, &mut cache, &mut recorder).unwrap();
                }
                recorder.finish().unwrap();

                let capture = Capture::open(&path).unwrap();
                let options = Options { common: true, ..Options::default() };
                let audit = audit(&capture, &checkpoint, &options, &mut |_| {}).unwrap();
                let replayed = audit.replayed.as_ref().unwrap();
                let (model, _mailbox) = replay::load(&checkpoint, &replayed.declared).unwrap();
                let evidence = Evidence::new(&capture, model, replayed);
                assert!(!audit.stages.is_empty(), "{name}");
                for stage in &audit.stages {
                    let case = Case::new(&evidence, stage, Extent::All);
                    let case = case.unwrap_or_else(|e| panic!("{name}: {}: {e:?}", stage.site));
                    let (here, there) = (case.excess(&case.record), stage.worst.excess);
                    let site = stage.site;
                    assert!((here - there).abs() <= 1e-6 * there, "{name}: {site}: {here} {there}");
                }
            }
        }
    }
}
