//! Comparisons of two model files as text. Their JSON is the comparison itself.

use std::{collections::BTreeMap, fmt::Write};

use apr_diff::{
    Cell, CheckpointComparison, ConfigComparison, ConfigDifference, Outcome, Steps,
    TensorComparison, UnreadableConfig,
};
use apr_model::Role;

use crate::{
    diff::{
        MEASURED_AGAINST, categories, cosine, largest, listed, mismatches, ratio, relative_l2,
        section, verdict,
    },
    table::{lines, magnitude, plural, table},
};

/// Of more tensors than this, only those that differ by more than rounding are listed.
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
    let shown: Vec<_> = c.tensors.iter().filter(|tensor| all || !tensor.explained).collect();
    if !shown.is_empty() {
        let mut t = table(&[
            "tensor",
            "A",
            "B",
            "shape",
            "rel L2",
            "steps",
            "worst block",
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
        let _ = writeln!(out, "({rest} equal or explained: not listed here, but in the JSON)");
    }
    out += &explained(c);
    out += &repeated(c);
    for (tensor, damage) in c.tensors.iter().filter_map(|t| Some((t, t.damage.as_ref()?))) {
        let _ = writeln!(
            out,
            "{}: no simple relation fits; off by more than rounding: {damage}",
            tensor.name
        );
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
    let tensors: Vec<_> = c.tensors.iter().filter(|tensor| !tensor.explained).collect();
    if let Some(first) = tensors.first() {
        let relation = first.relation.as_ref().map_or(String::new(), |r| format!(", {r}"));
        let all = plural(c.tensors.len(), "tensor");
        parts.push(format!("{} of {all}, first: {}{relation}", tensors.len(), first.name));
    }
    format!("DIFFERS: {}", parts.join("; "))
}

/// How many tensors differ by what rounding to the stored types does, and by how much at most.
fn explained(c: &CheckpointComparison) -> String {
    let rounded: Vec<_> = c.tensors.iter().filter(|t| t.explained && !t.within).collect();
    let block = |tensor: &&&TensorComparison| tensor.steps.map_or(0.0, |s| s.worst_block.steps);
    let Some(worst) = rounded.iter().max_by(|x, y| block(x).total_cmp(&block(y))) else {
        return String::new();
    };
    let Some(steps) = worst.steps else { return String::new() };
    format!(
        "explained by quantisation: {} of {}; the worst block is {:.2} steps off in the root mean square, in {} at {}\n",
        rounded.len(),
        plural(c.tensors.len(), "tensor"),
        steps.worst_block.steps,
        worst.name,
        place(worst, &steps.worst_block.at),
    )
}

/// The relations that hold in several layers, each told once.
fn repeated(c: &CheckpointComparison) -> String {
    let mut layers: BTreeMap<(String, String), Vec<usize>> = BTreeMap::new();
    let mut of_role: BTreeMap<String, usize> = BTreeMap::new();
    for tensor in &c.tensors {
        let Some(Role::Layer(layer, role)) = tensor.role else { continue };
        let role = format!("blk.*.{}", role.gguf_name());
        *of_role.entry(role.clone()).or_default() += 1;
        if let Some(relation) = &tensor.relation {
            // Another tensor is told relative to its layer.
            let relation = relation.to_string().replace(&format!("blk.{layer}."), "blk.*.");
            layers.entry((role, relation)).or_default().push(layer);
        }
    }
    let mut out = String::new();
    for ((role, relation), layers) in layers.iter().filter(|(_, layers)| layers.len() > 1) {
        let all = of_role[role];
        let which = match layers.len() == all {
            true => format!("all {all} layers"),
            false => format!("{} of {all} layers, the first {}", layers.len(), layers[0]),
        };
        let _ = writeln!(out, "{role} in {which}: {relation}");
    }
    out
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
    for ConfigDifference { key, a, b, effect } in &config.differences {
        let _ =
            writeln!(out, "config: {key} DIFFERS: {a} in A, {b} in B (on it depends: {effect})");
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
            let steps = tensor.steps.filter(|_| !tensor.bitwise);
            let steps = |of: fn(&Steps) -> f64| steps.map_or("-".to_owned(), |s| count(of(&s)));
            let (rms, block) = (steps(|s| s.rms), steps(|s| s.worst_block.steps));
            let (l2, cosine, ratio) = (relative_l2(m), cosine(m.cosine), ratio(m.norm_ratio));
            [l2, rms, block, largest, at, cosine, ratio, categories(m)]
        }
        false => ["-"; 8].map(str::to_owned),
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
    if let Some(relation) = &tensor.relation {
        let left = relation.relative_l2.map_or("-".to_owned(), magnitude);
        return format!("{relation} (leaves rel L2 {left})");
    }
    match (tensor.bitwise, tensor.within, tensor.explained) {
        (true, ..) => "same bytes",
        (_, true, _) if m.relative_l2 == Some(0.0) => "same values",
        (_, true, _) => "within",
        (_, _, true) => "quantised",
        _ => "DIFFERS",
    }
    .to_owned()
}

/// A number of steps.
fn count(steps: f64) -> String {
    match steps {
        0.0 => "0".to_owned(),
        _ if (0.005..1e4).contains(&steps) => format!("{steps:.2}"),
        _ => magnitude(steps),
    }
}

#[cfg(test)]
mod tests {
    use apr_diff::{Categories, Metrics, Pair, Relation, RelationKind};

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
            role: None,
            within,
            explained: within,
            bitwise: false,
            steps: None,
            relation,
            damage: None,
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
        assert_eq!(cells[4..12], ["-"; 8]);
        assert_eq!(cells[12], "TRANSPOSED (leaves rel L2 0)");
    }

    #[test]
    fn a_vector_has_one_index_and_equal_values_of_other_types_are_called_that() {
        let cells = row(&tensor(&[6], &[6], None));
        assert_eq!((cells[8].as_str(), cells[12].as_str()), ("[2]", "same values"));
        assert_eq!(row(&tensor(&[2, 3], &[2, 3], None))[8], "[0, 2]");
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
        assert!(text.contains("(40 tensors equal or explained: not listed"), "{text}");
        assert!(text.contains("DIFFERS: 1 of 41 tensors, first: x, TRANSPOSED\n"), "{text}");
    }
}
