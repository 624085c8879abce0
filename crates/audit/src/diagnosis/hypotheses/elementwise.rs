//! Activation functions and the residual stream.

use apr_model::{Site, Stage, Stage::*};
use apr_reference::Tensor as Plain;

use super::{Hypothesis, named};
use crate::{
    diagnosis::suspect::{Answer, Guess, Suspect, elementwise, slack_of},
    inputs,
    twin::Triple,
};

const SILU: &[Stage] = &[FfnSilu, MoeExpertSilu];
const SWIGL: &[Stage] = &[FfnSwigl, MoeExpertSwigl];
const RESIDUAL: &[Stage] = &[PostAttnResidual, PostFfnResidual];

pub(super) const TABLE: &[Hypothesis] = &[
    named("gelu-for-silu", SILU, |s| {
        let tanh = |x: f64| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        };
        let erf = |x: f64| 0.5 * x * (1.0 + libm::erf(x / std::f64::consts::SQRT_2));
        let quick = |x: f64| x / (1.0 + (-1.702 * x).exp());
        let guesses = [
            activation(s, tanh, "GELU, by its tanh formula, in the place of SiLU"),
            activation(s, erf, "GELU in the place of SiLU"),
            activation(s, quick, "GELU, by its sigmoid formula, in the place of SiLU"),
        ];
        s.best(guesses.into_iter().filter_map(Result::transpose))
    }),
    named("relu-for-silu", SILU, |s| activation(s, |x| x.max(0.0), "ReLU in the place of SiLU")),
    named("silu-missing", SILU, |s| activation(s, |x| x, "no activation function is applied")),
    named("sigmoid-for-silu", SILU, |s| {
        activation(s, |x| 1.0 / (1.0 + (-x).exp()), "the sigmoid in the place of SiLU")
    }),
    named("silu-twice", SILU, |s| activation(s, |x| silu(silu(x)), "SiLU is applied twice")),
    named("silu-on-up", &[FfnSilu, MoeExpertSilu, FfnSwigl, MoeExpertSwigl], silu_on_up),
    named("up-missing", SWIGL, |s| {
        pair(s, |silu, _| silu, "the activated gate is not multiplied with up")
    }),
    named("gate-missing", SWIGL, |s| pair(s, |_, up| up, "up is not multiplied with the gate")),
    named("sum-for-product", SWIGL, |s| {
        pair(s, |silu, up| silu + up, "the activated gate is added to up")
    }),
    named("residual-missing", RESIDUAL, |s| {
        pair(s, |_, block| block, "the residual stream is not added")
    }),
    named("block-missing", RESIDUAL, |s| {
        pair(s, |stream, _| stream, "what the block computed is not added to the residual stream")
    }),
    named("residual-doubled", RESIDUAL, |s| {
        pair(s, |stream, block| 2.0 * stream + block, "the residual stream is added twice")
    }),
    named("block-doubled", RESIDUAL, |s| {
        pair(s, |stream, block| stream + 2.0 * block, "what the block computed is added twice")
    }),
    named("block-subtracted", RESIDUAL, |s| {
        pair(s, |stream, block| stream - block, "what the block computed is subtracted")
    }),
    named("residual-from-elsewhere", RESIDUAL, from_elsewhere),
];

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Another function of the gate.
fn activation(suspect: &Suspect<'_>, f: impl Fn(f64) -> f64, sentence: &str) -> Answer {
    Ok(Some(Guess::new(mapped(suspect, &suspect.input(0)?, f), sentence)))
}

/// `f` of `x`, a function that is about as steep and as accurate as SiLU.
fn mapped(suspect: &Suspect<'_>, x: &Triple, f: impl Fn(f64) -> f64) -> Triple {
    let shape = suspect.expected.emulated.shape.clone();
    let data: Vec<f64> = x.emulated.data.iter().map(|&x| f(x)).collect();
    let through = x.slack.as_ref().map_or(vec![0.0; data.len()], |slack| slack.to_vec());
    let value = Triple::alternative(Plain { shape, data }, through);
    elementwise(&value, |_, y| (y, 1.2)).roughened(|i| {
        let (x, y) = (x.emulated.data[i].abs(), value.emulated.data[i].abs());
        // The rounding of an exponential's argument becomes a relative error; formulas of differences cancel.
        f64::from(f32::EPSILON) * (8.0 * y + x * y + x)
    })
}

fn silu_on_up(suspect: &Suspect<'_>) -> Answer {
    let sentence = "the activation function is applied to up, not to the gate";
    let (gate, up) = match suspect.site.stage {
        FfnSilu | FfnSwigl => (FfnGate, FfnUp),
        _ => (MoeExpertGate, MoeExpertUp),
    };
    let up = suspect.case.value(suspect.of_layer(up))?;
    if matches!(suspect.site.stage, FfnSilu | MoeExpertSilu) {
        return Ok(Some(Guess::new(mapped(suspect, &up, silu), sentence)));
    }
    let gate = suspect.case.value(suspect.of_layer(gate))?;
    let value = combined(suspect, &gate, &up, |gate, up| gate * silu(up));
    Ok(Some(Guess::new(value, sentence)))
}

/// Another function of the two inputs.
fn pair(suspect: &Suspect<'_>, f: impl Fn(f64, f64) -> f64, sentence: &str) -> Answer {
    let (a, b) = (suspect.input(0)?, suspect.input(1)?);
    Ok(Some(Guess::new(combined(suspect, &a, &b, f), sentence)))
}

fn combined(suspect: &Suspect<'_>, a: &Triple, b: &Triple, f: impl Fn(f64, f64) -> f64) -> Triple {
    let (x, y) = (&a.emulated.data, &b.emulated.data);
    let data: Vec<f64> = x.iter().zip(y).map(|(&x, &y)| f(x, y)).collect();
    let shape = suspect.expected.emulated.shape.clone();
    let slack = slack_of(&suspect.expected).to_vec();
    Triple::alternative(Plain { shape, data: data.clone() }, slack)
        .roughened(|i| 4.0 * f64::from(f32::EPSILON) * (data[i].abs() + x[i].abs() + y[i].abs()))
}

/// What the block computed, added to something else of this layer or of the one before.
fn from_elsewhere(suspect: &Suspect<'_>) -> Answer {
    let (config, evidence) = (suspect.config(), suspect.case.evidence);
    let own = inputs(suspect.site, config);
    let block = suspect.input(1)?;
    let layer = suspect.layer();
    let wide = |site: &Site| {
        let shape = apr_capture::Dims::from(config).shape(site.stage, 1, 1);
        shape.len() == 2 && shape[1] == config.hidden_size
    };
    let candidates: Vec<Site> = (layer.saturating_sub(1)..=layer)
        .flat_map(|layer| {
            Stage::all()
                .filter(|stage| !stage.is_whole_model())
                .map(move |stage| Site::layer(layer, stage))
        })
        .chain([Site::whole(Embedding)])
        .filter(|site| {
            wide(site) && *site < suspect.site && *site != own[0] && evidence.holds(*site)
        })
        .collect();
    suspect.best(candidates.into_iter().map(|site| {
        let stream = suspect.case.value(site)?;
        let value = combined(suspect, &stream, &block, |stream, block| stream + block);
        Ok(Guess::new(value, format!("{site} is added in the place of {}", own[0])))
    }))
}
