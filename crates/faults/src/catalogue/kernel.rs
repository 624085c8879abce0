//! Kernels that read, multiply or write the wrong numbers.

use std::ops::Range;

use apr_model::{HostTensor, Result, Stage};
use apr_tensor::{DType, Stored};
use half::{bf16, f16};

use crate::{
    Fault, Target,
    fault::{Family, OpFault, Plant},
    op::{Linear, Norm, Place, row_len, select_rows},
};

/// What every product with a matrix can suffer from.
const MATRIX: &[Stage] = &[
    Stage::QkvMatmul,
    Stage::AttnOut,
    Stage::FfnGate,
    Stage::FfnUp,
    Stage::MoeRouter,
    Stage::MoeExpertGate,
    Stage::MoeExpertUp,
    Stage::MoeExpertOut,
    Stage::FfnOut,
    Stage::LmHead,
];

const NORMS: &[Stage] =
    &[Stage::AttnNorm, Stage::FfnNorm, Stage::QNorm, Stage::KNorm, Stage::FinalNorm];

/// What any op can suffer from that writes one value, row by row.
const ANY: &[Stage] = &[
    Stage::AttnNorm,
    Stage::QkvMatmul,
    Stage::QPostRope,
    Stage::Attention,
    Stage::PostAttnResidual,
    Stage::FfnUp,
    Stage::FfnSwigl,
    Stage::MoeRouter,
    Stage::MoeExpertUp,
    Stage::MoeExpertSwigl,
    Stage::MoeExpertOut,
    Stage::FfnOut,
    Stage::FinalNorm,
    Stage::LmHead,
];

const fn linear(
    name: &'static str,
    damage: fn(&Linear<'_>, &mut HostTensor) -> Result<()>,
    about: &'static str,
) -> Fault {
    Fault::new(name, Family::Kernel, MATRIX, Plant::Op(OpFault::Linear(damage)), about)
}

const fn value(
    name: &'static str,
    damage: fn(&Place, &mut HostTensor) -> Result<()>,
    about: &'static str,
) -> Fault {
    Fault::new(name, Family::Kernel, ANY, Plant::Op(OpFault::Value(damage)), about)
}

const fn norm(
    name: &'static str,
    damage: fn(&Norm<'_>, &mut HostTensor) -> Result<()>,
    about: &'static str,
) -> Fault {
    Fault::new(name, Family::Kernel, NORMS, Plant::Op(OpFault::Norm(damage)), about)
}

pub(super) const FAULTS: &[Fault] = &[
    linear(
        "weight-transposed",
        transposed,
        "The weight's buffer is read with rows and columns exchanged.",
    )
    .diagnosed(&["weight-transposed"]),
    linear(
        "tail-dropped",
        tail_dropped,
        "The last inputs of each dot product are left out: 32, or 256.",
    )
    .graded()
    .diagnosed(&["tail-block-dropped"]),
    linear("head-dropped", head_dropped, "The first 32 inputs of each dot product are left out.")
        .diagnosed(&["input-block-dropped"]),
    linear("tile-edge", tile_edge, "The last 16 outputs are computed from half of the inputs.")
        // A router may have no more outputs than these.
        .diagnosed(&["weight-block-zeroed", "tail-block-dropped"]),
    linear(
        "block-zeroed",
        block_zeroed,
        "One block of 32 weights counts as zero: in one row, or in every eighth.",
    )
    .graded()
    .diagnosed(&["weight-block-zeroed"]),
    linear(
        "scale-of-neighbour",
        neighbour_scale,
        "Blocks are scaled by the scale of the block after them.",
    )
    .only(|target| has_type(target, &[DType::Q8_0, DType::Q4_K, DType::Q6_K])),
    linear(
        "nibbles-exchanged",
        nibbles_exchanged,
        "Low and high nibbles are taken for each other.",
    )
    .only(|target| has_type(target, &[DType::Q4_K])),
    linear(
        "sub-block-scale",
        sub_block_scale,
        "The upper bits of the last four sub-blocks' scales are forgotten.",
    )
    .only(|target| has_type(target, &[DType::Q4_K])),
    linear("minimum-ignored", minimum_ignored, "The minima of the blocks are not subtracted.")
        .only(|target| has_type(target, &[DType::Q4_K])),
    linear("quants-unsigned", quants_unsigned, "Signed 8-bit codes are read as unsigned.")
        .only(|target| has_type(target, &[DType::Q8_0])),
    linear("half-as-bfloat", half_as_bfloat, "Weights that were turned into f16 are read as bf16."),
    linear(
        "row-pointer-shifted",
        row_shifted,
        "Each output is computed from the weights of the next one.",
    )
    .diagnosed(&["rows-shifted"]),
    linear(
        "outputs-exchanged",
        outputs_exchanged,
        "Two neighbouring outputs are exchanged: one pair, or all.",
    )
    .graded()
    .diagnosed(&["channels-exchanged"]),
    linear(
        "input-misaligned",
        input_misaligned,
        "Activations are read from some elements too early.",
    )
    .graded()
    .diagnosed(&["input-misaligned"]),
    linear("activations-saturate", saturated, "8-bit activations saturate at half of their range."),
    linear(
        "activations-one-scale",
        one_scale,
        "Activations are rounded with one scale for a row instead of one for a block.",
    )
    .only(|target| {
        target.engine.rounds_activations() && target.weights.iter().all(|&w| w == DType::Q8_0)
    }),
    linear(
        "activations-rounded-bf16",
        rounded_bf16,
        "Activations are rounded to bf16, though the engine says otherwise.",
    )
    .only(|target| target.weights.contains(&DType::F32) || !target.engine.rounds_activations()),
    linear("strip-left-zero", strip_zero, "One thread's share of the outputs is never written.")
        .graded()
        .diagnosed(&["all-zeros"]),
    linear(
        "accumulator-stale",
        accumulator_stale,
        "Each row is added to what the accumulator still holds of the row before.",
    )
    .diagnosed(&["stale-accumulator"])
    // The row before in an expert's group is not the row before.
    .closed(|target, _| target.site.stage.of_experts() != Some(true)),
    linear("accumulator-f16", accumulator_f16, "Sums are kept in f16."),
    linear("factor", factor, "The result is off by a factor: 1.001, or 2.").graded().diagnosed(&[
        "weight-scaled",
        "expert-scaled",
        "constant-factor",
    ]),
    value("row-of-before", row_of_before, "A row is that of the token before.")
        .graded()
        .diagnosed(&["rows-of-another-token"]),
    value("row-twice", row_twice, "A row is accumulated twice: it is doubled.")
        .diagnosed(&["constant-factor"]),
    value(
        "row-race",
        row_race,
        "In one step, some channels of one row are what they were half-way.",
    )
    .graded()
    .diagnosed(&["constant-factor"]),
    value(
        "sign-flipped",
        sign_flipped,
        "The sign bit is lost: of one channel, or of every fourth.",
    )
    .graded(),
    value("channel-stuck", channel_stuck, "One channel has the value of its neighbour.")
        .diagnosed(&["channels-exchanged"]),
    value("nan", nan, "One element is NaN.").graded().diagnosed(&["nan-origin"]),
    value("infinity", infinity, "One element overflows.")
        .graded()
        .diagnosed(&["f16-overflow", "nan-origin"]),
    norm("norm-centred", centred, "The mean is subtracted first, as in LayerNorm.")
        .diagnosed(&["norm-mean-subtracted"]),
    norm(
        "norm-of-first-row",
        of_first_row,
        "Every row is divided by the root mean square of the first.",
    )
    .diagnosed(&["norm-of-first-row"]),
    norm("norm-of-sum", of_sum, "The sum of squares is not divided by the width.")
        .diagnosed(&["norm-sum-for-mean", "constant-factor"]),
    norm("norm-skipped", skipped, "The values are scaled by the weight and not normalised.")
        .diagnosed(&["norm-not-normalised"]),
    norm("norm-eps", eps, "Epsilon is another: 1e-5, or 1e-2, added.")
        .graded()
        .diagnosed(&["norm-eps"]),
    norm("norm-weight-lost", weight_lost, "The weight is taken for ones.")
        .diagnosed(&["norm-weight-missing"]),
    norm("norm-plus-one", plus_one, "One is added to the weight, as Gemma does.")
        .diagnosed(&["norm-weight-plus-one"]),
    norm("norm-half-width", half_width, "The mean is taken over the first half of the channels.")
        .diagnosed(&["norm-over-half"]),
];

fn has_type(target: &Target<'_>, types: &[DType]) -> bool {
    target.weights.iter().any(|dtype| types.contains(dtype))
}

fn transposed(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let [out, inputs] = op.dims();
    let w = op.values()?;
    let read: Vec<f32> =
        (0..out).flat_map(|o| (0..inputs).map(move |i| i * out + o)).map(|at| w[at]).collect();
    op.put_dense(y, &op.rounded()?, &read)
}

/// The product without the inputs in `dropped`.
fn without(op: &Linear<'_>, y: &mut HostTensor, dropped: Range<usize>) -> Result<()> {
    let mut x = op.rounded()?;
    let width = row_len(&x);
    x.values.chunks_exact_mut(width).for_each(|row| row[dropped.clone()].fill(0.0));
    op.put_dense(y, &x, &op.values()?)
}

fn tail_dropped(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let inputs = op.dims()[1];
    let tail = op.place.pick(32, if inputs > 256 { 256 } else { 128 });
    without(op, y, inputs - tail..inputs)
}

fn head_dropped(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    without(op, y, 0..32)
}

fn tile_edge(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let mut half = y.clone();
    without(op, &mut half, op.dims()[1] / 2..op.dims()[1])?;
    let columns = op.columns();
    let edge = columns.end - columns.len().min(16)..columns.end;
    let width = row_len(y);
    for (y, half) in y.values.chunks_exact_mut(width).zip(half.values.chunks_exact(width)) {
        y[edge.clone()].copy_from_slice(&half[edge.clone()]);
    }
    Ok(())
}

fn block_zeroed(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let [out, inputs] = op.dims();
    let mut rng = op.place.rng();
    let (row, block) = (rng.below(out), 32 * rng.below(inputs / 32));
    let hit = |o: usize| op.place.pick(o == row, o % 8 == row % 8);
    let mut w = op.values()?;
    for o in (0..out).filter(|&o| hit(o)) {
        w[o * inputs + block..][..32].fill(0.0);
    }
    // Only what is wrong is computed otherwise: the rest keeps the bits of the engine's own kernel.
    let mut wrong = y.clone();
    op.put_dense(&mut wrong, &op.rounded()?, &w)?;
    for (y, wrong) in op.rows(y).zip(op.rows(&mut wrong)) {
        (0..out).filter(|&o| hit(o)).for_each(|o| y[o] = wrong[o]);
    }
    Ok(())
}

/// The part with each of its blocks changed.
fn with_blocks(
    op: &Linear<'_>,
    y: &mut HostTensor,
    change: impl Fn(&mut [u8], usize),
) -> Result<()> {
    let stored = op.weight();
    let mut bytes = stored.bytes().to_vec();
    let size = stored.dtype().block_bytes();
    let blocks_per_row = stored.shape().cols() / stored.dtype().block_len();
    for (index, block) in bytes.chunks_exact_mut(size).enumerate() {
        change(block, index % blocks_per_row);
    }
    op.put_weight(y, &Stored::new(stored.dtype(), stored.shape().clone(), bytes.into())?)
}

fn neighbour_scale(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let stored = op.weight();
    let size = stored.dtype().block_bytes();
    let scale = match stored.dtype() {
        DType::Q6_K => size - 2..size,
        DType::Q4_K => 0..4,
        _ => 0..2,
    };
    let mut bytes = stored.bytes().to_vec();
    let count = bytes.len() / size;
    for index in 0..count {
        let next = (index + 1) % count;
        let (to, from) = (index * size, next * size);
        let neighbour = stored.bytes()[from + scale.start..from + scale.end].to_vec();
        bytes[to + scale.start..to + scale.end].copy_from_slice(&neighbour);
    }
    op.put_weight(y, &Stored::new(stored.dtype(), stored.shape().clone(), bytes.into())?)
}

fn nibbles_exchanged(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    with_blocks(op, y, |block, _| {
        block[16..].iter_mut().for_each(|byte| *byte = byte.rotate_left(4))
    })
}

fn sub_block_scale(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    with_blocks(op, y, |block, _| block[4..12].iter_mut().for_each(|byte| *byte &= 0x3f))
}

fn minimum_ignored(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    with_blocks(op, y, |block, _| block[2..4].fill(0))
}

fn quants_unsigned(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let stored = op.weight();
    let mut w = Vec::with_capacity(stored.shape().elements());
    for block in stored.bytes().chunks_exact(DType::Q8_0.block_bytes()) {
        let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
        w.extend(block[2..].iter().map(|&q| scale * f32::from(q)));
    }
    op.put_dense(y, &op.rounded()?, &w)
}

fn half_as_bfloat(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let read = |w: f32| bf16::from_bits(f16::from_f32(w).to_bits()).to_f32();
    let w: Vec<f32> = op.values()?.into_iter().map(read).collect();
    op.put_dense(y, &op.rounded()?, &w)
}

fn row_shifted(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    op.rows(y).for_each(|row| row.rotate_left(1));
    Ok(())
}

fn outputs_exchanged(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let pairs = op.dims()[0] / 2;
    let pair = op.place.rng().below(pairs);
    let hit = op.place.pick(pair..pair + 1, 0..pairs);
    op.rows(y).for_each(|row| hit.clone().for_each(|pair| row.swap(2 * pair, 2 * pair + 1)));
    Ok(())
}

fn input_misaligned(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let mut x = op.x.clone();
    let by = op.place.pick(1, 32);
    x.values.chunks_exact_mut(row_len(&op.x)).for_each(|row| row.rotate_right(by));
    op.put_input(y, &x)
}

fn saturated(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let block = op.block_len()?.max(32);
    let mut x = op.rounded()?;
    for block in x.values.chunks_mut(block) {
        let most = 0.5 * block.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        block.iter_mut().for_each(|x| *x = x.clamp(-most, most));
    }
    op.put_dense(y, &x, &op.values()?)
}

fn one_scale(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let mut x = op.x.clone();
    let width = row_len(&x);
    for row in x.values.chunks_exact_mut(width) {
        let most = row.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        row.iter_mut().for_each(|x| *x = (*x * 127.0 / most).round() * most / 127.0);
    }
    op.put_dense(y, &x, &op.values()?)
}

fn rounded_bf16(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let mut x = op.x.clone();
    x.values.iter_mut().for_each(|x| *x = bf16::from_f64(*x).to_f64());
    op.put_dense(y, &x, &op.values()?)
}

fn strip_zero(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let strip = (op.dims()[0] / op.place.pick(16, 4)).max(1);
    op.rows(y).for_each(|row| row[strip..2 * strip].fill(0.0));
    Ok(())
}

fn accumulator_stale(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let right = y.clone();
    let width = row_len(y);
    let column = op.columns();
    for row in 1..y.shape[0] {
        for column in column.clone() {
            y.values[row * width + column] += right.values[(row - 1) * width + column];
        }
    }
    Ok(())
}

fn accumulator_f16(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let blocks = op.dims()[1] / 32;
    let mut sum = HostTensor { shape: y.shape.clone(), values: vec![0.0; y.values.len()] };
    let x = op.rounded()?;
    let w = op.values()?;
    let width = row_len(&x);
    for block in 0..blocks {
        let mut part = x.clone();
        let kept = 32 * block..32 * (block + 1);
        for row in part.values.chunks_exact_mut(width) {
            let inside = |i: &usize| kept.contains(i);
            (0..width).filter(|i| !inside(i)).for_each(|i| row[i] = 0.0);
        }
        let mut product = y.clone();
        op.put_dense(&mut product, &part, &w)?;
        for (sum, product) in sum.values.iter_mut().zip(&product.values) {
            *sum = f16::from_f64(*sum + product).to_f64();
        }
    }
    for (y, sum) in op.rows(y).zip(op.rows(&mut sum)) {
        y.copy_from_slice(sum);
    }
    Ok(())
}

fn factor(op: &Linear<'_>, y: &mut HostTensor) -> Result<()> {
    let factor = op.place.pick(1.001, 2.0);
    op.rows(y).flatten().for_each(|y| *y *= factor);
    Ok(())
}

/// A row that is not the first, where there are several.
fn some_row(place: &Place, y: &HostTensor) -> Option<usize> {
    (y.shape[0] > 1).then(|| 1 + place.rng().below(y.shape[0] - 1))
}

fn row_of_before(place: &Place, y: &mut HostTensor) -> Result<()> {
    if let Some(row) = some_row(place, y) {
        let len = row_len(y);
        let rows = place.pick(row..row + 1, 1..y.shape[0]);
        let right = y.clone();
        for row in rows {
            y.values[row * len..][..len].copy_from_slice(&right.values[(row - 1) * len..][..len]);
        }
    }
    Ok(())
}

fn row_twice(place: &Place, y: &mut HostTensor) -> Result<()> {
    if let Some(row) = some_row(place, y) {
        let len = row_len(y);
        y.values[row * len..][..len].iter_mut().for_each(|y| *y *= 2.0);
    }
    Ok(())
}

fn row_race(place: &Place, y: &mut HostTensor) -> Result<()> {
    if let (0, Some(row)) = (place.step, some_row(place, y)) {
        let len = row_len(y);
        let strip = place.pick(8, 64).min(len);
        let start = place.rng().below(len - strip + 1);
        y.values[row * len + start..][..strip].iter_mut().for_each(|y| *y *= 0.5);
    }
    Ok(())
}

fn sign_flipped(place: &Place, y: &mut HostTensor) -> Result<()> {
    let len = row_len(y);
    let channel = place.rng().below(len);
    let hit = |c: usize| place.pick(c == channel, c % 4 == channel % 4);
    for row in y.values.chunks_exact_mut(len) {
        (0..len).filter(|&c| hit(c)).for_each(|c| row[c] = row[c].abs());
    }
    Ok(())
}

fn channel_stuck(place: &Place, y: &mut HostTensor) -> Result<()> {
    let len = row_len(y);
    let channel = 1 + place.rng().below(len - 1);
    y.values.chunks_exact_mut(len).for_each(|row| row[channel] = row[channel - 1]);
    Ok(())
}

fn spoil(place: &Place, y: &mut HostTensor, with: f64) {
    let len = row_len(y);
    let (row, channel) = (some_row(place, y).unwrap_or(0), place.rng().below(len));
    match place.is_subtle() {
        true if place.step > 0 => {}
        true => y.values[row * len + channel] = with,
        false => y.values.chunks_exact_mut(len).for_each(|row| row[channel] = with),
    }
}

fn nan(place: &Place, y: &mut HostTensor) -> Result<()> {
    spoil(place, y, f64::NAN);
    Ok(())
}

fn infinity(place: &Place, y: &mut HostTensor) -> Result<()> {
    spoil(place, y, f64::INFINITY);
    Ok(())
}

/// The values that are normalised together.
fn groups<'y>(op: &Norm<'_>, y: &'y mut HostTensor) -> impl Iterator<Item = &'y mut [f64]> {
    y.values.chunks_exact_mut(op.w.len())
}

/// Normalises by `rms` of the values in each group instead.
fn normalise(op: &Norm<'_>, y: &mut HostTensor, rms: impl Fn(&[f64]) -> f64) {
    for (y, x) in groups(op, y).zip(op.x.values.chunks_exact(op.w.len())) {
        let rms = rms(x);
        for ((y, x), &w) in y.iter_mut().zip(x).zip(op.w) {
            *y = x / rms * f64::from(w);
        }
    }
}

fn mean_square(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64
}

fn centred(op: &Norm<'_>, y: &mut HostTensor) -> Result<()> {
    let mut x = op.x.clone();
    for x in x.values.chunks_exact_mut(op.w.len()) {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        x.iter_mut().for_each(|x| *x -= mean);
    }
    *y = op.kernels.rms_norm(&x, op.w, op.eps)?;
    Ok(())
}

fn of_first_row(op: &Norm<'_>, y: &mut HostTensor) -> Result<()> {
    let first = select_rows(&op.x, [0]);
    let rms = (mean_square(&first.values) + op.eps).sqrt();
    normalise(op, y, |_| rms);
    Ok(())
}

fn of_sum(op: &Norm<'_>, y: &mut HostTensor) -> Result<()> {
    normalise(op, y, |x| (mean_square(x) * x.len() as f64 + op.eps).sqrt());
    Ok(())
}

fn skipped(op: &Norm<'_>, y: &mut HostTensor) -> Result<()> {
    normalise(op, y, |_| 1.0);
    Ok(())
}

fn eps(op: &Norm<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.kernels.rms_norm(&op.x, op.w, op.place.pick(op.eps + 1e-5, 1e-2))?;
    Ok(())
}

fn weight_lost(op: &Norm<'_>, y: &mut HostTensor) -> Result<()> {
    *y = op.kernels.rms_norm(&op.x, &vec![1.0; op.w.len()], op.eps)?;
    Ok(())
}

fn plus_one(op: &Norm<'_>, y: &mut HostTensor) -> Result<()> {
    let w: Vec<f32> = op.w.iter().map(|w| w + 1.0).collect();
    *y = op.kernels.rms_norm(&op.x, &w, op.eps)?;
    Ok(())
}

fn half_width(op: &Norm<'_>, y: &mut HostTensor) -> Result<()> {
    normalise(op, y, |x| (mean_square(&x[..x.len() / 2]) + op.eps).sqrt());
    Ok(())
}
