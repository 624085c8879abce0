//! Mistakes in mixtures of experts.

use apr_model::{HostTensor, Site, Stage};

use crate::{
    is_called, is_only,
    plant::{Run, Seen},
    sentence,
};

const EXPERTS: usize = 8;

fn run() -> Run {
    Run::of("tiny/qwen3-moe").steps(&[9, 4])
}

fn at(stage: Stage) -> Site {
    Site::layer(1, stage)
}

/// The ids of each row, the largest `key` of the logits first.
fn top(seen: &Seen, k: usize, key: impl Fn(f64) -> f64) -> HostTensor {
    let logits = seen.get(at(Stage::MoeRouter));
    let mut values = Vec::new();
    for row in logits.values.chunks_exact(EXPERTS) {
        let mut ids: Vec<usize> = (0..EXPERTS).collect();
        ids.sort_by(|&a, &b| key(row[b]).total_cmp(&key(row[a])));
        values.extend(ids[..k].iter().map(|&id| id as f64));
    }
    HostTensor { shape: vec![logits.shape[0], k], values }
}

/// `right` with each row's elements changed by `change`, which is given the row's ids.
fn by_row(seen: &Seen, right: &HostTensor, change: impl Fn(&[usize], &mut [f64])) -> HostTensor {
    let ids = seen.get(at(Stage::MoeRouterIndices));
    let k = ids.shape[1];
    let mut wrong = right.clone();
    let width = wrong.values.len() / right.shape[0];
    for (ids, row) in ids.values.chunks_exact(k).zip(wrong.values.chunks_exact_mut(width)) {
        let ids: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
        change(&ids, row);
    }
    wrong
}

/// `matrix x`, which has as many columns as `x` has elements.
fn product(matrix: &[f64], x: &[f64], out: &mut [f64]) {
    for (y, row) in out.iter_mut().zip(matrix.chunks_exact(x.len())) {
        *y = row.iter().zip(x).map(|(w, x)| w * x).sum();
    }
}

/// What the gates of all slots are if the matrix of `expert` is what `matrix` gives.
fn gates(seen: &Seen, right: &HostTensor, matrix: impl Fn(usize) -> Vec<f64>) -> HostTensor {
    let x = seen.get(at(Stage::FfnNorm));
    let [_, k, out] = right.shape[..] else { panic!("slots") };
    let ids = &seen.get(at(Stage::MoeRouterIndices)).values;
    let mut wrong = right.clone();
    for (slot, y) in wrong.values.chunks_exact_mut(out).enumerate() {
        let x = &x.values[slot / k * x.shape[1]..][..x.shape[1]];
        product(&matrix(ids[slot] as usize), x, y);
    }
    wrong
}

fn matrix(seen: &Seen, name: &str, layer: usize, expert: usize) -> Vec<f64> {
    seen.tensor(&format!("blk.{layer}.ffn_{name}_exps.weight[{expert}]")).to_vec()
}

#[test]
fn wrong_choices_of_experts_are_named() {
    let site = at(Stage::MoeRouterIndices);
    let found = run().plant(site, &|seen, _| top(seen, 2, |logit| -logit));
    is_only("top-k-smallest", site, &found);
    let found = run().plant(site, &|seen, _| top(seen, 2, f64::abs));
    is_only("top-k-of-magnitudes", site, &found);
    let found = run().plant(site, &|seen, _| {
        let three = top(seen, 3, |logit| logit);
        let values = three.values.chunks_exact(3).flat_map(|ids| [ids[0], ids[2]]).collect();
        HostTensor { shape: vec![three.shape[0], 2], values }
    });
    is_only("top-k-off-by-one", site, &found);
    assert!(sentence(&found).contains("number 2 of the 2 largest"), "{}", sentence(&found));
    let found = run().plant(site, &|seen, right| {
        let mut wrong = right.clone();
        wrong.values.chunks_exact_mut(2).for_each(|ids| ids[1] = ids[0]);
        let _ = seen;
        wrong
    });
    is_only("top-k-repeated", site, &found);
    let found = run().plant(site, &|_, right| {
        let values = right.values.iter().map(|id| (id + 1.0) % EXPERTS as f64).collect();
        HostTensor { shape: right.shape.clone(), values }
    });
    is_only("top-k-shifted", site, &found);
}

#[test]
fn wrong_weights_of_experts_are_named() {
    let site = at(Stage::MoeRouterWeights);
    let logits = |seen: &Seen, row: usize| {
        seen.get(at(Stage::MoeRouter)).values[row * EXPERTS..][..EXPERTS].to_vec()
    };
    // What `f` makes of the logits of a row and of an id.
    let with = |seen: &Seen, right: &HostTensor, f: &dyn Fn(&[f64], usize) -> f64| {
        let mut row = 0;
        let cell = std::cell::RefCell::new(&mut row);
        by_row(seen, right, |ids, weights| {
            let mut row = cell.borrow_mut();
            let logits = logits(seen, **row);
            **row += 1;
            weights.iter_mut().zip(ids).for_each(|(weight, &id)| *weight = f(&logits, id));
        })
    };
    let found = run().plant(site, &|seen, right| {
        with(seen, right, &|logits, id| {
            logits[id].exp() / logits.iter().map(|x| x.exp()).sum::<f64>()
        })
    });
    is_only("router-not-renormalised", site, &found);
    let found = run().plant(site, &|seen, right| {
        with(seen, right, &|logits, id| 1.0 / (1.0 + (-logits[id]).exp()))
    });
    is_only("router-sigmoid", site, &found);
    let found = run().plant(site, &|seen, right| by_row(seen, right, |_, row| row.swap(0, 1)));
    is_only("router-slots-exchanged", site, &found);
    let found = run().plant(site, &|seen, right| by_row(seen, right, |_, row| row.fill(0.5)));
    is_only("router-weights-equal", site, &found);
    let found = run()
        .plant(site, &|seen, right| by_row(seen, right, |_, row| row.copy_from_slice(&[1.0, 0.0])));
    is_only("router-last-expert-unused", site, &found);
    let found = run().plant(site, &|seen, right| {
        let other = with(seen, right, &|logits, id| (logits[id] * 1.25).exp());
        let mut other = other;
        other.values.chunks_exact_mut(2).for_each(|row| {
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|weight| *weight /= sum);
        });
        other
    });
    is_only("router-temperature", site, &found);
    assert!(sentence(&found).contains("1.25"), "{}", sentence(&found));
}

#[test]
fn wrong_matrices_of_experts_are_named_with_the_experts() {
    let site = at(Stage::MoeExpertGate);
    let busiest = 3;
    let swapped = |of: &dyn Fn(usize) -> usize| {
        run().plant(site, &|seen, right| gates(seen, right, |e| matrix(seen, "gate", 1, of(e))))
    };
    let chosen = swapped(&|expert| if expert == busiest { 5 } else { expert });
    is_only("other-expert-weights", site, &chosen);
    assert_eq!(sentence(&chosen), "expert 3 is computed with the matrix of expert 5");
    let geometry = chosen.1[0].geometry.as_ref().unwrap();
    assert_eq!(geometry.experts, [busiest]);
    assert!(geometry.to_string().contains("only where expert 3 is chosen"), "{geometry}");

    let all = swapped(&|expert| (expert + 1) % EXPERTS);
    is_called("other-expert-weights", site, &all);
    assert!(sentence(&all).contains("the one +1 from them"), "{}", sentence(&all));

    let found = run().plant(site, &|seen, right| {
        let name = |expert| if expert == busiest { "up" } else { "gate" };
        gates(seen, right, |expert| matrix(seen, name(expert), 1, expert))
    });
    is_only("gate-up-swapped", site, &found);
    let found = run()
        .plant(site, &|seen, right| gates(seen, right, |expert| matrix(seen, "gate", 0, expert)));
    is_only("other-layer-weights", site, &found);
    let found = run().plant(site, &|seen, right| {
        gates(seen, right, |expert| {
            let (right, inputs) = (matrix(seen, "gate", 1, expert), 64);
            let out = right.len() / inputs;
            (0..right.len()).map(|i| right[i % inputs * out + i / inputs]).collect()
        })
    });
    is_only("weight-transposed", site, &found);
    let found = run().plant(site, &|seen, right| {
        gates(seen, right, |expert| {
            let factor = if expert == busiest { 1.01 } else { 1.0 };
            matrix(seen, "gate", 1, expert).into_iter().map(|w| w * factor).collect()
        })
    });
    is_only("expert-scaled", site, &found);
    assert_eq!(sentence(&found), "expert 3 is scaled by 1.010000");
    let all =
        |seen: &Seen| (0..EXPERTS).flat_map(|e| matrix(seen, "gate", 1, e)).collect::<Vec<_>>();
    let found = run().plant(site, &|seen, right| {
        let all = all(seen);
        let len = all.len() / EXPERTS;
        gates(seen, right, |e| (0..len).map(|i| all[(e * len + 64 + i) % all.len()]).collect())
    });
    is_only("expert-rows-shifted", site, &found);
    let found = run().plant(site, &|seen, right| {
        let all = all(seen);
        let rows = all.len() / EXPERTS / 64;
        gates(seen, right, |expert| {
            (0..rows).flat_map(|row| all[(row * EXPERTS + expert) * 64..][..64].to_vec()).collect()
        })
    });
    is_only("experts-interleaved", site, &found);
}

#[test]
fn results_of_experts_in_wrong_places_are_named() {
    let site = at(Stage::MoeExpertOut);
    let width = 64;
    let found =
        run().plant(site, &|seen, right| by_row(seen, right, |_, row| row.rotate_right(width)));
    is_only("slots-exchanged", site, &found);
    let found = run().plant(site, &|seen, right| {
        by_row(seen, right, |ids, row| {
            for (id, slot) in ids.iter().zip(row.chunks_exact_mut(width)) {
                slot.iter_mut().for_each(|y| *y *= if *id == 3 { 0.0 } else { 1.0 });
            }
        })
    });
    is_only("expert-missing", site, &found);
    let found = run().plant(site, &|seen, right| {
        let weights = seen.get(at(Stage::MoeRouterWeights));
        let mut wrong = right.clone();
        for (weight, slot) in weights.values.iter().zip(wrong.values.chunks_exact_mut(width)) {
            slot.iter_mut().for_each(|y| *y *= weight);
        }
        wrong
    });
    is_only("experts-weighted", site, &found);
    let found = run().plant(site, &|seen, right| {
        let x = seen.get(at(Stage::MoeExpertSwigl));
        let [_, k, inputs] = x.shape[..] else { panic!("slots") };
        let ids = &seen.get(at(Stage::MoeRouterIndices)).values;
        let mut wrong = right.clone();
        for (slot, y) in wrong.values.chunks_exact_mut(width).enumerate() {
            let x = &x.values[slot / k * k * inputs..][..inputs];
            product(&matrix(seen, "down", 1, ids[slot] as usize), x, y);
        }
        wrong
    });
    is_only("expert-input-slots", site, &found);
}

#[test]
fn wrong_sums_over_experts_are_named() {
    let site = at(Stage::FfnOut);
    let sum = |f: fn(&[f64], usize, usize) -> f64| {
        run().plant(site, &|seen: &Seen, right| {
            let (x, weights) =
                (seen.get(at(Stage::MoeExpertOut)), seen.get(at(Stage::MoeRouterWeights)));
            let ids = &seen.get(at(Stage::MoeRouterIndices)).values;
            let [n, k, width] = x.shape[..] else { panic!("slots") };
            let mut wrong = HostTensor { shape: right.shape.clone(), values: vec![0.0; n * width] };
            for (slot, &id) in ids.iter().enumerate() {
                let row = &weights.values[slot / k * k..][..k];
                let weight = f(row, slot % k, id as usize);
                for (y, x) in wrong.values[slot / k * width..][..width]
                    .iter_mut()
                    .zip(&x.values[slot * width..])
                {
                    *y += weight * x;
                }
            }
            wrong
        })
    };
    is_only("experts-slot-missing", site, &sum(|w, slot, _| if slot == 1 { 0.0 } else { w[slot] }));
    is_only(
        "experts-slot-twice",
        site,
        &sum(|w, slot, _| if slot == 0 { 2.0 * w[0] } else { w[slot] }),
    );
    is_only("experts-unweighted", site, &sum(|_, _, _| 1.0));
    is_only("experts-weighted-twice", site, &sum(|w, slot, _| w[slot] * w[slot]));
    is_only("experts-weights-exchanged", site, &sum(|w, slot, _| w[1 - slot]));
    is_only("expert-missing", site, &sum(|w, slot, id| if id == 3 { 0.0 } else { w[slot] }));
    let found = sum(|w, slot, id| if id == 3 { 0.75 * w[slot] } else { w[slot] });
    is_only("expert-scaled", site, &found);
    assert_eq!(sentence(&found), "the results of expert 3 are multiplied by 0.750000");
}

#[test]
fn mistakes_of_dense_layers_are_named_beside_experts_too() {
    let site = at(Stage::MoeExpertSilu);
    let found = run().plant(site, &|seen, _| {
        let gate = seen.get(at(Stage::MoeExpertGate));
        let values = gate.values.iter().map(|x| x.max(0.0)).collect();
        HostTensor { shape: gate.shape.clone(), values }
    });
    is_only("relu-for-silu", site, &found);
    let site = at(Stage::MoeRouter);
    let found = run().plant(site, &|seen, right| {
        let (x, w) = (seen.get(at(Stage::FfnNorm)), seen.tensor("blk.0.ffn_gate_inp.weight"));
        let mut wrong = right.clone();
        for (x, y) in x.values.chunks_exact(64).zip(wrong.values.chunks_exact_mut(EXPERTS)) {
            product(w, x, y);
        }
        wrong
    });
    is_only("other-layer-weights", site, &found);
    // The hypotheses on products know that there is no feed-forward network beside.
    let site = at(Stage::AttnOut);
    let found = run().plant(site, &|_, right| {
        let values = right.values.iter().map(|y| -y).collect();
        HostTensor { shape: right.shape.clone(), values }
    });
    is_called("sign-flipped", site, &found);
}

#[test]
fn a_choice_that_nobody_captured_is_diagnosed_by_what_follows() {
    use Stage::{MoeExpertGate, MoeRouterIndices, MoeRouterWeights};
    let run = run().without(&[MoeRouterIndices, MoeRouterWeights]);
    let found = run.plant(at(MoeRouterIndices), &|seen, _| top(seen, 2, |logit| -logit));
    is_called("top-k-smallest", at(MoeExpertGate), &found);
    assert_eq!(found.1[0].finding.as_ref().unwrap().at, at(MoeRouterIndices));
}
