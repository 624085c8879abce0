//! Comparisons as text. Their JSON is the comparison itself, or one that has the same beside it.

use std::{
    fmt::{Display, Write},
    path::Path,
};

use apr_diff::{
    Alignment, AprtComparison, Arithmetic, Comparison, Location, Logits, Metrics, NotCompared,
    Origin, Outcome, Pair, RowScore, StageComparison, ZeroNorm,
};
use serde::Serialize;

use crate::{
    table::{lines, magnitude, number, plural, short, table},
    words,
};

/// Stages that were not compared are listed up to this many.
const MISSING_SHOWN: usize = 20;

/// What the reference is.
pub(crate) const MEASURED_AGAINST: &str = "(what A is measured against)";

/// A comparison of two captures.
pub fn captures(c: &Comparison) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "A  {}", origin(&c.a));
    let _ = writeln!(out, "B  {} {MEASURED_AGAINST}", origin(&c.b));
    out += match c.alignment {
        Alignment::Positions => "rows aligned by token position\n",
        Alignment::LastRow => {
            "rows aligned on the LAST row of both: a side does not know its positions, and tokens could not be compared\n"
        }
    };
    for (side, origin) in [("A", &c.a), ("B", &c.b)] {
        if !origin.complete {
            let _ = writeln!(
                out,
                "note: {side} is incomplete: its writer was interrupted, and only its whole steps are compared"
            );
        }
    }
    if let Some(note) = arithmetic(&c.a, &c.b) {
        let _ = writeln!(out, "note: {note}");
    }
    for d in &c.token_differences {
        let _ = writeln!(
            out,
            "tokens differ from position {} on: {} in A, {} in B; rows from there on are not scored",
            d.position, d.a, d.b
        );
    }

    if !c.stages.is_empty() {
        out += "\n";
        let mut t = table(&[
            "stage",
            "rows",
            "rel L2",
            "worst row",
            "max |diff|",
            "at",
            "A",
            "B",
            "RMS diff",
            "cosine",
            "|A|/|B|",
            "NaN/Inf",
            "",
        ]);
        let mut layer = None;
        for stage in &c.stages {
            if stage.site.layer.is_some() && stage.site.layer != layer {
                t.add_row([format!("layer {}", stage.site.layer.unwrap_or_default())]);
            }
            layer = stage.site.layer;
            t.add_row(stage_row(stage));
        }
        out += &lines(&t);
        let experts = c.stages.iter().any(|stage| stage.site.stage.holds_ids());
        out += match experts {
            true => {
                "(p5 h2 e9 c17 k3: position, head, expert, channel, key; the choice of experts is compared as a set)\n"
            }
            false => "(p5 h2 c17 k3: position, head, channel, key)\n",
        };
    }
    let metrics = c.stages.iter().map(|stage| (stage.site.to_string(), &stage.metrics));
    let notes =
        [mismatches(metrics, Location::to_string, "stage"), dead_rows(&c.stages), flips(&c.stages)];
    let notes: Vec<String> = notes.into_iter().flatten().collect();
    let logits = c.stages.iter().find_map(|stage| stage.logits.as_ref());
    if !notes.is_empty() || logits.is_some() {
        out += "\n";
    }
    notes.iter().for_each(|note| out += note);
    out += &logits.map_or(String::new(), tokens);
    out += &not_compared(c);
    out += "\n";
    let mut outcome = c.outcome.to_string();
    if let Some((site, &RowScore { position: Some(position), .. })) = c.first_row_beyond() {
        let _ = write!(outcome, "\nfirst row beyond the tolerance: position {position} ({site})");
    }
    out += &verdict(outcome, c.tolerance, &plural(c.stages.len(), "stage"));
    if let Outcome::Differs { .. } = c.outcome {
        out += "This is where the difference becomes visible, not necessarily where it arises.\n";
    }
    out
}

/// Elements that are NaN or infinite on one side only: the first, and how many more of `thing` have some.
pub(crate) fn mismatches<'m, At: 'm>(
    all: impl IntoIterator<Item = (String, &'m Metrics<At>)>,
    place: impl Fn(&At) -> String,
    thing: &str,
) -> Option<String> {
    let first = |(name, m): (String, &'m Metrics<At>)| Some((name, m.categories.first.as_ref()?));
    let mut with = all.into_iter().filter_map(first);
    let (name, pair) = with.next()?;
    let (at, a, b, more) = (place(&pair.at), pair.a, pair.b, in_more(with.count(), thing));
    Some(format!("NaN/Inf on one side only: first {name}, {at}: {a} in A, {b} in B{more}\n"))
}

/// Rows that are zero throughout on one side only, told like [`mismatches`].
fn dead_rows(stages: &[StageComparison]) -> Option<String> {
    let dead =
        |stage: &StageComparison| stage.rows.iter().find_map(|r| Some((r.position, r.dead?)));
    let mut with = stages.iter().filter_map(|stage| Some((stage.site, dead(stage)?)));
    let (site, (position, side)) = with.next()?;
    let position = position.map_or("unknown".to_owned(), |p| p.to_string());
    let more = in_more(with.count(), "stage");
    Some(format!(
        "rows of zeros on one side only: first {site}, position {position}, zero in {side}{more}\n"
    ))
}

/// Rows whose experts differ: the first, how close the choice was, and how many more.
fn flips(stages: &[StageComparison]) -> Option<String> {
    let mut all = stages.iter().flat_map(|s| s.flips.iter().map(move |flip| (s.site, flip)));
    let (site, flip) = all.next()?;
    let at = flip.position.map_or(String::new(), |p| format!(", position {p}"));
    let close = match (flip.margin, flip.logits_moved, flip.is_near_tie()) {
        (Some(margin), Some(moved), Some(near)) => format!(
            "; B's logits of them are {} apart and the sides' differ by up to {}, which {} it",
            number(margin),
            number(moved),
            if near { "explains" } else { "does not explain" },
        ),
        _ => "; how close the choice was is not known, for the router's logits were not captured"
            .to_owned(),
    };
    let more = match all.count() {
        0 => String::new(),
        n => format!(" ({})", plural(n, "more such row")),
    };
    Some(format!(
        "other experts chosen: first {site}{at}: {} in A, {} in B{close}{more}\n",
        words::numbers(flip.only_a.iter().copied()),
        words::numbers(flip.only_b.iter().copied()),
    ))
}

fn in_more(count: usize, thing: &str) -> String {
    match count {
        0 => String::new(),
        n => format!("; and in {}", plural(n, &format!("more {thing}"))),
    }
}

fn not_compared(c: &Comparison) -> String {
    let mut lines = listed(&c.not_compared);
    let mut rows = |why: &str, rows: fn(&StageComparison) -> usize| {
        let with: Vec<usize> = c.stages.iter().map(rows).filter(|&n| n > 0).collect();
        if !with.is_empty() {
            let rows = plural(with.iter().sum(), "row");
            lines.push(format!("{rows} of {}: {why}", plural(with.len(), "stage")));
        }
    };
    rows("only in A", |stage| stage.rows_only_a);
    rows("only in B", |stage| stage.rows_only_b);
    rows("the tokens up to there differ", |stage| stage.rows_other_tokens);
    let slots: usize = c.stages.iter().map(|stage| stage.slots_left_out).sum();
    if slots > 0 {
        lines.push(format!("{} of experts that only one side chose", plural(slots, "slot")));
    }
    section("not compared, and not scored", &lines)
        + &section("left out, since only common stages were asked for", &listed(&c.left_out))
}

/// The first of `missing`, and how many more there are.
pub(crate) fn listed(missing: &[NotCompared]) -> Vec<String> {
    let line = |missing: &NotCompared| format!("{}: {}", missing.name, missing.reason);
    let mut lines: Vec<String> = missing.iter().take(MISSING_SHOWN).map(line).collect();
    if missing.len() > MISSING_SHOWN {
        lines.push(format!("and {} more", missing.len() - MISSING_SHOWN));
    }
    lines
}

/// Indented lines under a heading, if there are any.
pub(crate) fn section(heading: &str, lines: &[String]) -> String {
    match lines.is_empty() {
        true => String::new(),
        false => format!("\n{heading}:\n  {}\n", lines.join("\n  ")),
    }
}

/// What the sides round differently, if both say.
fn arithmetic(a: &Origin, b: &Origin) -> Option<String> {
    let (declared_a, declared_b) = (a.arithmetic.as_ref()?, b.arithmetic.as_ref()?);
    if declared_a == declared_b {
        return None;
    }
    let rounds = |of: &Arithmetic| {
        let activations = &of.activations;
        let activations = (!activations.is_empty())
            .then(|| format!("rounds activations to {}", activations.join(", ")));
        let kv = of.kv.as_ref().map(|kv| format!("keeps its cache in {kv}"));
        let parts: Vec<String> = activations.into_iter().chain(kv).collect();
        match parts.is_empty() {
            true => "rounds neither activations nor the cache".to_owned(),
            false => parts.join(" and "),
        }
    };
    let size = if declared_a.activations == declared_b.activations { "1e-3" } else { "1e-2" };
    let mut note = format!(
        "A {}; B {}: differences of about {size} are what such rounding does",
        rounds(declared_a),
        rounds(declared_b),
    );
    // Only our own tracing has options that leave it out.
    let avoidable = |(_, origin, declared): &(&str, &Origin, &Arithmetic)| {
        let ours = origin.tool.as_ref().is_some_and(|tool| tool.starts_with("apr "));
        ours && (!declared.activations.is_empty() || declared.kv.is_some())
    };
    let again: Vec<&str> = [("A", a, declared_a), ("B", b, declared_b)]
        .into_iter()
        .filter(avoidable)
        .map(|(side, ..)| side)
        .collect();
    if !again.is_empty() {
        let _ = write!(
            note,
            "; tracing {} again with `--activations f32 --kv f32` or `--backend reference` leaves it out",
            again.join(" and ")
        );
    }
    Some(note)
}

/// A comparison of two captures in a few lines: the extremes, the tokens, the verdict.
pub fn summary(c: &Comparison) -> String {
    let mut out = String::new();
    let error = |stage: &&StageComparison| stage.metrics.relative_l2.unwrap_or(0.0);
    if let Some(worst) = c.stages.iter().max_by(|a, b| error(a).total_cmp(&error(b))) {
        let _ = writeln!(
            out,
            "{} stages compared; the largest relative L2 is {} at {}",
            c.stages.len(),
            relative_l2(&worst.metrics),
            worst.site,
        );
    }
    if let Some(logits) = c.stages.iter().find_map(|stage| stage.logits.as_ref()) {
        out += &tokens(logits);
    }
    out + &verdict(&c.outcome, c.tolerance, &plural(c.stages.len(), "stage"))
}

/// A comparison of two files of values, and the values that are furthest apart.
#[derive(Clone, Debug, Serialize)]
pub struct AprtReport<'c> {
    /// The numbers.
    #[serde(flatten)]
    pub comparison: &'c AprtComparison,
    /// The file under test.
    pub a: String,
    /// The reference.
    pub b: String,
    /// Pairs of values, those that are furthest apart first.
    pub values: Vec<Pair<usize>>,
}

impl<'c> AprtReport<'c> {
    /// The report of `comparison`, with as many pairs as `values` says.
    pub fn new(a: &Path, b: &Path, comparison: &'c AprtComparison, values: usize) -> Self {
        Self {
            comparison,
            a: a.display().to_string(),
            b: b.display().to_string(),
            values: comparison.values(values),
        }
    }

    /// The report as text.
    pub fn text(&self) -> String {
        let mut out = format!("A  {}\nB  {} {MEASURED_AGAINST}\n\n", self.a, self.b);
        let c = self.comparison;
        for (name, value) in metrics(&c.metrics, |at: &usize| format!("element {at}")) {
            let _ = writeln!(out, "{name:<16}{value}");
        }
        if !self.values.is_empty() {
            let mut t = table(&["element", "A", "B", "A - B"]);
            for pair in &self.values {
                let cells = [pair.a, pair.b, pair.a - pair.b].map(number);
                t.add_row([vec![pair.at.to_string()], cells.to_vec()].concat());
            }
            out += "\n";
            out += &lines(&t);
        }
        let compared = plural(c.metrics.count as usize, "element");
        out + "\n" + &verdict(&c.outcome, c.tolerance, &compared)
    }
}

fn origin(o: &Origin) -> String {
    let plan = o.plan_fingerprint.as_ref().map(|plan| format!("plan {}", short(plan)));
    let details = [&o.tool, &o.backend, &o.model, &plan];
    let details: Vec<&str> = details.into_iter().flatten().map(String::as_str).collect();
    match details.is_empty() {
        true => o.path.clone(),
        false => format!("{}: {}", o.path, details.join(", ")),
    }
}

fn stage_row(stage: &StageComparison) -> Vec<String> {
    let m = &stage.metrics;
    let indent = if stage.site.layer.is_some() { "  " } else { "" };
    let mut row = vec![format!("{indent}{}", stage.site.stage), stage.rows.len().to_string()];
    row.extend([relative_l2(m), worst_row(stage)]);
    row.extend(largest(m, place));
    row.extend([optional(m.rms), cosine(m.cosine), ratio(m.norm_ratio)]);
    row.push(categories(m));
    row.push(
        match (stage.bitwise, stage.within) {
            (true, _) => "same bits",
            (false, true) => "within",
            (false, false) => "DIFFERS",
        }
        .to_owned(),
    );
    row
}

/// The largest relative L2 of a single row, and the row's position.
fn worst_row(stage: &StageComparison) -> String {
    match stage.worst_row() {
        Some(&RowScore { relative_l2: Some(error), position, .. }) if error > 0.0 => {
            let at = position.map_or(String::new(), |p| format!(" p{p}"));
            magnitude(error) + &at
        }
        _ => "-".to_owned(),
    }
}

/// The largest difference, its place and the two values. Where nothing differs there is no place to point at.
pub(crate) fn largest<At>(m: &Metrics<At>, place: impl Fn(&At) -> String) -> [String; 4] {
    match &m.max_abs {
        Some(pair) if pair.abs_diff() == 0.0 => ["0", "-", "-", "-"].map(str::to_owned),
        Some(pair) => [magnitude(pair.abs_diff()), place(&pair.at), number(pair.a), number(pair.b)],
        None => ["-"; 4].map(str::to_owned),
    }
}

pub(crate) fn relative_l2<At>(m: &Metrics<At>) -> String {
    match m.zero_norm {
        Some(ZeroNorm::Both) => "both zero".to_owned(),
        Some(ZeroNorm::OnlyA) => "A is zero".to_owned(),
        Some(ZeroNorm::OnlyB) => "B is zero".to_owned(),
        None => optional(m.relative_l2),
    }
}

/// `p5 h2 c17`: position, head, channel; `e` is an expert, `k` a key's position.
fn place(at: &Location) -> String {
    let mut text = match at.position {
        Some(position) => format!("p{position}"),
        None => format!("row {}", at.row),
    };
    for (letter, value) in [("h", at.head), ("e", at.expert), ("c", at.channel), ("k", at.key)] {
        if let Some(value) = value {
            let _ = write!(text, " {letter}{value}");
        }
    }
    text
}

pub(crate) fn categories<At>(m: &Metrics<At>) -> String {
    let c = &m.categories;
    match (c.mismatched, c.both_nan + c.both_inf) {
        (0, 0) => "0".to_owned(),
        (0, same) => format!("{same} on both"),
        (n, _) => format!("{n} MISMATCHED"),
    }
}

pub(crate) fn tokens(logits: &Logits) -> String {
    let rows = plural(logits.rows + logits.rows_with_nan, "row");
    let mut out = format!("next token: the favourite agrees in {} of {rows}", logits.argmax_agree);
    if let Some(d) = &logits.first_disagreement {
        let _ = write!(
            out,
            ", first not at position {}: {} in A, {} in B (by a margin of {} in B)",
            d.position.map_or("?".to_owned(), |p| p.to_string()),
            d.a,
            d.b,
            number(d.reference_margin),
        );
    }
    if logits.rows_with_nan > 0 {
        let _ = write!(out, "; {} with NaN not compared", plural(logits.rows_with_nan, "row"));
    }
    let _ = writeln!(
        out,
        "; top-{} overlap {}; KL(B||A) mean {} max {} nats",
        logits.top_k,
        logits.top_k_overlap.map_or("-".to_owned(), |share| format!("{:.1} %", share * 100.0)),
        optional(logits.kl_mean),
        optional(logits.kl_max),
    );
    out
}

/// Every number of `m`, by name.
fn metrics<At>(m: &Metrics<At>, at: impl Fn(&At) -> String) -> Vec<(&'static str, String)> {
    let mut rows =
        vec![("compared", plural(m.count as usize, "element")), ("relative L2", relative_l2(m))];
    if let Some(pair) = &m.max_abs {
        let (a, b) = (number(pair.a), number(pair.b));
        let text = match pair.abs_diff() {
            0.0 => "0".to_owned(),
            apart => format!("{} at {} (A {a}, B {b})", number(apart), at(&pair.at)),
        };
        rows.push(("max |diff|", text));
    }
    rows.extend([
        ("RMS diff", optional(m.rms)),
        ("cosine", cosine(m.cosine)),
        ("|A|/|B|", ratio(m.norm_ratio)),
        ("NaN/Inf", categories(m)),
    ]);
    if let Some(pair) = &m.categories.first {
        let text = format!("{}: A {}, B {}", at(&pair.at), pair.a, pair.b);
        rows.push(("first mismatch", text));
    }
    rows
}

fn optional(x: Option<f64>) -> String {
    x.map_or("-".to_owned(), magnitude)
}

pub(crate) fn ratio(x: Option<f64>) -> String {
    x.map_or("-".to_owned(), |x| if x < 100.0 { format!("{x:.4}") } else { number(x) })
}

/// A cosine near 1 is told by its distance from 1.
pub(crate) fn cosine(x: Option<f64>) -> String {
    match x {
        Some(x) if x > 0.999 && x < 1.0 => format!("1-{:.1e}", 1.0 - x),
        Some(x) => format!("{x:.4}"),
        None => "-".to_owned(),
    }
}

pub(crate) fn verdict(outcome: impl Display, tolerance: f64, compared: &str) -> String {
    format!("{outcome}\n(compared: {compared}; tolerance: relative L2 up to {tolerance:e})\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(arithmetic: Option<(&[&str], Option<&str>)>) -> Origin {
        let strings = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        Origin {
            path: "cap".to_owned(),
            tool: Some("apr 1.0".to_owned()),
            model: None,
            backend: None,
            plan_fingerprint: None,
            complete: true,
            arithmetic: arithmetic.map(|(activations, kv)| Arithmetic {
                activations: strings(activations),
                kv: kv.map(str::to_owned),
            }),
        }
    }

    #[test]
    fn two_declared_arithmetics_that_differ_are_noted() {
        let note = |a, b| arithmetic(&origin(Some(a)), &origin(Some(b)));
        let fast = (&["Q8_0", "Q8_K"][..], Some("f16"));
        let exact = (&[][..], None);
        let text = note(fast, exact).unwrap();
        assert!(text.starts_with(
            "A rounds activations to Q8_0, Q8_K and keeps its cache in f16; \
             B rounds neither activations nor the cache: differences of about 1e-2"
        ));
        assert!(note((&[], Some("f16")), exact).unwrap().contains("about 1e-3"));
        assert_eq!(note(fast, fast), None);
        assert!(text.contains("tracing A again"), "{text}");
        assert!(note(exact, fast).unwrap().contains("tracing B again"));
        assert!(note((&[], Some("bf16")), fast).unwrap().contains("tracing A and B again"));
        let foreign = Origin { tool: Some("torch 2".to_owned()), ..origin(Some(fast)) };
        let text = arithmetic(&origin(Some(exact)), &foreign).unwrap();
        assert!(!text.contains("again"), "its tool has other options: {text}");
        assert_eq!(arithmetic(&origin(Some(fast)), &origin(None)), None, "nothing is declared");
    }

    #[test]
    fn rows_of_logits_with_nan_are_not_passed_over() {
        let logits = Logits {
            rows: 5,
            rows_with_nan: 1,
            argmax_agree: 5,
            first_disagreement: None,
            top_k: 10,
            top_k_overlap: Some(1.0),
            kl_mean: Some(0.0),
            kl_max: Some(0.0),
            kl_max_position: None,
        };
        let start = "next token: the favourite agrees in 5 of 6 rows; 1 row with NaN not compared;";
        assert!(tokens(&logits).starts_with(start), "{}", tokens(&logits));
        let whole = Logits { rows_with_nan: 0, ..logits };
        assert!(tokens(&whole).contains("agrees in 5 of 5 rows; top-10"), "{}", tokens(&whole));
    }

    #[test]
    fn cosines_near_one_are_told_by_their_distance() {
        assert_eq!(cosine(Some(1.0 - 2e-9)), "1-2.0e-9");
        assert_eq!(cosine(Some(1.0)), "1.0000");
        assert_eq!(cosine(Some(-0.5)), "-0.5000");
        assert_eq!(cosine(None), "-");
    }
}
