//! The table that is printed: one row for each engine, one column for each kind and depth.

use comfy_table::{Table, presets::ASCII_MARKDOWN};

use super::{
    measurement::Kind,
    record::{Case, Record, Summary},
};

/// All that `record` holds, as text.
pub(super) fn text(record: &Record) -> String {
    let mut table = Table::new();
    // To be read here and pasted into a page.
    table.load_style(ASCII_MARKDOWN);
    table.set_header([
        "model",
        "threads",
        "measured",
        "engine",
        "tokens/s",
        "least..most",
        "to the best other",
    ]);
    for (case, peers) in record.cases() {
        for (place, (peer, summary)) in peers.iter().enumerate() {
            let Summary { median, least, most } = summary;
            let others =
                peers.iter().filter(|(other, _)| other != peer).map(|(_, other)| other.median);
            let best = others.reduce(f64::max);
            let ratio = best.map_or("–".to_owned(), |best| format!("{:.2}", median / best));
            let [model, threads, measured] = match place {
                0 => [case.model.clone(), case.threads.to_string(), what(case)],
                _ => Default::default(),
            };
            let speeds = [format!("{median:.1}"), format!("{least:.1}..{most:.1}")];
            let [speed, spread] = speeds;
            table.add_row([model, threads, measured, (*peer).to_owned(), speed, spread, ratio]);
        }
    }
    let mut text = format!("{table}\n{}\n", record.machine);
    for (name, version) in &record.peers {
        text += &format!("{name}: {version}\n");
    }
    for failure in &record.failures {
        let setting = failure.setting.as_ref().map(|setting| format!(" ({setting})"));
        let setting = setting.unwrap_or_default();
        text += &format!("{} failed{setting}: {}\n", failure.peer, failure.reason);
    }
    text
}

/// What was measured, in llama-bench's words: `pp512`, `tg64`, `tg64 @ 2048`.
fn what(case: &Case) -> String {
    let kind = match case.kind {
        Kind::Prefill => "pp",
        Kind::Decode => "tg",
    };
    match case.depth {
        0 => format!("{kind}{}", case.tokens),
        depth => format!("{kind}{} @ {depth}", case.tokens),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::measurement::{Lengths, Measurement, Setting};

    #[test]
    fn each_engine_is_held_against_the_best_of_the_others() {
        let lengths = Lengths { prompt: 0, generate: 64, depth: 2048 };
        let setting = Setting { model: "m.gguf".into(), threads: 2, lengths };
        let mut record = Record::default();
        for (peer, speed) in [("a", 30.0), ("b", 20.0), ("c", 10.0)] {
            record.peers.push((peer.to_owned(), "1".to_owned()));
            let samples = vec![speed - 1.0, speed, speed + 1.0];
            record.add(
                peer,
                &setting,
                vec![Measurement { kind: Kind::Decode, tokens: 64, depth: 2048, samples }],
            );
        }
        let text = text(&record);
        let line = |peer: &str| text.lines().find(|line| line.contains(peer)).unwrap().to_owned();
        assert!(
            line("29.0..31.0").contains("1.50") && line("29.0..31.0").contains("tg64 @ 2048"),
            "{text}"
        );
        assert!(
            line("19.0..21.0").contains("0.67") && line("9.0..11.0").contains("0.33"),
            "{text}"
        );
    }
}
