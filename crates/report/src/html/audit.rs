//! The page of an audit.

use apr_audit::{ArithmeticFrom, Audit, Errors, Finding, StageAudit};
use apr_capture::Provenance;
use maud::{Markup, html};

use crate::{
    audit::{
        AuditReport, Places, arithmetic, excess, fault, made_by, place, reasons, sign, word,
        worst_first,
    },
    table::{magnitude, number, plural},
    words,
};

use super::{
    Page,
    chart::{self, Bar, Series},
    facts, heat, list,
};

/// Wrong stages that are shown at length.
const FAULTS_SHOWN: usize = 12;
/// Rows and channels that are listed of one.
const LISTED: usize = 64;

/// Of those, as many are unfolded.
const FAULTS_OPEN: usize = 3;

/// The page of an audit.
pub fn audit(report: &AuditReport<'_>) -> String {
    let mut page = Page::new(format!("audit of {}", report.audit.capture), report.verdict());
    sections(&mut page, report, "", "");
    page.render()
}

/// The sections of an audit, of a side of several if `side` says which: ` of A`. `prefix` tells their ids apart.
pub(super) fn sections(page: &mut Page, report: &AuditReport<'_>, prefix: &str, side: &str) {
    let audit = report.audit;
    let mut add = |id: &str, heading: &str, body: Markup| {
        page.section(&format!("{prefix}{id}"), &format!("{heading}{side}"), body);
    };
    if !audit.stages.is_empty() {
        add("map", "Stages by layer", maps(audit));
    }
    if audit.faults().next().is_some() {
        add("faults", "Wrong stages", faults(report));
    }
    if !audit.stages.is_empty() {
        let places = Places::of(audit);
        if places.layers > 1 {
            add("layers", "Errors by layer", drift(audit, places.layers));
        }
    }
    if !audit.not_measured.is_empty() {
        add("missing", "Not measured", list(&reasons(&audit.not_measured)));
    }
    if !audit.stages.is_empty() {
        add("stages", "All stages", stages(audit, side.is_empty()));
    }
    add("origin", "Where it comes from", origin(audit, report.provenance));
}

fn maps(audit: &Audit) -> Markup {
    let places = Places::of(audit);
    html! {
        figure {
            figcaption {
                strong { "Unexplained error, in units of its bound. " }
                "Each stage was recomputed from what the engine itself had, in the arithmetic that it declares; the number \
                 is the worst of the tests by tensor, row, head, channel and element. Up to 1 is what accumulation does; \
                 ✗ marks what is wrong."
            }
            (heat::unexplained(&places))
        }
        figure {
            figcaption {
                strong { "Local error, as a power of ten. " }
                "Against exact arithmetic, relative L2: −7 is between 1e-7 and 1e-6. This is what each stage adds by itself, \
                 its arithmetic's own rounding included."
            }
            (heat::local(&places))
        }
    }
}

/// The largest errors within each layer.
fn drift(audit: &Audit, layers: usize) -> Markup {
    let largest = |of: fn(&Errors) -> f64| -> Vec<Option<f64>> {
        (0..layers)
            .map(|layer| {
                let stages = audit.stages.iter().filter(|s| s.site.layer == Some(layer as u32));
                stages.map(|stage| of(&stage.errors)).max_by(f64::total_cmp)
            })
            .collect()
    };
    let series = [
        ("local: captured against exact", largest(|e| e.local)),
        ("floor: what the arithmetic must add", largest(|e| e.floor)),
        ("unexplained: captured against emulated", largest(|e| e.unexplained)),
        ("bound: what accumulation adds", largest(|e| e.bound)),
    ];
    let series = series.map(|(name, values)| Series { name: name.to_owned(), values });
    let labels: Vec<String> = (0..layers).map(|layer| layer.to_string()).collect();
    html! {
        figure {
            figcaption { "The largest of each over the stages of a layer, relative L2. Local and floor lie on each other where the \
                declared arithmetic is the engine's." }
            (chart::curves(&labels, "layer", &series, "Errors over the layers; the table of all stages has the numbers"))
        }
    }
}

fn faults(report: &AuditReport<'_>) -> Markup {
    let all: Vec<&StageAudit> = report.audit.faults().collect();
    html! {
        @for (index, stage) in all.iter().take(FAULTS_SHOWN).enumerate() {
            details.fault open[index < FAULTS_OPEN] {
                summary { (sign(stage.finding)) " " code { (stage.site) } ": " (words::site(stage.site)) }
                @if let Some(diagnosis) = report.diagnosis(stage.site) { p.diagnosis { strong { (diagnosis) } } }
                (fault_at_length(report.audit, stage))
            }
        }
        @if all.len() > FAULTS_SHOWN {
            p { "And " (plural(all.len() - FAULTS_SHOWN, "more wrong stage")) ", in the table of all stages." }
        }
    }
}

/// A wrong stage: in words, by rows and by channels.
fn fault_at_length(audit: &Audit, stage: &StageAudit) -> Markup {
    let many_steps = audit.steps > 1;
    let rows: Vec<Bar> = stage
        .rows
        .iter()
        .map(|row| Bar {
            label: row.position.to_string(),
            name: row.position.to_string(),
            value: shown(row.errors.unexplained, row.errors.bound * stage.row_limit, row.beyond),
            limit: row.errors.bound * stage.row_limit,
            beyond: row.beyond,
        })
        .collect();
    let channels = profile(stage);
    html! {
        (list(&fault(audit, stage)))
            @if rows.len() > 1 {
                figure {
                    figcaption { "Unexplained error by position; the line is the most that accumulation may leave, ✗ is beyond it." }
                    (chart::bars(&rows, "position", &format!("Unexplained error of {} by position", stage.site)))
                }
            }
            @if channels.len() > 1 {
                figure {
                    figcaption {
                        "Unexplained error by channel"
                        @if channels.len() < stage.channels_total {
                            ", " (stage.channels_total.div_ceil(channels.len())) " neighbours to a bar"
                        }
                        "; the line is the most that accumulation may leave."
                    }
                    (chart::bars(&channels, "channel", &format!("Unexplained error of {} by channel", stage.site)))
                }
            }
            details {
                summary { "Rows and channels in numbers" }
                div.columns {
                    (numbers(
                        "position",
                        stage.rows.iter().filter(|row| row.beyond).map(|row| {
                            let step = if many_steps { format!(" (step {})", row.step) } else { String::new() };
                            (format!("{}{step}", row.position), row.errors)
                        }),
                    ))
                    (numbers("channel", stage.channels.iter().map(|c| (c.channel.to_string(), c.errors))))
                }
            }
    }
}

/// What is beyond its limit though its numbers are not has a NaN, and no height is enough for that.
fn shown(value: f64, limit: f64, beyond: bool) -> f64 {
    if beyond && value <= limit { f64::INFINITY } else { value }
}

/// The channels of a stage in bins of neighbours.
fn profile(stage: &StageAudit) -> Vec<Bar> {
    let bins = stage.channel_profile.len();
    let per_bin = stage.channels_total.div_ceil(bins.max(1)).max(1);
    let beyond = |bin: usize| stage.channels.iter().any(|channel| channel.channel / per_bin == bin);
    stage
        .channel_profile
        .iter()
        .zip(&stage.bound_profile)
        .enumerate()
        .map(|(bin, (&value, &bound))| {
            let first = bin * per_bin;
            let last = (first + per_bin).min(stage.channels_total) - 1;
            let name = if first == last { first.to_string() } else { format!("{first}–{last}") };
            let limit = bound * stage.channel_limit;
            Bar {
                label: first.to_string(),
                name,
                value,
                limit,
                beyond: value > limit || beyond(bin),
            }
        })
        .collect()
}

fn numbers(what: &str, rows: impl Iterator<Item = (String, Errors)>) -> Markup {
    let rows: Vec<(String, Errors)> = rows.collect();
    html! {
        div.scroll tabindex="0" role="region" aria-label={ "Beyond the bound, by " (what) } {
            @if rows.is_empty() {
                p.note { "No single " (what) " is beyond its bound." }
            } @else {
                table.list.side {
                    thead { tr { th scope="col" { (what) } th scope="col" { "local" } th scope="col" { "floor" }
                        th scope="col" { "unexplained" } th scope="col" { "bound" } } }
                    tbody {
                        @for (name, e) in rows.iter().take(LISTED) {
                            tr { th scope="row" { (name) } @for x in [e.local, e.floor, e.unexplained, e.bound] { td { (magnitude(x)) } } }
                        }
                    }
                }
                @if rows.len() > LISTED { p.note { "and " (rows.len() - LISTED) " more; JSON has all" } }
            }
        }
    }
}

/// The table of all stages, unfolded if it is what the page is about and not too long.
fn stages(audit: &Audit, unfolded: bool) -> Markup {
    let spans = audit.stages.iter().any(|stage| !stage.span.is_empty());
    let row_class = |finding| match finding {
        Finding::Explained => None,
        Finding::Close => Some("close"),
        Finding::Fault => Some("bad"),
    };
    html! {
        p.note {
            "Wrong ones first, then by how near they come to their bound. Local: captured against exact; floor: what the arithmetic \
             must add; unexplained: captured against emulated; bound: what accumulation adds, one standard deviation; all relative L2. \
             Excess: the worst test in units of its limit."
        }
        details open[unfolded && audit.stages.len() <= 100] {
            summary { (plural(audit.stages.len(), "stage")) }
            div.scroll tabindex="0" role="region" aria-label="All stages" {
                table.list {
                    thead {
                        tr {
                            @for name in ["stage", "finding", "local", "floor", "unexplained", "bound", "excess"] { th scope="col" { (name) } }
                            th.text scope="col" { "worst at" }
                            @if spans { th.text scope="col" { "judged together with" } }
                        }
                    }
                    tbody {
                        @for stage in worst_first(audit) {
                            tr class=[row_class(stage.finding)] {
                                @let e = stage.errors;
                                th scope="row" { code { (stage.site) } }
                                td { (sign(stage.finding)) " " (word(stage.finding)) }
                                @for x in [e.local, e.floor, e.unexplained, e.bound] { td { (magnitude(x)) } }
                                td { (excess(stage.worst.excess)) }
                                td.text { (place(audit, stage, &stage.worst)) }
                                @if spans {
                                    td.text { (stage.span.iter().map(|s| s.to_string()).collect::<Vec<_>>().join(", ")) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Both sides: the capture, and what it was held against.
fn origin(audit: &Audit, provenance: Option<&Provenance>) -> Markup {
    let model = provenance.map(|p| &p.model);
    let plan = provenance.and_then(|p| p.plan.as_ref()).and_then(|plan| plan.fingerprint.clone());
    let threads = provenance.and_then(|p| p.backend.as_ref()?.threads);
    html! {
        h3 { "The capture" }
        (facts([
            ("path", Some(audit.capture.clone())),
            ("made by", provenance.map(made_by).or(Some("unknown: it has no manifest".to_owned()))),
            ("threads", threads.map(|n| n.to_string())),
            ("of the model", model.map(|m| m.path.clone())),
            ("architecture", model.and_then(|m| m.architecture.clone())),
            ("index SHA-256", model.and_then(|m| m.index_sha256.clone())),
            ("file SHA-256", model.and_then(|m| m.file_sha256.clone())),
            ("cache", provenance.and_then(|p| p.kv.clone())),
            ("plan", plan),
            ("prompt", provenance.and_then(|p| p.prompt.as_ref()?.text.clone())),
            ("tokens", Some(format!("{} in {}", audit.tokens, plural(audit.steps, "step")))),
        ]))
        h3 { "What it was held against" }
        (facts([("model file", Some(audit.model.clone())), ("arithmetic", Some(arithmetic(&audit.arithmetic)))]))
        @if let ArithmeticFrom::Inferred { candidates } = &audit.arithmetic.from {
            @if !candidates.is_empty() {
                details {
                    summary { "The arithmetics that were tried" }
                    div.scroll tabindex="0" role="region" aria-label="The arithmetics that were tried" {
                        table.list.side {
                            thead { tr { th scope="col" { "arithmetic" } th scope="col" { "the median stage, in units of its bound" } } }
                            tbody { @for (name, score) in candidates { tr { th scope="row" { (name) } td { (number(*score)) } } } }
                        }
                    }
                }
            }
        }
    }
}
