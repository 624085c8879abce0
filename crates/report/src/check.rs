//! What holds of a model and its backend, and what does not.

use std::fmt::Write;

use apr_check::{Break, Checked, Checkup, Outcome, Place};
use serde::Serialize;

use crate::table::{lines, plural, short, table};

/// Breaks and notes of one check that are written out; the JSON has them all.
const SHOWN: usize = 4;

/// The report of `apr check`.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct CheckReport {
    /// `apr-check/1`.
    pub schema: &'static str,
    pub model: String,
    pub container: String,
    pub backend: &'static str,
    pub isa: &'static str,
    pub threads: usize,
    pub kv: &'static str,
    /// Where the prompt of the runs comes from.
    pub prompt: String,
    pub prompt_token_ids: Vec<u32>,
    /// `held`, `broken` or `unmeasured`, which decides the exit code.
    pub verdict: &'static str,
    #[serde(flatten)]
    pub checkup: Checkup,
}

impl CheckReport {
    /// The report of `checkup`, of the model at `model`.
    pub fn new(
        model: String,
        container: String,
        prompt: String,
        prompt_token_ids: Vec<u32>,
        checkup: Checkup,
    ) -> Self {
        let info = &checkup.backend;
        Self {
            schema: "apr-check/1",
            model,
            container,
            backend: info.name,
            isa: info.isa,
            threads: info.threads,
            kv: info.kv.name(),
            prompt,
            prompt_token_ids,
            verdict: match checkup.exit_code() {
                0 => "held",
                1 => "broken",
                _ => "unmeasured",
            },
            checkup,
        }
    }

    /// The report as text.
    pub fn text(&self) -> String {
        let checks = &self.checkup.checks;
        let mut out = format!("model    {} ({})\n", self.model, self.container);
        let threads = plural(self.threads, "thread");
        let _ =
            writeln!(out, "backend  {} ({}, {threads}, kv {})", self.backend, self.isa, self.kv);
        let tokens = plural(self.prompt_token_ids.len(), "token");
        let _ = writeln!(out, "prompt   {tokens}: {}", self.prompt);
        if let Some(plan) = &self.checkup.plan {
            let _ = writeln!(out, "plan     {}", short(plan));
        }
        out += "\n";
        let mut t = table(&["", "check", "looked at", "time"]);
        if let Some(column) = t.column_mut(1) {
            column.set_cell_alignment(comfy_table::CellAlignment::Left);
        }
        if let Some(column) = t.column_mut(2) {
            column.set_cell_alignment(comfy_table::CellAlignment::Left);
        }
        for checked in checks {
            let looked_at = checked.looked_at.as_deref().unwrap_or("-");
            let time = format!("{:.2} s", checked.seconds);
            t.add_row([outcome(checked), checked.name.name(), looked_at, &time]);
        }
        out += &lines(&t);
        checks.iter().for_each(|checked| out += &details(checked));
        out + "\n" + &self.summary()
    }

    /// How many checks ended how, after the word that decides the exit code.
    fn summary(&self) -> String {
        let count = |is: fn(&Outcome) -> bool| self.checkup.count(is);
        let counts = [
            (count(|o| matches!(o, Outcome::Held)), "held"),
            (count(|o| matches!(o, Outcome::Broken { .. })), "broken"),
            (count(|o| matches!(o, Outcome::NotMeasured { .. })), "not measured"),
            (count(|o| matches!(o, Outcome::NotApplicable { .. })), "not applicable"),
        ];
        let counts = counts.into_iter().filter(|(n, _)| *n > 0);
        let counts: Vec<String> = counts.map(|(n, what)| format!("{n} {what}")).collect();
        let all = plural(self.checkup.checks.len(), "check");
        format!("{}: {all}: {}\n", self.verdict.to_uppercase(), counts.join(", "))
    }
}

/// A symbol and a word.
fn outcome(checked: &Checked) -> &'static str {
    match (&checked.outcome, checked.notes.is_empty()) {
        (Outcome::Held, true) => "✓ held",
        (Outcome::Held, false) => "! held, with notes",
        (Outcome::Broken { .. }, _) => "✗ BROKEN",
        (Outcome::NotMeasured { .. }, _) => "· not measured",
        (Outcome::NotApplicable { .. }, _) => "· not applicable",
    }
}

/// What there is to say about a check beyond its line.
fn details(checked: &Checked) -> String {
    let (name, holds) = (checked.name, checked.holds);
    let mut out = match &checked.outcome {
        Outcome::Held => String::new(),
        Outcome::Broken { breaks } => {
            let places = breaks.iter().map(broken);
            format!("\n{name} is BROKEN. What must hold: {holds}\n{}", listed(places))
        }
        Outcome::NotMeasured { why } => format!("\n{name} is not measured: {why}\n"),
        Outcome::NotApplicable { why } => format!("\n{name} does not apply: {why}\n"),
    };
    if !checked.notes.is_empty() {
        let _ = write!(out, "\n{name}, notes:\n{}", listed(checked.notes.iter().cloned()));
    }
    out
}

/// The first few, indented, and how many more there are.
fn listed(all: impl ExactSizeIterator<Item = String>) -> String {
    let more = all.len().saturating_sub(SHOWN);
    let mut out: String = all.take(SHOWN).map(|line| format!("  {line}\n")).collect();
    if more > 0 {
        let _ = writeln!(out, "  and {more} more");
    }
    out
}

fn broken(what: &Break) -> String {
    match what {
        Break::Bits { run, at, expected, found, elements, rows } => {
            let value = match expected {
                Some(expected) => format!("{} instead of {}", exact(*found), exact(*expected)),
                None => "the run to agree with gives other bits when repeated".to_owned(),
            };
            let (elements, rows) = (count(*elements, "element"), count(*rows, "row"));
            format!("{run}: first at {}: {value} ({elements} of {rows} differ there)", place(at))
        }
        Break::Looking { observed, at, expected, found, elements } => {
            let observed = observed.map_or("several sites at once".to_owned(), |s| s.to_string());
            let (expected, found) = (exact(*expected), exact(*found));
            let elements = count(*elements, "logit");
            format!(
                "looking at {observed} changes {elements}, first {}: {found} instead of {expected}",
                place(at)
            )
        }
        Break::NotFinite { at, found, elements, sites } => {
            let (elements, sites) = (count(*elements, "element"), count(*sites, "site"));
            format!("first at {}: {found} ({elements} there; {sites} in all)", place(at))
        }
        Break::Tensor { tensor, what } => format!("{tensor}: {what}"),
        Break::Other { what } => what.clone(),
        other => format!("{other:?}"),
    }
}

fn place(at: &Place) -> String {
    let mut out = format!("{}, position {}", at.site, at.position);
    for (name, index) in [("head", at.head), ("channel", at.channel), ("key", at.key)] {
        if let Some(index) = index {
            let _ = write!(out, ", {name} {index}");
        }
    }
    out
}

/// All digits that tell a number from its neighbours, in the precision that it has.
fn exact(x: f64) -> String {
    let single = x as f32;
    if f64::from(single) == x { format!("{single:?}") } else { format!("{x:?}") }
}

fn count(n: u64, what: &str) -> String {
    plural(usize::try_from(n).unwrap_or(usize::MAX), what)
}
