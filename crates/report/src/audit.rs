//! Audits as text and as JSON.
//!
//! The map shows every stage of every layer as one sign, the table the stages that are furthest from what they may be, and
//! each wrong stage is told at length. The verdict comes last, where a terminal ends.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use apr_audit::{
    ArithmeticFrom, ArithmeticOrigin, Audit, Consequence, Diagnosis, Finding, Flip, Group,
    NotMeasured, Routing, StageAudit, Test, Verdict,
};
use apr_capture::Provenance;
use apr_model::{Axes, Site, Stage};
use serde::{Serialize, Serializer};

use crate::{
    table::{lines, magnitude, number, plural, table},
    words,
};

/// An audit and what is known about it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct AuditReport<'a> {
    /// The audit.
    #[serde(flatten)]
    pub audit: &'a Audit,
    /// What is the matter with the stages that are wrong.
    pub diagnoses: &'a [Diagnosis],
    /// What the wrong stages do to the logits, if any is wrong.
    pub consequence: Option<&'a Consequence>,
    /// Where the capture comes from, if it says so; in JSON, what made it.
    #[serde(rename = "made_by", serialize_with = "maker")]
    pub provenance: Option<&'a Provenance>,
}

fn maker<S: Serializer>(
    provenance: &Option<&Provenance>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    provenance.map(made_by).serialize(serializer)
}

/// How an audit is told.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Stages in the table.
    pub limit: usize,
    /// Whether signs and verdicts are coloured, for terminals.
    pub colour: bool,
}

/// Wrong stages that are told at length.
const FAULTS_TOLD: usize = 8;
/// Sites that are named in a list.
const SITES_NAMED: usize = 6;

impl AuditReport<'_> {
    /// The report as text.
    pub fn text(&self, options: &Options) -> String {
        let (audit, paint) = (self.audit, Paint(options.colour));
        let mut out = header(audit, self.provenance);
        if !audit.stages.is_empty() {
            out += "\n";
            out += &paint.signs(&map(audit));
            out += "\n";
            out += &paint.signs(&worst_stages(audit, options.limit));
        }
        out +=
            &crate::diff::section("routers that were about to choose otherwise", &near_ties(audit));
        out += &faults(audit, self.diagnoses, paint);
        out += &self.consequence.map_or(String::new(), consequence);
        out += &not_measured(&audit.not_measured);
        out += "\n";
        out + &paint.verdict(&self.verdict()) + "\n"
    }

    /// What follows, in words to act on; the first word is the verdict.
    pub(crate) fn verdict(&self) -> String {
        verdict(self.audit, self.diagnoses)
    }

    /// What is the matter with the stage at `site`.
    pub(crate) fn diagnosis(&self, site: Site) -> Option<&Diagnosis> {
        self.diagnoses.iter().find(|diagnosis| diagnosis.site == site)
    }
}

/// What the wrong stages do to the logits.
fn consequence(c: &Consequence) -> String {
    let rows = c.logits.rows + c.logits.rows_with_nan;
    let changed = rows - c.logits.argmax_agree;
    let mut out = format!(
        "\nwith {} and what follows from it done right, the favourite token is another one in {changed} of {}",
        c.from,
        plural(rows, "row"),
    );
    if let Some(first) = &c.logits.first_disagreement {
        let position = first.position.map_or("?".to_owned(), |p| p.to_string());
        let _ = write!(out, ", first at position {position}: {} instead of {}", first.b, first.a);
    }
    let _ = write!(out, "; the logits are off by {}", magnitude(c.relative_l2));
    if let Some(kl) = c.logits.kl_mean {
        let _ = write!(out, " (KL {} nats)", magnitude(kl));
    }
    out + "\n"
}

/// The wrong stages at length.
pub(crate) fn faults(audit: &Audit, diagnoses: &[Diagnosis], paint: Paint) -> String {
    let mut out = String::new();
    for stage in audit.faults().take(FAULTS_TOLD) {
        let sign = paint.signs(sign(stage.finding));
        let _ = writeln!(out, "\n{sign} {}: {}", stage.site, words::site(stage.site));
        if let Some(diagnosis) = diagnoses.iter().find(|diagnosis| diagnosis.site == stage.site) {
            let _ = writeln!(out, "  {diagnosis}");
        }
        for line in fault(audit, stage) {
            let _ = writeln!(out, "  {line}");
        }
    }
    let more = audit.faults().count().saturating_sub(FAULTS_TOLD);
    if more > 0 {
        let _ = writeln!(out, "\nand {}, in the table", plural(more, "more wrong stage"));
    }
    out
}

fn header(audit: &Audit, provenance: Option<&Provenance>) -> String {
    let mut out = format!("capture     {}", audit.capture);
    if let Some(by) = provenance.map(made_by) {
        let _ = write!(out, " (by {by})");
    }
    let tokens = match (audit.tokens, audit.steps) {
        (0, _) => "unknown".to_owned(),
        (tokens, 1) => format!("{tokens} in 1 step"),
        (tokens, steps) => format!("{tokens} in {steps} steps"),
    };
    let _ = write!(out, "\nmodel       {}\ntokens      {tokens}\n", audit.model);
    let _ = writeln!(out, "arithmetic  {}", arithmetic(&audit.arithmetic));
    out
}

/// The program and the backend that made a capture.
pub(crate) fn made_by(provenance: &Provenance) -> String {
    let tool = format!("{} {}", provenance.tool.name, provenance.tool.version);
    match &provenance.backend {
        None => tool,
        Some(backend) => match &backend.isa {
            Some(isa) => format!("{tool}, {} backend, {isa}", backend.name),
            None => format!("{tool}, {} backend", backend.name),
        },
    }
}

/// What a capture was held against, and who says so.
pub(crate) fn arithmetic(origin: &ArithmeticOrigin) -> String {
    let who = match &origin.from {
        ArithmeticFrom::Manifest => "the capture declares it".to_owned(),
        ArithmeticFrom::Given => "as given".to_owned(),
        ArithmeticFrom::Inferred { candidates } if candidates.is_empty() => {
            return origin.name.clone();
        }
        ArithmeticFrom::Inferred { candidates } => {
            let score = candidates.iter().map(|(_, score)| *score).fold(f64::INFINITY, f64::min);
            format!(
                "nobody declares it: the best of {} by the median stage, which is at {} of its bound; --arithmetic overrides",
                candidates.len(),
                number(score)
            )
        }
    };
    format!("{} [{who}]", origin.name)
}

/// The sign of a finding. It says by itself what colours only repeat.
pub(crate) fn sign(finding: Finding) -> &'static str {
    match finding {
        Finding::Explained => "✓",
        Finding::Close => "≈",
        Finding::Fault => "✗",
    }
}

/// The word that goes with it.
pub(crate) fn word(finding: Finding) -> &'static str {
    match finding {
        Finding::Explained => "explained",
        Finding::Close => "close",
        Finding::Fault => "FAULT",
    }
}

/// What a place of the map of stages holds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place<'a> {
    /// A judged stage.
    Judged(&'a StageAudit),
    /// Judged together with a later one only.
    InSpan,
    /// Not judged.
    NotMeasured,
    /// The model has no such stage, or nobody knows of it.
    Nothing,
}

/// The stages of an audit, by what they are and of which layer.
#[derive(Debug)]
pub(crate) struct Places<'a> {
    judged: BTreeMap<Site, &'a StageAudit>,
    spans: BTreeSet<Site>,
    missing: BTreeSet<Site>,
    pub(crate) layers: usize,
}

impl<'a> Places<'a> {
    pub(crate) fn of(audit: &'a Audit) -> Self {
        let judged: BTreeMap<Site, &StageAudit> =
            audit.stages.iter().map(|s| (s.site, s)).collect();
        let spans: BTreeSet<Site> =
            audit.stages.iter().flat_map(|s| s.span.iter().copied()).collect();
        let missing: BTreeSet<Site> = audit.not_measured.iter().filter_map(|m| m.site).collect();
        let sites = judged.keys().chain(&spans).chain(&missing);
        let layers = sites.filter_map(|site| site.layer).max().map_or(0, |last| last as usize + 1);
        Self { judged, spans, missing, layers }
    }

    pub(crate) fn at(&self, site: Site) -> Place<'a> {
        match self.judged.get(&site) {
            Some(stage) => Place::Judged(stage),
            None if self.spans.contains(&site) => Place::InSpan,
            None if self.missing.contains(&site) => Place::NotMeasured,
            None => Place::Nothing,
        }
    }

    /// The places of `stage`, layer by layer; those of the whole model have one.
    pub(crate) fn row(&self, stage: Stage) -> Vec<(Site, Place<'a>)> {
        let sites: Vec<Site> = match stage.is_whole_model() {
            true => vec![Site::whole(stage)],
            false => (0..self.layers).map(|layer| Site::layer(layer, stage)).collect(),
        };
        sites.into_iter().map(|site| (site, self.at(site))).collect()
    }

    /// The stages that the model has, with their rows.
    pub(crate) fn rows(&self) -> impl Iterator<Item = (Stage, Vec<(Site, Place<'a>)>)> {
        Stage::all()
            .map(|stage| (stage, self.row(stage)))
            .filter(|(_, row)| row.iter().any(|(_, place)| !matches!(place, Place::Nothing)))
    }
}

/// Every stage of every layer as one sign.
pub(crate) fn map(audit: &Audit) -> String {
    const NAMES: usize = 20;
    let places = Places::of(audit);
    let mut ruler = String::new();
    for layer in (0..places.layers).step_by(10) {
        let _ = write!(ruler, "{layer:<10}");
    }
    let mut out = format!("{:NAMES$}{}\n", "layer", ruler.trim_end());
    for (stage, row) in places.rows() {
        let signs: String = row
            .iter()
            .map(|(_, place)| match place {
                Place::Judged(stage) => match stage.finding {
                    Finding::Explained => "·",
                    other => sign(other),
                },
                Place::InSpan => "-",
                Place::NotMeasured => "?",
                Place::Nothing => " ",
            })
            .collect();
        let _ = writeln!(out, "{:NAMES$}{}", stage.name(), signs.trim_end());
    }
    let used = |sign: &str| out.lines().skip(1).any(|line| line.contains(sign));
    let legend: Vec<&str> = [
        ("·", "· explained by the arithmetic"),
        ("≈", "≈ close to it"),
        ("✗", "✗ wrong"),
        ("-", "- judged only together with a later stage"),
        ("?", "? not measured"),
    ]
    .into_iter()
    .filter_map(|(sign, meaning)| used(sign).then_some(meaning))
    .collect();
    format!("{out}{}\n", legend.join("   "))
}

/// The stages that are furthest beyond, or nearest to, what they may be.
fn worst_stages(audit: &Audit, limit: usize) -> String {
    let stages = worst_first(audit);
    let mut t =
        table(&["stage", "finding", "local", "floor", "unexplained", "bound", "excess", "worst"]);
    for stage in stages.iter().take(limit) {
        let e = stage.errors;
        let mut row = vec![
            stage.site.to_string(),
            format!("{} {}", sign(stage.finding), word(stage.finding)),
        ];
        row.extend([e.local, e.floor, e.unexplained, e.bound].map(magnitude));
        row.extend([excess(stage.worst.excess), place(audit, stage, &stage.worst)]);
        t.add_row(row);
    }
    if let Some(last) = t.column_mut(7) {
        last.set_cell_alignment(comfy_table::CellAlignment::Left);
    }
    let mut out = lines(&t);
    match stages.len().saturating_sub(limit) {
        0 => {}
        more => {
            let _ = writeln!(
                out,
                "and {} nearer to their bound; --all shows them",
                plural(more, "stage")
            );
        }
    }
    out + "(local: captured against exact; floor: what the arithmetic must add; unexplained: captured against emulated;\n \
           bound: what accumulation adds to it; all relative L2. excess: the worst test in units of its limit, 1 is the most)\n"
}

/// The stages of an audit: the wrong ones, then the rest, each by how far they are beyond.
pub(crate) fn worst_first(audit: &Audit) -> Vec<&StageAudit> {
    let mut stages: Vec<&StageAudit> = audit.stages.iter().collect();
    stages.sort_by(|a, b| {
        let key = |stage: &StageAudit| (stage.is_fault(), stage.finding == Finding::Close);
        key(b).cmp(&key(a)).then(b.worst.excess.total_cmp(&a.worst.excess))
    });
    stages
}

pub(crate) fn excess(x: f64) -> String {
    match x {
        x if !x.is_finite() => "inf".to_owned(),
        x if x < 100.0 => format!("{x:.2}"),
        x => number(x),
    }
}

/// Where a test is furthest from what it may be, in words.
pub(crate) fn place(audit: &Audit, stage: &StageAudit, test: &Test) -> String {
    let row = |step: usize, position: usize| match audit.steps {
        0 | 1 => format!("position {position}"),
        _ => format!("position {position} (step {step})"),
    };
    match test.group {
        Group::Whole => "all of it".to_owned(),
        Group::Row { step, position } => row(step, position),
        Group::Head { head } => head_in_words(audit, stage, head),
        Group::Expert { expert } => format!("expert {expert}"),
        Group::Channel { channel } => channel_in_words(audit, stage, channel),
        Group::Element { step, position, head, expert, column, .. } => {
            let row = row(step, position);
            let channel = || channel_in_words(audit, stage, column);
            match (head, expert) {
                (Some(head), _) => format!("{row}, head {head}, key {column}"),
                (None, Some(expert)) => format!("{row}, expert {expert}, {}", channel()),
                (None, None) => format!("{row}, {}", channel()),
            }
        }
    }
}

/// `key head 1` where queries, keys and values stand side by side, `head 1` elsewhere.
pub(crate) fn head_in_words(audit: &Audit, stage: &StageAudit, head: usize) -> String {
    if !matches!(stage.site.stage, Stage::QkvMatmul | Stage::QkvBias) {
        return format!("head {head}");
    }
    let heads_of =
        |of: Stage| audit.stages.iter().find(|s| s.site.stage == of).map(|s| s.heads.len());
    let queries = [Stage::QPostRope, Stage::QNorm, Stage::Attention, Stage::AttnScores];
    let Some(queries) = queries.into_iter().find_map(heads_of) else {
        return format!("head {head} of queries, keys and values");
    };
    let keys = stage.heads.len().saturating_sub(queries) / 2;
    match head.checked_sub(queries) {
        None => format!("query head {head}"),
        Some(key) if key < keys => format!("key head {key}"),
        Some(value) => format!("value head {}", value - keys),
    }
}

fn channel_in_words(audit: &Audit, stage: &StageAudit, channel: usize) -> String {
    match stage.heads.len() {
        0 if stage.site.stage.axes() == Axes::RowSlot => format!("slot {channel}"),
        0 if stage.site.stage == Stage::MoeRouter => format!("expert {channel}"),
        0 => format!("channel {channel}"),
        heads => {
            let head = channel / (stage.channels_total / heads).max(1);
            format!("channel {channel} ({})", head_in_words(audit, stage, head))
        }
    }
}

/// All that is known of a wrong stage, in lines.
pub(crate) fn fault(audit: &Audit, stage: &StageAudit) -> Vec<String> {
    if let Some(routing) = &stage.routing {
        return misrouted(audit, stage, routing);
    }
    let e = stage.errors;
    let mut out = Vec::new();
    if stage.not_finite > 0 {
        out.push(format!(
            "{} captured as NaN or infinite where the replay is not, or the other way round",
            plural(stage.not_finite as usize, "element")
        ));
    }
    if stage.elements > 0 {
        let beyond = e.unexplained / e.bound;
        out.push(format!(
            "unexplained {} of the norm, where accumulation leaves {}{}",
            magnitude(e.unexplained),
            magnitude(e.bound),
            if beyond > 1.0 { format!(": {} that", words::times(beyond)) } else { String::new() },
        ));
        out.push(format!(
            "local error {}, floor {}; |captured| / |exact| = {}, cosine {}",
            magnitude(e.local),
            magnitude(e.floor),
            crate::diff::ratio(Some(stage.norm_ratio)),
            crate::diff::cosine(Some(stage.cosine)),
        ));
    }
    out.extend(affected(audit, stage));
    out.extend(worst_element(audit, stage));
    out.extend(span(stage));
    out
}

/// Rows that went to other experts than their logits say, in lines.
fn misrouted(audit: &Audit, stage: &StageAudit, routing: &Routing) -> Vec<String> {
    const TOLD: usize = 4;
    let flips: Vec<&Flip> = routing.flips.iter().filter(|flip| !flip.explained).collect();
    let mut out = affected(audit, stage);
    out.extend(flips.iter().take(TOLD).map(|flip| flip_in_words(flip, routing.experts)));
    if flips.len() > TOLD {
        out.push(format!("and {}", plural(flips.len() - TOLD, "more row")));
    }
    out.extend(span(stage));
    out
}

fn flip_in_words(flip: &Flip, experts: usize) -> String {
    fn joined<T: ToString>(ids: &[T]) -> String {
        ids.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
    }
    let (position, captured, expected) =
        (flip.position, joined(&flip.captured), joined(&flip.expected));
    let is_id = |id: f64| id >= 0.0 && id < experts as f64 && id.fract() == 0.0;
    let is_twice = |id: f64| flip.captured.iter().filter(|&&other| other == id).count() > 1;
    let said =
        format!("position {position}: experts {captured}, where the logits choose {expected}");
    if let Some(id) = flip.captured.iter().find(|&&id| !is_id(id)) {
        return format!("{said}; {id} is none of {experts} experts");
    }
    if let Some(id) = flip.captured.iter().find(|&&id| is_twice(id)) {
        return format!("{said}; {id} occurs twice");
    }
    let (Some(left_out), Some(taken)) = (flip.left_out().next(), flip.taken().next()) else {
        return said;
    };
    format!(
        "{said}; the logit of {left_out} is larger than that of {taken}, by {}: {} what rounding may do",
        magnitude(flip.margin),
        words::times(flip.margin / flip.slack),
    )
}

/// Rows whose choice of experts hung by a hair, or went otherwise than expected and is explained.
pub(crate) fn near_ties(audit: &Audit) -> Vec<String> {
    /// What part of the size of a row's logits is a hair.
    const HAIR: f64 = 1e-3;
    let mut out = Vec::new();
    for stage in &audit.stages {
        let Some(routing) = &stage.routing else { continue };
        if let Some(tie) = routing.nearest.filter(|tie| tie.relative < HAIR) {
            out.push(format!(
                "{}: at position {}, expert {} is ahead of {} by {} only, {} of the logits' size",
                stage.site,
                tie.position,
                tie.chosen,
                tie.next,
                magnitude(tie.margin),
                magnitude(tie.relative),
            ));
        }
        let explained = routing.flips.iter().filter(|flip| flip.explained);
        out.extend(explained.map(|flip| {
            let (left_out, taken) = (flip.left_out().next(), flip.taken().next());
            format!(
                "{}: at position {}, expert {} was taken and not {}: their logits are as good as equal",
                stage.site,
                flip.position,
                taken.unwrap_or(f64::NAN),
                left_out.unwrap_or(0),
            )
        }));
    }
    out
}

/// Which rows, heads, experts and channels are wrong.
pub(crate) fn affected(audit: &Audit, stage: &StageAudit) -> Vec<String> {
    let rows: Vec<usize> = stage.rows_beyond().map(|row| row.position).collect();
    let mut out =
        vec![wrong("row", rows.len(), stage.rows.len(), || words::counted("position", &rows))];
    if stage.routing.is_some() {
        return out;
    }
    if !stage.experts.is_empty() {
        let experts: Vec<usize> =
            stage.experts.iter().filter(|e| e.beyond).map(|e| e.expert).collect();
        let named = || words::numbers(experts.clone());
        out.push(wrong("expert", experts.len(), stage.experts.len(), named));
    }
    if !stage.heads.is_empty() {
        let heads = &stage.heads_beyond;
        out.push(wrong("head", heads.len(), stage.heads.len(), || {
            const NAMED: usize = 8;
            let mut named: Vec<String> =
                heads.iter().take(NAMED).map(|&h| head_in_words(audit, stage, h)).collect();
            if heads.len() > NAMED {
                named.push(format!("{} more", heads.len() - NAMED));
            }
            words::join(&named)
        }));
    }
    if stage.channels_total > 0 {
        let (beyond, all) = (stage.channels_beyond, stage.channels_total);
        // A part of them would look like all of them.
        out.push(match beyond > stage.channels.len() && beyond < all {
            true => format!("{beyond} of {all} channels are wrong"),
            false => wrong("channel", beyond, all, || {
                let mut listed: Vec<usize> = stage.channels.iter().map(|c| c.channel).collect();
                listed.sort_unstable();
                words::numbers(listed)
            }),
        });
    }
    out
}

/// `3 of 35 rows are wrong: ` and which, if not all are.
fn wrong(what: &str, wrong: usize, all: usize, which: impl Fn() -> String) -> String {
    match wrong {
        0 => format!("no single {what} is beyond its bound, of {all}"),
        1 if all == 1 => format!("the only {what} is wrong"),
        n if n == all => format!("all {n} {what}s are wrong"),
        1 => format!("1 of {all} {what}s is wrong: {}", which()),
        n => format!("{n} of {all} {what}s are wrong: {}", which()),
    }
}

/// The element that is furthest off, and what it should be.
fn worst_element(audit: &Audit, stage: &StageAudit) -> Option<String> {
    let test = stage.worst_element?;
    let Group::Element { captured, expected, .. } = test.group else { return None };
    Some(format!(
        "the worst element, {}: captured {}, expected {}",
        place(audit, stage, &test),
        number(captured),
        number(expected)
    ))
}

/// The captured stages around a fault that was not seen at one stage alone.
pub(crate) fn span(stage: &StageAudit) -> Option<String> {
    let first = stage.span.first()?;
    Some(format!(
        "judged over the span {first}..{}, because {} not captured: the fault is in one of these or in {} itself",
        stage.site,
        were(&stage.span),
        stage.site
    ))
}

fn were(sites: &[Site]) -> String {
    format!("{} {}", named(sites), if sites.len() == 1 { "was" } else { "were" })
}

fn named(sites: &[Site]) -> String {
    let mut parts: Vec<String> = sites.iter().take(SITES_NAMED).map(Site::to_string).collect();
    if sites.len() > SITES_NAMED {
        parts.push(format!("{} more", sites.len() - SITES_NAMED));
    }
    words::join(&parts)
}

/// What was not measured, by reason.
fn not_measured(missing: &[NotMeasured]) -> String {
    let lines = reasons(missing);
    crate::diff::section("not measured, and not judged", &lines)
}

pub(crate) fn reasons(missing: &[NotMeasured]) -> Vec<String> {
    let mut by_reason: BTreeMap<&str, Vec<Site>> = BTreeMap::new();
    for missing in missing {
        by_reason.entry(&missing.because).or_default().extend(missing.site);
    }
    let line = |(because, sites): (&str, Vec<Site>)| match sites.len() {
        0 => because.to_owned(),
        1 => format!("{}: {because}", sites[0]),
        n => format!("{n} stages: {because}: {}", named(&sites)),
    };
    by_reason.into_iter().map(line).collect()
}

fn verdict(audit: &Audit, diagnoses: &[Diagnosis]) -> String {
    let judged = plural(audit.stages.len(), "stage");
    match &audit.verdict {
        Verdict::Match => {
            let close = audit.stages.iter().filter(|s| s.finding == Finding::Close).count();
            let spans = audit.stages.iter().filter(|s| !s.span.is_empty()).count();
            let mut out = match close {
                0 => format!("MATCH: all of {judged} do what the arithmetic says"),
                n => format!(
                    "MATCH: no fault in {judged}; {n} of them only come close to the arithmetic, so that faults smaller than its \
                     rounding would go unseen there"
                ),
            };
            if let Some(largest) =
                audit.stages.iter().max_by(|a, b| a.worst.excess.total_cmp(&b.worst.excess))
            {
                let _ = write!(
                    out,
                    "\n(the stage nearest to its bound is {}, at {} of it",
                    largest.site,
                    excess(largest.worst.excess)
                );
                match spans {
                    0 => out.push(')'),
                    n => {
                        let _ = write!(out, "; {} judged over a span)", plural(n, "stage"));
                    }
                }
            }
            out
        }
        Verdict::Diverges { first, all } => {
            let mut out = format!("DIVERGES at {first}, {}", words::site(*first));
            if let Some(stage) = audit.stage(*first) {
                match stage.not_finite {
                    _ if stage.routing.is_some() => {}
                    0 => {
                        let _ = write!(
                            out,
                            ": off by {} of the norm where the arithmetic allows {}",
                            magnitude(stage.errors.unexplained),
                            magnitude(stage.errors.bound)
                        );
                    }
                    n => {
                        let n = plural(n as usize, "element");
                        let _ = write!(out, ": {n} NaN or infinite on one side only");
                    }
                }
                let _ = write!(out, "\n({})", affected(audit, stage).join("; "));
            }
            if let Some(diagnosis) = diagnoses.iter().find(|diagnosis| diagnosis.site == *first) {
                let _ = write!(out, "\n{diagnosis}");
            }
            if let [_, rest @ ..] = &all[..]
                && !rest.is_empty()
            {
                let _ = write!(
                    out,
                    "\n{}, each by itself: {}",
                    plural(rest.len(), "more stage"),
                    named(rest)
                );
            }
            out += "\nEach stage was recomputed from what the engine itself had: an error arises where it is shown.";
            out + &everywhere(audit)
        }
        Verdict::Unmeasured { because } => {
            let clean = match audit.stages.len() {
                0 => String::new(),
                _ => format!(
                    "\n({judged} judged, none of them wrong; --common judges these and does not miss the rest)"
                ),
            };
            format!("UNMEASURED: {because}{clean}")
        }
    }
}

/// What to try if a stage is wrong in each layer, which faults seldom are and arithmetics are.
fn everywhere(audit: &Audit) -> String {
    let layers = |wrong: bool, stage: Stage| {
        let of_stage =
            audit.stages.iter().filter(|s| s.site.stage == stage && s.site.layer.is_some());
        of_stage.filter(|s| !wrong || s.is_fault()).count()
    };
    let everywhere = Stage::all()
        .find(|&stage| layers(false, stage) > 1 && layers(true, stage) == layers(false, stage));
    match everywhere {
        Some(stage) => format!(
            "\nEvery layer's {stage} is wrong: is the arithmetic the engine's? `apr audit --arithmetic list` lists others."
        ),
        None => String::new(),
    }
}

/// Colour on terminals. Signs and words say the same without it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint(pub(crate) bool);

const RED: &str = "1;31";
const GREEN: &str = "32";
const YELLOW: &str = "33";

impl Paint {
    fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// `text` with its signs coloured.
    pub(crate) fn signs(self, text: &str) -> String {
        let mut out = text.to_owned();
        for (sign, code) in [("✗", RED), ("≈", YELLOW), ("✓", GREEN), ("·", GREEN), ("FAULT", RED)]
        {
            out = out.replace(sign, &self.with(code, sign));
        }
        out
    }

    /// `text` with its first word coloured.
    pub(crate) fn verdict(self, text: &str) -> String {
        let end = text.find([' ', ':']).unwrap_or(text.len());
        let (word, rest) = text.split_at(end);
        let code = match word {
            "MATCH" | "DRIFT" => GREEN,
            "DIVERGES" => RED,
            _ => YELLOW,
        };
        self.with(code, word) + rest
    }
}
