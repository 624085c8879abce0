//! `apr demo`: the tour agrees with Hugging Face, and what it keeps is whole.

mod common;

use std::fs;

use common::{Scratch, apr};

#[test]
fn what_the_tour_keeps_can_be_compared_and_traced() {
    let scratch = Scratch::new();
    let kept = scratch.path("new/demo");
    let done = apr(["demo", "--output", &kept]).expect(0);
    let verdicts = [
        "2. ",
        "MATCH",
        "3. ",
        "MATCH",
        "4. ",
        "DIFFERS is the expected verdict",
        "MATCH: every stage does what its arithmetic says",
    ];
    let mut rest = done.stdout.as_str();
    for verdict in verdicts {
        let at = rest.find(verdict).unwrap_or_else(|| panic!("no {verdict:?} in {rest}"));
        rest = &rest[at + verdict.len()..];
    }
    assert!(!done.stdout.contains(".partial"), "a path that is gone: {}", done.stdout);
    let mut names: Vec<_> =
        fs::read_dir(&kept).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    let expected = [
        "cpu",
        "cpu-f32",
        "golden",
        "pycoder-3m-Q4_K_M.gguf",
        "reference",
        "transposed",
        "transposed.html",
    ];
    assert_eq!(names, expected);
    apr(["diff", &format!("{kept}/reference"), &format!("{kept}/golden")]).expect(0);
    apr(["audit", &format!("{kept}/cpu"), "--model", &format!("{kept}/pycoder-3m-Q4_K_M.gguf")])
        .expect(0);
    apr(["inspect", &format!("{kept}/pycoder-3m-Q4_K_M.gguf")]).expect(0);

    let again = apr(["demo", "--output", &kept]).expect(2);
    assert!(again.stderr.contains("is not empty"), "{}", again.stderr);
    assert_eq!(fs::read_dir(&kept).unwrap().count(), expected.len(), "nothing was removed");
}

#[test]
fn the_planted_bug_is_found_named_and_put_right() {
    let scratch = Scratch::new();
    let kept = scratch.path("demo");
    let done = apr(["demo", "--output", &kept]).expect(0);
    let (_, story) = done.stdout.split_once("\n5. ").unwrap();
    for words in [
        "stages of A: DIVERGES at lm_head, the only stage that does",
        "weight-transposed: the weight is read transposed",
        "stages of B: MATCH",
        "lm_head: nothing else is wrong",
        "the favourite token agrees in 10 of 10 rows instead of 0",
        "DIVERGES: the engine under test: lm_head is off by",
    ] {
        assert!(story.contains(words), "no {words:?} in {story}");
    }
    let page = fs::read_to_string(format!("{kept}/transposed.html")).unwrap();
    assert!(page.contains("weight-transposed") && page.trim_end().ends_with("</html>"));
}

#[test]
#[cfg(unix)]
fn a_tour_that_cannot_be_written_leaves_nothing_and_names_the_file() {
    let scratch = Scratch::new();
    for name in ["new", "empty"] {
        let kept = scratch.path(name);
        if name == "empty" {
            fs::create_dir(&kept).unwrap();
        }
        // Room for a capture of the reference, not for all of the model.
        for blocks in ["24", "2000"] {
            let done = common::apr_with_file_limit(blocks, &["demo", "--output", &kept]).expect(2);
            let stderr = done.stderr;
            assert!(stderr.contains(&kept) && stderr.contains("cannot be written"), "{stderr}");
            assert!(!fs::exists(&kept).unwrap() || fs::read_dir(&kept).unwrap().count() == 0);
        }
        assert_eq!(fs::exists(&kept).unwrap(), name == "empty");
    }
}
