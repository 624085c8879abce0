//! Findings as one HTML file that needs nothing else: no script, no font, no image, no network.
//!
//! Its first line is the verdict. Heat maps are tables, so that screen readers and text browsers have them too; charts are
//! inline SVG with their numbers in words beside them. No colour says anything that a sign, a word or a number does
//! not. `maud` escapes whatever comes from files.

mod audit;
mod bisect;
mod chart;
mod heat;
mod palette;

use maud::{DOCTYPE, Markup, PreEscaped, html};

pub use audit::audit;
pub use bisect::bisect;

const STYLE: &str = include_str!("html/page.css");

/// How bad the news is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    Good,
    Bad,
    Unknown,
}

impl Tone {
    /// By the first word of a verdict.
    pub(crate) fn of(verdict: &str) -> Self {
        match verdict.split([' ', ':']).next() {
            Some("MATCH" | "DRIFT") => Self::Good,
            Some("DIVERGES") => Self::Bad,
            _ => Self::Unknown,
        }
    }

    fn class(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Bad => "bad",
            Self::Unknown => "unknown",
        }
    }

    fn sign(self) -> &'static str {
        match self {
            Self::Good => "✓",
            Self::Bad => "✗",
            Self::Unknown => "?",
        }
    }
}

/// A page under construction.
#[derive(Debug)]
pub(crate) struct Page {
    about: String,
    verdict: String,
    sections: Vec<Section>,
}

#[derive(Debug)]
struct Section {
    id: String,
    heading: String,
    body: Markup,
}

impl Page {
    /// A page about something, with its verdict: the first line is the headline.
    pub(crate) fn new(about: String, verdict: String) -> Self {
        Self { about, verdict, sections: Vec::new() }
    }

    /// Adds a section that links can point at by `id`.
    pub(crate) fn section(&mut self, id: &str, heading: &str, body: Markup) {
        self.sections.push(Section { id: id.to_owned(), heading: heading.to_owned(), body });
    }

    /// The file.
    pub(crate) fn render(self) -> String {
        let tone = Tone::of(&self.verdict);
        let mut lines = self.verdict.lines();
        let headline = lines.next().unwrap_or_default();
        let (points, lines): (Vec<&str>, Vec<&str>) =
            lines.partition(|line| line.starts_with("- "));
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    title { (headline) " – " (self.about) }
                    style { (PreEscaped(STYLE)) (PreEscaped(palette::css())) }
                }
                body {
                    header.(tone.class()) {
                        h1 { span.sign aria-hidden="true" { (tone.sign()) } " " (headline) }
                        @for line in lines { p { (line) } }
                        @if !points.is_empty() { ul { @for point in points { li { (&point[2..]) } } } }
                    }
                    nav aria-label="Sections" {
                        ul { @for section in &self.sections { li { a href={ "#" (section.id) } { (section.heading) } } } }
                    }
                    main {
                        @for section in &self.sections {
                            section id=(section.id) { h2 { (section.heading) } (section.body) }
                        }
                    }
                    footer { "apr " (env!("CARGO_PKG_VERSION")) ": " (self.about) }
                }
            }
        };
        page.into_string()
    }
}

/// Names and what they stand for; what is not known is left out.
pub(crate) fn facts<'a>(facts: impl IntoIterator<Item = (&'a str, Option<String>)>) -> Markup {
    html! {
        dl.facts {
            @for (name, value) in facts {
                @if let Some(value) = value { div { dt { (name) } dd { (value) } } }
            }
        }
    }
}

/// Lines as a list.
pub(crate) fn list(lines: &[String]) -> Markup {
    html! { ul { @for line in lines { li { (line) } } } }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{palette::tests::contrast, *};

    /// The colours that a block of the style sheet defines.
    fn colours(block: &str) -> BTreeMap<&str, &str> {
        let rules = block.split([';', '{', '}', '\n']).filter_map(|rule| rule.strip_prefix("--"));
        rules.map(|rule| rule.split_once(':').expect("a name and a colour")).collect()
    }

    #[test]
    fn text_stands_out_from_its_ground_in_light_and_in_dark() {
        let (light, rest) = STYLE.split_once("@media (prefers-color-scheme:dark)").unwrap();
        let (dark, _) = rest.split_once("*{").unwrap();
        let (light, dark) = (colours(light), colours(dark));
        assert_eq!(light.keys().collect::<Vec<_>>(), dark.keys().collect::<Vec<_>>());
        let text = [
            ("ink", "paper"),
            ("muted", "paper"),
            ("link", "paper"),
            ("good", "good-soft"),
            ("bad", "bad-soft"),
            ("unknown", "unknown-soft"),
            ("ink", "good-soft"),
            ("ink", "bad-soft"),
            ("ink", "unknown-soft"),
        ];
        let graphics = [
            ("bar", "paper"),
            ("bar-bad", "paper"),
            ("s0", "paper"),
            ("s1", "paper"),
            ("s2", "paper"),
            ("s3", "paper"),
        ];
        for scheme in [&light, &dark] {
            for (pairs, least) in [(&text[..], 4.5), (&graphics[..], 3.0)] {
                for (a, b) in pairs {
                    let contrast = contrast(scheme[a], scheme[b]);
                    assert!(contrast >= least, "{a} on {b}: {contrast:.2}");
                }
            }
        }
    }

    #[test]
    fn the_tone_follows_the_first_word_of_a_verdict() {
        let cases = [
            ("MATCH: all", Tone::Good),
            ("DRIFT: some", Tone::Good),
            ("DIVERGES at x", Tone::Bad),
            ("UNMEASURED: nothing", Tone::Unknown),
            ("", Tone::Unknown),
        ];
        for (verdict, tone) in cases {
            assert_eq!(Tone::of(verdict), tone, "{verdict}");
        }
    }
}
