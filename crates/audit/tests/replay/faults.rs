//! Small and plural faults.

use apr_audit::Group;
use apr_tensor::{DType, Stored};

use crate::engine::{Q4, Run, faults, native, open, site, trained};

#[test]
fn two_faults_are_both_found() {
    for file in trained() {
        let checkpoint = open(&file);
        let run = Run::default()
            .planting(0, "layers.0.ffn_out", |_, values| values.iter_mut().for_each(|x| *x *= 1.01))
            .planting(2, "layers.2.q_post_rope", |_, values| values.swap(3, 4));
        let audit = run.on(native(), &checkpoint).audited(&checkpoint);
        assert_eq!(faults(&audit), ["layers.0.ffn_out", "layers.2.q_post_rope"], "{file}");
    }
}

#[test]
fn one_wrong_element_is_found_where_it_is() {
    let checkpoint = open(Q4);
    for stage in ["qkv_matmul", "attn_out", "ffn_gate", "ffn_out", "ffn_norm", "post_ffn_residual"]
    {
        let name = format!("layers.1.{stage}");
        let run = Run::default().planting(0, &name, |shape, values| {
            // A hundredth of the root mean square: far below what quantisation does to the tensor.
            let squares = values.iter().map(|x| x * x).sum::<f64>();
            values[2 * shape[1] + 5] += 0.01 * (squares / values.len() as f64).sqrt();
        });
        let audit = run.on(native(), &checkpoint).audited(&checkpoint);
        assert_eq!(faults(&audit), [&name[..]]);
        let worst = audit.stage(site(&name)).unwrap().worst;
        match worst.group {
            Group::Element { position, column, .. } => assert_eq!((position, column), (2, 5)),
            Group::Channel { channel } => assert_eq!(channel, 5),
            other => panic!("{other:?} is not the smallest group"),
        }
    }
}

#[test]
fn one_block_of_one_row_of_a_quantised_matrix_is_found() {
    let checkpoint = open(Q4);
    for (tensor, stage, row, column) in [
        ("blk.0.ffn_gate.weight", "layers.0.ffn_gate", 100, 100),
        ("blk.3.attn_output.weight", "layers.3.attn_out", 17, 17),
        ("blk.2.attn_k.weight", "layers.2.qkv_matmul", 33, 256 + 33),
    ] {
        // The engine's weights are the file's but for 32 of them.
        let mut damaged = apr_testkit::Draft::of(&checkpoint);
        let stored = damaged.tensor(tensor);
        *stored = without_a_block(stored, row);
        let captured = Run::default().on(native(), &damaged.gguf());
        let audit = captured.audited(&checkpoint);
        assert_eq!(faults(&audit), [stage]);
        let found = audit.stage(site(stage)).unwrap();
        assert_eq!(found.channels_beyond, 1, "{:?}", found.channels);
        assert_eq!(found.channels[0].channel, column);
    }
}

/// A Q4_K matrix whose row `row` begins with 32 zeros: their sub-block has neither a scale nor a minimum.
fn without_a_block(stored: &Stored, row: usize) -> Stored {
    assert_eq!(stored.dtype(), DType::Q4_K);
    let row_bytes = stored.row_bytes(0).len();
    let mut bytes: Vec<u8> =
        (0..stored.shape().rows()).flat_map(|row| stored.row_bytes(row).to_vec()).collect();
    // After two f16 factors, six bits each.
    let scales = &mut bytes[row * row_bytes + 4..][..12];
    scales[0] &= 0b1100_0000;
    scales[4] &= 0b1100_0000;
    Stored::new(DType::Q4_K, stored.shape().clone(), bytes.into()).unwrap()
}
