use apr_cpu::Cpu;
use apr_model::{HostTensor, Site, Stage};
use apr_tensor::activation::ActivationType;

use crate::{
    is_called, is_only,
    plant::{Run, Seen},
    sentence,
};

/// `x W^T` for `[out, in]` weights given by `w`.
fn product(x: &HostTensor, out: usize, w: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let inputs = x.shape[1];
    let mut y = Vec::new();
    for row in x.values.chunks(inputs) {
        for o in 0..out {
            y.push((0..inputs).map(|i| row[i] * w(o, i)).sum());
        }
    }
    y
}

fn with(right: &HostTensor, values: Vec<f64>) -> HostTensor {
    assert_eq!(right.values.len(), values.len());
    HostTensor { shape: right.shape.clone(), values }
}

/// Columns of each row moved: `source` says where each is from.
fn columns(right: &HostTensor, source: impl Fn(usize) -> usize) -> HostTensor {
    let width = right.shape[1];
    let values =
        (0..right.values.len()).map(|i| right.values[i - i % width + source(i % width)]).collect();
    with(right, values)
}

#[test]
fn a_weight_that_is_read_transposed_is_recognised() {
    let run = Run::of("tiny/qwen2");
    for (site, from, name) in [
        (Site::whole(Stage::LmHead), Site::whole(Stage::FinalNorm), "output.weight"),
        (Site::layer(1, Stage::FfnOut), Site::layer(1, Stage::FfnSwigl), "blk.1.ffn_down.weight"),
        (Site::layer(0, Stage::FfnUp), Site::layer(0, Stage::FfnNorm), "blk.0.ffn_up.weight"),
    ] {
        let found = run.plant(site, &|seen: &Seen, right| {
            let out = right.shape[1];
            let w = seen.tensors.get(name).unwrap_or_else(|| &seen.tensors["token_embd.weight"]);
            with(right, product(seen.get(from), out, |o, i| w.1[i * out + o]))
        });
        is_only("weight-transposed", site, &found);
        assert!(sentence(&found).contains("transposed"));
    }
}

#[test]
fn one_transposed_projection_of_three_is_named() {
    let site = Site::layer(1, Stage::QkvMatmul);
    let found = Run::of("tiny/llama").plant(site, &|seen: &Seen, right| {
        let width = right.shape[1];
        let (q, kv) = (seen.config.q_dim(), seen.config.kv_dim());
        let w = seen.tensor("blk.1.attn_k.weight");
        let k = product(seen.get(Site::layer(1, Stage::AttnNorm)), kv, |o, i| w[i * kv + o]);
        let mut wrong = right.clone();
        for (row, k) in wrong.values.chunks_mut(width).zip(k.chunks(kv)) {
            row[q..q + kv].copy_from_slice(k);
        }
        wrong
    });
    is_only("weight-transposed", site, &found);
    assert!(sentence(&found).starts_with("in k, "), "{}", sentence(&found));
}

#[test]
fn inputs_that_are_left_out_are_counted() {
    let site = Site::layer(1, Stage::FfnOut);
    for (from, to, name) in [(96, 128, "tail-block-dropped"), (32, 64, "input-block-dropped")] {
        let found = Run::of("tiny/qwen2").plant(site, &|seen: &Seen, right| {
            let w = seen.tensor("blk.1.ffn_down.weight");
            let dropped = |i: usize| (from..to).contains(&i);
            let y = product(seen.get(Site::layer(1, Stage::FfnSwigl)), 64, |o, i| {
                if dropped(i) { 0.0 } else { w[o * 128 + i] }
            });
            with(right, y)
        });
        is_only(name, site, &found);
        let parameters = &found.1[0].finding.as_ref().unwrap().parameters;
        assert_eq!(parameters["inputs"], 32.0, "{}", sentence(&found));
    }
}

#[test]
fn a_zeroed_block_of_one_row_is_found_in_a_quantised_engine() {
    let site = Site::layer(2, Stage::FfnUp);
    let run = Run::of("pycoder-3m/pycoder-3m-Q4_K_M.gguf");
    let found = run.plant_in(Cpu::new(Default::default()).unwrap(), site, &|seen: &Seen, right| {
        let x = seen.get(Site::layer(2, Stage::FfnNorm));
        let (shape, w) = &seen.tensors["blk.2.ffn_up.weight"];
        let inputs = shape[1];
        let mut wrong = right.clone();
        for (row, x) in wrong.values.chunks_mut(shape[0]).zip(x.values.chunks(inputs)) {
            let single: Vec<f32> = x.iter().map(|&x| x as f32).collect();
            let mut rounded = vec![0.0; inputs];
            ActivationType::Q8_K.round_row(&single, &mut rounded);
            row[17] -= (64..96).map(|i| rounded[i] * w[17 * inputs + i]).sum::<f64>();
        }
        wrong
    });
    is_only("weight-block-zeroed", site, &found);
    assert!(sentence(&found).contains("inputs 64..96"), "{}", sentence(&found));
    assert!(sentence(&found).ends_with("output 17"), "{}", sentence(&found));
    let geometry = found.1[0].geometry.as_ref().unwrap();
    assert_eq!(geometry.channels, [17], "{geometry}");
}

#[test]
fn a_transposed_weight_is_found_under_rounded_activations() {
    let site = Site::layer(1, Stage::AttnOut);
    let run = Run::of("pycoder-3m/pycoder-3m-Q4_K_M.gguf");
    let found = run.plant_in(Cpu::new(Default::default()).unwrap(), site, &|seen: &Seen, right| {
        let mut x = seen.get(Site::layer(1, Stage::Attention)).clone();
        let (shape, w) = &seen.tensors["blk.1.attn_output.weight"];
        let (out, inputs) = (shape[0], shape[1]);
        for row in x.values.chunks_mut(inputs) {
            let single: Vec<f32> = row.iter().map(|&x| x as f32).collect();
            ActivationType::Q8_K.round_row(&single, row);
        }
        with(right, product(&x, out, |o, i| w[i * out + o]))
    });
    is_only("weight-transposed", site, &found);
}

#[test]
fn heads_in_the_order_of_the_other_rotation_are_recognised() {
    let site = Site::layer(0, Stage::QkvMatmul);
    for (name, direction) in [("qk-rows-interleaved", true), ("qk-rows-in-halves", false)] {
        for only_q in [false, true] {
            let found = Run::of("tiny/qwen3").plant(site, &|seen: &Seen, right| {
                let (q, kv) = (seen.config.q_dim(), seen.config.kv_dim());
                let (head_dim, half) = (seen.config.head_dim, seen.config.head_dim / 2);
                columns(right, |column| {
                    let channel = column % head_dim;
                    let head = column - channel;
                    match column {
                        column if column >= if only_q { q } else { q + kv } => column,
                        _ if direction => head + channel / 2 + channel % 2 * half,
                        _ => head + channel / half + channel % half * 2,
                    }
                })
            });
            is_only(name, site, &found);
            let part = if only_q { "in q, " } else { "in q and k, " };
            assert!(sentence(&found).starts_with(part), "{}", sentence(&found));
        }
    }
}

#[test]
fn exchanged_projections_are_named() {
    let site = Site::layer(1, Stage::QkvMatmul);
    let found = Run::of("tiny/llama").plant(site, &|seen: &Seen, right| {
        let (q, kv) = (seen.config.q_dim(), seen.config.kv_dim());
        columns(right, |column| match column {
            column if column < q => column,
            column if column < q + kv => column + kv,
            column => column - kv,
        })
    });
    is_only("kv-swapped", site, &found);

    let site = Site::layer(1, Stage::QkvMatmul);
    let found = Run::of("tiny/qwen3").plant(site, &|seen: &Seen, right| {
        let (q, kv) = (seen.config.q_dim(), seen.config.kv_dim());
        columns(right, |column| if column < 2 * kv { q + column } else { column - 2 * kv })
    });
    is_only("q-k-v-order", site, &found);

    let site = Site::layer(0, Stage::FfnGate);
    let found = Run::of("tiny/llama").plant(site, &|seen: &Seen, right| {
        let w = seen.tensor("blk.0.ffn_up.weight");
        let x = seen.get(Site::layer(0, Stage::FfnNorm));
        with(right, product(x, right.shape[1], |o, i| w[o * x.shape[1] + i]))
    });
    is_only("gate-up-swapped", site, &found);
}

#[test]
fn weights_of_another_layer_or_role_are_named() {
    let run = Run::of("tiny/qwen2");
    let site = Site::layer(0, Stage::FfnOut);
    let found = run.plant(site, &|seen: &Seen, right| {
        let w = seen.tensor("blk.1.ffn_down.weight");
        let x = seen.get(Site::layer(0, Stage::FfnSwigl));
        with(right, product(x, right.shape[1], |o, i| w[o * x.shape[1] + i]))
    });
    is_only("other-layer-weights", site, &found);
    assert_eq!(sentence(&found), "the weight is that of layer 1");

    let site = Site::layer(1, Stage::AttnOut);
    let found = run.plant(site, &|seen: &Seen, right| {
        let w = seen.tensor("blk.1.attn_q.weight");
        let x = seen.get(Site::layer(1, Stage::Attention));
        with(right, product(x, right.shape[1], |o, i| w[o * x.shape[1] + i]))
    });
    is_only("other-tensor", site, &found);
    assert_eq!(sentence(&found), "the weight is that of q");
}

#[test]
fn signs_scales_shifts_and_misaligned_inputs_are_recognised() {
    let run = Run::of("tiny/llama3-rope");
    let site = Site::layer(0, Stage::AttnOut);
    let found =
        run.plant(site, &|_: &Seen, right| with(right, right.values.iter().map(|x| -x).collect()));
    is_only("sign-flipped", site, &found);

    let found = run.plant(site, &|_: &Seen, right| {
        with(right, right.values.iter().map(|x| x * 1.25).collect())
    });
    is_only("weight-scaled", site, &found);
    let factor = found.1[0].finding.as_ref().unwrap().parameters["factor"];
    assert!((factor - 1.25).abs() < 1e-6, "{factor}");

    let site = Site::whole(Stage::LmHead);
    let found = run.plant(site, &|_: &Seen, right| {
        let width = right.shape[1];
        columns(right, |column| (column + 1) % width)
    });
    is_only("rows-shifted", site, &found);

    let site = Site::layer(1, Stage::FfnGate);
    let found = run.plant(site, &|seen: &Seen, right| {
        let w = seen.tensor("blk.1.ffn_gate.weight");
        let mut x = seen.get(Site::layer(1, Stage::FfnNorm)).clone();
        let width = x.shape[1];
        x.values.chunks_mut(width).for_each(|row| row.rotate_right(1));
        with(right, product(&x, right.shape[1], |o, i| w[o * width + i]))
    });
    is_only("input-misaligned", site, &found);
}

#[test]
fn embeddings_of_other_tokens_are_named() {
    let site = Site::whole(Stage::Embedding);
    let run = Run::of("tiny/qwen2");
    let row = |seen: &Seen, token: usize| {
        let width = seen.config.hidden_size;
        seen.tensor("token_embd.weight")[token * width..][..width].to_vec()
    };
    let found = run.plant(site, &|seen: &Seen, right| {
        with(right, seen.tokens.iter().flat_map(|&t| row(seen, t as usize + 1)).collect())
    });
    is_only("embedding-rows-shifted", site, &found);
    let found = run.plant(site, &|seen: &Seen, right| {
        let mut tokens = seen.tokens.clone();
        tokens[3] = 99;
        with(right, tokens.iter().flat_map(|&t| row(seen, t as usize)).collect())
    });
    is_only("other-tokens", site, &found);
    assert!(sentence(&found).contains("99 for"), "{}", sentence(&found));
    assert!(sentence(&found).ends_with("at position 3"), "{}", sentence(&found));
}

#[test]
fn what_is_wrong_with_a_bias_is_named() {
    let site = Site::layer(0, Stage::QkvBias);
    let run = Run::of("tiny/qwen2");
    let bias = |seen: &Seen, layer: usize| -> Vec<f64> {
        ["q", "k", "v"]
            .iter()
            .flat_map(|part| seen.tensor(&format!("blk.{layer}.attn_{part}.bias")).to_vec())
            .collect()
    };
    let plus = |seen: &Seen, right: &HostTensor, b: &dyn Fn(usize) -> f64| {
        let x = seen.get(Site::layer(0, Stage::QkvMatmul));
        let width = right.shape[1];
        let sum = x.values.iter().enumerate().map(|(i, x)| x + b(i % width)).collect();
        with(right, sum)
    };
    let found = run.plant(site, &|seen: &Seen, right| plus(seen, right, &|_| 0.0));
    is_only("bias-missing", site, &found);
    let found = run.plant(site, &|seen: &Seen, right| {
        let (b, q) = (bias(seen, 0), seen.config.q_dim());
        plus(seen, right, &|i| if i < q { b[i] } else { 0.0 })
    });
    is_only("bias-missing", site, &found);
    assert!(sentence(&found).starts_with("in k and v, "), "{}", sentence(&found));
    let found = run.plant(site, &|seen: &Seen, right| {
        let b = bias(seen, 0);
        plus(seen, right, &|i| 2.0 * b[i])
    });
    is_only("bias-doubled", site, &found);
    let found = run.plant(site, &|seen: &Seen, right| {
        let b = bias(seen, 1);
        plus(seen, right, &|i| b[i])
    });
    is_only("bias-of-other-layer", site, &found);
    let found = run.plant(site, &|seen: &Seen, right| {
        let (b, q) = (bias(seen, 0), seen.config.q_dim());
        plus(seen, right, &|i| if i < q { b[(i + 1) % q] } else { b[i] })
    });
    is_called("bias-shifted", site, &found);
}
