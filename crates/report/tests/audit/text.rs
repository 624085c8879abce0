use apr_report::audit::Options;

use crate::Case;

/// Numbers are those of the fixtures and of how bounds are derived; the words around them are ours.
fn snapshot(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let line = match line.split_once("fixtures/") {
            Some((before, path)) => {
                let name = before.split_whitespace().next().unwrap_or_default();
                format!("{name} fixtures/{path}")
            }
            None => line.to_owned(),
        };
        let line = match line.rsplit_once(": ") {
            Some((before, times)) if times.ends_with(" times that") => {
                format!("{before}: # times that")
            }
            _ => line,
        };
        let words = line.split(' ').map(|word| {
            let bare = word.trim_matches(|c: char| ",;:()".contains(c));
            let measured = bare.parse::<f64>().is_ok() && bare.contains(['.', 'e']);
            if measured { word.replace(bare, "#") } else { word.to_owned() }
        });
        out += &words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
        out.push('\n');
    }
    out
}

#[test]
fn an_audit_reads_from_what_was_held_against_what_to_the_verdict() {
    let right = Case::right().report().text(&Options { limit: 0, colour: false });
    insta::assert_snapshot!("match", snapshot(&right));
    let wrong = Case::wrong();
    let text = wrong.report().text(&Options { limit: 1, colour: false });
    let model = wrong.audit.model.as_str();
    insta::assert_snapshot!("diverges", snapshot(&text.replace(model, "fixtures/wrong")));
}

#[test]
fn colour_repeats_what_signs_and_words_say() {
    let wrong = Case::wrong();
    let text = |colour| wrong.report().text(&Options { limit: 3, colour });
    let mut bare = text(true);
    assert!(bare.contains("\x1b[1;31mDIVERGES\x1b[0m at layers.1.ffn_gate"), "{bare}");
    for code in ["\x1b[1;31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"] {
        bare = bare.replace(code, "");
    }
    assert_eq!(bare, text(false));
}
