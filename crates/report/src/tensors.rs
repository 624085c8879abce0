//! Comparisons of two model files as text. Their JSON is the comparison itself.

use std::fmt::Write;

use apr_diff::{
    Cell, CheckpointComparison, ConfigComparison, ConfigDifference, RelationKind, TensorComparison,
    UnreadableConfig,
};

use crate::{
    diff::{categories, cosine, largest, mismatches, ratio, relative_l2, verdict},
    table::{lines, magnitude, table},
};

/// Tensors that were not compared are listed up to this many.
const MISSING_SHOWN: usize = 20;

/// A comparison of two model files, tensor by tensor.
pub fn checkpoints(c: &CheckpointComparison) -> String {
    let mut out = format!("A  {}\nB  {} (reference)\n", c.a, c.b);
    for note in &c.notes {
        let _ = writeln!(out, "note: {note}");
    }
    if let Some(config) = &c.config {
        out += &declared(config);
    }
    if !c.tensors.is_empty() {
        let mut t = table(&[
            "tensor",
            "A",
            "B",
            "shape",
            "rel L2",
            "max |diff|",
            "at",
            "cosine",
            "|A|/|B|",
            "NaN/Inf",
            "",
        ]);
        for tensor in &c.tensors {
            t.add_row(row(tensor));
        }
        out += "\n";
        out += &lines(&t);
    }
    let metrics = c.tensors.iter().map(|tensor| (tensor.name.clone(), &tensor.metrics));
    if let Some(note) = mismatches(metrics, place, "tensor") {
        out += "\n";
        out += &note;
    }
    if !c.not_compared.is_empty() {
        out += "\nnot compared, and not scored:\n";
        for missing in c.not_compared.iter().take(MISSING_SHOWN) {
            let _ = writeln!(out, "  {}: {}", missing.name, missing.reason);
        }
        if c.not_compared.len() > MISSING_SHOWN {
            let _ = writeln!(out, "  and {} more", c.not_compared.len() - MISSING_SHOWN);
        }
    }
    out + "\n" + &verdict(&c.outcome, c.tolerance, c.tensors.len())
}

/// What the two configs say differently, or why they cannot be compared.
fn declared(config: &ConfigComparison) -> String {
    let mut out = String::new();
    if config.unreadable.is_empty() && config.differences.is_empty() {
        out += "config: the same\n";
    }
    for UnreadableConfig { side, why } in &config.unreadable {
        let _ = writeln!(out, "config: not compared, that of {side} cannot be read: {why}");
    }
    for ConfigDifference { key, a, b } in &config.differences {
        let _ = writeln!(out, "config: {key} DIFFERS: {a} in A, {b} in B");
    }
    out
}

fn place(at: &Cell) -> String {
    format!("[{}, {}]", at.row, at.col)
}

fn row(tensor: &TensorComparison) -> Vec<String> {
    let m = &tensor.metrics;
    let [largest, at, ..] = largest(m, place);
    vec![
        tensor.name.clone(),
        tensor.dtype_a.clone(),
        tensor.dtype_b.clone(),
        format!("{:?}", tensor.shape),
        relative_l2(m),
        largest,
        at,
        cosine(m.cosine),
        ratio(m.norm_ratio),
        categories(m),
        judgement(tensor),
    ]
}

fn judgement(tensor: &TensorComparison) -> String {
    let plain = match (tensor.bitwise, tensor.within) {
        (true, _) => "same bytes",
        (false, true) => "within",
        (false, false) => "DIFFERS",
    };
    let Some(relation) = &tensor.relation else { return plain.to_owned() };
    let what = match relation.kind {
        RelationKind::Transposed => "TRANSPOSED",
        RelationKind::RowsInterleaved => "rows of heads INTERLEAVED in A",
        RelationKind::RowsInHalves => "rows of heads IN HALVES in A",
    };
    match relation.relative_l2 {
        Some(left) if left > 0.0 => format!("{what} (leaves {})", magnitude(left)),
        _ => what.to_owned(),
    }
}
