//! Captures that are not what they say: the engine was right, what was written down is not.

use std::{fs, io, path::Path};

use apr_capture::manifest;
use apr_model::{Site, Stage};
use half::f16;

use crate::{
    Engine, Fault,
    fault::{Blames, CapturePlace, Family, Plant, Reach},
    recording::Recording,
    rng::Rng,
};

type Change = fn(&CapturePlace<'_>, &mut Recording);

/// Stages whose label may be wrong: one of each kind of op.
const LABELLED: &[Stage] = &[
    Stage::AttnNorm,
    Stage::QkvMatmul,
    Stage::KPostRope,
    Stage::AttnSoftmax,
    Stage::Attention,
    Stage::PostAttnResidual,
    Stage::FfnUp,
    Stage::MoeRouter,
    Stage::MoeRouterWeights,
    Stage::MoeExpertUp,
    Stage::MoeExpertOut,
    Stage::FfnOut,
];

/// The same of what is told apart by being equal or not.
const LABELLED_IDS: &[Stage] = &[
    Stage::AttnNorm,
    Stage::QkvMatmul,
    Stage::KPostRope,
    Stage::AttnSoftmax,
    Stage::Attention,
    Stage::PostAttnResidual,
    Stage::FfnUp,
    Stage::MoeRouter,
    Stage::MoeRouterIndices,
    Stage::MoeExpertUp,
    Stage::FfnOut,
];

/// Where a fault of the whole capture is counted: at its first value.
const WHOLE: &[Stage] = &[Stage::Embedding];

const fn capture(
    name: &'static str,
    stages: &'static [Stage],
    change: Change,
    about: &'static str,
) -> Fault {
    Fault::new(name, Family::Capture, stages, Plant::Capture(change), about)
}

const fn disk(
    name: &'static str,
    damage: fn(&Path) -> io::Result<()>,
    about: &'static str,
) -> Fault {
    Fault::new(name, Family::Capture, WHOLE, Plant::Disk(damage), about).blaming(Blames::Anything)
}

pub(super) const FAULTS: &[Fault] = &[
    capture(
        "captured-last-row-only",
        WHOLE,
        last_row_only,
        "Only the last row of each step was kept.",
    )
    .blaming(Blames::Nothing),
    // Not the softmax of flash attention, which never exists.
    capture("captured-not", LABELLED_IDS, stage_missing, "The stage was not captured.")
        .only(|target| {
            !(target.engine == Engine::LlamaCpp && target.site.stage == Stage::AttnSoftmax)
        })
        .blaming(Blames::Nothing),
    capture(
        "captured-step-missing",
        WHOLE,
        step_missing,
        "The second chunk of the prompt was not captured.",
    )
    .blaming(Blames::Nothing),
    capture(
        "captured-of-other-layer",
        LABELLED_IDS,
        layer_label,
        "The stage's values of this layer and the next are exchanged.",
    )
    .reaching(Reach::NextLayer)
    .diagnosed(&["value-of-other-layer"]),
    capture(
        "captured-layers-exchanged",
        &[Stage::AttnNorm],
        layers_exchanged,
        "All values of this layer and the next are exchanged.",
    )
    .reaching(Reach::NextLayer)
    .diagnosed(&["value-of-other-layer"]),
    capture(
        "captured-stages-exchanged",
        &[Stage::FfnGate, Stage::MoeExpertGate],
        stages_exchanged,
        "Gate and up are written under each other's name.",
    )
    .also(&[Stage::FfnUp, Stage::MoeExpertUp])
    .diagnosed(&["gate-up-swapped", "equals-another-stage"]),
    capture(
        "captured-from-reused-buffer",
        &[Stage::AttnNorm],
        buffer_reused,
        "The buffer held the norm before the feed-forward network by the time it was written.",
    )
    .diagnosed(&["equals-another-stage"]),
    capture(
        "captured-before-op",
        &[Stage::QPostRope, Stage::PostAttnResidual],
        before_op,
        "An op in place was captured before it ran.",
    )
    // Of the value alone: what an op that is left out makes.
    .diagnosed(&["equals-another-stage", "rope-missing", "block-missing"]),
    capture(
        "captured-post-norm",
        &[Stage::PostFfnResidual],
        post_norm,
        "The last layer's output was captured after the final norm.",
    )
    .also(&[Stage::FinalNorm])
    .only(|target| target.site.layer == Some(target.config.num_hidden_layers as u32 - 1))
    .diagnosed(&["equals-another-stage"]),
    capture(
        "captured-rows-shifted",
        LABELLED_IDS,
        rows_shifted,
        "Rows are those of the token before.",
    )
    .diagnosed(&["rows-of-another-token"]),
    capture("captured-one-row-repeated", LABELLED_IDS, row_repeated, "Every row is the last one.")
        .diagnosed(&["last-row-only-repeated", "rows-of-another-token"]),
    capture(
        "captured-steps-exchanged",
        LABELLED_IDS,
        steps_exchanged,
        "The stage's values of the two decode steps are exchanged.",
    )
    .only(|target| target.site.stage != Stage::AttnSoftmax)
    .diagnosed(&["rows-of-another-token"]),
    capture(
        "captured-column-major",
        LABELLED,
        column_major,
        "The values are written column by column.",
    ),
    capture(
        "captured-zeros",
        LABELLED_IDS,
        zeros,
        "The buffer was written before it was filled: zeros.",
    )
    .diagnosed(&["all-zeros"]),
    capture("captured-nan", LABELLED, one_nan, "One value is NaN.").diagnosed(&["nan-origin"]),
    capture("captured-stage-nan", LABELLED, stage_nan, "All values of the stage are NaN.")
        .diagnosed(&["nan-origin"]),
    capture("captured-all-nan", WHOLE, all_nan, "All values are NaN.").blaming(Blames::Anything),
    capture(
        "captured-rounded",
        LABELLED,
        rounded,
        "The values were rounded to f16 before they were written.",
    ),
    capture(
        "captured-other-prompt",
        WHOLE,
        other_prompt,
        "The tokens are those of another prompt.",
    )
    .diagnosed(&["other-tokens"]),
    capture("captured-positions", WHOLE, positions_shifted, "Positions are counted from one.")
        .blaming(Blames::Anything),
    capture(
        "declared-unrounded",
        &[Stage::QkvMatmul],
        declared_unrounded,
        "Activations were rounded to 8 bits, and the manifest says they were not.",
    )
    .also(&[
        Stage::AttnOut,
        Stage::FfnGate,
        Stage::FfnUp,
        Stage::MoeExpertGate,
        Stage::MoeExpertUp,
        Stage::MoeExpertOut,
        Stage::FfnOut,
        Stage::LmHead,
    ])
    .reaching(Reach::EveryLayer)
    .only(|target| {
        target.engine.rounds_activations() && target.weights.iter().all(|w| w.block_len() > 1)
    }),
    disk("file-truncated", truncated, "The last bytes of a step's file are missing."),
    disk("file-bit-flipped", bit_flipped, "One bit of a step's file has changed."),
    disk("file-missing", missing, "A step's file is missing."),
    disk("manifest-incomplete", incomplete, "The writer was interrupted."),
];

/// Applies `change` to what each step has of the site.
fn each_step(
    site: Site,
    recording: &mut Recording,
    mut change: impl FnMut(&mut manifest::Tensor, &mut Vec<f64>),
) {
    for step in 0..recording.steps.len() {
        if let Some((tensor, values)) = recording.get_mut(step, site) {
            change(tensor, values);
        }
    }
}

/// Exchanges the values of two sites, whose labels stay.
fn exchange(recording: &mut Recording, a: Site, b: Site) {
    for step in 0..recording.steps.len() {
        if let (Some(a), Some(b)) = (recording.index(step, a), recording.index(step, b)) {
            recording.steps[step].swap(a, b);
        }
    }
}

/// Puts a copy of the values of `from` in the place of those of `to`.
fn copy(recording: &mut Recording, from: Site, to: Site) {
    for step in 0..recording.steps.len() {
        if let (Some(from), Some(to)) = (recording.index(step, from), recording.index(step, to)) {
            let values = recording.steps[step][from].clone();
            recording.steps[step][to] = values;
        }
    }
}

fn at(place: &CapturePlace<'_>, stage: Stage) -> Site {
    Site { stage, ..place.site }
}

fn next_layer(place: &CapturePlace<'_>) -> u32 {
    (place.site.layer.unwrap_or(0) + 1) % place.config.num_hidden_layers as u32
}

/// The rows of a value of this shape with row `from(r)` in place of row `r`.
fn with_rows(tensor: &manifest::Tensor, values: &[f64], rows: &[usize]) -> Vec<f64> {
    let axis = tensor.axes.iter().position(|axis| axis == "row").unwrap_or(0);
    let count = tensor.shape[axis];
    let inner: usize = tensor.shape[axis + 1..].iter().product();
    let pieces = values.chunks_exact(count * inner);
    pieces
        .flat_map(|piece| rows.iter().flat_map(|&row| &piece[row * inner..][..inner]))
        .copied()
        .collect()
}

fn last_row_only(_: &CapturePlace<'_>, recording: &mut Recording) {
    for (step, values) in recording.manifest.steps.iter_mut().zip(&mut recording.steps) {
        for (tensor, values) in step.tensors.iter_mut().zip(values) {
            let last = tensor.positions.len() - 1;
            *values = with_rows(tensor, values, &[last]);
            tensor.positions.drain(..last);
            let axis = tensor.axes.iter().position(|axis| axis == "row").unwrap_or(0);
            tensor.shape[axis] = 1;
        }
    }
}

fn stage_missing(place: &CapturePlace<'_>, recording: &mut Recording) {
    for step in 0..recording.steps.len() {
        if let Some(index) = recording.index(step, place.site) {
            recording.manifest.steps[step].tensors.remove(index);
            recording.steps[step].remove(index);
        }
    }
}

fn step_missing(_: &CapturePlace<'_>, recording: &mut Recording) {
    recording.manifest.steps.remove(1);
    recording.steps.remove(1);
}

fn layer_label(place: &CapturePlace<'_>, recording: &mut Recording) {
    let other = Site { layer: Some(next_layer(place)), ..place.site };
    exchange(recording, place.site, other);
}

fn layers_exchanged(place: &CapturePlace<'_>, recording: &mut Recording) {
    for stage in Stage::all().filter(|stage| !stage.is_whole_model()) {
        let other = Site { layer: Some(next_layer(place)), stage };
        exchange(recording, at(place, stage), other);
    }
}

fn stages_exchanged(place: &CapturePlace<'_>, recording: &mut Recording) {
    let up = match place.site.stage {
        Stage::MoeExpertGate => Stage::MoeExpertUp,
        _ => Stage::FfnUp,
    };
    exchange(recording, place.site, at(place, up));
}

fn buffer_reused(place: &CapturePlace<'_>, recording: &mut Recording) {
    copy(recording, at(place, Stage::FfnNorm), place.site);
}

fn before_op(place: &CapturePlace<'_>, recording: &mut Recording) {
    if place.site.stage == Stage::PostAttnResidual {
        let before = match place.site.layer {
            Some(0) | None => Site::whole(Stage::Embedding),
            Some(layer) => Site::layer(layer as usize - 1, Stage::PostFfnResidual),
        };
        return copy(recording, before, place.site);
    }
    let config = place.config;
    let source = match (config.qk_norm, config.attention_bias) {
        (true, _) => Stage::QNorm,
        (_, true) => Stage::QkvBias,
        _ => Stage::QkvMatmul,
    };
    let width = if config.qk_norm { config.q_dim() } else { config.q_dim() + 2 * config.kv_dim() };
    for step in 0..recording.steps.len() {
        let Some((_, before)) = recording.get(step, at(place, source)) else { continue };
        let queries = before.chunks_exact(width).flat_map(|row| &row[..config.q_dim()]);
        let queries = queries.copied().collect();
        if let Some((_, values)) = recording.get_mut(step, place.site) {
            *values = queries;
        }
    }
}

fn post_norm(place: &CapturePlace<'_>, recording: &mut Recording) {
    copy(recording, Site::whole(Stage::FinalNorm), place.site);
}

fn rows_shifted(place: &CapturePlace<'_>, recording: &mut Recording) {
    each_step(place.site, recording, |tensor, values| {
        let rows: Vec<usize> =
            (0..tensor.positions.len()).map(|row| row.saturating_sub(1)).collect();
        *values = with_rows(tensor, values, &rows);
    });
}

fn row_repeated(place: &CapturePlace<'_>, recording: &mut Recording) {
    each_step(place.site, recording, |tensor, values| {
        let count = tensor.positions.len();
        *values = with_rows(tensor, values, &vec![count - 1; count]);
    });
}

fn steps_exchanged(place: &CapturePlace<'_>, recording: &mut Recording) {
    let last = recording.steps.len() - 1;
    if let (Some(a), Some(b)) =
        (recording.index(last - 1, place.site), recording.index(last, place.site))
    {
        let first = std::mem::take(&mut recording.steps[last - 1][a]);
        recording.steps[last - 1][a] = std::mem::replace(&mut recording.steps[last][b], first);
    }
}

fn column_major(place: &CapturePlace<'_>, recording: &mut Recording) {
    each_step(place.site, recording, |tensor, values| {
        let rows = tensor.shape[0];
        let cols = values.len() / rows;
        *values = (0..values.len()).map(|i| values[i % rows * cols + i / rows]).collect();
    });
}

fn zeros(place: &CapturePlace<'_>, recording: &mut Recording) {
    each_step(place.site, recording, |_, values| values.fill(0.0));
}

fn one_nan(place: &CapturePlace<'_>, recording: &mut Recording) {
    let mut rng = Rng::new(place.seed);
    if let Some((tensor, values)) = recording.get_mut(0, place.site) {
        // In the last row: it sees everything.
        let index = match tensor.axes.first().map(String::as_str) {
            Some("head") => tensor.shape[1] * tensor.shape[2] - 1,
            _ => values.len() - 1 - rng.below(values.len() / tensor.shape[0]),
        };
        values[index] = f64::NAN;
    }
}

fn stage_nan(place: &CapturePlace<'_>, recording: &mut Recording) {
    each_step(place.site, recording, |_, values| values.fill(f64::NAN));
}

fn all_nan(_: &CapturePlace<'_>, recording: &mut Recording) {
    recording.steps.iter_mut().flatten().for_each(|values| values.fill(f64::NAN));
}

fn rounded(place: &CapturePlace<'_>, recording: &mut Recording) {
    let round = |x: &mut f64| *x = f16::from_f64(*x).to_f64();
    each_step(place.site, recording, |_, values| values.iter_mut().for_each(round));
}

fn other_prompt(_: &CapturePlace<'_>, recording: &mut Recording) {
    for step in &mut recording.manifest.steps {
        step.token_ids.iter_mut().for_each(|id| *id ^= 1);
    }
}

fn positions_shifted(_: &CapturePlace<'_>, recording: &mut Recording) {
    for step in &mut recording.manifest.steps {
        step.positions.iter_mut().for_each(|position| *position += 1);
        let tensors = step.tensors.iter_mut();
        tensors.flat_map(|tensor| &mut tensor.positions).for_each(|position| *position += 1);
    }
}

fn declared_unrounded(_: &CapturePlace<'_>, recording: &mut Recording) {
    let plan = recording.manifest.provenance.plan.iter_mut();
    for op in plan.flat_map(|plan| &mut plan.ops).filter(|op| op.op.ends_with("linear")) {
        op.activations.iter_mut().for_each(|activations| *activations = "F32".to_owned());
    }
}

const STEP: &str = "step-0001.safetensors";

fn truncated(directory: &Path) -> io::Result<()> {
    let file = fs::OpenOptions::new().write(true).open(directory.join(STEP))?;
    file.set_len(file.metadata()?.len() - 1000)
}

fn bit_flipped(directory: &Path) -> io::Result<()> {
    let path = directory.join(STEP);
    let mut bytes = fs::read(&path)?;
    let middle = bytes.len() * 2 / 3;
    bytes[middle] ^= 0x10;
    fs::write(path, bytes)
}

fn missing(directory: &Path) -> io::Result<()> {
    fs::remove_file(directory.join(STEP))
}

fn incomplete(directory: &Path) -> io::Result<()> {
    let path = directory.join(manifest::MANIFEST);
    let json = fs::read_to_string(&path)?;
    fs::write(path, json.replace("\"complete\":true", "\"complete\":false"))
}
