//! Activation functions, biases, the residual stream, and what is done to embeddings and logits.

use apr_model::{HostTensor, Result, Stage};
use half::{bf16, f16};

use crate::{
    Fault,
    fault::{Family, OpFault, Plant},
    op::{Bias, Embed, Gated, Place, Residual, Swiglu, row_len},
};

const SILU: &[Stage] = &[Stage::FfnSilu, Stage::MoeExpertSilu];

const SWIGL: &[Stage] = &[Stage::FfnSwigl, Stage::MoeExpertSwigl];

const fn op(
    name: &'static str,
    stages: &'static [Stage],
    op: OpFault,
    about: &'static str,
) -> Fault {
    Fault::new(name, Family::Activations, stages, Plant::Op(op), about)
}

const fn silu(
    name: &'static str,
    damage: fn(&Swiglu<'_>) -> Result<Gated>,
    about: &'static str,
) -> Fault {
    op(name, SILU, OpFault::Swiglu(damage), about)
}

const fn residual(
    name: &'static str,
    damage: fn(&Residual<'_>, &mut HostTensor) -> Result<()>,
    about: &'static str,
) -> Fault {
    const BOTH: &[Stage] = &[Stage::PostAttnResidual, Stage::PostFfnResidual];
    op(name, BOTH, OpFault::Residual(damage), about)
}

pub(super) const FAULTS: &[Fault] = &[
    silu(
        "gelu-tanh",
        gelu_tanh,
        "The gate goes through GELU's tanh approximation instead of SiLU.",
    )
    .diagnosed(&["gelu-for-silu"]),
    silu("gelu-erf", gelu_erf, "The gate goes through GELU instead of SiLU.")
        .diagnosed(&["gelu-for-silu"]),
    silu("gelu-quick", gelu_quick, "The gate goes through x * sigmoid(1.702 x).")
        .diagnosed(&["gelu-for-silu"]),
    silu("relu", relu, "The gate goes through ReLU.").diagnosed(&["relu-for-silu"]),
    silu("sigmoid", sigmoid, "The sigmoid is not multiplied with the gate.")
        .diagnosed(&["sigmoid-for-silu"]),
    silu("silu-of-up", of_up, "SiLU is applied to up instead of gate.")
        .also(SWIGL)
        .diagnosed(&["silu-on-up"]),
    silu("silu-missing", identity, "There is no activation function.").diagnosed(&["silu-missing"]),
    silu("silu-coarse", coarse, "The exponential is a table of 256 entries."),
    op("swiglu-clipped", SWIGL, OpFault::Value(clipped), "Large values are clipped.")
        .graded()
        .diagnosed(&["clipped"]),
    op(
        "swiglu-f16-overflow",
        SWIGL,
        OpFault::Value(overflow),
        "The product overflows a type that is too small, and is infinite.",
    )
    .graded()
    .diagnosed(&["f16-overflow", "nan-origin"]),
    op(
        "swiglu-added",
        SWIGL,
        OpFault::Swiglu(added),
        "Gate and up are added instead of multiplied.",
    )
    .diagnosed(&["sum-for-product"]),
    op(
        "swiglu-up-missing",
        SWIGL,
        OpFault::Swiglu(up_missing),
        "The gate is not multiplied with up.",
    )
    .diagnosed(&["up-missing"]),
    residual("residual-missing", residual_missing, "The stream is not added.")
        .diagnosed(&["residual-missing"]),
    residual("residual-branch-missing", branch_missing, "What the block computed is not added.")
        .diagnosed(&["block-missing"]),
    residual("residual-of-norm", of_norm, "The normalised stream is added instead of the stream.")
        .diagnosed(&["residual-from-elsewhere"]),
    residual("residual-doubled", doubled, "The stream is added twice.")
        .diagnosed(&["residual-doubled"]),
    residual("residual-bf16", residual_bf16, "The stream is kept in bf16, or in f16.").graded(),
    residual("residual-subtracted", subtracted, "What the block computed is subtracted.")
        .diagnosed(&["block-subtracted"]),
    op(
        "residual-of-layer-input",
        &[Stage::PostFfnResidual],
        OpFault::Residual(of_layer_input),
        "The feed-forward network's result is added to the stream from before attention.",
    )
    .diagnosed(&["residual-from-elsewhere"]),
    op("bias-twice", &[Stage::QkvBias], OpFault::Bias(bias_twice), "The bias is added twice.")
        .diagnosed(&["bias-doubled"]),
    op(
        "bias-subtracted",
        &[Stage::QkvBias],
        OpFault::Bias(bias_subtracted),
        "The bias is subtracted.",
    )
    .diagnosed(&["bias-subtracted"]),
    op("bias-skipped", &[Stage::QkvBias], OpFault::Bias(bias_skipped), "The bias is not added.")
        .diagnosed(&["bias-missing"]),
    op(
        "embedding-times-root",
        &[Stage::Embedding],
        OpFault::Value(times_root),
        "Embeddings are multiplied with the root of the width, as Gemma's are.",
    )
    .diagnosed(&["constant-factor"]),
    op(
        "embedding-of-before",
        &[Stage::Embedding],
        OpFault::Embed(token_before),
        "Each row is the embedding of the token before.",
    )
    .diagnosed(&["other-tokens"]),
    op(
        "embedding-f16",
        &[Stage::Embedding],
        OpFault::Value(rounded_f16),
        "Embeddings are rounded to f16.",
    )
    .only(|target| target.weights[0] == apr_tensor::DType::F32),
    op(
        "logits-capped",
        &[Stage::LmHead],
        OpFault::Value(capped),
        "Logits are capped by a tanh, as Gemma's are.",
    )
    .graded(),
    op(
        "logits-tempered",
        &[Stage::LmHead],
        OpFault::Value(tempered),
        "Logits are divided by a temperature.",
    )
    .graded()
    .diagnosed(&["constant-factor", "weight-scaled"]),
    op(
        "logits-normalised",
        &[Stage::LmHead],
        OpFault::Value(log_probabilities),
        "Logits are log probabilities.",
    ),
];

fn sigma(x: f64) -> f64 {
    1.0 / (1.0 + libm::exp(-x))
}

fn gelu_tanh(op: &Swiglu<'_>) -> Result<Gated> {
    let k = (2.0 / std::f64::consts::PI).sqrt();
    op.with(|x| 0.5 * x * (1.0 + libm::tanh(k * (x + 0.044_715 * x * x * x))))
}

fn gelu_erf(op: &Swiglu<'_>) -> Result<Gated> {
    op.with(|x| 0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2)))
}

fn gelu_quick(op: &Swiglu<'_>) -> Result<Gated> {
    op.with(|x| x * sigma(1.702 * x))
}

fn relu(op: &Swiglu<'_>) -> Result<Gated> {
    op.with(|x| x.max(0.0))
}

fn sigmoid(op: &Swiglu<'_>) -> Result<Gated> {
    op.with(sigma)
}

fn identity(op: &Swiglu<'_>) -> Result<Gated> {
    op.with(|x| x)
}

fn coarse(op: &Swiglu<'_>) -> Result<Gated> {
    op.with(|x| x * sigma((x * 16.0).round() / 16.0))
}

fn of_up(op: &Swiglu<'_>) -> Result<Gated> {
    op.kernels.swiglu(&op.up, &op.gate, None)
}

fn added(op: &Swiglu<'_>) -> Result<Gated> {
    let right = op.kernels.swiglu(&op.gate, &op.up, None)?;
    Ok(Gated { out: op.kernels.add(&right.silu, &op.up)?, ..right })
}

fn up_missing(op: &Swiglu<'_>) -> Result<Gated> {
    let right = op.kernels.swiglu(&op.gate, &op.up, None)?;
    Ok(Gated { out: right.silu.clone(), ..right })
}

fn clipped(place: &Place, y: &mut HostTensor) -> Result<()> {
    let largest = y.values.iter().fold(0.0, |most: f64, y| most.max(y.abs()));
    let most = largest * place.pick(0.5, 0.05);
    y.values.iter_mut().for_each(|y| *y = y.clamp(-most, most));
    Ok(())
}

fn overflow(place: &Place, y: &mut HostTensor) -> Result<()> {
    let largest = y.values.iter().fold(0.0, |most: f64, y| most.max(y.abs()));
    let most = largest * place.pick(0.999, 0.25);
    let spill = |y: &mut f64| *y = if y.abs() > most { y.signum() * f64::INFINITY } else { *y };
    y.values.iter_mut().for_each(spill);
    Ok(())
}

fn residual_missing(op: &Residual<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.added.clone();
    Ok(())
}

fn branch_missing(op: &Residual<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.stream.clone();
    Ok(())
}

fn of_norm(op: &Residual<'_>, y: &mut HostTensor) -> Result<()> {
    let norm = match op.place.site.stage {
        Stage::PostAttnResidual => Stage::AttnNorm,
        _ => Stage::FfnNorm,
    };
    *y = op.kernels.add(&op.before[&norm], &op.added)?;
    Ok(())
}

fn doubled(op: &Residual<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.kernels.add(y, &op.stream)?;
    Ok(())
}

fn residual_bf16(op: &Residual<'_>, y: &mut HostTensor) -> Result<()> {
    let round = match op.place.is_subtle() {
        true => |y: f64| f16::from_f64(y).to_f64(),
        false => |y: f64| bf16::from_f64(y).to_f64(),
    };
    y.values.iter_mut().for_each(|y| *y = round(*y));
    Ok(())
}

fn subtracted(op: &Residual<'_>, y: &mut HostTensor) -> Result<()> {
    let mut added = op.added.clone();
    added.values.iter_mut().for_each(|x| *x = -*x);
    *y = op.kernels.add(&op.stream, &added)?;
    Ok(())
}

fn of_layer_input(op: &Residual<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.kernels.add(op.layer_input, &op.added)?;
    Ok(())
}

/// The input and `times` times the bias.
fn with_bias(op: &Bias<'_>, y: &mut HostTensor, times: f64) {
    y.values.copy_from_slice(&op.x.values);
    for row in y.values.chunks_exact_mut(op.bias.len()) {
        row.iter_mut().zip(op.bias).for_each(|(y, &b)| *y += times * f64::from(b));
    }
}

fn bias_twice(op: &Bias<'_>, y: &mut HostTensor) -> Result<()> {
    with_bias(op, y, 2.0);
    Ok(())
}

fn bias_subtracted(op: &Bias<'_>, y: &mut HostTensor) -> Result<()> {
    with_bias(op, y, -1.0);
    Ok(())
}

fn bias_skipped(op: &Bias<'_>, y: &mut HostTensor) -> Result<()> {
    with_bias(op, y, 0.0);
    Ok(())
}

fn times_root(place: &Place, y: &mut HostTensor) -> Result<()> {
    let factor = (place.config.hidden_size as f64).sqrt();
    y.values.iter_mut().for_each(|y| *y *= factor);
    Ok(())
}

fn token_before(op: &Embed<'_>, y: &mut HostTensor) -> Result<()> {
    let width = row_len(y);
    let mut row = vec![0.0; width];
    let before = op.tokens[..1].iter().chain(op.tokens);
    for (y, &token) in y.values.chunks_exact_mut(width).zip(before) {
        op.table.dequantize_row(token as usize, &mut row)?;
        y.iter_mut().zip(&row).for_each(|(y, &x)| *y = x.into());
    }
    Ok(())
}

fn rounded_f16(_: &Place, y: &mut HostTensor) -> Result<()> {
    y.values.iter_mut().for_each(|y| *y = f16::from_f64(*y).to_f64());
    Ok(())
}

fn capped(place: &Place, y: &mut HostTensor) -> Result<()> {
    let cap = place.pick(30.0, 2.0);
    y.values.iter_mut().for_each(|y| *y = cap * libm::tanh(*y / cap));
    Ok(())
}

fn tempered(place: &Place, y: &mut HostTensor) -> Result<()> {
    let temperature = place.pick(1.01, 0.7);
    y.values.iter_mut().for_each(|y| *y /= temperature);
    Ok(())
}

fn log_probabilities(_: &Place, y: &mut HostTensor) -> Result<()> {
    let width = row_len(y);
    for row in y.values.chunks_exact_mut(width) {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|y| libm::exp(y - max)).sum();
        let shift = max + libm::log(sum);
        row.iter_mut().for_each(|y| *y -= shift);
    }
    Ok(())
}
