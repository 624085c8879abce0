//! The score of a bench of planted faults, as text. Its JSON is the [`Score`] itself.

use std::fmt::Write;

use apr_faults::{Diagnosis, Fault, Finding, Outcome, Score, Tally};

use crate::{
    diff::section,
    table::{lines, magnitude, plural, table},
};

/// The score: who found what, and every case that was not found.
pub fn text(score: &Score) -> String {
    let mut t =
        table(&["", "faults", "localised", "layer only", "elsewhere", "missed", "false alarms"]);
    let mut row = |name: &str, tally: &Tally| {
        use Finding::{FalseAlarm, LayerOnly, Localised, Missed, WrongPlace};
        let faults = tally.faults();
        let share = |n: usize| match faults {
            0 => "-".to_owned(),
            _ => format!("{n} ({:.1} %)", 100.0 * n as f64 / faults as f64),
        };
        let alarms = match tally.controls() {
            0 => "-".to_owned(),
            controls => format!("{} of {controls}", tally.count(FalseAlarm)),
        };
        let cells = [
            name.to_owned(),
            faults.to_string(),
            share(tally.count(Localised)),
            tally.count(LayerOnly).to_string(),
            tally.count(WrongPlace).to_string(),
            tally.count(Missed).to_string(),
            alarms,
        ];
        t.add_row(cells);
    };
    row("audit", &score.judge);
    for (family, tally) in &score.by_family {
        row(&format!("  {family}"), tally);
    }
    row("std ratio outside 0.7..1.4", &score.std_ratio);
    row("cosine below 0.999", &score.cosine);
    let mut out = lines(&t);
    let count = |diagnosis| score.diagnoses.get(&diagnosis).copied().unwrap_or(0);
    let [right, wrong, missing] =
        [Diagnosis::Right, Diagnosis::Wrong, Diagnosis::Missing].map(count);
    let _ = writeln!(
        out,
        "\ndiagnosis of those localised, where the mistake has a closed form: right {right} of {}, none given {missing}, \
         wrong {wrong}",
        right + wrong + missing
    );
    let small = score.judge.count(Finding::TooSmall);
    if small > 0 {
        let _ = writeln!(
            out,
            "{} below what arithmetic itself does, and not counted",
            plural(small, "fault")
        );
    }
    let of = |findings: &[Finding]| -> Vec<String> {
        score.outcomes.iter().filter(|o| findings.contains(&o.finding)).map(line).collect()
    };
    use Finding::{FalseAlarm, LayerOnly, Missed, TooSmall, WrongPlace};
    out += &section("not localised", &of(&[LayerOnly, WrongPlace, Missed]));
    out += &section("false alarms", &of(&[FalseAlarm]));
    out += &section("too small to see", &of(&[TooSmall]));
    let diagnosed = |as_what: Diagnosis| -> Vec<String> {
        let localised = score.outcomes.iter().filter(|o| o.finding == Finding::Localised);
        localised.filter(|o| o.diagnosis == as_what).map(diagnosis).collect()
    };
    out += &section("wrong diagnoses", &diagnosed(Diagnosis::Wrong));
    out += &section("no diagnosis, where one was to be expected", &diagnosed(Diagnosis::Missing));
    let _ = writeln!(
        out,
        "\n{}, {:.2} seconds each for the audit",
        plural(score.outcomes.len(), "case"),
        score.seconds_per_case
    );
    out
}

fn line(outcome: &Outcome) -> String {
    let said = match (outcome.verdict.sites.first(), &outcome.verdict.unmeasured) {
        (Some(site), _) => format!("blamed {site}"),
        (None, Some(what)) => format!("not measured: {what}"),
        (None, None) => "blamed nothing".to_owned(),
    };
    let effect = outcome.effect.as_ref().map_or(String::new(), |effect| {
        let (off, kl) = (magnitude(effect.relative_l2), magnitude(effect.logits_kl));
        let flips = plural(effect.argmax_flips, "favourite");
        format!("; the stage is off by {off}, the logits by KL {kl}, {flips} flipped")
    });
    format!("{}: {said}{effect}", outcome.case)
}

fn diagnosis(outcome: &Outcome) -> String {
    match &outcome.verdict.diagnoses[..] {
        [] => outcome.case.to_string(),
        said => format!("{}: {}", outcome.case, said.join(" or ")),
    }
}

/// The kinds of faults there are.
pub fn kinds(faults: &[&Fault]) -> String {
    let mut t = table(&["kind", "family", "what goes wrong"]);
    for fault in faults {
        t.add_row([fault.name.to_owned(), fault.family.to_string(), fault.about.to_owned()]);
    }
    lines(&t) + &format!("\n{}\n", plural(faults.len(), "kind"))
}
