//! Heat maps of stages over layers: tables of coloured numbers.

use std::collections::BTreeMap;

use apr_audit::Finding;
use apr_model::Site;
use maud::{Markup, html};

use crate::audit::{Place, Places, excess, sign, word};

use super::palette;

/// A place of a heat map.
#[derive(Debug)]
struct Cell {
    class: String,
    text: String,
    title: String,
}

impl Cell {
    /// A relative error, told by its decimal exponent.
    fn error(site: Site, what: &str, error: f64) -> Self {
        Self {
            class: palette::of_error(error),
            text: match error {
                // A 0 would be the exponent of 1.
                0.0 => "=".to_owned(),
                x if !x.is_finite() => "∞".to_owned(),
                x => format!("{:.0}", x.log10().floor()).replace('-', "−"),
            },
            title: format!("{site}: {what} {}", crate::table::magnitude(error)),
        }
    }

    fn plain(class: &str, text: &str, title: String) -> Self {
        Self { class: class.to_owned(), text: text.to_owned(), title }
    }
}

/// The local error of each stage.
pub(crate) fn local(places: &Places<'_>) -> Markup {
    let cell = |site, place: Place<'_>| {
        judged_or(site, place, |stage| Cell::error(site, "local error", stage.errors.local))
    };
    html! {
        (table(places, "Local error by stage and layer", cell))
        (legend(palette::errors()))
    }
}

/// Errors that were measured elsewhere, on the map of an audit.
pub(crate) fn errors(
    places: &Places<'_>,
    caption: &str,
    what: &str,
    errors: &BTreeMap<Site, f64>,
) -> Markup {
    let cell = |site: Site, _: Place<'_>| {
        let missing = || Cell::plain("missing", "?", format!("{site}: not compared"));
        Some(errors.get(&site).map_or_else(missing, |&error| Cell::error(site, what, error)))
    };
    html! {
        (table(places, caption, cell))
        (legend(palette::errors()))
    }
}

/// What is unexplained of each stage, in units of what it may be.
pub(crate) fn unexplained(places: &Places<'_>) -> Markup {
    let cell = |site, place: Place<'_>| {
        judged_or(site, place, |stage| {
            let e = stage.errors;
            let number = match stage.worst.excess {
                x if x.is_finite() && x >= 1000.0 => format!("{x:.0e}"),
                x if x.is_finite() && x >= 10.0 => format!("{x:.0}"),
                x if x.is_finite() => format!("{x:.1}"),
                _ => "∞".to_owned(),
            };
            Cell {
                class: match stage.finding {
                    Finding::Fault => format!("{} fault", palette::of_excess(stage.worst.excess)),
                    _ => palette::of_excess(stage.worst.excess),
                },
                text: match stage.finding {
                    Finding::Explained => number,
                    other => format!("{} {number}", sign(other)),
                },
                title: format!(
                    "{site}: {}; unexplained {:.1e}, accumulation {:.1e}; the worst test is at {} of its limit",
                    word(stage.finding),
                    e.unexplained,
                    e.bound,
                    excess(stage.worst.excess)
                ),
            }
        })
    };
    html! {
        (table(places, "Unexplained error by stage and layer, in units of its bound", cell))
        (legend(palette::excesses()))
    }
}

/// The cell of a judged stage; others say why they have no number.
fn judged_or(
    site: Site,
    place: Place<'_>,
    judged: impl Fn(&apr_audit::StageAudit) -> Cell,
) -> Option<Cell> {
    match place {
        Place::Judged(stage) => Some(judged(stage)),
        Place::InSpan => Some(Cell::plain(
            "span",
            "–",
            format!("{site}: not captured, judged together with a later stage"),
        )),
        Place::NotMeasured => Some(Cell::plain("missing", "?", format!("{site}: not measured"))),
        Place::Nothing => None,
    }
}

/// A table with a row per stage and a column per layer.
fn table(
    places: &Places<'_>,
    caption: &str,
    cell: impl Fn(Site, Place<'_>) -> Option<Cell>,
) -> Markup {
    let columns = places.layers.max(1);
    html! {
        div.scroll tabindex="0" role="region" aria-label=(caption) {
            table.heat {
                thead {
                    tr {
                        th.stage scope="col" { "layer" }
                        @for layer in 0..places.layers { th scope="col" { (layer) } }
                    }
                }
                tbody {
                    @for (stage, row) in places.rows() {
                        tr {
                            th.stage scope="row" { (stage.name()) }
                            @for (site, place) in row {
                                @match cell(site, place) {
                                    Some(cell) => {
                                        td class=(cell.class) title=(cell.title)
                                            colspan=[site.layer.is_none().then_some(columns)] { (cell.text) }
                                    }
                                    None => td {},
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn legend(shades: Vec<(String, String)>) -> Markup {
    html! {
        ul.legend aria-label="Colours" {
            @for (class, name) in shades {
                li { span class={ "swatch " (class) } {} (name) }
            }
        }
    }
}
