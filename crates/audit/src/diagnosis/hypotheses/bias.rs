//! Biases.

use apr_model::{Backend, Site, Stage, Stage::*};

use super::{Hypothesis, named, of_part};
use crate::{
    Result,
    diagnosis::suspect::{Answer, Guess, Suspect},
    twin::Triple,
};

const BIAS: &[Stage] = &[QkvBias];

pub(super) const TABLE: &[Hypothesis] = &[
    named("bias-missing", BIAS, |s| changed(s, |_| 0.0, "the bias is not added")),
    named("bias-doubled", BIAS, |s| changed(s, |b| 2.0 * b, "the bias is added twice")),
    named("bias-subtracted", BIAS, |s| changed(s, |b| -b, "the bias is subtracted")),
    named("bias-of-other-layer", BIAS, of_other_layer),
    named("bias-shifted", BIAS, shifted),
];

/// The stage with another bias for each column.
pub(super) fn replaced(suspect: &Suspect<'_>, bias: impl Fn(usize) -> f64) -> Result<Triple> {
    let bias = (0..suspect.vector().len()).map(bias).collect();
    // Leaves the slack of the product with the twin.
    suspect.case.op(suspect.of_layer(QkvBias), &|input| suspect.case.value(input))?;
    Ok(suspect.twin().add_bias(suspect.input(0)?, &bias)?)
}

fn changed(suspect: &Suspect<'_>, f: impl Fn(f64) -> f64, sentence: &str) -> Answer {
    let value = replaced(suspect, |column| f(suspect.vector()[column]))?;
    let (value, parts) = suspect.in_parts(&value)?;
    Ok(Some(Guess::new(value, of_part(&parts, sentence))))
}

fn of_other_layer(suspect: &Suspect<'_>) -> Answer {
    let layers = 0..suspect.config().num_hidden_layers;
    suspect.best(layers.filter(|&layer| layer != suspect.layer()).map(|layer| {
        let model = &suspect.case.evidence.model;
        let bias = model.vector(Site::layer(layer, QkvBias)).expect("layers are alike");
        let (value, parts) = suspect.in_parts(&replaced(suspect, |column| bias[column])?)?;
        let sentence = of_part(&parts, &format!("the bias is that of layer {layer}"));
        Ok(Guess::new(value, sentence).with("layer", layer as f64))
    }))
}

fn shifted(suspect: &Suspect<'_>) -> Answer {
    let parts = suspect.parts();
    let head_dim = suspect.config().head_dim as isize;
    let by = [1, -1, 2, -2, 4, -4, 8, -8, 16, -16, 32, -32, head_dim, -head_dim];
    suspect.best(by.into_iter().map(|by| {
        let value = replaced(suspect, |column| {
            let (_, part) = parts.iter().find(|(_, part)| part.contains(&column)).expect("covers");
            let shifted = (column - part.start) as isize + by;
            suspect.vector()[part.start + shifted.rem_euclid(part.len() as isize) as usize]
        })?;
        let (value, parts) = suspect.in_parts(&value)?;
        let sentence = of_part(&parts, &format!("each bias is the one {by:+} from it"));
        Ok(Guess::new(value, sentence).with("channels", by as f64))
    }))
}
