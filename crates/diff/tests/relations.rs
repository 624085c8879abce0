//! Faults planted in model files are named, exactly; rounding and what is right are not.

use apr_diff::*;
use apr_format::Checkpoint;
use apr_tensor::{DType, Stored};
use apr_testkit::{Draft, fixture};
use half::f16;

const LAYERS: [usize; 2] = [0, 3];
const HEAD_DIM: usize = 64;

fn original() -> Checkpoint {
    Checkpoint::open(fixture("pycoder-3m")).unwrap()
}

fn quantised(name: &str) -> Draft {
    let file = format!("pycoder-3m/pycoder-3m-{name}.gguf");
    Draft::of(&Checkpoint::open(fixture(&file)).unwrap())
}

fn halves() -> Draft {
    let metadata = fixture("pycoder-3m/pycoder-3m-Q8_0.gguf");
    Draft::f16_gguf(&original(), &Checkpoint::open(metadata).unwrap())
}

/// The same model in three types: each has its own steps.
fn models() -> [(&'static str, Draft); 3] {
    [("F16", halves()), ("Q8_0", quantised("Q8_0")), ("Q4_K_M", quantised("Q4_K_M"))]
}

fn diff(a: &Draft) -> CheckpointComparison {
    compare_checkpoints(&a.gguf(), &original(), &TensorOptions::default()).unwrap()
}

fn diff_layer(a: &Draft, layer: usize) -> CheckpointComparison {
    let options = TensorOptions { filter: Some(format!("blk.{layer}.")), ..Default::default() };
    compare_checkpoints(&a.gguf(), &original(), &options).unwrap()
}

/// A tensor of other numbers, as F16.
fn dense(dims: [usize; 2], value: impl Fn(usize) -> f32) -> Stored {
    let bytes: Vec<u8> =
        (0..dims[0] * dims[1]).flat_map(|i| f16::from_f32(value(i)).to_le_bytes()).collect();
    Stored::new(DType::F16, dims.into(), bytes.into()).unwrap()
}

/// The same bytes, changed or differently labelled.
fn bytes(stored: &Stored, dtype: DType, change: impl FnOnce(&mut [u8])) -> Stored {
    let mut bytes = stored.bytes().to_vec();
    change(&mut bytes);
    Stored::new(dtype, stored.shape().clone(), bytes.into()).unwrap()
}

fn vector(stored: &Stored, change: impl Fn(f32) -> f32) -> Stored {
    let values = stored.to_f32().unwrap().into_iter();
    let bytes: Vec<u8> = values.flat_map(|x| change(x).to_le_bytes()).collect();
    Stored::new(DType::F32, stored.shape().clone(), bytes.into()).unwrap()
}

/// Plants `fault` in tensor `name` of a layer and expects it, and nothing else of the layer, to be found and called
/// `expected`.
#[track_caller]
fn expect(draft: &Draft, name: &str, expected: &str, fault: impl Fn(&Stored) -> Stored) {
    for layer in LAYERS {
        let name = name.replace('*', &layer.to_string());
        let mut faulty = draft.clone();
        let stored = faulty.tensor(&name);
        *stored = fault(stored);
        let expected = expected.replace('*', &layer.to_string());
        assert_found(&diff_layer(&faulty, layer), &[(&name, &expected)]);
    }
}

#[track_caller]
fn assert_found(found: &CheckpointComparison, expected: &[(&str, &str)]) {
    let said: Vec<(&str, String)> = found
        .tensors
        .iter()
        .filter(|tensor| !tensor.explained)
        .map(|tensor| {
            let relation = tensor.relation.as_ref().map(Relation::to_string);
            let damage = tensor.damage.as_ref().map(Damage::to_string);
            (tensor.name.as_str(), relation.or(damage).unwrap_or_default())
        })
        .collect();
    let said: Vec<_> = said.iter().map(|(name, what)| (*name, what.as_str())).collect();
    assert_eq!(said, expected);
    assert_eq!(found.outcome, Outcome::Differs { first: expected[0].0.to_owned() });
}

#[test]
fn rounding_to_a_stored_type_is_drift_and_never_a_fault_whichever_side_is_wider() {
    let files: Vec<Checkpoint> = models().iter().map(|(_, draft)| draft.gguf()).collect();
    let all: Vec<&Checkpoint> = files.iter().collect();
    let original = original();
    for (i, a) in all.iter().chain([&&original]).enumerate() {
        for (j, b) in all.iter().chain([&&original]).enumerate() {
            let found = compare_checkpoints(a, b, &TensorOptions::default()).unwrap();
            let faults: Vec<_> = found.tensors.iter().filter(|t| !t.explained).collect();
            assert!(faults.is_empty(), "{i} {j} {faults:#?}");
            assert!(found.tensors.iter().all(|t| t.relation.is_none() && t.damage.is_none()));
            let drifts = i != j && ![i, j].iter().all(|k| [0, 3].contains(k));
            assert_eq!(found.outcome == Outcome::Drift, drifts, "{i} {j} {:?}", found.outcome);
            assert_eq!(found.outcome.exit_code(), 0);
            assert_eq!(found.tensors.len(), 50, "all tensors are compared, not the first ones");
        }
    }
}

#[test]
fn a_quantisers_error_is_what_its_types_step_predicts() {
    for (name, expected) in [("Q8_0", 0.22), ("Q4_K_M", 0.17)] {
        let found = diff(&quantised(name));
        let up = found.tensors.iter().find(|t| t.name == "blk.1.ffn_up.weight").unwrap();
        let steps = up.steps.unwrap();
        assert!((steps.rms - expected).abs() < 0.02, "{name} {steps:?}");
        assert!(steps.worst_block.steps < 0.4 && steps.worst_element.steps < 1.0, "{steps:?}");
    }
}

#[test]
fn a_transposed_weight_is_found_whether_or_not_its_dimensions_are_exchanged() {
    let turn = |stored: &Stored, dims: [usize; 2]| {
        let (rows, cols) = (stored.shape().rows(), stored.shape().cols());
        let values = stored.to_f32().unwrap();
        dense(dims, |i| values[i % rows * cols + i / rows])
    };
    let draft = halves();
    expect(&draft, "blk.*.attn_output.weight", "TRANSPOSED", |stored| turn(stored, [256, 256]));
    expect(&draft, "blk.*.ffn_up.weight", "TRANSPOSED", |stored| turn(stored, [768, 256]));
    for layer in LAYERS {
        let (mut faulty, name) = (draft.clone(), format!("blk.{layer}.ffn_up.weight"));
        let stored = faulty.tensor(&name);
        *stored = turn(stored, [256, 768]);
        assert_found(&diff_layer(&faulty, layer), &[(&name, "TRANSPOSED")]);
        let stored = faulty.tensor(&name);
        *stored = draft.clone().tensor(&name).with_shape([256, 768]).unwrap();
        let expected = "the same numbers under OTHER DIMENSIONS";
        assert_found(&diff_layer(&faulty, layer), &[(&name, expected)]);
    }
}

#[test]
fn rows_of_heads_in_the_order_of_the_other_rotation_are_found() {
    let in_head =
        |to: fn(usize) -> usize| move |row| row / HEAD_DIM * HEAD_DIM + to(row % HEAD_DIM);
    let pairs = in_head(|c| c / 2 + c % 2 * (HEAD_DIM / 2));
    let halves = in_head(|c| 2 * (c % (HEAD_DIM / 2)) + c / (HEAD_DIM / 2));
    for (_, draft) in models() {
        let interleaved = "rows of heads INTERLEAVED in A";
        expect(&draft, "blk.*.attn_q.weight", interleaved, |s| s.permute_rows(pairs));
        expect(&draft, "blk.*.attn_k.weight", "rows of heads IN HALVES in A", |s| {
            s.permute_rows(halves)
        });
        expect(&draft, "blk.*.attn_q.bias", interleaved, |s| {
            let column = s.with_shape([s.shape().elements(), 1]).unwrap();
            column.permute_rows(pairs).with_shape(s.shape().clone()).unwrap()
        });
    }
}

#[test]
fn heads_that_change_places_are_told_from_rows_that_do() {
    let next_head = |row: usize| (row + HEAD_DIM) % (2 * HEAD_DIM);
    for (_, draft) in models() {
        let heads = "HEADS MOVED: head 0 is B's 1, head 1 is B's 0";
        for name in ["blk.*.attn_k.weight", "blk.*.attn_v.weight"] {
            expect(&draft, name, heads, |s| s.permute_rows(next_head));
        }
        expect(&draft, "blk.*.attn_k.bias", heads, |s| {
            let column = s.with_shape([s.shape().elements(), 1]).unwrap();
            column.permute_rows(next_head).with_shape(s.shape().clone()).unwrap()
        });
        let exchanged = |row| match row {
            5 => 700,
            700 => 5,
            row => row,
        };
        expect(&draft, "blk.*.ffn_up.weight", "2 ROWS MOVED: row 5 is B's 700", |s| {
            s.permute_rows(exchanged)
        });
    }
}

#[test]
fn an_embedding_whose_rows_are_one_off_is_found() {
    for (_, draft) in models() {
        let rows = draft.clone().tensor("token_embd.weight").shape().rows();
        for (by, text) in [(1, "+1"), (rows - 1, "-1")] {
            let mut faulty = draft.clone();
            let stored = faulty.tensor("token_embd.weight");
            *stored = stored.permute_rows(|row| (row + by) % rows);
            let expected = format!("ROWS SHIFTED: row r is B's r {text}");
            let found = diff(&faulty);
            let tensor = found.tensors.iter().find(|t| !t.explained).unwrap();
            assert_eq!(tensor.name, "token_embd.weight");
            assert_eq!(tensor.relation.as_ref().unwrap().to_string(), expected);
        }
    }
}

#[test]
fn a_tensor_in_the_place_of_another_is_told_which_it_is() {
    for (_, draft) in models() {
        for layer in LAYERS {
            let exchange = |parts: [&str; 2]| {
                let names = parts.map(|part| format!("blk.{layer}.{part}.weight"));
                let mut faulty = draft.clone();
                let stored = names.clone().map(|name| faulty.tensor(&name).clone());
                let [first, second] = stored;
                *faulty.tensor(&names[0]) = second;
                *faulty.tensor(&names[1]) = first;
                let said = names.clone().map(|name| format!("ANOTHER TENSOR: B's {name}"));
                let expected = [(names[0].as_str(), said[1].as_str()), (&names[1], &said[0])];
                assert_found(&diff_layer(&faulty, layer), &expected);
            };
            exchange(["ffn_gate", "ffn_up"]);
            exchange(["attn_k", "attn_v"]);
        }
        let other = draft.clone().tensor("blk.2.attn_q.weight").clone();
        let expected = "ANOTHER TENSOR: B's blk.2.attn_q.weight";
        expect(&draft, "blk.*.attn_q.weight", expected, |_| other.clone());
    }
}

#[test]
fn factors_signs_and_offsets_are_found_and_have_their_values() {
    for (_, draft) in models() {
        let norm = "blk.*.ffn_norm.weight";
        expect(&draft, norm, "OFFSET by -1", |s| vector(s, |x| x - 1.0));
        expect(&draft, norm, "OFFSET by +1", |s| vector(s, |x| x + 1.0));
        expect(&draft, norm, "SCALED by 2", |s| vector(s, |x| x * 2.0));
        expect(&draft, norm, "SIGN CHANGED", |s| vector(s, |x| -x));
        expect(&draft, norm, "CONSTANT 1", |s| vector(s, |_| 1.0));
        expect(&draft, "blk.*.attn_v.bias", "ALL ZERO", |s| vector(s, |_| 0.0));
    }
    // A scale of a block of Q8_0 is an f16 at its head: the exponent makes a factor of two, the sign bit a sign.
    let draft = quantised("Q8_0");
    let scales = |s: &Stored, change: fn(&mut u8)| {
        bytes(s, DType::Q8_0, |bytes| bytes.iter_mut().skip(1).step_by(34).for_each(change))
    };
    expect(&draft, "blk.*.ffn_down.weight", "SCALED by 2", |s| scales(s, |b| *b += 4));
    expect(&draft, "blk.*.ffn_down.weight", "SIGN CHANGED", |s| scales(s, |b| *b ^= 0x80));
}

#[test]
fn bytes_that_are_right_under_another_type_or_in_another_order_are_found() {
    let up = "blk.*.ffn_up.weight";
    let draft = halves();
    expect(&draft, up, "MISLABELLED: right if read as F16", |s| bytes(s, DType::BF16, |_| {}));
    expect(&draft, up, "BYTES REVERSED in each number", |s| {
        bytes(s, DType::F16, |bytes| bytes.chunks_mut(2).for_each(|number| number.swap(0, 1)))
    });
    let draft = quantised("Q4_K_M");
    for other in [DType::Q4_0, DType::IQ4_NL] {
        let expected = "MISLABELLED: right if read as Q4_K";
        expect(&draft, up, expected, |s| bytes(s, other, |_| {}));
    }
    expect(&draft, up, "NIBBLES EXCHANGED", |s| {
        bytes(s, DType::Q4_K, |bytes| {
            let blocks = bytes.chunks_mut(144);
            blocks.for_each(|block| block[16..].iter_mut().for_each(|q| *q = q.rotate_left(4)));
        })
    });
}

#[test]
fn one_zeroed_block_in_a_large_tensor_is_found_where_it_is() {
    for (name, dtype, block, expected) in [
        (
            "Q8_0",
            DType::Q8_0,
            9 * 8 + 2,
            "row 9, columns 64 to 95 (1 of 6144 blocks, zeroed in A, ",
        ),
        ("Q4_K_M", DType::Q4_K, 9, "row 9, all 256 columns (8 of 6144 blocks, zeroed in A, "),
    ] {
        for layer in LAYERS {
            let mut faulty = quantised(name);
            let stored = faulty.tensor(&format!("blk.{layer}.ffn_gate.weight"));
            let len = dtype.block_bytes();
            *stored = bytes(stored, dtype, |bytes| bytes[block * len..][..len].fill(0));
            let found = diff_layer(&faulty, layer);
            let wrong: Vec<_> = found.tensors.iter().filter(|t| !t.explained).collect();
            assert_eq!((wrong.len(), &wrong[0].relation), (1, &None));
            let damage = wrong[0].damage.as_ref().unwrap().to_string();
            assert!(damage.starts_with(expected), "{damage}");
        }
    }
}

#[test]
fn a_number_that_is_none_is_told_and_has_no_share_of_the_difference() {
    let mut faulty = halves();
    let stored = faulty.tensor("blk.1.ffn_gate.weight");
    *stored = bytes(stored, DType::F16, |bytes| {
        bytes[2 * (7 * 256 + 40)..][..2].copy_from_slice(&f16::NAN.to_le_bytes());
    });
    let expected = "row 7, columns 32 to 63 (1 of 6144 blocks, with NaN or infinity in A)";
    assert_found(&diff(&faulty), &[("blk.1.ffn_gate.weight", expected)]);
}

#[test]
fn a_block_with_a_wrong_scale_and_one_wrong_number_are_found_where_they_are() {
    let draft = quantised("Q4_K_M");
    let mut faulty = draft.clone();
    let stored = faulty.tensor("blk.2.attn_q.weight");
    // The scale of the first sub-block of row 17.
    *stored = bytes(stored, DType::Q4_K, |bytes| bytes[17 * 144 + 4] ^= 0x20);
    let found = diff(&faulty);
    let tensor = found.tensors.iter().find(|tensor| !tensor.explained).unwrap();
    let Damage { blocks, zeroed, rows, columns, .. } = tensor.damage.as_ref().unwrap();
    assert_eq!((*blocks, *zeroed, rows.first, rows.count), (1, 0, 17, 1));
    assert_eq!((columns.first, columns.last), (0, 31));

    let mut faulty = halves();
    let stored = faulty.tensor("blk.2.attn_q.weight");
    *stored = bytes(stored, DType::F16, |bytes| bytes[2 * (256 * 30 + 100) + 1] ^= 4);
    let found = diff(&faulty);
    let tensor = found.tensors.iter().find(|tensor| !tensor.explained).unwrap();
    assert_eq!(tensor.steps.unwrap().worst_element.at, Cell { row: 30, col: 100 });
}

#[test]
fn a_block_of_huge_steps_explains_nothing() {
    let mut faulty = quantised("Q8_0");
    let stored = faulty.tensor("blk.1.ffn_up.weight");
    // Codes of zero under the largest scale: every weight is within half a step of what it should be.
    *stored = bytes(stored, DType::Q8_0, |bytes| {
        for block in bytes.chunks_mut(34) {
            block.fill(0);
            block[1] = 0x7b;
        }
    });
    assert_found(&diff(&faulty), &[("blk.1.ffn_up.weight", "ALL ZERO")]);
}
