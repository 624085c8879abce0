//! Constants of the model that an engine has wrong: rotation, epsilon, ties.

use apr_format::Draft;
use apr_model::{HostTensor, Result, Role, RopeFrequencies, Stage};

use crate::{
    Fault,
    fault::{Family, FilePlace, OpFault, Plant, Reach, is_llama},
    op::Rope,
};

const ROPE: &[Stage] = &[Stage::QPostRope, Stage::KPostRope];

const fn rope(
    name: &'static str,
    damage: fn(&Rope<'_>, &mut HostTensor) -> Result<()>,
    about: &'static str,
) -> Fault {
    Fault::new(name, Family::Config, ROPE, Plant::Op(OpFault::Rope(damage)), about)
}

const fn file(
    name: &'static str,
    stages: &'static [Stage],
    alter: fn(&FilePlace<'_>, &mut Draft) -> crate::Result<()>,
    about: &'static str,
) -> Fault {
    Fault::new(name, Family::Config, stages, Plant::File(alter), about).reaching(Reach::EveryLayer)
}

pub(super) const FAULTS: &[Fault] = &[
    rope("rope-theta", theta, "The base of the rotation is another: 0.9 times, or a hundredth.")
        .graded()
        .diagnosed(&["rope-theta"]),
    rope(
        "rope-pairs",
        pairs,
        "Neighbouring channels are rotated together instead of channels half a head apart.",
    )
    .diagnosed(&["rope-style"]),
    rope("rope-position", position, "Positions count from one, or from 17.")
        .graded()
        .diagnosed(&["rope-position-offset"]),
    rope("rope-position-restarts", restarts, "Positions begin at zero again in every step.")
        .diagnosed(&["rope-position-offset"]),
    rope(
        "rope-scaling-lost",
        scaling_lost,
        "The frequencies are not scaled as the model asks for.",
    )
    .only(is_llama)
    .diagnosed(&["rope-scaling-missing"]),
    rope(
        "rope-scaled",
        scaled,
        "The frequencies are divided by two, which the model does not ask for.",
    )
    .diagnosed(&["rope-frequencies-scaled"]),
    rope("rope-partial", partial, "Only the faster half of the pairs is rotated.")
        .diagnosed(&["partial-rotary"]),
    rope("rope-backwards", backwards, "The rotation goes the other way.")
        .diagnosed(&["rope-inverse"]),
    rope("rope-missing", missing, "Nothing is rotated.").diagnosed(&["rope-missing"]),
    rope("rope-angles-f16", angles_f16, "Angles are computed in half precision."),
    file(
        "file-rope-theta",
        &[Stage::QPostRope],
        file_theta,
        "The base of the rotation is another, in every layer.",
    )
    .graded()
    .also(&[Stage::KPostRope])
    .diagnosed(&["rope-theta"]),
    file(
        "file-rope-factors-lost",
        &[Stage::QPostRope],
        file_factors,
        "The file's rope factors were lost.",
    )
    .also(&[Stage::KPostRope])
    .only(is_llama)
    .diagnosed(&["rope-scaling-missing"]),
    file(
        "file-rope-linear",
        &[Stage::QPostRope],
        file_linear,
        "Linear scaling is on, which the model does not ask for.",
    )
    .also(&[Stage::KPostRope])
    .only(|target| !is_llama(target))
    .diagnosed(&["rope-frequencies-scaled"]),
    file(
        "file-eps",
        &[Stage::AttnNorm],
        file_eps,
        "Epsilon is another: 1e-5 more, or 1e-2; in every norm.",
    )
    .graded()
    .also(&[Stage::FfnNorm, Stage::QNorm, Stage::KNorm, Stage::FinalNorm])
    .diagnosed(&["norm-eps"]),
];

fn theta(op: &Rope<'_>, y: &mut HostTensor) -> Result<()> {
    let mut config = op.place.config.clone();
    config.rope_theta *= op.place.pick(0.9, 0.01);
    *y = op.by(&config.rope_frequencies())?;
    Ok(())
}

/// The head of channel-wise values, with `from[i]` in place `i`.
fn rearranged(x: &HostTensor, from: impl Fn(usize, usize) -> usize) -> HostTensor {
    let head_dim = x.shape[2];
    let heads = x.values.chunks_exact(head_dim);
    let values =
        heads.flat_map(|head| (0..head_dim).map(|i| head[from(i, head_dim)]).collect::<Vec<_>>());
    HostTensor { shape: x.shape.clone(), values: values.collect() }
}

fn pairs(op: &Rope<'_>, y: &mut HostTensor) -> Result<()> {
    // Neighbours are brought half a head apart, rotated, and brought back.
    let apart = rearranged(&op.x, |i, n| 2 * (i % (n / 2)) + i / (n / 2));
    let apart = Rope { x: apart, place: op.place, kernels: op.kernels, first: op.first };
    *y =
        rearranged(&apart.by(&op.place.config.rope_frequencies())?, |i, n| i / 2 + i % 2 * (n / 2));
    Ok(())
}

fn at(op: &Rope<'_>, first: usize, y: &mut HostTensor) -> Result<()> {
    let table = op.place.config.rope_frequencies().table(first..first + op.x.shape[0]);
    *y = op.kernels.rope(&op.x, &table)?;
    Ok(())
}

fn position(op: &Rope<'_>, y: &mut HostTensor) -> Result<()> {
    at(op, op.first + op.place.pick(1, 17), y)
}

fn restarts(op: &Rope<'_>, y: &mut HostTensor) -> Result<()> {
    at(op, 0, y)
}

fn scaling_lost(op: &Rope<'_>, y: &mut HostTensor) -> Result<()> {
    let config = &op.place.config;
    *y = op.by(&RopeFrequencies::new(config.rope_theta, config.rotary_dim))?;
    Ok(())
}

fn scaled(op: &Rope<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.by(&op.place.config.rope_frequencies().linear(2.0))?;
    Ok(())
}

fn partial(op: &Rope<'_>, y: &mut HostTensor) -> Result<()> {
    let pairs = op.place.config.rotary_dim / 2;
    let still = (0..pairs).map(|i| if i < pairs / 2 { 1.0 } else { f32::INFINITY });
    // An infinitely slow pair does not turn.
    *y = op.by(&op.place.config.rope_frequencies().divided_by(&still.collect::<Vec<_>>()))?;
    Ok(())
}

fn backwards(op: &Rope<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.by(&op.place.config.rope_frequencies().linear(-1.0))?;
    Ok(())
}

fn missing(op: &Rope<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.x.clone();
    Ok(())
}

fn angles_f16(op: &Rope<'_>, y: &mut HostTensor) -> Result<()> {
    let [_, heads, head_dim] = op.x.shape[..] else { panic!("rotation is per head") };
    let frequencies = op.place.config.rope_frequencies();
    let rows = op.x.values.chunks_exact(heads * head_dim);
    for ((y, x), position) in
        y.values.chunks_exact_mut(heads * head_dim).zip(rows).zip(op.positions())
    {
        for (y, x) in y.chunks_exact_mut(head_dim).zip(x.chunks_exact(head_dim)) {
            let pairs = frequencies.as_slice().len();
            for (i, frequency) in frequencies.as_slice().iter().enumerate() {
                let angle = half::f16::from_f64(position as f64 * frequency).to_f64();
                let (sin, cos) = (libm::sin(angle), libm::cos(angle));
                let (a, b) = (x[i], x[i + pairs]);
                (y[i], y[i + pairs]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    }
    Ok(())
}

fn file_theta(place: &FilePlace<'_>, draft: &mut Draft) -> crate::Result<()> {
    let factor = if place.severity == crate::Severity::Subtle { 0.9 } else { 0.01 };
    place.set(draft, "rope.freq_base", (place.config.rope_theta * factor) as f32);
    Ok(())
}

fn file_factors(_: &FilePlace<'_>, draft: &mut Draft) -> crate::Result<()> {
    draft.remove_tensor(&Role::RopeFreqs.gguf_name());
    Ok(())
}

fn file_linear(place: &FilePlace<'_>, draft: &mut Draft) -> crate::Result<()> {
    place.set(draft, "rope.scaling.type", "linear");
    place.set(draft, "rope.scaling.factor", 2.0f32);
    Ok(())
}

fn file_eps(place: &FilePlace<'_>, draft: &mut Draft) -> crate::Result<()> {
    let eps = match place.severity {
        crate::Severity::Subtle => place.config.rms_norm_eps + 1e-5,
        crate::Severity::Gross => 1e-2,
    };
    place.set(draft, "attention.layer_norm_rms_epsilon", eps as f32);
    Ok(())
}
