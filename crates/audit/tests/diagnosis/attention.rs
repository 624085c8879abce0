use apr_model::{HostTensor, Site, Stage};

use crate::{
    is_called, is_only,
    plant::{Run, Seen},
    sentence,
};

const LAYER: usize = 1;

fn at(stage: Stage) -> Site {
    Site::layer(LAYER, stage)
}

/// Attention by loops, all parts of which can be otherwise.
struct Attention {
    heads: usize,
    head_dim: usize,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    kv_width: usize,
    first: usize,
    scale: f64,
    kv_head: Box<dyn Fn(usize) -> usize>,
    /// The positions that a row sees.
    sees: Box<dyn Fn(usize) -> Vec<usize>>,
    softmax: fn(&[f64]) -> Vec<f64>,
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    scores.iter().map(|s| (s - max).exp() / sum).collect()
}

impl Attention {
    fn of(seen: &Seen) -> Self {
        let config = &seen.config;
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let qkv = at(if config.attention_bias { Stage::QkvBias } else { Stage::QkvMatmul });
        let width = config.q_dim() + 2 * config.kv_dim();
        let v = seen
            .all_rows(qkv)
            .chunks(width)
            .flat_map(|row| row[config.q_dim() + config.kv_dim()..].to_vec())
            .collect();
        Self {
            heads,
            head_dim: config.head_dim,
            q: seen.get(at(Stage::QPostRope)).values.clone(),
            k: seen.all_rows(at(Stage::KPostRope)),
            v,
            kv_width: config.kv_dim(),
            first: seen.positions.start,
            scale: 1.0 / (config.head_dim as f64).sqrt(),
            kv_head: Box::new(move |head| head / (heads / kv_heads)),
            sees: Box::new(|position| (0..=position).collect()),
            softmax,
        }
    }

    fn rows(&self) -> usize {
        self.q.len() / (self.heads * self.head_dim)
    }

    fn keys(&self) -> usize {
        self.k.len() / self.kv_width
    }

    fn scores(&self) -> HostTensor {
        let (n, keys, dim) = (self.rows(), self.keys(), self.head_dim);
        let mut values = vec![0.0; self.heads * n * keys];
        for head in 0..self.heads {
            for row in 0..n {
                for key in (self.sees)(self.first + row) {
                    let q = &self.q[(row * self.heads + head) * dim..][..dim];
                    let k = &self.k[key * self.kv_width + (self.kv_head)(head) * dim..][..dim];
                    let dot: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                    values[(head * n + row) * keys + key] = dot * self.scale;
                }
            }
        }
        HostTensor { shape: vec![self.heads, n, keys], values }
    }

    fn weights(&self, scores: &HostTensor) -> HostTensor {
        let (n, keys) = (self.rows(), self.keys());
        let mut values = vec![0.0; scores.values.len()];
        for head in 0..self.heads {
            for row in 0..n {
                let start = (head * n + row) * keys;
                let seen = (self.sees)(self.first + row);
                let visible: Vec<f64> = seen.iter().map(|key| scores.values[start + key]).collect();
                for (key, p) in seen.into_iter().zip((self.softmax)(&visible)) {
                    values[start + key] = p;
                }
            }
        }
        HostTensor { shape: scores.shape.clone(), values }
    }

    fn out(&self, weights: &HostTensor) -> HostTensor {
        let (n, keys, dim) = (self.rows(), self.keys(), self.head_dim);
        let mut values = vec![0.0; n * self.heads * dim];
        for head in 0..self.heads {
            for row in 0..n {
                for key in (self.sees)(self.first + row) {
                    let p = weights.values[(head * n + row) * keys + key];
                    let v = &self.v[key * self.kv_width + (self.kv_head)(head) * dim..][..dim];
                    let out = &mut values[(row * self.heads + head) * dim..][..dim];
                    out.iter_mut().zip(v).for_each(|(out, v)| *out += p * v);
                }
            }
        }
        HostTensor { shape: vec![n, self.heads * dim], values }
    }
}

fn found_in_scores(
    run: &Run,
    change: &dyn Fn(&mut Attention),
) -> (apr_audit::Audit, Vec<apr_audit::Diagnosis>) {
    run.plant(at(Stage::AttnScores), &|seen: &Seen, _| {
        let mut attention = Attention::of(seen);
        change(&mut attention);
        attention.scores()
    })
}

fn found_in_values(
    run: &Run,
    change: &dyn Fn(&mut Attention),
) -> (apr_audit::Audit, Vec<apr_audit::Diagnosis>) {
    run.plant(at(Stage::Attention), &|seen: &Seen, _| {
        let mut attention = Attention::of(seen);
        change(&mut attention);
        attention.out(seen.get(at(Stage::AttnSoftmax)))
    })
}

/// The engine shows no scores and no softmax, as with flash attention.
fn found_in_fused(
    run: &Run,
    change: &dyn Fn(&mut Attention),
) -> (apr_audit::Audit, Vec<apr_audit::Diagnosis>) {
    let run = run.clone().without(&[Stage::AttnScores, Stage::AttnSoftmax]);
    run.plant(at(Stage::Attention), &|seen: &Seen, _| {
        let mut attention = Attention::of(seen);
        change(&mut attention);
        attention.out(&attention.weights(&attention.scores()))
    })
}

#[test]
fn scales_of_scores_are_named_by_the_constant_they_are() {
    let site = at(Stage::AttnScores);
    let run = Run::of("tiny/qwen3").steps(&[6, 3]);
    let found = found_in_scores(&run, &|a| a.scale = 1.0);
    is_only("scores-unscaled", site, &found);
    let found = found_in_scores(&run, &|a| a.scale = a.scale * a.scale);
    is_only("scores-scaled-twice", site, &found);
    let found = found_in_scores(&run, &|a| a.scale = 1.0 / 64f64.sqrt());
    is_only("scores-scale", site, &found);
    assert!(sentence(&found).contains("1/sqrt(hidden_size)"), "{}", sentence(&found));
    let site = at(Stage::Attention);
    let found = found_in_fused(&run, &|a| a.scale = 1.0);
    is_only("scores-unscaled", site, &found);
    assert_eq!(found.1[0].finding.as_ref().unwrap().at, at(Stage::AttnScores));
}

#[test]
fn key_heads_that_are_read_in_turn_are_recognised() {
    let run = Run::of("tiny/llama");
    let modulo = |a: &mut Attention| a.kv_head = Box::new(|head| head % 2);
    is_only("head-map", at(Stage::AttnScores), &found_in_scores(&run, &modulo));
    is_only("value-head-map", at(Stage::Attention), &found_in_values(&run, &modulo));
    is_only("head-map", at(Stage::Attention), &found_in_fused(&run, &modulo));
}

#[test]
fn what_is_wrong_with_a_mask_is_named() {
    let run = Run::of("tiny/llama").steps(&[6, 5]);
    let end = |position: usize| if position < 6 { 6 } else { 11 };
    let all = move |a: &mut Attention| a.sees = Box::new(move |p| (0..end(p)).collect());
    let many =
        move |a: &mut Attention| a.sees = Box::new(move |p| (0..(p + 2).min(end(p))).collect());
    let few = |a: &mut Attention| a.sees = Box::new(|p| (0..p.max(1)).collect());
    let own = |a: &mut Attention| {
        a.sees = Box::new(|p| (if p < 6 { 0 } else { 6 }..=p).collect());
    };
    let window = |a: &mut Attention| {
        a.sees = Box::new(|p: usize| ((p + 1).saturating_sub(4)..=p).collect());
    };
    let scores = at(Stage::AttnScores);
    is_only("mask-missing", scores, &found_in_scores(&run, &all));
    let found = found_in_scores(&run, &many);
    is_only("mask-off-by-one", scores, &found);
    assert!(sentence(&found).contains("too many"));
    let found = found_in_scores(&run, &few);
    is_only("mask-off-by-one", scores, &found);
    assert!(sentence(&found).contains("too few"));
    is_only("cache-ignored", scores, &found_in_scores(&run, &own));
    is_only("mask-window", scores, &found_in_scores(&run, &window));
    let fused = at(Stage::Attention);
    is_only("mask-missing", fused, &found_in_fused(&run, &all));
    is_only("mask-off-by-one", fused, &found_in_fused(&run, &few));
    is_only("cache-ignored", fused, &found_in_fused(&run, &own));
    is_only("mask-window", fused, &found_in_fused(&run, &window));
}

#[test]
fn rows_of_the_cache_that_are_others_are_named() {
    let run = Run::of("tiny/llama").steps(&[5, 4]);
    let stale = |a: &mut Attention| {
        let (width, start) = (a.kv_width, 6 * a.kv_width);
        for rows in [&mut a.k, &mut a.v] {
            if rows.len() > start {
                let other = rows[2 * width..3 * width].to_vec();
                rows[start..start + width].copy_from_slice(&other);
            }
        }
    };
    let found = found_in_scores(&run, &stale);
    is_only("stale-kv-row", at(Stage::AttnScores), &found);
    assert_eq!(sentence(&found), "the cached key of position 6 is that of position 2");
    let found = found_in_values(&run, &stale);
    is_only("stale-kv-row", at(Stage::Attention), &found);
    assert_eq!(sentence(&found), "the cached value of position 6 is that of position 2");
    is_only("stale-kv-row", at(Stage::Attention), &found_in_fused(&run, &stale));

    // In one step: what comes round is the last row of it.
    let run = Run::of("tiny/llama").steps(&[7]);
    let found = found_in_scores(&run, &|a| {
        let width = a.kv_width;
        a.k.rotate_right(width);
    });
    is_only("kv-rows-shifted", at(Stage::AttnScores), &found);

    let found = found_in_values(&run, &|a| {
        let (width, dim) = (a.kv_width, a.head_dim);
        a.v.chunks_mut(width).for_each(|row| row.rotate_left(dim));
    });
    is_called("kv-in-other-head", at(Stage::Attention), &found);
}

#[test]
fn what_is_wrong_with_a_softmax_is_named() {
    let run = Run::of("tiny/qwen2").steps(&[6, 2]);
    let site = at(Stage::AttnSoftmax);
    let plant = |f: fn(&[f64]) -> Vec<f64>| {
        run.plant(site, &move |seen: &Seen, _| {
            let mut attention = Attention::of(seen);
            attention.softmax = f;
            attention.weights(&attention.scores())
        })
    };
    let found = plant(|scores| {
        let max = scores.iter().copied().fold(f64::MIN, f64::max);
        scores.iter().map(|s| (s - max).exp()).collect()
    });
    is_only("softmax-not-normalised", site, &found);
    let found = plant(|scores| {
        let sum = 1.0 + scores.iter().map(|s| s.exp()).sum::<f64>();
        scores.iter().map(|s| s.exp() / sum).collect()
    });
    is_only("softmax-off-by-one", site, &found);
    let found = plant(|scores| softmax(&scores.iter().map(|s| s * 0.7).collect::<Vec<_>>()));
    is_only("softmax-temperature", site, &found);
    let fitted = found.1[0].finding.as_ref().unwrap().parameters["factor"];
    assert!((fitted - 0.7).abs() < 1e-4, "{fitted}");
    let found = run.plant(site, &|seen: &Seen, _| {
        let attention = Attention::of(seen);
        let scores = attention.scores();
        let keys = attention.keys();
        // The masked scores are zeros, and so they are counted as.
        let rows = scores.values.chunks(keys).enumerate().flat_map(|(i, row)| {
            let visible = attention.first + i % attention.rows() + 1;
            let mut p = softmax(row);
            p[visible..].fill(0.0);
            p
        });
        HostTensor { shape: scores.shape.clone(), values: rows.collect() }
    });
    is_only("softmax-over-padding", site, &found);
}

#[test]
fn a_softmax_that_nobody_captured_is_diagnosed_by_what_follows() {
    let run = Run::of("tiny/qwen3");
    let found = found_in_fused(&run, &|a| {
        a.softmax = |scores| {
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            scores.iter().map(|s| (s - max).exp()).collect()
        };
    });
    is_only("softmax-not-normalised", at(Stage::Attention), &found);
    assert_eq!(found.1[0].finding.as_ref().unwrap().at, at(Stage::AttnSoftmax));
    assert!(found.1[0].to_string().contains("which was not captured"), "{}", found.1[0]);
}

#[test]
fn heads_that_are_joined_without_a_transposition_are_recognised() {
    let site = at(Stage::Attention);
    let found = Run::of("tiny/llama").plant(site, &|seen: &Seen, right| {
        let (n, dim) = (right.shape[0], seen.config.head_dim);
        let heads = right.shape[1] / dim;
        let mut values = Vec::new();
        for head in 0..heads {
            for row in 0..n {
                values.extend_from_slice(&right.values[(row * heads + head) * dim..][..dim]);
            }
        }
        HostTensor { shape: right.shape.clone(), values }
    });
    is_only("heads-not-transposed", site, &found);
}
