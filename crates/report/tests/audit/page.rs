use apr_report::html;

use crate::{Case, tiny};

/// Elements that have no end tag.
const VOID: [&str; 3] = ["meta", "br", "hr"];

/// Checks that every element is closed where it should be; returns how many there are.
pub(crate) fn well_formed(page: &str) -> usize {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = page.strip_prefix("<!DOCTYPE html>").expect("it says what it is");
    let mut count = 0;
    while let Some(start) = rest.find('<') {
        assert!(!rest[..start].contains('>'), "a stray > before {}", &rest[start..start + 20]);
        let end = start + rest[start..].find('>').expect("each tag ends");
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name), "</{name}> closes what is open"),
            None => {
                let name = tag.split_whitespace().next().unwrap();
                count += 1;
                if name == "style" {
                    rest = &rest[rest.find("</style>").unwrap()..];
                }
                if !VOID.contains(&name) {
                    open.push(name);
                }
            }
        }
    }
    assert_eq!(open, [""; 0], "all is closed");
    count
}

#[test]
fn a_page_is_well_formed_and_begins_with_the_verdict() {
    for (case, verdict) in
        [(Case::right(), "MATCH: all of"), (Case::wrong(), "DIVERGES at layers.1.ffn_gate")]
    {
        let page = html::audit(&case.report());
        assert!(well_formed(&page) > 500);
        let body = &page[page.find("<body>").unwrap()..];
        let headline = &body[..body.find("</h1>").unwrap()];
        assert!(headline.contains(verdict), "{headline}");
        assert!(page.find("<title>").unwrap() < page.find(verdict).unwrap());
    }
}

/// Checks that a page loads nothing, runs nothing and links to itself only.
pub(crate) fn needs_nothing(page: &str) {
    for word in
        ["http:", "https:", "src=", "<script", "<link", "@import", "url(", "onload", "javascript:"]
    {
        assert!(!page.contains(word), "{word}");
    }
    for (at, _) in page.match_indices("href=\"") {
        let target = page[at + 6..].split('"').next().unwrap();
        let id = target.strip_prefix('#').unwrap_or_else(|| panic!("{target} leads away"));
        assert_eq!(page.matches(&format!("id=\"{id}\"")).count(), 1, "{target} leads to one place");
    }
}

#[test]
fn a_page_needs_no_network_and_runs_no_script() {
    for case in [Case::right(), Case::wrong()] {
        needs_nothing(&html::audit(&case.report()));
    }
}

#[test]
fn a_page_names_every_stage_and_tells_it_without_colour() {
    let case = Case::wrong();
    let page = html::audit(&case.report());
    for stage in &case.audit.stages {
        assert!(page.contains(&format!("<code>{}</code>", stage.site)), "{}", stage.site);
    }
    assert!(page.contains("✗ FAULT") && page.contains("16 of "), "signs and words");
    assert!(page.contains("channels are wrong: 16-31"), "which channels");
    // Each coloured cell has a text and says at length what it is.
    let cells: Vec<&str> =
        page.split("<td class=\"").skip(1).filter(|cell| cell.starts_with(['e', 'x'])).collect();
    assert!(cells.len() >= 2 * case.audit.stages.len(), "two maps: {}", cells.len());
    for cell in cells {
        let (tag, rest) = cell.split_once('>').unwrap();
        assert!(tag.contains(" title=\"") && !rest.starts_with("</td>"), "{tag}");
    }
    assert_eq!(
        page.matches("<svg viewBox").count(),
        page.matches("role=\"img\"").count() + page.matches("aria-hidden=\"true\"><line").count()
    );
}

#[test]
fn a_fault_is_shown_by_rows_and_by_channels() {
    let page = html::audit(&Case::wrong().report());
    let fault = &page[page.find("id=\"faults\"").unwrap()..page.find("id=\"layers\"").unwrap()];
    assert!(fault.contains("by position") && fault.contains("by channel"));
    // Only the channels of the zeroed rows stand out.
    let beyond = |chart: &str| chart.matches("class=\"bar beyond\"").count();
    let channels = &fault[fault.find("Unexplained error by channel").unwrap()..];
    assert_eq!(beyond(channels), 16, "one bar each, of 128");
    let right = html::audit(&Case::right().report());
    assert!(!right.contains("id=\"faults\"") && beyond(&right) == 0);
}

#[cfg(unix)]
#[test]
fn names_of_files_cannot_become_markup() {
    let directory = tempfile::tempdir().unwrap();
    let capture = directory.path().join("<img src=x onerror=alert(1)> & \"quoted\"");
    std::fs::create_dir(&capture).unwrap();
    for entry in std::fs::read_dir(apr_testkit::golden("tiny-qwen2").capture).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), capture.join(entry.file_name())).unwrap();
    }
    let page = html::audit(&Case::of(&capture, &tiny(), false).report());
    well_formed(&page);
    assert!(!page.contains("<img"));
    assert!(page.contains("&lt;img src=x onerror=alert(1)&gt; &amp; &quot;quoted&quot;"));
}
