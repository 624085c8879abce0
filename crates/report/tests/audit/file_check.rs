use std::path::Path;

use apr_check::{Unwatched, check_file};
use apr_format::Checkpoint;
use apr_model::Model;
use apr_reference::{Arithmetic, Reference};
use apr_report::file_check::FileCheckReport;
use apr_tensor::{DType, Stored};
use apr_testkit::{Draft, fixture};

use crate::schema::assert_published;

fn report(path: &Path) -> FileCheckReport {
    let bind = |checkpoint: &Checkpoint| {
        let model = Model::load(Reference::<f64>::new(Arithmetic::EXACT), checkpoint)?;
        Ok(model.config().clone())
    };
    FileCheckReport::new("a model".to_owned(), check_file(path, bind, &Unwatched).unwrap())
}

/// The report of a file with these bytes.
fn report_of(bytes: &[u8]) -> FileCheckReport {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model");
    std::fs::write(&path, bytes).unwrap();
    report(&path)
}

/// A file with a dead norm, which is broken, and a bias of zeros, which is a note.
fn damaged() -> FileCheckReport {
    let sound = Checkpoint::open(fixture("tiny/qwen2/qwen2-F16.gguf")).unwrap();
    let mut draft = Draft::of(&sound);
    for name in ["blk.1.ffn_norm.weight", "blk.0.attn_q.bias"] {
        let stored = draft.tensor(name);
        let zeros = vec![0; stored.bytes().len()];
        assert_eq!(stored.dtype(), DType::F32);
        *stored = Stored::new(DType::F32, stored.shape().clone(), zeros.into()).unwrap();
    }
    report_of(draft.gguf().files()[0].bytes())
}

#[test]
fn json_of_sound_damaged_and_unreadable_files_is_what_the_published_schema_says() {
    let sound = report(&fixture("tiny/qwen2"));
    let cut = report_of(b"GGUF");
    assert_eq!((sound.verdict, damaged().verdict, cut.verdict), ("held", "broken", "broken"));
    for report in [sound, damaged(), cut] {
        assert_published("inspect-check", &serde_json::to_value(&report).unwrap());
    }
}

#[test]
fn the_table_of_tensors_has_the_broken_ones_first_and_no_sound_ones() {
    let text = damaged().text();
    let norm = text.find("blk.1.ffn_norm.weight  F32").unwrap_or_else(|| panic!("{text}"));
    let bias = text.find("blk.0.attn_q.bias").unwrap_or_else(|| panic!("{text}"));
    assert!(norm < bias, "{text}");
    assert!(text[norm..].contains("✗  dead-weights"), "{text}");
    assert!(text[bias..].contains("!  dead-weights"), "{text}");
    assert!(!text.contains("blk.1.ffn_gate.weight"), "{text}");
    assert!(text.lines().last().unwrap().starts_with("BROKEN: 14 checks: "), "{text}");
}

#[test]
fn a_sound_file_has_no_table_of_tensors() {
    let text = report(&fixture("tiny/qwen2")).text();
    assert!(!text.contains("tensor  "), "{text}");
    assert!(text.ends_with("HELD: 14 checks: 13 held, 1 not applicable\n"), "{text}");
}
