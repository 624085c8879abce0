use apr_audit::{Against, Bisect, BisectOptions, Engine, Loaded, Run, Script, bisect};
use apr_format::Checkpoint;
use apr_reference::{Arithmetic, Reference};
use apr_report::{Favourite, LogitRow, bisect as report, html};

use crate::{
    page::{needs_nothing, well_formed},
    schema::assert_published,
    tiny, with_wrong_gate,
};

struct Exact;

impl Engine for Exact {
    fn name(&self) -> String {
        "exact <engine>".to_owned()
    }

    fn load(&self, checkpoint: &Checkpoint) -> apr_audit::Result<Box<dyn Run>> {
        Ok(Box::new(Loaded::new(Reference::<f64>::new(Arithmetic::EXACT), checkpoint, None)?))
    }
}

fn bisected(a: &Checkpoint, b: &Checkpoint) -> Bisect {
    let place = tempfile::tempdir().unwrap();
    let script = Script::Greedy { prompt: vec![5, 6, 7], decode: 1 };
    let against = Against::Model { checkpoint: b, engine: &Exact };
    let options = BisectOptions::default();
    bisect(a, &Exact, &against, &script, place.path(), &options, &mut |_| {}).unwrap()
}

#[test]
fn a_bisection_tells_a_file_from_an_engine_in_words_and_on_a_page() {
    let directory = tempfile::tempdir().unwrap();
    let found = bisected(&with_wrong_gate(directory.path()), &tiny());
    assert_published("bisect", &serde_json::to_value(&found).unwrap());
    let text = report::text(&found, &report::Options { limit: 3, colour: false });
    let verdict = text.lines().find(|line| line.starts_with("DIVERGES")).expect("a verdict");
    assert!(
        verdict.contains("the weights of the file under test")
            && verdict.contains("mlp.gate_proj.weight"),
        "{text}"
    );
    for words in ["A  ", "B  ", "exact <engine>", "stages of A: MATCH", "files:", "cumulative"] {
        assert!(text.contains(words), "{words:?} is not in:\n{text}");
    }

    let favourite = |id, text: &str| Favourite {
        id,
        text: Some(text.to_owned()),
        logit: 1.0,
        probability: 0.5,
    };
    let row = LogitRow {
        position: 2,
        token: None,
        a: vec![favourite(3, "<b>")],
        b: vec![favourite(4, "d")],
    };
    let page = html::bisect(&found, &[row]);
    assert!(well_formed(&page) > 500);
    needs_nothing(&page);
    let body = &page[page.find("<body>").unwrap()..];
    assert!(
        body[..body.find("</h1>").unwrap()]
            .contains("DIVERGES: the weights of the file under test")
    );
    for words in
        ["Cumulative error", "id=\"parts\"", "Stages by layer of A", "Stages by layer of B"]
    {
        assert!(page.contains(words), "{words:?}");
    }
    assert!(
        page.contains("After position 2 ≠") && page.contains("&lt;b&gt;"),
        "favourites side by side"
    );
}

#[test]
fn two_sides_that_agree_match() {
    let found = bisected(&tiny(), &tiny());
    let text = report::text(&found, &report::Options { limit: 3, colour: false });
    assert!(text.ends_with("MATCH: the sides agree\n"), "{text}");
    assert!(!text.contains("put right"), "there was nothing to put right");
}

#[test]
fn json_of_every_verdict_is_what_the_published_schema_says() {
    let found = bisected(&tiny(), &tiny());
    assert_published("bisect", &serde_json::to_value(&found).unwrap());
    let mut more = serde_json::to_value(&found).unwrap();
    more["verdict"]["opinion"] = "good".into();
    let refused = std::panic::catch_unwind(|| assert_published("bisect", &more));
    assert!(refused.is_err(), "a key that nobody documented");
}
