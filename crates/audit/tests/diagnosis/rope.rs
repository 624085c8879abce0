use apr_model::{HostTensor, Site, Stage};

use crate::{
    is_only,
    plant::{Run, Seen},
    sentence,
};

/// The pair of channels that turns by `angle(pair, position)`.
fn rotated(
    seen: &Seen,
    right: &HostTensor,
    pairs: impl Fn(usize, usize) -> Option<(usize, usize)>,
    angle: impl Fn(usize, usize) -> f64,
) -> HostTensor {
    let x = seen.get(Site::layer(
        1,
        if seen.config.attention_bias { Stage::QkvBias } else { Stage::QkvMatmul },
    ));
    let (width, head_dim) = (seen.config.q_dim(), seen.config.head_dim);
    let mut y = right.clone();
    for (row, (y, x)) in y.values.chunks_mut(width).zip(x.values.chunks(x.shape[1])).enumerate() {
        y.copy_from_slice(&x[..width]);
        let position = seen.positions.start + row;
        for (y, x) in y.chunks_mut(head_dim).zip(x.chunks(head_dim)) {
            for pair in 0..head_dim / 2 {
                let Some((i, j)) = pairs(pair, head_dim / 2) else { continue };
                let (sin, cos) = angle(pair, position).sin_cos();
                y[i] = x[i] * cos - x[j] * sin;
                y[j] = x[j] * cos + x[i] * sin;
            }
        }
    }
    y
}

fn halves(pair: usize, half: usize) -> Option<(usize, usize)> {
    Some((pair, pair + half))
}

fn frequency(seen: &Seen, theta: f64, pair: usize) -> f64 {
    theta.powf(-2.0 * pair as f64 / seen.config.head_dim as f64)
}

const SITE: (usize, Stage) = (1, Stage::QPostRope);

#[test]
fn what_is_wrong_with_a_rotation_is_named() {
    let run = Run::of("tiny/llama").steps(&[14]);
    let site = Site::layer(SITE.0, SITE.1);
    let own = |seen: &Seen, pair: usize| frequency(seen, seen.config.rope_theta, pair);
    let found = run.plant(site, &|seen: &Seen, right| rotated(seen, right, halves, |_, _| 0.0));
    is_only("rope-missing", site, &found);
    let found = run.plant(site, &|seen: &Seen, right| {
        rotated(seen, right, halves, |i, p| -(p as f64) * own(seen, i))
    });
    is_only("rope-inverse", site, &found);
    let found = run.plant(site, &|seen: &Seen, right| {
        let neighbours = |pair, _| Some((2 * pair, 2 * pair + 1));
        rotated(seen, right, neighbours, |i, p| p as f64 * own(seen, i))
    });
    is_only("rope-style", site, &found);
    let found = run.plant(site, &|seen: &Seen, right| {
        rotated(seen, right, halves, |i, p| (p as f64 + 1.0) * own(seen, i))
    });
    is_only("rope-position-offset", site, &found);
    assert_eq!(sentence(&found), "positions are off by +1");
    for theta in [500_000.0, 12_345.0] {
        let found = run.plant(site, &|seen: &Seen, right| {
            rotated(seen, right, halves, |i, p| p as f64 * frequency(seen, theta, i))
        });
        is_only("rope-theta", site, &found);
        let fitted = found.1[0].finding.as_ref().unwrap().parameters["theta"];
        assert!((fitted / theta - 1.0).abs() < 1e-3, "{fitted}");
    }
    let found = run.plant(site, &|seen: &Seen, right| {
        rotated(seen, right, halves, |i, p| p as f64 * own(seen, i) / 4.0)
    });
    is_only("rope-frequencies-scaled", site, &found);
    let found = run.plant(site, &|seen: &Seen, right| {
        let rotary = seen.config.head_dim / 2;
        let partial =
            |pair: usize, _: usize| (pair < rotary / 2).then_some((pair, pair + rotary / 2));
        rotated(seen, right, partial, |i, p| {
            p as f64 * seen.config.rope_theta.powf(-2.0 * i as f64 / rotary as f64)
        })
    });
    is_only("partial-rotary", site, &found);
}

#[test]
fn scaling_that_the_config_asks_for_and_that_is_forgotten_is_recognised() {
    let site = Site::layer(SITE.0, SITE.1);
    let found = Run::of("tiny/llama3-rope").steps(&[24]).plant(site, &|seen: &Seen, right| {
        rotated(seen, right, halves, |i, p| p as f64 * frequency(seen, seen.config.rope_theta, i))
    });
    is_only("rope-scaling-missing", site, &found);
}

#[test]
fn positions_that_begin_again_with_each_chunk_are_recognised() {
    let site = Site::layer(SITE.0, SITE.1);
    let found = Run::of("tiny/qwen2").steps(&[7, 6]).plant(site, &|seen: &Seen, right| {
        let start = seen.positions.start;
        rotated(seen, right, halves, |i, p| {
            (p - start) as f64 * frequency(seen, seen.config.rope_theta, i)
        })
    });
    is_only("rope-position-offset", site, &found);
    assert_eq!(sentence(&found), "each step counts its positions from 0");
    let geometry = found.1[0].geometry.as_ref().unwrap();
    assert_eq!(geometry.rows, (7..13).collect::<Vec<_>>(), "{geometry}");
    assert!(
        geometry.to_string().contains("rows from position 7 on, where a step begins"),
        "{geometry}"
    );
}

#[test]
fn a_wrong_constant_is_one_diagnosis_for_all_layers() {
    let run = Run::of("tiny/llama").steps(&[12]);
    let found = run.configured("rope_theta", 500_000.0.into());
    is_only("rope-theta", Site::layer(0, Stage::QPostRope), &found);
    assert_eq!(found.1.len(), 2, "of q and of k");
    assert_eq!(found.1[1].site, Site::layer(0, Stage::KPostRope));
    let same: Vec<Site> = [1, 2].map(|layer| Site::layer(layer, Stage::QPostRope)).to_vec();
    assert_eq!(found.1[0].same_at, same);
    let text = found.1[0].to_string();
    assert_eq!(text, "rope-theta: rope theta is 500000 instead of 10000; the same in layers 1..3");
}
