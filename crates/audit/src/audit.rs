//! The audit of a capture: replay, judge, say what follows.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use apr_capture::{Capture, Dims};
use apr_format::Checkpoint;
use apr_model::{Config, Site, Stage, read_config};
use serde::Serialize;

use crate::{
    ArithmeticFrom, ArithmeticOrigin, ChannelAudit, Declared, Error, Errors, ExpertAudit, Finding,
    Progress, Result, RowAudit, StageAudit, Test,
    gaps::{Captured, Gaps, span},
    judge::{Bound, Record, Sums},
    replay::{self, Replay},
};

/// How to audit.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The arithmetic to hold the capture against; `None` is the one that it declares, or else one that is inferred.
    pub arithmetic: Option<Declared>,
    /// Judge what the capture holds and do not miss what it does not.
    pub common: bool,
    /// The tokens of the steps, for captures that do not say them.
    pub tokens: Option<Vec<u32>>,
    /// The engine had the weights that those of the file were rounded from: allow what their types do not resolve.
    pub rounded_weights: bool,
}

/// What an audit found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Audit {
    /// The version of this form: `apr-audit/1`.
    pub schema: &'static str,
    /// The capture.
    pub capture: String,
    /// The model file.
    pub model: String,
    /// The arithmetic that the capture was held against.
    pub arithmetic: ArithmeticOrigin,
    /// Tokens replayed.
    pub tokens: usize,
    /// Steps replayed.
    pub steps: usize,
    /// What was judged, in the order of computation.
    pub stages: Vec<StageAudit>,
    /// What was not, and why.
    pub not_measured: Vec<NotMeasured>,
    /// What follows.
    pub verdict: Verdict,
    /// What a diagnosis goes on from; `None` if nothing was replayed.
    #[serde(skip)]
    pub(crate) replayed: Option<Replayed>,
}

/// What was replayed, and under what arithmetic.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Replayed {
    pub(crate) declared: Declared,
    /// The tokens of each step.
    pub(crate) steps: Vec<Vec<u32>>,
    pub(crate) bound: Bound,
}

/// Something that could not be measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotMeasured {
    /// The stage; all of them if there is none.
    #[serde(serialize_with = "optional_site")]
    pub site: Option<Site>,
    /// Why.
    pub because: String,
}

impl NotMeasured {
    pub(crate) fn all(because: String) -> Self {
        Self { site: None, because }
    }

    pub(crate) fn of((&site, because): (&Site, &String)) -> Self {
        Self { site: Some(site), because: because.clone() }
    }
}

impl fmt::Display for NotMeasured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.site {
            Some(site) => write!(f, "{site}: {}", self.because),
            None => f.write_str(&self.because),
        }
    }
}

/// What follows from an audit.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// Every stage does what its arithmetic says.
    Match,
    /// Some stages do something else.
    Diverges {
        /// The first of them, in the order of computation.
        #[serde(serialize_with = "crate::site")]
        first: Site,
        /// All of them.
        #[serde(serialize_with = "crate::sites")]
        all: Vec<Site>,
    },
    /// Nothing, or not everything, could be judged, and what could be is as it should be.
    Unmeasured {
        /// What is missing.
        because: String,
    },
}

impl Verdict {
    /// The exit code that stands for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Match => 0,
            Self::Diverges { .. } => 1,
            Self::Unmeasured { .. } => 3,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Match => f.write_str("MATCH: every stage does what its arithmetic says"),
            Self::Diverges { first, all } => {
                write!(f, "DIVERGES at {first}")?;
                match all.len() - 1 {
                    0 => f.write_str(", the only stage that does"),
                    n => write!(f, ", and {n} more by themselves"),
                }
            }
            Self::Unmeasured { because } => write!(f, "UNMEASURED: {because}"),
        }
    }
}

impl Audit {
    /// The stages that are wrong, in the order of computation.
    pub fn faults(&self) -> impl Iterator<Item = &StageAudit> {
        self.stages.iter().filter(|stage| stage.is_fault())
    }

    /// What was found out about `site`.
    pub fn stage(&self, site: Site) -> Option<&StageAudit> {
        self.stages.iter().find(|stage| stage.site == site)
    }
}

/// Judges each stage of `capture` by itself, with the weights of `checkpoint`.
pub fn audit(
    capture: &Capture,
    checkpoint: &Checkpoint,
    options: &Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<Audit> {
    let config = read_config(checkpoint)?;
    same_model(capture, &config, checkpoint)?;
    let name = |path: &std::path::Path| path.display().to_string();
    let mut audit = Audit {
        schema: "apr-audit/1",
        capture: name(capture.path()),
        model: name(checkpoint.path()),
        arithmetic: ArithmeticOrigin {
            name: "unknown".to_owned(),
            from: ArithmeticFrom::Inferred { candidates: Vec::new() },
        },
        tokens: 0,
        steps: 0,
        stages: Vec::new(),
        not_measured: Vec::new(),
        verdict: Verdict::Match,
        replayed: None,
    };
    let steps = match &options.tokens {
        Some(tokens) if capture.steps().len() == 1 => Ok(vec![tokens.clone()]),
        Some(_) => Err(NotMeasured::all(format!(
            "it has {} steps, and tokens can be given of one only; capture them in one step",
            capture.steps().len()
        ))),
        None => replay::steps(capture),
    };
    let steps = match steps {
        Ok(steps) => steps,
        Err(why) => {
            audit.verdict = Verdict::Unmeasured { because: why.because.clone() };
            audit.not_measured.push(why);
            return Ok(audit);
        }
    };
    (audit.steps, audit.tokens) = (steps.len(), steps.iter().map(Vec::len).sum());

    let mut declared = match options.arithmetic.clone().or_else(|| Declared::by(capture)) {
        Some(declared) => declared,
        None => infer(capture, checkpoint, &steps)?,
    };
    declared = declared.captured_by(capture);
    if options.rounded_weights {
        declared.units.weights = 0.5;
    }
    audit.arithmetic = declared.origin.clone();
    let (model, mailbox) = replay::load(checkpoint, &declared)?;
    let replay = Replay::new(capture, &model, mailbox, &steps, progress).run(&model, &steps)?;

    let comparisons = replay.records.values().map(|record| record.elements as f64).sum();
    let bound = Bound::for_comparisons(comparisons);
    let captured = Captured::all(&replay.records, &steps);
    audit.stages = stages(&replay.records, bound, &config, &captured);
    for stage in &mut audit.stages {
        stage.routing = replay.routing.get(&stage.site).map(|routing| routing.judged(bound));
    }
    let gaps = Gaps::of(&replay, model.plan().sites(), &config, &captured, bound);
    audit.not_measured = gaps.all();
    let missed = if options.common { gaps.unjudged() } else { gaps.all() };
    audit.verdict = verdict(&audit, &missed);
    audit.replayed = Some(Replayed { declared, steps, bound });
    Ok(audit)
}

fn same_model(capture: &Capture, config: &Config, checkpoint: &Checkpoint) -> Result<()> {
    let Some(captured) = capture.dims() else { return Ok(()) };
    let ours = Dims::from(config);
    let pairs = [
        ("num_hidden_layers", captured.num_hidden_layers, ours.num_hidden_layers),
        ("hidden_size", captured.hidden_size, ours.hidden_size),
        ("num_attention_heads", captured.num_attention_heads, ours.num_attention_heads),
        ("num_key_value_heads", captured.num_key_value_heads, ours.num_key_value_heads),
        ("head_dim", captured.head_dim, ours.head_dim),
        ("intermediate_size", captured.intermediate_size, ours.intermediate_size),
        ("vocab_size", captured.vocab_size, ours.vocab_size),
    ];
    match pairs.into_iter().find(|(_, captured, found)| captured != found) {
        None => Ok(()),
        Some((key, captured, found)) => Err(Error::OtherModel {
            file: checkpoint.path().display().to_string(),
            key,
            captured: captured.to_string(),
            found: found.to_string(),
        }),
    }
}

/// How many layers of a capture are looked at to infer its arithmetic.
const LAYERS_TO_INFER: usize = 2;

/// The candidate under which the stages of the median layer are nearest to their bounds: a fault touches few of them,
/// arithmetic touches all. Each kind of stage counts, since arithmetics may differ in one of them.
fn infer(capture: &Capture, checkpoint: &Checkpoint, steps: &[Vec<u32>]) -> Result<Declared> {
    // Elementwise stages have next to no arithmetic; they count if there is nothing else.
    let telling = |site: &Site| Class::of(site.stage) != Class::Elementwise;
    let sites = capture.sites();
    let layers: BTreeSet<u32> =
        sites.iter().filter(|site| telling(site)).filter_map(|site| site.layer).collect();
    let enough = layers.iter().nth(LAYERS_TO_INFER - 1);
    let mut best: Option<(f64, Declared)> = None;
    let mut scores = Vec::new();
    for (name, candidate) in Declared::to_try() {
        let candidate = candidate.captured_by(capture);
        let (model, mailbox) = replay::load(checkpoint, &candidate)?;
        let mut quiet = |_: Progress| {};
        let mut replay = Replay::new(capture, &model, mailbox, &steps[..1], &mut quiet);
        if let Some(&last) = enough {
            replay = replay.of_layers(last as usize + 1);
        }
        let replay = replay.run(&model, &steps[..1])?;
        let any_telling = replay.records.keys().any(telling);
        let score: f64 = Stage::all()
            .filter(|&stage| !any_telling || Class::of(stage) != Class::Elementwise)
            .filter_map(|stage| median(ratios(&replay.records, |site| site.stage == stage)))
            // A stage that is infinitely wrong under all candidates must not make them all alike.
            .map(|ratio| ratio.clamp(1.0, f64::MAX).ln())
            .sum();
        scores.push((name.to_owned(), score.exp()));
        if best.as_ref().is_none_or(|(least, _)| score < *least) {
            best = Some((score, candidate));
        }
    }
    let (_, mut best) = best.expect("there are candidates");
    best.origin.from = ArithmeticFrom::Inferred { candidates: scores };
    Ok(best)
}

/// Kinds of stages that share an arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Product,
    Attention,
    Elementwise,
}

impl Class {
    fn of(stage: Stage) -> Self {
        use Stage::*;
        match stage {
            QkvMatmul | AttnOut | FfnGate | FfnUp | FfnOut | MoeRouter | MoeExpertGate
            | MoeExpertUp | MoeExpertOut | LmHead => Self::Product,
            AttnScores | AttnSoftmax | Attention => Self::Attention,
            _ => Self::Elementwise,
        }
    }
}

fn ratios(records: &BTreeMap<Site, Record>, of: impl Fn(Site) -> bool) -> Vec<f64> {
    let chosen = records.iter().filter(|(site, _)| of(**site));
    chosen.map(|(_, record)| record.whole.ratio()).collect()
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len().checked_sub(1)? / 2).copied()
}

fn stages(
    records: &BTreeMap<Site, Record>,
    bound: Bound,
    config: &Config,
    captured: &Captured,
) -> Vec<StageAudit> {
    // Whether the declared arithmetic is the engine's to the bit: then nothing beyond a bound is rounding.
    let sharp = |class| {
        median(ratios(records, |site| Class::of(site.stage) == class))
            .is_none_or(|m| m <= bound.of(1))
    };
    let sharp = [Class::Product, Class::Attention, Class::Elementwise].map(|c| (c, sharp(c)));
    let judged = |(&site, record): (&Site, &Record)| {
        let worst = record.worst(bound);
        let sharp = sharp.iter().any(|&(class, sharp)| class == Class::of(site.stage) && sharp);
        let finding = match () {
            () if worst.excess <= 1.0 => Finding::Explained,
            () if !sharp && rough_excess(record, bound) <= 1.0 => Finding::Close,
            () => Finding::Fault,
        };
        stage(
            site,
            record,
            finding,
            worst,
            bound,
            span(site, config, captured).into_iter().collect(),
        )
    };
    records
        .iter()
        .filter(|(_, record)| record.elements + record.not_finite > 0)
        .map(judged)
        .collect()
}

/// How much larger the local error may be than the floor, in an arithmetic that only resembles the declared one.
const ROUGH: f64 = 2.0;

/// The same with the floor in the place of the slack, for groups large enough that their floor is a measure of itself.
fn rough_excess(record: &Record, bound: Bound) -> f64 {
    const ENOUGH: usize = 8;
    let n = record.rows.len();
    let mut excess = record.whole.rough_ratio() / bound.of(n);
    for (_, _, sums) in &record.rows {
        excess = excess.max(sums.rough_ratio() / bound.of(ENOUGH));
    }
    if n >= ENOUGH {
        for sums in record.heads.iter().chain(&record.channels) {
            excess = excess.max(sums.rough_ratio() / bound.of(n));
        }
    }
    let wrong_category = if record.not_finite > 0 { f64::INFINITY } else { 0.0 };
    (excess / ROUGH).max(wrong_category)
}

fn stage(
    site: Site,
    record: &Record,
    finding: Finding,
    worst: Test,
    bound: Bound,
    span: Vec<Site>,
) -> StageAudit {
    let Sums { exact, captured, dot, .. } = record.whole;
    let n = record.rows.len();
    let mut channels: Vec<(f64, ChannelAudit)> = record
        .channels
        .iter()
        .enumerate()
        .map(|(channel, sums)| {
            (sums.ratio() / bound.of(n), ChannelAudit { channel, errors: sums.errors() })
        })
        .filter(|(excess, _)| *excess > 1.0)
        .collect();
    let channels_beyond = channels.len();
    channels.sort_by(|a, b| b.0.total_cmp(&a.0));
    channels.truncate(StageAudit::CHANNELS);
    let per_bin = record.channels.len().div_ceil(StageAudit::PROFILE).max(1);
    let bins: Vec<Errors> = record
        .channels
        .chunks(per_bin)
        .map(|bin| {
            let mut sums = Sums::default();
            bin.iter().for_each(|channel| sums.merge(channel));
            sums.errors()
        })
        .collect();
    StageAudit {
        site,
        finding,
        errors: record.whole.errors(),
        cosine: if exact > 0.0 && captured > 0.0 {
            dot / (exact * captured).sqrt()
        } else {
            f64::NAN
        },
        norm_ratio: (captured / exact).sqrt(),
        worst,
        worst_element: record.element.map(|(z, group)| Test { group, excess: z / bound.of(1) }),
        elements: record.elements,
        not_finite: record.not_finite,
        span,
        row_limit: bound.of(1),
        channel_limit: bound.of(n),
        rows: record
            .rows
            .iter()
            .map(|&(step, position, sums)| RowAudit {
                step,
                position,
                errors: sums.errors(),
                beyond: sums.ratio() > bound.of(1),
            })
            .collect(),
        heads: record.heads.iter().map(Sums::errors).collect(),
        experts: record
            .experts
            .iter()
            .map(|(&expert, (rows, sums))| ExpertAudit {
                expert,
                rows: *rows,
                errors: sums.errors(),
                beyond: sums.ratio() > bound.of(*rows),
            })
            .collect(),
        routing: None,
        heads_beyond: record
            .heads
            .iter()
            .enumerate()
            .filter(|(_, sums)| sums.ratio() > bound.of(n))
            .map(|(head, _)| head)
            .collect(),
        channels: channels.into_iter().map(|(_, channel)| channel).collect(),
        channels_beyond,
        channels_total: record.channels.len(),
        channel_profile: bins.iter().map(|bin| bin.unexplained).collect(),
        bound_profile: bins.iter().map(|bin| bin.bound).collect(),
    }
}

/// What follows, if `missed` is to be missed.
fn verdict(audit: &Audit, missed: &[NotMeasured]) -> Verdict {
    let all: Vec<Site> = audit.faults().map(|stage| stage.site).collect();
    if let Some(&first) = all.first() {
        return Verdict::Diverges { first, all };
    }
    if audit.stages.is_empty() {
        return Verdict::Unmeasured {
            because: "no stage of the capture could be judged".to_owned(),
        };
    }
    match missed {
        [] => Verdict::Match,
        [first] => Verdict::Unmeasured { because: first.to_string() },
        [first, rest @ ..] => {
            Verdict::Unmeasured { because: format!("{first} (and {} more)", rest.len()) }
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
