//! What holds of a model and its backend, and what does not.

use std::fmt::Write;

use apr_check::{Break, Checked, Checkup, Outcome, Place};
use comfy_table::CellAlignment;
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
            verdict: verdict(checkup.exit_code()),
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
        out += &checks_table(checks);
        checks.iter().for_each(|checked| out += &broken_or_noted(checked));
        out += &not_looked_at(checks);
        out + "\n" + &summary(self.verdict, checks)
    }
}

/// The word for an exit code.
pub(crate) fn verdict(exit_code: u8) -> &'static str {
    match exit_code {
        0 => "held",
        1 => "broken",
        _ => "unmeasured",
    }
}

/// One line per check.
pub(crate) fn checks_table(checks: &[Checked]) -> String {
    let mut t = table(&["", "check", "looked at", "time"]);
    for column in t.column_iter_mut().take(3) {
        column.set_cell_alignment(CellAlignment::Left);
    }
    for checked in checks {
        let looked_at = checked.looked_at.as_deref().unwrap_or("-");
        let time = format!("{:.2} s", checked.seconds);
        t.add_row([outcome(checked), checked.name.name(), looked_at, &time]);
    }
    lines(&t)
}

/// How many checks ended how, after the word that decides the exit code.
pub(crate) fn summary(verdict: &str, checks: &[Checked]) -> String {
    let count = |is: fn(&Outcome) -> bool| checks.iter().filter(|c| is(&c.outcome)).count();
    let counts = [
        (count(|o| matches!(o, Outcome::Held)), "held"),
        (count(|o| matches!(o, Outcome::Broken { .. })), "broken"),
        (count(|o| matches!(o, Outcome::NotMeasured { .. })), "not measured"),
        (count(|o| matches!(o, Outcome::NotApplicable { .. })), "not applicable"),
    ];
    let counts = counts.into_iter().filter(|(n, _)| *n > 0);
    let counts: Vec<String> = counts.map(|(n, what)| format!("{n} {what}")).collect();
    let all = plural(checks.len(), "check");
    format!("{}: {all}: {}\n", verdict.to_uppercase(), counts.join(", "))
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

/// What breaks a check, and what is odd.
fn broken_or_noted(checked: &Checked) -> String {
    let (name, holds) = (checked.name, checked.holds);
    let mut out = String::new();
    if let Outcome::Broken { breaks } = &checked.outcome {
        let breaks = listed(breaks.iter().map(broken));
        let _ = write!(out, "\n{name} is BROKEN. What must hold: {holds}.\n{breaks}");
    }
    if !checked.notes.is_empty() {
        let _ = write!(
            out,
            "\n{name}, notes:\n{}",
            listed(checked.notes.iter().map(ToString::to_string))
        );
    }
    out
}

/// What was not looked at, each reason once.
pub(crate) fn not_looked_at(checks: &[Checked]) -> String {
    let mut reasons: Vec<(&str, &str, Vec<&str>)> = Vec::new();
    for checked in checks {
        let (how, why) = match &checked.outcome {
            Outcome::NotMeasured { why } => ("not measured", why),
            Outcome::NotApplicable { why } => ("not applicable", why),
            _ => continue,
        };
        let name = checked.name.name();
        match reasons.iter_mut().find(|reason| (reason.0, reason.1) == (how, why)) {
            Some((.., names)) => names.push(name),
            None => reasons.push((how, why, vec![name])),
        }
    }
    let line = |(how, why, names): (&str, &str, Vec<&str>)| {
        format!("\n{how}: {}\n  {why}\n", names.join(", "))
    };
    reasons.into_iter().map(line).collect()
}

/// The first few, indented, and how many more there are.
pub(crate) fn listed(all: impl ExactSizeIterator<Item = String>) -> String {
    let more = all.len().saturating_sub(SHOWN);
    let mut out: String = all.take(SHOWN).map(|line| format!("  {line}\n")).collect();
    if more > 0 {
        let _ = writeln!(out, "  and {more} more");
    }
    out
}

pub(crate) fn broken(what: &Break) -> String {
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
    let places = [("head", at.head), ("slot", at.slot), ("channel", at.channel), ("key", at.key)];
    for (name, index) in places {
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

#[cfg(test)]
mod tests {
    use apr_check::Check;
    use apr_model::{BackendInfo, Site, Stage};
    use apr_tensor::DType;

    use super::*;

    fn report(outcomes: Vec<(Check, Outcome)>) -> CheckReport {
        let checked = |(name, outcome): (Check, Outcome)| Checked {
            name,
            holds: name.holds(),
            outcome,
            looked_at: None,
            notes: Vec::new(),
            seconds: 0.25,
            asked_for: false,
        };
        let checkup = Checkup {
            backend: BackendInfo { name: "cpu", isa: "avx2", threads: 2, kv: DType::F16 },
            plan: Some("0123456789abcdef".to_owned()),
            checks: outcomes.into_iter().map(checked).collect(),
        };
        CheckReport::new("m.gguf".into(), "gguf".into(), "as given".into(), vec![1, 2], checkup)
    }

    /// A rotated query of layer 3 that is off by the last bit.
    fn bits(expected: Option<f64>) -> Outcome {
        let site = Site::layer(3, Stage::QPostRope);
        let at =
            Place { site, position: 7, head: Some(1), slot: None, channel: Some(5), key: None };
        let found = f64::from(f32::from_bits(0.1f32.to_bits() + 1));
        let run = "token by token".to_owned();
        Outcome::Broken {
            breaks: vec![Break::Bits { run, at, expected, found, elements: 9, rows: 3 }],
        }
    }

    #[test]
    fn a_broken_promise_is_told_with_its_place_and_every_digit_of_both_values() {
        let text = report(vec![(Check::Decode, bits(Some(0.1f32.into())))]).text();
        let line = "token by token: first at layers.3.q_post_rope, position 7, head 1, channel 5: \
                    0.10000001 instead of 0.1 (9 elements of 3 rows differ there)";
        assert!(text.contains(line), "{text}");
        assert!(
            text.contains("✗ BROKEN") && text.ends_with("BROKEN: 1 check: 1 broken\n"),
            "{text}"
        );
        let unsteady = report(vec![(Check::Decode, bits(None))]).text();
        assert!(unsteady.contains("other bits when repeated") && !unsteady.contains("instead of"));
    }

    #[test]
    fn each_reason_for_not_looking_is_given_once_and_never_reads_as_held() {
        let missed = |why: &str| Outcome::NotMeasured { why: why.to_owned() };
        let checks = vec![
            (Check::Config, Outcome::Held),
            (Check::Chunks, missed("no time")),
            (Check::Decode, missed("no time")),
            (Check::Threads, Outcome::NotApplicable { why: "one thread".to_owned() }),
        ];
        let text = report(checks).text();
        assert!(text.contains("not measured: chunks, decode\n  no time\n"), "{text}");
        assert!(text.contains("not applicable: threads\n  one thread\n"), "{text}");
        assert_eq!(text.matches("✓ held").count(), 1, "{text}");
        let summary = "UNMEASURED: 4 checks: 1 held, 2 not measured, 1 not applicable\n";
        assert!(text.ends_with(summary), "{text}");
    }

    #[test]
    fn the_json_has_what_the_text_says() {
        let json =
            serde_json::to_value(report(vec![(Check::Decode, bits(Some(f64::NAN)))])).unwrap();
        assert_eq!((&json["schema"], &json["verdict"]), (&"apr-check/1".into(), &"broken".into()));
        let decode = &json["checks"][0];
        assert_eq!((&decode["name"], &decode["outcome"]), (&"decode".into(), &"broken".into()));
        let found = &decode["breaks"][0];
        assert_eq!(
            (&found["kind"], &found["site"]),
            (&"bits".into(), &"layers.3.q_post_rope".into())
        );
        assert_eq!((&found["position"], &found["expected"]), (&7.into(), &"NaN".into()));
        assert!(found["key"].is_null());
    }
}
