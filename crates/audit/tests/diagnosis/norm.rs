use apr_model::{HostTensor, Site, Stage};

use crate::{
    is_only,
    plant::{Run, Seen},
    sentence,
};

/// What becomes of values, given the norm's weight and epsilon.
type Norm<'f> = &'f dyn Fn(&[f64], &[f64], f64) -> Vec<f64>;

/// Each group of `width` values through `f`, which is also given the norm's weight.
fn groups(
    x: &[f64],
    w: &[f64],
    right: &HostTensor,
    f: impl Fn(&[f64], &[f64]) -> Vec<f64>,
) -> HostTensor {
    let values = x.chunks(w.len()).flat_map(|x| f(x, w)).collect();
    HostTensor { shape: right.shape.clone(), values }
}

fn normalised(x: &[f64], eps: f64) -> Vec<f64> {
    let square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().map(|x| x / (square + eps).sqrt()).collect()
}

fn times(x: Vec<f64>, w: impl Iterator<Item = f64>) -> Vec<f64> {
    x.into_iter().zip(w).map(|(x, w)| x * w).collect()
}

#[test]
fn what_is_wrong_with_a_norm_is_named() {
    let run = Run::of("tiny/llama");
    let site = Site::layer(1, Stage::FfnNorm);
    let plant = |f: Norm<'_>| {
        run.plant(site, &|seen: &Seen, right| {
            let x = &seen.get(Site::layer(1, Stage::PostAttnResidual)).values;
            let w = seen.tensor("blk.1.ffn_norm.weight");
            groups(x, w, right, |x, w| f(x, w, seen.config.rms_norm_eps))
        })
    };
    let found = plant(&|x, _, eps| normalised(x, eps));
    is_only("norm-weight-missing", site, &found);
    let found = plant(&|x, w, eps| times(normalised(x, eps), w.iter().map(|w| w + 1.0)));
    is_only("norm-weight-plus-one", site, &found);
    let found = plant(&|x, w, eps| times(normalised(x, eps), w.iter().map(|w| w - 1.0)));
    is_only("norm-weight-minus-one", site, &found);
    let found = plant(&|x, w, _| times(x.to_vec(), w.iter().copied()));
    is_only("norm-not-normalised", site, &found);
    let found = plant(&|x, w, eps| {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let centred: Vec<f64> = x.iter().map(|x| x - mean).collect();
        times(normalised(&centred, eps), w.iter().copied())
    });
    is_only("norm-mean-subtracted", site, &found);
    let found = plant(&|x, w, eps| {
        let sum = x.iter().map(|x| x * x).sum::<f64>();
        times(x.iter().map(|x| x / (sum + eps).sqrt()).collect(), w.iter().copied())
    });
    is_only("norm-sum-for-mean", site, &found);
    let found = plant(&|x, w, eps| {
        let half = &x[..x.len() / 2];
        let square = half.iter().map(|x| x * x).sum::<f64>() / half.len() as f64;
        times(x.iter().map(|x| x / (square + eps).sqrt()).collect(), w.iter().copied())
    });
    is_only("norm-over-half", site, &found);
    let found = plant(&|x, w, _| times(normalised(x, 3e-3), w.iter().copied()));
    is_only("norm-eps", site, &found);
    assert_eq!(
        found.1[0].finding.as_ref().unwrap().parameters["eps"],
        3e-3,
        "{}",
        sentence(&found)
    );
}

#[test]
fn a_norm_of_another_place_is_named() {
    let site = Site::layer(0, Stage::AttnNorm);
    let found = Run::of("tiny/llama").plant(site, &|seen: &Seen, right| {
        let x = &seen.get(Site::whole(Stage::Embedding)).values;
        let w = seen.tensor("blk.1.attn_norm.weight");
        groups(x, w, right, |x, w| {
            times(normalised(x, seen.config.rms_norm_eps), w.iter().copied())
        })
    });
    is_only("norm-weight-of-another", site, &found);
    assert_eq!(sentence(&found), "the norm's weight is that of layers.1.attn_norm");
}

#[test]
fn a_norm_over_all_heads_at_once_is_recognised() {
    let site = Site::layer(1, Stage::QNorm);
    let found = Run::of("tiny/qwen3").plant(site, &|seen: &Seen, right| {
        let qkv = seen.get(Site::layer(1, Stage::QkvMatmul));
        let (q, w) = (seen.config.q_dim(), seen.tensor("blk.1.attn_q_norm.weight"));
        let rows = qkv.values.chunks(qkv.shape[1]).flat_map(|row| {
            times(normalised(&row[..q], seen.config.rms_norm_eps), w.iter().copied().cycle())
        });
        HostTensor { shape: right.shape.clone(), values: rows.collect() }
    });
    is_only("norm-over-wrong-axis", site, &found);
}

#[test]
fn rows_divided_by_the_first_rows_size_are_recognised() {
    let site = Site::whole(Stage::FinalNorm);
    let found = Run::of("tiny/llama").plant(site, &|seen: &Seen, right| {
        let x = &seen.get(Site::layer(2, Stage::PostFfnResidual)).values;
        let w = seen.tensor("output_norm.weight");
        let first = &x[..w.len()];
        let square = first.iter().map(|x| x * x).sum::<f64>() / w.len() as f64;
        let rms = (square + seen.config.rms_norm_eps).sqrt();
        groups(x, w, right, |x, w| times(x.iter().map(|x| x / rms).collect(), w.iter().copied()))
    });
    is_only("norm-of-first-row", site, &found);
}

#[test]
fn a_wrong_epsilon_of_the_config_is_fitted() {
    let found = Run::of("tiny/llama").configured("rms_norm_eps", 1e-3.into());
    is_only("norm-eps", Site::layer(0, Stage::AttnNorm), &found);
    assert_eq!(found.1[0].same_at.len(), 2, "{}", found.1[0]);
    assert!(
        sentence(&found).starts_with("epsilon is 1e-3 instead of 1e-5"),
        "{}",
        sentence(&found)
    );
}
