use apr_model::{HostTensor, Site, Stage};

use crate::{
    is_only,
    plant::{Run, Seen},
    sentence,
};

/// A name and what is computed of two inputs.
type Case<'f> = (&'static str, &'f dyn Fn(f64, f64) -> f64);

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

#[test]
fn other_activation_functions_are_named() {
    let run = Run::of("tiny/llama");
    let site = Site::layer(0, Stage::FfnSilu);
    let gelu =
        |x: f64| 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044715 * x * x * x)).tanh());
    let cases: [(&str, &dyn Fn(f64) -> f64); 5] = [
        ("gelu-for-silu", &gelu),
        ("relu-for-silu", &|x| x.max(0.0)),
        ("silu-missing", &|x| x),
        ("sigmoid-for-silu", &|x| 1.0 / (1.0 + (-x).exp())),
        ("silu-twice", &|x| silu(silu(x))),
    ];
    for (name, f) in cases {
        let found = run.plant(site, &|seen: &Seen, _| {
            let gate = seen.get(Site::layer(0, Stage::FfnGate));
            let values = gate.values.iter().map(|&x| f(x)).collect();
            HostTensor { shape: gate.shape.clone(), values }
        });
        is_only(name, site, &found);
    }
    let found = run.plant(site, &|seen: &Seen, _| {
        let up = seen.get(Site::layer(0, Stage::FfnUp));
        HostTensor { shape: up.shape.clone(), values: up.values.iter().map(|&x| silu(x)).collect() }
    });
    is_only("silu-on-up", site, &found);
}

#[test]
fn an_activation_that_nobody_captured_is_diagnosed_by_what_follows() {
    let run = Run::of("tiny/qwen3").without(&[Stage::FfnSilu]);
    let site = Site::layer(1, Stage::FfnSwigl);
    let found = run.plant(site, &|seen: &Seen, right| {
        let of = |stage| seen.get(Site::layer(1, stage)).values.iter();
        let pairs = of(Stage::FfnGate).zip(of(Stage::FfnUp));
        let values = pairs.map(|(gate, up)| gate.max(0.0) * up).collect();
        HostTensor { shape: right.shape.clone(), values }
    });
    is_only("relu-for-silu", site, &found);
    assert_eq!(found.1[0].finding.as_ref().unwrap().at, Site::layer(1, Stage::FfnSilu));
}

#[test]
fn gates_that_are_combined_otherwise_are_named() {
    let run = Run::of("tiny/qwen2");
    let site = Site::layer(1, Stage::FfnSwigl);
    let cases: [Case<'_>; 3] = [
        ("up-missing", &|silu, _| silu),
        ("gate-missing", &|_, up| up),
        ("sum-for-product", &|silu, up| silu + up),
    ];
    for (name, f) in cases {
        let found = run.plant(site, &|seen: &Seen, right| {
            let of = |stage| seen.get(Site::layer(1, stage)).values.iter();
            let pairs = of(Stage::FfnSilu).zip(of(Stage::FfnUp));
            let values = pairs.map(|(&silu, &up)| f(silu, up)).collect();
            HostTensor { shape: right.shape.clone(), values }
        });
        is_only(name, site, &found);
    }
}

#[test]
fn what_is_wrong_with_a_residual_is_named() {
    let run = Run::of("tiny/qwen2");
    let site = Site::layer(1, Stage::PostFfnResidual);
    let cases: [Case<'_>; 5] = [
        ("residual-missing", &|_, block| block),
        ("block-missing", &|stream, _| stream),
        ("residual-doubled", &|stream, block| 2.0 * stream + block),
        ("block-doubled", &|stream, block| stream + 2.0 * block),
        ("block-subtracted", &|stream, block| stream - block),
    ];
    let sum = |seen: &Seen, stream: Site, f: &dyn Fn(f64, f64) -> f64| {
        let (stream, block) = (seen.get(stream), seen.get(Site::layer(1, Stage::FfnOut)));
        let pairs = stream.values.iter().zip(&block.values);
        HostTensor { shape: block.shape.clone(), values: pairs.map(|(&s, &b)| f(s, b)).collect() }
    };
    for (name, f) in cases {
        let found = run
            .plant(site, &|seen: &Seen, _| sum(seen, Site::layer(1, Stage::PostAttnResidual), f));
        is_only(name, site, &found);
    }
    for from in [Site::layer(1, Stage::FfnNorm), Site::layer(0, Stage::PostFfnResidual)] {
        let found = run.plant(site, &|seen: &Seen, _| sum(seen, from, &|s, b| s + b));
        is_only("residual-from-elsewhere", site, &found);
        assert!(sentence(&found).starts_with(&from.to_string()), "{}", sentence(&found));
    }
}
