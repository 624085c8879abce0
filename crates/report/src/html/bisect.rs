//! The page of a bisection.

use std::collections::BTreeMap;

use apr_audit::{Bisect, Parts};
use apr_diff::{Comparison, Origin};
use apr_model::Site;
use maud::{Markup, html};

use crate::{
    LogitRow,
    audit::{AuditReport, Places},
    bisect::{audited, differences, grafts, optional, prompt, sides, verdict, worst_parts},
    logits::Favourite,
    table::{magnitude, plural},
};

use super::{
    Page, audit,
    chart::{self, Series},
    facts, heat, list,
};

/// The page of a bisection; `logits` are shown side by side.
pub fn bisect(found: &Bisect, logits: &[LogitRow]) -> String {
    let about = format!("{} against {}", found.a.path, found.b.path);
    let mut page = Page::new(about, verdict(found));
    let lines = prompt(&found.prompt);
    if !lines.is_empty() {
        page.section("prompt", "Prompt", list(&lines));
    }
    if let Some(files) = &found.files {
        page.section("files", "Files", list(&differences(files)));
    }
    between(&mut page, found, logits);
    for (prefix, side, audit, report) in audited(found) {
        let report = AuditReport {
            audit,
            diagnoses: &report.diagnoses,
            consequence: None,
            provenance: None,
        };
        audit::sections(&mut page, &report, prefix, side);
    }
    page.section("sides", "The two sides", origins(found));
    page.render()
}

/// What shows when both sides are held side by side.
fn between(page: &mut Page, found: &Bisect, logits: &[LogitRow]) {
    if !found.grafts.is_empty() {
        page.section("grafts", "Put right and run again", list(&grafts(&found.grafts)));
    }
    if !found.comparison.stages.is_empty() {
        page.section("cumulative", "A against B", cumulative(found));
    }
    if !found.parts.is_empty() {
        page.section("parts", "What the difference is made of", parts(&found.parts));
    }
    if !found.harm.is_empty() {
        page.section("harm", "Which tensors hurt most", harm(found));
    }
    if !logits.is_empty() {
        page.section("logits", "Next tokens", side_by_side(logits));
    }
}

fn cumulative(found: &Bisect) -> Markup {
    let errors: BTreeMap<Site, f64> = errors(&found.comparison);
    let series = Series {
        name: "residual stream: A against B".to_owned(),
        values: (0..layers(&errors))
            .map(|layer| {
                errors.get(&Site::layer(layer, apr_model::Stage::PostFfnResidual)).copied()
            })
            .collect(),
    };
    let labels: Vec<String> = (0..series.values.len()).map(|layer| layer.to_string()).collect();
    html! {
        figure {
            figcaption {
                strong { "Cumulative error, as a power of ten. " }
                "A against B, relative L2, the errors of all earlier stages included: where a difference shows, not where it arises."
            }
            @if let Some(audit) = &found.a.audit {
                (heat::errors(&Places::of(audit), "Cumulative error by stage and layer", "cumulative error", &errors))
            }
        }
        @if series.values.iter().flatten().count() > 1 {
            figure {
                figcaption { "How the residual stream drifts apart from layer to layer, relative L2." }
                (chart::curves(&labels, "layer", &[series], "Cumulative error of the residual stream over the layers"))
            }
        }
    }
}

/// The cumulative errors; a NaN on one side only is beyond any.
fn errors(comparison: &Comparison) -> BTreeMap<Site, f64> {
    let error = |stage: &apr_diff::StageComparison| {
        let error = match stage.metrics.categories.mismatched {
            0 => stage.metrics.relative_l2?,
            _ => f64::INFINITY,
        };
        Some((stage.site, error))
    };
    comparison.stages.iter().filter_map(error).collect()
}

fn layers(errors: &BTreeMap<Site, f64>) -> usize {
    errors.keys().filter_map(|site| site.layer).max().map_or(0, |last| last as usize + 1)
}

fn parts(parts: &[Parts]) -> Markup {
    let heading = ["stage", "arithmetic", "weights", "unexplained", "bound", "cumulative"];
    html! {
        p.note {
            "What each stage adds by itself: by its arithmetic's rounding, by weights that differ from B's, by neither; and where all \
             earlier stages' errors have led. Relative L2, the largest first."
        }
        details open[parts.len() <= 60] {
            summary { (plural(parts.len(), "stage")) }
            div.scroll tabindex="0" role="region" aria-label="What the difference is made of" {
                table.list {
                    thead { tr { @for name in heading { th scope="col" { (name) } } } }
                    tbody {
                        @for part in worst_parts(parts) {
                            tr {
                                th scope="row" { code { (part.site) } }
                                td { (magnitude(part.arithmetic)) }
                                td { (optional(part.weights)) }
                                td { (magnitude(part.unexplained)) }
                                td { (magnitude(part.bound)) }
                                td { (optional(part.cumulative)) }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn harm(found: &Bisect) -> Markup {
    let first = &found.harm[0];
    html! {
        p {
            "As they are, the logits are " (magnitude(first.error)) " from B's (relative L2), KL " (optional(first.kl)) " nats. \
             With one tensor of B's in its place:"
        }
        div.scroll tabindex="0" role="region" aria-label="Which tensors hurt most" {
            table.list.side {
                thead { tr { th scope="col" { "with B's" } th.text scope="col" { "stored as" } th scope="col" { "logits" } th scope="col" { "KL" } } }
                tbody {
                    @for harm in &found.harm {
                        tr {
                            th scope="row" { code { (harm.tensor) } }
                            td.text { (harm.dtype) }
                            td { (magnitude(harm.error_without)) }
                            td { (optional(harm.kl_without)) }
                        }
                    }
                }
            }
        }
    }
}

fn side_by_side(rows: &[LogitRow]) -> Markup {
    let favourite = |favourite: Option<&Favourite>| {
        html! {
            @match favourite {
                Some(f) => {
                    @if let Some(text) = &f.text { code { (format!("{text:?}")) } " " }
                    span.note { "#" (f.id) } " " (format!("{:.1} %", 100.0 * f.probability))
                }
                None => "–",
            }
        }
    };
    html! {
        p.note { "The likeliest next tokens after a position, with their probabilities; ≠ marks other favourites." }
        @for row in rows {
            @let same = row.a.first().map(|f| f.id) == row.b.first().map(|f| f.id);
            h3 {
                "After position " (row.position)
                @if let Some(token) = &row.token { ", " code { (format!("{token:?}")) } }
                @if !same { " ≠" }
            }
            div.scroll tabindex="0" role="region" aria-label={ "Next tokens after position " (row.position) } {
                table.list.side {
                    thead { tr { th scope="col" { "place" } th.text scope="col" { "A" } th.text scope="col" { "B" } } }
                    tbody {
                        @for place in 0..row.a.len().max(row.b.len()) {
                            tr {
                                th scope="row" { (place + 1) }
                                td.text { (favourite(row.a.get(place))) }
                                td.text { (favourite(row.b.get(place))) }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn origins(found: &Bisect) -> Markup {
    let compared = [&found.comparison.a, &found.comparison.b];
    html! {
        @for ((letter, role, side), origin) in sides(found).into_iter().zip(compared) {
            h3 { (letter) ", " (role) }
            (facts([
                ("path", Some(side.path.clone())),
                ("engine", Some(side.engine.clone())),
                ("made by", origin.tool.clone()),
                ("backend", origin.backend.clone()),
                ("of the model", origin.model.clone()),
                ("plan", origin.plan_fingerprint.clone()),
                ("rounds", rounds(origin)),
            ]))
        }
    }
}

fn rounds(origin: &Origin) -> Option<String> {
    let arithmetic = origin.arithmetic.as_ref()?;
    let mut parts = Vec::new();
    if !arithmetic.activations.is_empty() {
        parts.push(format!("activations to {}", arithmetic.activations.join(", ")));
    }
    parts.extend(arithmetic.kv.as_ref().map(|kv| format!("the cache to {kv}")));
    Some(if parts.is_empty() { "nothing".to_owned() } else { parts.join("; ") })
}
