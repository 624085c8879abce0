//! Comparisons as text. Their JSON is the comparison itself.

use std::fmt::Write;

use apr_diff::{
    Alignment, AprtComparison, Comparison, Location, Logits, Metrics, Origin, Outcome,
    StageComparison, ZeroNorm,
};

use crate::table::{lines, number, table};

/// Stages that were not compared are listed up to this many.
const MISSING_SHOWN: usize = 20;

/// A comparison of two captures.
pub fn captures(c: &Comparison) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "A  {}", origin(&c.a));
    let _ = writeln!(out, "B  {} (reference)", origin(&c.b));
    out += match c.alignment {
        Alignment::Positions => "rows aligned by token position\n",
        Alignment::LastRow => {
            "rows aligned on the LAST row: a side does not know its positions, and tokens could not be compared\n"
        }
    };
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
            "max |diff|",
            "at",
            "A",
            "B",
            "RMS",
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
    }
    if let Some(logits) = c.stages.iter().find_map(|stage| stage.logits.as_ref()) {
        out += "\n";
        out += &tokens(logits);
    }
    if !c.not_compared.is_empty() {
        let _ = writeln!(out, "\nnot compared, and not scored:");
        for missing in c.not_compared.iter().take(MISSING_SHOWN) {
            let _ = writeln!(out, "  {}: {}", missing.name, missing.reason);
        }
        if c.not_compared.len() > MISSING_SHOWN {
            let _ = writeln!(out, "  and {} more", c.not_compared.len() - MISSING_SHOWN);
        }
    }
    out + "\n" + &verdict(&c.outcome, c.tolerance, c.stages.len())
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
    out + &verdict(&c.outcome, c.tolerance, c.stages.len())
}

/// A comparison of two files of values, and the first values of both.
pub fn aprt(c: &AprtComparison, values: usize) -> String {
    let mut t = table(&["", "value"]);
    for (name, value) in metrics(&c.metrics, |at: &usize| format!("element {at}")) {
        t.add_row([name.to_owned(), value]);
    }
    let mut out = lines(&t);
    let pairs = c.values(values);
    if !pairs.is_empty() {
        let mut t = table(&["element", "A", "B", "A - B"]);
        for pair in pairs {
            t.add_row([
                pair.at.to_string(),
                number(pair.a),
                number(pair.b),
                number(pair.a - pair.b),
            ]);
        }
        out += "\n";
        out += &lines(&t);
    }
    out + "\n" + &verdict(&c.outcome, c.tolerance, 1)
}

fn origin(o: &Origin) -> String {
    let details: Vec<&str> =
        [&o.tool, &o.backend, &o.model].into_iter().flatten().map(String::as_str).collect();
    match details.is_empty() {
        true => o.path.clone(),
        false => format!("{}: {}", o.path, details.join(", ")),
    }
}

fn stage_row(stage: &StageComparison) -> Vec<String> {
    let m = &stage.metrics;
    let indent = if stage.site.layer.is_some() { "  " } else { "" };
    let mut row = vec![format!("{indent}{}", stage.site.stage), stage.rows.len().to_string()];
    row.push(relative_l2(m));
    match &m.max_abs {
        Some(pair) => {
            row.extend([number(pair.abs_diff()), place(&pair.at), number(pair.a), number(pair.b)])
        }
        None => row.extend(["-", "-", "-", "-"].map(str::to_owned)),
    }
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

fn relative_l2<At>(m: &Metrics<At>) -> String {
    match m.zero_norm {
        Some(ZeroNorm::Both) => "both zero".to_owned(),
        Some(ZeroNorm::OnlyA) => "A is zero".to_owned(),
        Some(ZeroNorm::OnlyB) => "B is zero".to_owned(),
        None => optional(m.relative_l2),
    }
}

/// `p5 h2 c17`: position, head, channel; `k` is a key's position.
fn place(at: &Location) -> String {
    let mut text = match at.position {
        Some(position) => format!("p{position}"),
        None => format!("row {}", at.row),
    };
    for (letter, value) in [("h", at.head), ("c", at.channel), ("k", at.key)] {
        if let Some(value) = value {
            let _ = write!(text, " {letter}{value}");
        }
    }
    text
}

fn categories<At>(m: &Metrics<At>) -> String {
    let c = &m.categories;
    match (c.mismatched, c.both_nan + c.both_inf) {
        (0, 0) => "0".to_owned(),
        (0, same) => format!("{same} on both"),
        (n, _) => format!("{n} MISMATCHED"),
    }
}

fn tokens(logits: &Logits) -> String {
    let mut out =
        format!("tokens: the favourite agrees in {} of {} rows", logits.argmax_agree, logits.rows);
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
    let mut rows = vec![("compared", m.count.to_string()), ("relative L2", relative_l2(m))];
    if let Some(pair) = &m.max_abs {
        let (a, b) = (number(pair.a), number(pair.b));
        let text = format!("{} at {} (A {a}, B {b})", number(pair.abs_diff()), at(&pair.at));
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
    x.map_or("-".to_owned(), number)
}

fn ratio(x: Option<f64>) -> String {
    x.map_or("-".to_owned(), |x| if x < 100.0 { format!("{x:.4}") } else { number(x) })
}

/// A cosine near 1 is told by its distance from 1.
fn cosine(x: Option<f64>) -> String {
    match x {
        Some(x) if x > 0.999 && x < 1.0 => format!("1-{:.1e}", 1.0 - x),
        Some(x) => format!("{x:.4}"),
        None => "-".to_owned(),
    }
}

fn verdict(outcome: &Outcome, tolerance: f64, compared: usize) -> String {
    format!("{outcome}\n(compared: {compared}; tolerance: relative L2 up to {tolerance:e})\n")
}
