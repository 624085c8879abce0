//! What follows from a bisection: whose fault it is, if it is anybody's.

use std::fmt;

use apr_diff::{NotCompared, Outcome, Reason};
use apr_model::{Site, Stage};
use serde::Serialize;

use super::{Bisect, PromptDifference};
use crate::{Audit, Diagnosis, Errors, Group, StageAudit, Verdict};

/// What follows from a bisection.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum BisectVerdict {
    /// Both sides agree.
    Match,
    /// They differ by what their types and arithmetics do, and nobody is wrong.
    Drift {
        /// The relative L2 of the logits.
        logits: Option<f64>,
        /// Rows whose favourite token agrees, and rows.
        favourites: Option<[usize; 2]>,
        /// The mean KL divergence from the reference, in nats.
        kl: Option<f64>,
    },
    /// Something is wrong; the cheapest evidence first.
    Diverges {
        /// What, and whose fault it is.
        blames: Vec<Blame>,
    },
    /// Nothing, or not everything, could be measured, and nothing is known to be wrong.
    Unmeasured {
        /// What is missing.
        because: String,
    },
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Blame {
    /// Whose fault it is.
    pub culprit: Culprit,
    /// The stage, where there is one.
    #[serde(serialize_with = "optional_site")]
    pub site: Option<Site>,
    /// What is wrong, in words.
    pub what: String,
}

/// Whose fault something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Culprit {
    /// The sides are of different tokens.
    Prompt,
    /// The configuration in the file under test.
    Config,
    /// The weights in the file under test: its converter's or quantiser's.
    File,
    /// The engine under test: it does not compute what its file says.
    Engine,
    /// The reference: it does not compute what its file says.
    Reference,
    /// Either the file under test or the reference: the reference did not use these weights, and its own are not at hand.
    FileOrReference,
}

impl Culprit {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prompt => "the prompt",
            Self::Config => "the config of the file under test",
            Self::File => "the weights of the file under test",
            Self::Engine => "the engine under test",
            Self::Reference => "the reference",
            Self::FileOrReference => "the file under test, or the reference",
        }
    }
}

impl BisectVerdict {
    /// The exit code that stands for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Match | Self::Drift { .. } => 0,
            Self::Diverges { .. } => 1,
            Self::Unmeasured { .. } => 3,
        }
    }
}

impl fmt::Display for BisectVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Match => f.write_str("MATCH: the sides agree"),
            Self::Drift { logits, favourites, kl } => {
                f.write_str("DRIFT: the sides differ by what their types and arithmetics do")?;
                if let Some(error) = logits {
                    write!(f, "; the logits by {error:.1e}")?;
                }
                if let Some(kl) = kl {
                    write!(f, " (KL {kl:.1e} nats)")?;
                }
                match favourites {
                    Some([same, rows]) => {
                        write!(f, "; the favourite token is the same in {same} of {rows} rows")
                    }
                    None => Ok(()),
                }
            }
            Self::Diverges { blames } => {
                let Blame { culprit, what, .. } = &blames[0];
                write!(f, "DIVERGES: {}: {what}", culprit.name())?;
                match blames.len() - 1 {
                    0 => Ok(()),
                    n => write!(f, " (and {n} more)"),
                }
            }
            Self::Unmeasured { because } => write!(f, "UNMEASURED: {because}"),
        }
    }
}

pub(super) fn of(found: &Bisect) -> BisectVerdict {
    let mut blames = prompt(found);
    blames.extend(files(found));
    if let Some(audit) = &found.a.audit {
        blames.extend(stages(audit, &found.a.diagnoses, Culprit::Engine));
    }
    if let Some(audit) = &found.b.audit {
        blames.extend(stages(audit, &found.b.diagnoses, Culprit::Reference));
    }
    if let Some(audit) = &found.reference_with_our_weights {
        blames.extend(stages(audit, &found.b.diagnoses, Culprit::FileOrReference));
    }
    if !blames.is_empty() {
        return BisectVerdict::Diverges { blames };
    }
    let unmeasured = |audit: &Option<Audit>| match audit {
        Some(Audit { verdict: Verdict::Unmeasured { because }, .. }) => Some(because.clone()),
        _ => None,
    };
    let sides = [&found.a.audit, &found.b.audit, &found.reference_with_our_weights];
    if let Some(because) = sides.into_iter().find_map(unmeasured) {
        return BisectVerdict::Unmeasured { because };
    }
    // A stage that the reference left out and that leads to one that it holds is judged with that one.
    let theirs = [&found.b.audit, &found.reference_with_our_weights];
    if let Some(because) = theirs.into_iter().flatten().find_map(missing) {
        return BisectVerdict::Unmeasured { because };
    }
    // What one file stores as a tensor the other's metadata may say: configs were compared.
    let missed = |missed: &&NotCompared| !matches!(missed.reason, Reason::Derived { .. });
    let missed = found.files.iter().flat_map(|files| &files.not_compared).find(missed);
    if let Some(NotCompared { name, reason }) = missed {
        let because = format!("`{name}` of the files could not be compared: {reason}");
        return BisectVerdict::Unmeasured { because };
    }
    if found.comparison.stages.is_empty() {
        let because = "no stage is on both sides".to_owned();
        return BisectVerdict::Unmeasured { because };
    }
    match &found.comparison.outcome {
        Outcome::Match { .. } => BisectVerdict::Match,
        _ => drift(found),
    }
}

/// What the reference should have let us judge and did not.
fn missing(reference: &Audit) -> Option<String> {
    let (first, rest) = reference.not_measured.split_first()?;
    let more = if rest.is_empty() { String::new() } else { format!(" (and {} more)", rest.len()) };
    Some(format!("the reference is not whole: {first}{more}; nothing is wrong with what it holds"))
}

fn drift(found: &Bisect) -> BisectVerdict {
    let stages = &found.comparison.stages;
    let head = stages.iter().find(|stage| stage.site.stage == Stage::LmHead);
    let logits = head.and_then(|stage| stage.logits.as_ref());
    BisectVerdict::Drift {
        logits: head.and_then(|stage| stage.metrics.relative_l2),
        favourites: logits.map(|l| [l.argmax_agree, l.rows + l.rows_with_nan]),
        kl: logits.and_then(|l| l.kl_mean),
    }
}

fn prompt(found: &Bisect) -> Vec<Blame> {
    let finding = |what| Blame { culprit: Culprit::Prompt, site: None, what };
    let mut blames = Vec::new();
    for difference in &found.prompt {
        // Templates and ends of text decide no number of this run.
        if let PromptDifference::Tokens { at, ours, theirs, .. } = difference {
            let token = |token: &Option<(u32, String)>| match token {
                Some((id, text)) => format!("{id} {text:?}"),
                None => "nothing".to_owned(),
            };
            let (ours, theirs) = (token(ours), token(theirs));
            blames.push(finding(format!(
                "the same text gives other tokens: at index {at} {ours} here and {theirs} in the reference"
            )));
        }
    }
    if let Some(first) = found.comparison.token_differences.first() {
        blames.push(finding(format!(
            "the captures are of different tokens: at position {} {} here and {} in the reference",
            first.position, first.a, first.b
        )));
    }
    blames
}

fn files(found: &Bisect) -> Vec<Blame> {
    let Some(files) = &found.files else { return Vec::new() };
    let mut blames = Vec::new();
    let config = files.config.iter().flat_map(|config| &config.differences);
    // How long a context may become decides no number of a short one.
    for difference in config.filter(|difference| difference.key != "max_position_embeddings") {
        let what = format!(
            "{} is {} here and {} in the reference",
            difference.key, difference.a, difference.b
        );
        blames.push(Blame { culprit: Culprit::Config, site: None, what });
    }
    for tensor in files.tensors.iter().filter(|tensor| !tensor.explained) {
        let what = match (&tensor.relation, &tensor.damage) {
            (Some(relation), _) => format!("`{}`: {relation}", tensor.name_a),
            (None, Some(damage)) => format!("`{}`: {damage}", tensor.name_a),
            (None, None) => format!(
                "`{}` differs by more than its type, {}, explains",
                tensor.name_a, tensor.dtype_a
            ),
        };
        blames.push(Blame { culprit: Culprit::File, site: None, what });
    }
    blames
}

fn stages(audit: &Audit, diagnoses: &[Diagnosis], culprit: Culprit) -> Vec<Blame> {
    // One mistake in all layers is one finding.
    let told: Vec<Site> = diagnoses.iter().flat_map(|d| d.same_at.iter().copied()).collect();
    let finding = |stage: &StageAudit| {
        let site = stage.site;
        let diagnosis = diagnoses.iter().find(|diagnosis| diagnosis.site == site);
        let why = diagnosis.map_or(String::new(), |diagnosis| format!(": {diagnosis}"));
        let subject = match culprit {
            Culprit::FileOrReference => {
                format!("the reference's {site}, with the weights under test,")
            }
            _ => site.to_string(),
        };
        Blame { culprit, site: Some(site), what: format!("{subject} is {}{why}", off(stage)) }
    };
    audit.faults().filter(|stage| !told.contains(&stage.site)).map(finding).collect()
}

/// How a wrong stage is wrong: as a whole where that shows it, or where it shows.
fn off(stage: &StageAudit) -> String {
    let Errors { unexplained, bound, .. } = stage.errors;
    match stage.not_finite {
        0 if unexplained > bound => {
            format!("off by {unexplained:.1e} where {bound:.1e} is explained")
        }
        0 => format!(
            "right as a whole (off by {unexplained:.1e} where {bound:.1e} is explained) and wrong in {}, by {:.1} times what may be",
            place(stage.worst.group),
            stage.worst.excess
        ),
        n => format!(
            "NaN or infinite in {n} elements that should be numbers, or the other way round"
        ),
    }
}

fn place(group: Group) -> String {
    match group {
        Group::Whole => "all of it".to_owned(),
        Group::Row { position, .. } => format!("position {position}"),
        Group::Head { head } => format!("head {head}"),
        Group::Expert { expert } => format!("expert {expert}"),
        Group::Channel { channel } => format!("channel {channel}"),
        Group::Element { position, head: None, column, .. } => {
            format!("position {position}, channel {column}")
        }
        Group::Element { position, head: Some(head), column, .. } => {
            format!("position {position}, head {head}, key {column}")
        }
    }
}

fn optional_site<S: serde::Serializer>(
    site: &Option<Site>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match site {
        Some(site) => serializer.collect_str(site),
        None => serializer.serialize_none(),
    }
}
