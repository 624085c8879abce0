use apr_model::{HostTensor, Site, Stage};

use crate::{
    is_called, is_only,
    plant::{Run, Seen},
    sentence,
};

fn with(right: &HostTensor, values: Vec<f64>) -> HostTensor {
    HostTensor { shape: right.shape.clone(), values }
}

#[test]
fn what_a_value_looks_like_is_said() {
    let run = Run::of("tiny/llama");
    let site = Site::layer(1, Stage::PostAttnResidual);
    let found = run.plant(site, &|_: &Seen, right| with(right, vec![0.0; right.values.len()]));
    is_called("all-zeros", site, &found);

    let found = run.plant(site, &|_: &Seen, right| {
        let mut wrong = right.clone();
        wrong.values[3 * 64 + 5] = f64::NAN;
        wrong
    });
    is_only("nan-origin", site, &found);
    assert!(sentence(&found).starts_with("channel 5 of position 3 is NaN"), "{}", sentence(&found));

    let found = run.plant(site, &|_: &Seen, right| {
        let last = &right.values[right.values.len() - 64..];
        with(right, last.repeat(right.shape[0]))
    });
    is_called("last-row-only-repeated", site, &found);

    let found = run.plant(site, &|_: &Seen, right| {
        let mut wrong = right.clone();
        wrong.values.copy_within(2 * 64..3 * 64, 4 * 64);
        wrong
    });
    is_only("rows-of-another-token", site, &found);
    assert_eq!(sentence(&found), "the row of position 4 is that of 2");

    let found = run.plant(site, &|_: &Seen, right| {
        let mut wrong = right.clone();
        for i in (64..wrong.values.len()).rev() {
            wrong.values[i] += wrong.values[i - 64];
        }
        wrong
    });
    is_only("stale-accumulator", site, &found);

    let found =
        run.plant(site, &|seen: &Seen, _| seen.get(Site::layer(1, Stage::AttnNorm)).clone());
    is_only("equals-another-stage", site, &found);
    assert_eq!(sentence(&found), "the value is that of layers.1.attn_norm");

    let found = run
        .plant(site, &|seen: &Seen, _| seen.get(Site::layer(0, Stage::PostAttnResidual)).clone());
    is_only("value-of-other-layer", site, &found);

    let found = run.plant(site, &|_: &Seen, right| {
        with(right, right.values.iter().map(|x| x.clamp(-0.5, 0.5)).collect())
    });
    is_only("clipped", site, &found);

    let found = run.plant(site, &|_: &Seen, right| {
        let mut wrong = right.clone();
        wrong.values.chunks_mut(2).for_each(|pair| pair.swap(0, 1));
        wrong
    });
    is_only("channels-exchanged", site, &found);

    let found = run.plant(site, &|_: &Seen, right| {
        with(right, right.values.iter().map(|x| x + 0.25).collect())
    });
    is_only("constant-offset", site, &found);
}

#[test]
fn a_factor_is_said_with_where_it_is() {
    let run = Run::of("tiny/llama");
    let site = Site::layer(0, Stage::FfnNorm);
    let scaled = |hit: &dyn Fn(usize, usize) -> bool| {
        run.plant(site, &|_: &Seen, right| {
            let scaled = |(i, x): (usize, &f64)| if hit(i / 64, i % 64) { 3.0 * x } else { *x };
            with(right, right.values.iter().enumerate().map(scaled).collect())
        })
    };
    for (words, hit) in [
        ("all values are", &(|_, _| true) as &dyn Fn(usize, usize) -> bool),
        ("the values of position 5 are", &|row, _| row == 5),
        ("the values of channels 60..64 are", &|_, channel| channel >= 60),
        ("the values of channels 8..16 of position 2 are", &|row, channel| {
            row == 2 && (8..16).contains(&channel)
        }),
    ] {
        let found = scaled(hit);
        is_only("constant-factor", site, &found);
        assert!(sentence(&found).starts_with(words), "{}", sentence(&found));
        let factor = found.1[0].finding.as_ref().unwrap().parameters["factor"];
        assert!((factor - 3.0).abs() < 1e-5, "{factor}");
    }
}

#[test]
fn what_no_hypothesis_explains_is_said_to_be_somewhere() {
    let run = Run::of("tiny/qwen2").steps(&[8, 4]);
    let site = Site::layer(1, Stage::FfnUp);
    let noisy = |hit: &dyn Fn(usize, usize) -> bool| {
        run.plant(site, &|seen: &Seen, right| {
            let first = seen.positions.start;
            let noise = |i: usize| (i as f64 * 12.9898).sin() * 0.1;
            let damaged = right.values.iter().enumerate().map(|(i, x)| {
                let (row, channel) = (first + i / 128, i % 128);
                if hit(row, channel) { x * (1.0 + noise(i)) + noise(i + 7) } else { *x }
            });
            with(right, damaged.collect())
        })
    };
    for (words, hit) in [
        (
            "only the last 16 of 128 channels",
            &(|_, c: usize| c >= 112) as &dyn Fn(usize, usize) -> bool,
        ),
        ("only channels 32..64 of 128, a block of 32", &|_, c| (32..64).contains(&c)),
        ("one channel (17) of 128", &|_, c| c == 17),
        ("one channel in 4, from 1 on", &|_, c| c % 4 == 1),
        ("rows from position 8 on, where a step begins", &|row, _| row >= 8),
        ("a single row (position 7)", &|row, _| row == 7),
    ] {
        let (audit, diagnoses) = noisy(hit);
        assert_eq!(audit.faults().next().map(|fault| fault.site), Some(site));
        let diagnosis = &diagnoses[0];
        assert_eq!(diagnosis.finding, None, "{diagnosis}");
        let text = diagnosis.to_string();
        assert!(text.starts_with("no hypothesis fits; ") && text.contains(words), "{text}");
        assert!(diagnosis.tried > 20);
    }
}

#[test]
fn a_diagnosis_serialises() {
    let site = Site::layer(0, Stage::AttnOut);
    let found = Run::of("tiny/llama")
        .plant(site, &|_: &Seen, right| with(right, right.values.iter().map(|x| -x).collect()));
    let json = serde_json::to_value(&found.1).unwrap();
    assert_eq!(json[0]["site"], "layers.0.attn_out");
    assert_eq!(json[0]["finding"]["hypothesis"], "sign-flipped");
    assert_eq!(json[0]["finding"]["at"], "layers.0.attn_out");
}
