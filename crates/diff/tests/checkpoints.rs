//! The same weights in two containers are the same weights, and what is not is named.

use std::{fs, path::Path};

use apr_diff::*;
use apr_format::{Checkpoint, safetensors::Writer};
use apr_tensor::{DType, Shape};
use apr_testkit::{TINY, fixture};

fn open(path: impl AsRef<Path>) -> Checkpoint {
    Checkpoint::open(path).unwrap()
}

fn tiny(name: &str) -> Checkpoint {
    open(fixture("tiny").join(name))
}

fn gguf(name: &str) -> Checkpoint {
    open(fixture("tiny").join(name).join(format!("{name}-F16.gguf")))
}

fn diff(a: &Checkpoint, b: &Checkpoint) -> CheckpointComparison {
    compare_checkpoints(a, b, &TensorOptions::default()).unwrap()
}

/// A copy of the tiny model `name` in F32, with tensors changed, renamed or left out.
fn changed(
    directory: &Path,
    name: &str,
    change: impl Fn(&str, Shape, Vec<f32>) -> Option<(String, Shape, Vec<f32>)>,
) -> Checkpoint {
    let original = tiny(name);
    let tensors: Vec<_> = original
        .tensors()
        .filter_map(|(name, t)| change(name, t.shape().clone(), t.to_f32().unwrap()))
        .collect();
    let mut writer = Writer::new();
    for (name, shape, _) in &tensors {
        writer.tensor(name, DType::F32, shape.clone()).unwrap();
    }
    fs::create_dir_all(directory).unwrap();
    let mut body =
        writer.begin(fs::File::create(directory.join("model.safetensors")).unwrap()).unwrap();
    for (name, _, values) in &tensors {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        body.tensor(name, &bytes).unwrap();
    }
    body.finish().unwrap();
    let config = fixture("tiny").join(name).join("config.json");
    fs::copy(config, directory.join("config.json")).unwrap();
    open(directory)
}

fn keep(name: &str, shape: Shape, values: Vec<f32>) -> Option<(String, Shape, Vec<f32>)> {
    Some((name.to_owned(), shape, values))
}

fn transpose(shape: &Shape, values: &[f32]) -> (Shape, Vec<f32>) {
    let (rows, cols) = (shape.rows(), shape.cols());
    let turned = (0..rows * cols).map(|i| values[i % rows * cols + i / rows]).collect();
    ([cols, rows].into(), turned)
}

#[test]
fn a_gguf_and_the_checkpoint_it_was_made_of_match_in_every_tensor() {
    for name in TINY {
        let (gguf, original) = (gguf(name), tiny(name));
        for found in [diff(&gguf, &original), diff(&original, &gguf)] {
            assert_eq!(found.outcome, Outcome::Match { bitwise: false }, "{name}");
            assert_eq!(found.config, Some(ConfigComparison::default()), "{name}");
            assert_eq!(found.tensors.len(), original.tensors().len(), "{name}");
            for tensor in &found.tensors {
                assert_eq!(tensor.relation, None, "{name} {}", tensor.name);
            }
            assert_eq!(found.notes.len(), usize::from(name.starts_with("llama")), "{name}");
        }
    }
}

#[test]
fn a_checkpoint_matches_itself_bit_for_bit() {
    let original = tiny("qwen2");
    assert_eq!(diff(&original, &original).outcome, Outcome::Match { bitwise: true });
}

#[test]
fn equal_tensors_under_another_config_are_another_model() {
    let dir = tempfile::tempdir().unwrap();
    let other = changed(dir.path(), "qwen2", keep);
    let config = dir.path().join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    let edit = |from: &str, to: &str| {
        assert!(text.contains(from), "{text}");
        fs::write(&config, text.replace(from, to)).unwrap();
        diff(&open(dir.path()), &tiny("qwen2"))
    };
    let found = edit("\"rope_theta\": 1000000.0", "\"rope_theta\": 10000.0");
    assert_eq!(found.outcome, Outcome::Differs { first: "rope_theta of the config".into() });
    let expected = ConfigDifference {
        key: "rope_theta",
        a: "10000.0".to_owned(),
        b: "1000000.0".to_owned(),
        effect: "the rotation of q and k, the more the later the token",
    };
    assert_eq!(found.config.unwrap().differences, [expected]);
    assert!(found.tensors.iter().all(|tensor| tensor.within));

    let found = edit("\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": \"small\"");
    assert_eq!(found.outcome.exit_code(), 3, "{:?}", found.outcome);
    assert_eq!(found.config.unwrap().unreadable[0].side, Side::A);
    assert_eq!(found.tensors.len(), other.tensors().len(), "tensors are compared all the same");
}

#[test]
fn one_changed_weight_is_found_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let victim = "model.layers.1.mlp.up_proj.weight";
    let faulty = changed(dir.path(), "qwen2", |name, shape, mut values| {
        if name == victim {
            values[3 * shape.cols() + 5] += 1.0;
        }
        keep(name, shape, values)
    });
    let found = diff(&faulty, &tiny("qwen2"));
    assert_eq!(found.outcome, Outcome::Differs { first: "blk.1.ffn_up.weight".into() });
    let wrong: Vec<_> = found.tensors.iter().filter(|tensor| !tensor.within).collect();
    assert_eq!(
        (wrong.len(), wrong[0].name_a.as_str(), wrong[0].relation.as_ref()),
        (1, victim, None)
    );
    assert_eq!(wrong[0].metrics.max_abs.unwrap().at, Cell { row: 3, col: 5 });
}

#[test]
fn a_transposed_weight_is_recognised_square_or_not_and_no_other_is() {
    let original = tiny("llama");
    for victim in ["model.layers.0.self_attn.o_proj.weight", "model.layers.2.mlp.gate_proj.weight"]
    {
        let dir = tempfile::tempdir().unwrap();
        let faulty = changed(dir.path(), "llama", |name, shape, values| match name == victim {
            true => {
                let (shape, values) = transpose(&shape, &values);
                keep(name, shape, values)
            }
            false => keep(name, shape, values),
        });
        let found = diff(&faulty, &original);
        let related: Vec<_> = found.tensors.iter().filter(|t| t.relation.is_some()).collect();
        assert_eq!((related.len(), related[0].name_a.as_str()), (1, victim));
        let relation = related[0].relation.as_ref().unwrap();
        assert_eq!((&relation.kind, relation.relative_l2), (&RelationKind::Transposed, Some(0.0)));
        assert_eq!((related[0].within, found.outcome.exit_code()), (false, 1));
        let turned: Vec<_> = related[0].shape_b.iter().rev().copied().collect();
        assert_eq!(related[0].shape, turned, "a's shape is that of b turned");
    }
}

#[test]
fn a_symmetric_matrix_is_identical_and_not_transposed() {
    let symmetric = |name: &str, shape: Shape, mut values: Vec<f32>| {
        if name.ends_with("o_proj.weight") {
            let n = shape.cols();
            (0..n * n).for_each(|i| values[i] = (i / n * (i % n)) as f32);
        }
        keep(name, shape, values)
    };
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let found =
        diff(&changed(a.path(), "llama", symmetric), &changed(b.path(), "llama", symmetric));
    assert_eq!(found.outcome, Outcome::Match { bitwise: true });
    assert!(found.tensors.iter().all(|tensor| tensor.relation.is_none()));
}

#[test]
fn rows_of_heads_in_the_other_order_are_recognised() {
    let dir = tempfile::tempdir().unwrap();
    let head_dim = 8;
    let victim = "model.layers.1.self_attn.k_proj.weight";
    let faulty = changed(dir.path(), "llama", |name, shape, values| {
        if name != victim {
            return keep(name, shape, values);
        }
        let cols = shape.cols();
        let halves = |row: usize| {
            let (head, channel) = (row / head_dim, row % head_dim);
            head * head_dim + channel / 2 + channel % 2 * (head_dim / 2)
        };
        let rows = (0..shape.rows()).flat_map(|row| values[halves(row) * cols..][..cols].to_vec());
        let values = rows.collect();
        keep(name, shape, values)
    });
    for (a, b, kind) in [
        (&faulty, &tiny("llama"), RelationKind::RowsInterleaved),
        (&tiny("llama"), &faulty, RelationKind::RowsInHalves),
    ] {
        let found = diff(a, b);
        assert_eq!(found.outcome, Outcome::Differs { first: "blk.1.attn_k.weight".into() });
        let tensor = found.tensors.iter().find(|tensor| !tensor.within).unwrap();
        let relation = tensor.relation.as_ref().unwrap();
        assert_eq!((&relation.kind, relation.relative_l2), (&kind, Some(0.0)));
    }
}

#[test]
fn a_tensor_on_one_side_only_is_named_and_no_match() {
    let dir = tempfile::tempdir().unwrap();
    let lost = "model.layers.0.self_attn.k_proj.bias";
    let part = changed(dir.path(), "qwen2", |name, shape, values| {
        (name != lost).then(|| (name.to_owned(), shape, values))
    });
    for (a, b, side) in [(&part, &tiny("qwen2"), Side::A), (&tiny("qwen2"), &part, Side::B)] {
        let found = diff(a, b);
        assert_eq!(found.not_compared[0].name, "blk.0.attn_k.bias");
        assert_eq!(found.not_compared[0].reason, Reason::Missing { side });
        assert_eq!(found.outcome.exit_code(), 3);
    }
}

#[test]
fn a_nan_in_the_weights_is_a_difference() {
    let dir = tempfile::tempdir().unwrap();
    let sick = changed(dir.path(), "qwen2", |name, shape, mut values| {
        if name == "model.norm.weight" {
            values[7] = f32::NAN;
        }
        keep(name, shape, values)
    });
    let found = diff(&sick, &tiny("qwen2"));
    assert_eq!(found.outcome, Outcome::Differs { first: "output_norm.weight".into() });
}

#[test]
fn a_filter_selects_by_either_name_and_may_not_select_nothing() {
    let (a, b) = (gguf("qwen2"), tiny("qwen2"));
    for filter in ["blk.1.ffn_up", "layers.1.mlp.up_proj"] {
        let options = TensorOptions { filter: Some(filter.into()), ..TensorOptions::default() };
        assert_eq!(compare_checkpoints(&a, &b, &options).unwrap().tensors.len(), 1);
    }
    let options = TensorOptions { filter: Some("attn_z".into()), ..TensorOptions::default() };
    let error = compare_checkpoints(&a, &b, &options).unwrap_err();
    assert!(error.to_string().contains("attn_z"), "{error}");
}

#[test]
fn a_tensor_of_nothing_is_not_compared_however_large_it_claims_to_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    for dims in [[1 << 60, 0], [0, 1 << 60]] {
        let mut writer = Writer::new();
        writer.tensor("nothing", DType::U8, dims).unwrap();
        let mut body = writer.begin(fs::File::create(&path).unwrap()).unwrap();
        body.tensor("nothing", &[]).unwrap();
        body.finish().unwrap();
        let found = diff(&open(&path), &open(&path));
        assert_eq!(found.not_compared[0].reason, Reason::NothingFinite);
        assert_eq!(found.outcome.exit_code(), 3);
    }
}

#[test]
fn experts_are_compared_one_by_one_whether_a_file_merges_them_or_not() {
    let (merged, single) = (gguf("qwen3-moe"), tiny("qwen3-moe"));
    let found = diff(&merged, &single);
    assert!(matches!(found.outcome, Outcome::Match { .. } | Outcome::Drift), "{:?}", found.outcome);
    let of_experts = found.tensors.iter().filter(|t| t.name.contains("_exps.weight["));
    assert_eq!(of_experts.count(), 2 * 3 * 8);

    let directory = tempfile::tempdir().unwrap();
    let exchanged = |expert: usize| format!("model.layers.1.mlp.experts.{expert}.up_proj.weight");
    let wrong = changed(directory.path(), "qwen3-moe", |name, shape, values| {
        let name = match name {
            _ if name == exchanged(2) => exchanged(6),
            _ if name == exchanged(6) => exchanged(2),
            _ => name.to_owned(),
        };
        Some((name, shape, values))
    });
    for reference in [merged, single] {
        let found = diff(&wrong, &reference);
        let beyond: Vec<_> = found.tensors.iter().filter(|t| !t.explained).collect();
        let kind = |t: &TensorComparison| t.relation.as_ref().map(|relation| relation.kind.clone());
        let expected = [(2, 6), (6, 2)].map(|(is, of)| {
            let name = |expert: usize| format!("blk.1.ffn_up_exps.weight[{expert}]");
            (name(is), Some(RelationKind::OtherTensor { name: name(of) }))
        });
        let names: Vec<_> = beyond.iter().map(|t| (t.name.clone(), kind(t))).collect();
        assert_eq!(names, expected);
    }
}
