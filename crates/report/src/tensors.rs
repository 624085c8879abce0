//! Comparisons of two model files as text. Their JSON is the comparison itself.

use std::fmt::Write;

use apr_diff::{
    Cell, CheckpointComparison, ConfigComparison, ConfigDifference, Outcome, Relation,
    RelationKind, TensorComparison, UnreadableConfig,
};

use crate::{
    diff::{
        MEASURED_AGAINST, categories, cosine, largest, listed, mismatches, ratio, relative_l2,
        section, verdict,
    },
    table::{lines, magnitude, plural, table},
};

/// Of more tensors than this, only those that differ are listed.
const ALL_SHOWN: usize = 40;

/// A comparison of two model files, tensor by tensor.
pub fn checkpoints(c: &CheckpointComparison) -> String {
    let mut out = format!("A  {}\nB  {} {MEASURED_AGAINST}\n", c.a, c.b);
    for note in &c.notes {
        let _ = writeln!(out, "note: {note}");
    }
    if let Some(config) = &c.config {
        out += &declared(config);
    }
    let all = c.tensors.len() <= ALL_SHOWN;
    let shown: Vec<_> = c.tensors.iter().filter(|tensor| all || !tensor.within).collect();
    if !shown.is_empty() {
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
        for tensor in &shown {
            t.add_row(row(tensor));
        }
        out += "\n";
        out += &lines(&t);
    }
    if shown.len() < c.tensors.len() {
        let rest = plural(c.tensors.len() - shown.len(), "tensor");
        let _ = writeln!(out, "({rest} within the tolerance: not listed here, but in the JSON)");
    }
    let first = |tensor: &&TensorComparison| tensor.metrics.categories.first.is_some();
    if let Some(sick) = c.tensors.iter().find(first) {
        let metrics = c.tensors.iter().map(|tensor| (tensor.name.clone(), &tensor.metrics));
        out += "\n";
        out += &mismatches(metrics, |at| place(sick, at), "tensor").unwrap_or_default();
    }
    out += &section("not compared, and not scored", &listed(&c.not_compared));
    let outcome = match &c.outcome {
        Outcome::Differs { .. } => differs(c),
        other => other.to_string(),
    };
    out + "\n" + &verdict(outcome, c.tolerance, &plural(c.tensors.len(), "tensor"))
}

/// The keys of the config that differ, how many tensors do, and the first of them.
fn differs(c: &CheckpointComparison) -> String {
    let mut parts = Vec::new();
    let config = c.config.as_ref().map_or(&[][..], |config| &config.differences);
    if !config.is_empty() {
        let keys: Vec<&str> = config.iter().map(|different| different.key).collect();
        parts.push(format!("the config in {}", keys.join(", ")));
    }
    let tensors: Vec<_> = c.tensors.iter().filter(|tensor| !tensor.within).collect();
    if let Some(first) = tensors.first() {
        let relation =
            first.relation.as_ref().map_or(String::new(), |r| format!(", {}", called(r)));
        let all = plural(c.tensors.len(), "tensor");
        parts.push(format!("{} of {all}, first: {}{relation}", tensors.len(), first.name));
    }
    format!("DIFFERS: {}", parts.join("; "))
}

/// What the two configs say differently. Why one cannot be read is among the notes.
fn declared(config: &ConfigComparison) -> String {
    let mut out = String::new();
    if config.unreadable.is_empty() && config.differences.is_empty() {
        out += "config: the same\n";
    }
    for UnreadableConfig { side, .. } in &config.unreadable {
        let _ = writeln!(out, "config: not compared, since that of {side} cannot be read");
    }
    for ConfigDifference { key, a, b } in &config.differences {
        let _ = writeln!(out, "config: {key} DIFFERS: {a} in A, {b} in B");
    }
    out
}

fn row(tensor: &TensorComparison) -> Vec<String> {
    let m = &tensor.metrics;
    let mut row = vec![
        tensor.name.clone(),
        tensor.dtype_a.clone(),
        tensor.dtype_b.clone(),
        format!("{:?}", tensor.shape),
    ];
    // Between different shapes there are numbers only after a transposition, and these would look like a match.
    row.extend(match tensor.shape == tensor.shape_b {
        true => {
            let [largest, at, ..] = largest(m, |at| place(tensor, at));
            [relative_l2(m), largest, at, cosine(m.cosine), ratio(m.norm_ratio), categories(m)]
        }
        false => ["-"; 6].map(str::to_owned),
    });
    row.push(judgement(tensor));
    row
}

/// Where an element stands: a vector has no rows to speak of.
fn place(tensor: &TensorComparison, at: &Cell) -> String {
    match tensor.shape.len() {
        0 | 1 => format!("[{}]", at.col),
        _ => format!("[{}, {}]", at.row, at.col),
    }
}

fn judgement(tensor: &TensorComparison) -> String {
    let m = &tensor.metrics;
    let Some(relation) = &tensor.relation else {
        return match (tensor.bitwise, tensor.within) {
            (true, _) => "same bytes",
            (false, true) if m.relative_l2 == Some(0.0) => "same values",
            (false, true) => "within",
            (false, false) => "DIFFERS",
        }
        .to_owned();
    };
    let done = match relation.kind {
        RelationKind::Transposed => "transposing",
        RelationKind::RowsInterleaved | RelationKind::RowsInHalves => "reordering",
    };
    let left = relation.relative_l2.map_or("-".to_owned(), magnitude);
    format!("{}: rel L2 {left} after {done}", called(relation))
}

fn called(relation: &Relation) -> &'static str {
    match relation.kind {
        RelationKind::Transposed => "TRANSPOSED",
        RelationKind::RowsInterleaved => "rows of heads INTERLEAVED in A",
        RelationKind::RowsInHalves => "rows of heads IN HALVES in A",
    }
}

#[cfg(test)]
mod tests {
    use apr_diff::{Categories, Metrics, Pair};

    use super::*;

    fn tensor(shape: &[usize], shape_b: &[usize], relation: Option<Relation>) -> TensorComparison {
        let within = relation.is_none();
        TensorComparison {
            name: "x".to_owned(),
            name_a: "x".to_owned(),
            name_b: "x".to_owned(),
            dtype_a: "F16".to_owned(),
            dtype_b: "BF16".to_owned(),
            shape: shape.to_vec(),
            shape_b: shape_b.to_vec(),
            within,
            bitwise: false,
            relation,
            metrics: Metrics {
                count: 6,
                finite: 6,
                relative_l2: Some(0.0),
                zero_norm: None,
                max_abs: Some(Pair { at: Cell { row: 0, col: 2 }, a: 1.0, b: 1.5 }),
                rms: Some(0.0),
                cosine: Some(1.0),
                norm_ratio: Some(1.0),
                categories: Categories {
                    both_nan: 0,
                    both_inf: 0,
                    mismatched: 0,
                    first: None,
                    zero_only_a: 0,
                    zero_only_b: 0,
                },
            },
        }
    }

    fn comparison(tensors: Vec<TensorComparison>, outcome: Outcome) -> CheckpointComparison {
        CheckpointComparison {
            schema: "apr-diff-tensors/1",
            a: "a.gguf".to_owned(),
            b: "b.gguf".to_owned(),
            tolerance: 1e-5,
            config: None,
            tensors,
            not_compared: Vec::new(),
            notes: Vec::new(),
            outcome,
        }
    }

    #[test]
    fn a_transposed_tensor_of_another_shape_shows_no_numbers_that_look_like_a_match() {
        let relation = Relation { kind: RelationKind::Transposed, relative_l2: Some(0.0) };
        let cells = row(&tensor(&[2, 3], &[3, 2], Some(relation)));
        assert_eq!(cells[4..10], ["-"; 6]);
        assert_eq!(cells[10], "TRANSPOSED: rel L2 0 after transposing");
    }

    #[test]
    fn a_vector_has_one_index_and_equal_values_of_other_types_are_called_that() {
        let cells = row(&tensor(&[6], &[6], None));
        assert_eq!((cells[6].as_str(), cells[10].as_str()), ("[2]", "same values"));
        assert_eq!(row(&tensor(&[2, 3], &[2, 3], None))[6], "[0, 2]");
    }

    #[test]
    fn of_many_tensors_only_those_that_differ_are_listed() {
        let mut tensors = vec![tensor(&[6], &[6], None); ALL_SHOWN];
        let all = checkpoints(&comparison(tensors.clone(), Outcome::Match { bitwise: false }));
        assert_eq!(all.matches("same values").count(), ALL_SHOWN);
        let relation = Relation { kind: RelationKind::Transposed, relative_l2: Some(0.0) };
        tensors.push(tensor(&[2, 3], &[3, 2], Some(relation)));
        let outcome = Outcome::Differs { first: "x".to_owned() };
        let text = checkpoints(&comparison(tensors, outcome));
        assert_eq!(text.matches("same values").count(), 0, "{text}");
        assert!(text.contains("(40 tensors within the tolerance: not listed"), "{text}");
        assert!(text.contains("DIFFERS: 1 of 41 tensors, first: x, TRANSPOSED\n"), "{text}");
    }
}
