//! Weights that are not the model's: lost, exchanged, permuted or scaled on the way into the engine.
//!
//! The engine runs an altered file, and is faultless on that. The judge is given the original.

use apr_format::Draft;
use apr_model::{LayerRole, Role, Stage};
use apr_tensor::{DType, Stored};
use half::{bf16, f16};

use crate::{
    Fault, Result, Severity, Target,
    fault::{Family, FilePlace, Plant, Reach, is_llama},
    models::f32_tensor,
};

type Alter = fn(&FilePlace<'_>, &mut Draft) -> Result<()>;

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
];

const NORMS: &[Stage] =
    &[Stage::AttnNorm, Stage::FfnNorm, Stage::QNorm, Stage::KNorm, Stage::FinalNorm];

const fn file(
    name: &'static str,
    stages: &'static [Stage],
    alter: Alter,
    about: &'static str,
) -> Fault {
    Fault::new(name, Family::Weights, stages, Plant::File(alter), about)
}

pub(super) const FAULTS: &[Fault] = &[
    file(
        "q-rows-permuted",
        &[Stage::QkvMatmul],
        q_permuted,
        "The query rows are permuted for rotation by pairs, once too often.",
    )
    .diagnosed(&["qk-rows-interleaved"]),
    file("k-rows-permuted", &[Stage::QkvMatmul], k_permuted, "The same of the key rows.")
        .diagnosed(&["qk-rows-interleaved"]),
    file(
        "qk-permutation-lost",
        &[Stage::QkvMatmul],
        permutation_lost,
        "The converter forgot to permute query and key rows.",
    )
    .only(is_llama)
    .diagnosed(&["qk-rows-in-halves"]),
    file(
        "gate-up-swapped",
        &[Stage::FfnGate, Stage::MoeExpertGate],
        gate_up_swapped,
        "Gate and up projection are exchanged.",
    )
    .also(&[Stage::FfnUp, Stage::MoeExpertUp])
    .diagnosed(&["gate-up-swapped"]),
    file(
        "k-v-swapped",
        &[Stage::QkvMatmul],
        k_v_swapped,
        "Key and value projection are exchanged.",
    )
    // Where the file has rows of keys in another order than those of values, the swap is one of single channels.
    .diagnosed(&["kv-swapped", "channels-exchanged"]),
    file("tensor-of-other-layer", MATRIX, of_other_layer, "The matrix is another layer's.")
        .diagnosed(&["other-layer-weights"]),
    file(
        "layers-swapped",
        &[Stage::AttnNorm],
        layers_swapped,
        "The layer and the next one are exchanged.",
    )
    .reaching(Reach::NextLayer)
    .also(&[
        Stage::QkvMatmul,
        Stage::QkvBias,
        Stage::QNorm,
        Stage::KNorm,
        Stage::AttnOut,
        Stage::FfnNorm,
        Stage::FfnGate,
        Stage::FfnUp,
        Stage::MoeRouter,
        Stage::MoeExpertGate,
        Stage::MoeExpertUp,
        Stage::MoeExpertOut,
        Stage::FfnOut,
    ])
    .diagnosed(&["norm-weight-of-another"]),
    file("bias-lost", &[Stage::QkvBias], bias_lost, "The biases are zero.")
        .diagnosed(&["bias-missing"]),
    file(
        "bias-shifted",
        &[Stage::QkvBias],
        bias_shifted,
        "The key bias is shifted by one channel.",
    )
    .diagnosed(&["bias-shifted"]),
    file(
        "bias-of-other-layer",
        &[Stage::QkvBias],
        of_other_layer,
        "The query bias is another layer's.",
    )
    .diagnosed(&["bias-of-other-layer"]),
    file(
        "norm-weight-of-other-layer",
        &[Stage::AttnNorm, Stage::FfnNorm],
        of_other_layer,
        "The norm weight is another layer's.",
    )
    .diagnosed(&["norm-weight-of-another"]),
    file(
        "norms-swapped",
        &[Stage::AttnNorm],
        norms_swapped,
        "The norms before attention and before the feed-forward network are exchanged.",
    )
    .also(&[Stage::FfnNorm])
    .diagnosed(&["norm-weight-of-another"]),
    file(
        "norm-weight-plus-one",
        NORMS,
        norm_plus_one,
        "The converter has added one to the norm weight.",
    )
    .diagnosed(&["norm-weight-plus-one"]),
    file("norm-weight-ones", NORMS, norm_ones, "The norm weight was not found and is ones.")
        .diagnosed(&["norm-weight-missing"]),
    file("matrix-scaled", MATRIX, scaled, "The matrix is off by a factor: 0.99, or 2.")
        .graded()
        .diagnosed(&["weight-scaled", "expert-scaled", "constant-factor"])
        .closed(is_scaled_exactly),
    file("matrix-zero", MATRIX, zeroed, "The matrix was never read: it is zero.")
        .diagnosed(&["all-zeros", "expert-missing"]),
    file(
        "matrix-cut-off",
        MATRIX,
        cut_off,
        "The last rows of the matrix were never read: they are zero.",
    )
    .graded()
    // The last rows of a stack of experts are the last experts.
    .diagnosed(&["all-zeros", "expert-missing"]),
    file(
        "matrix-transposed",
        &[Stage::QkvMatmul, Stage::AttnOut],
        transposed,
        "A square matrix is stored transposed.",
    )
    .only(|target| target.weights.contains(&DType::F32))
    .diagnosed(&["weight-transposed"])
    // Llama's query rows are brought into another order after that.
    .closed(|target, _| !(is_llama(target) && target.site.stage == Stage::QkvMatmul)),
    file(
        "matrix-bytes-shifted",
        MATRIX,
        bytes_shifted,
        "The matrix is read from one block too late in the file.",
    ),
    file("matrix-rows-reversed", MATRIX, reversed, "The rows of the matrix are in reverse order."),
    file(
        "matrix-rounded-bf16",
        MATRIX,
        rounded_bf16,
        "The converter went through bf16, or through 6 bits of mantissa.",
    )
    .graded()
    .only(|target| target.weights.contains(&DType::F32)),
    file(
        "matrix-f16-overflow",
        MATRIX,
        overflow,
        "The converter went through f16 with a wrong exponent: large weights saturate.",
    )
    .only(|target| target.weights.contains(&DType::F32)),
    file(
        "heads-reordered",
        &[Stage::QkvMatmul],
        heads_reordered,
        "The query heads are in another order.",
    )
    .diagnosed(&["channels-exchanged"]),
    file(
        "embedding-row-shifted",
        &[Stage::Embedding],
        table_shifted,
        "Tokens are looked up one row too late.",
    )
    .also(&[Stage::LmHead])
    .diagnosed(&["embedding-rows-shifted"]),
    file(
        "embedding-scaled",
        &[Stage::Embedding],
        scaled,
        "The embedding is off by a factor: 0.99, or 2.",
    )
    .graded()
    .also(&[Stage::LmHead])
    .diagnosed(&["constant-factor"])
    .closed(is_scaled_exactly),
    file(
        "head-row-shifted",
        &[Stage::LmHead],
        table_shifted,
        "The head's rows are shifted by one token.",
    )
    .only(|target| !target.config.tie_word_embeddings)
    .diagnosed(&["rows-shifted"]),
    file(
        "head-tied-wrongly",
        &[Stage::LmHead],
        head_tied,
        "The embedding is taken for the head, which the file has.",
    )
    .only(|target| !target.config.tie_word_embeddings)
    .diagnosed(&["other-tensor"]),
    file(
        "types-mislabelled",
        NORMS,
        mislabelled,
        "The norm weight was written as f16 and is read as bf16.",
    ),
    file(
        "matrix-type-mislabelled",
        MATRIX,
        matrix_mislabelled,
        "The matrix was written as f16 and is read as bf16, or as Q4_K and is read as Q4_0, which is as long.",
    )
    .only(|target| matches!(target.weights[..], [DType::F32 | DType::Q4_K, ..])),
];

fn row_permuted(place: &FilePlace<'_>, draft: &mut Draft, role: LayerRole) -> Result<()> {
    let head_dim = place.config.head_dim;
    let stored = place.tensor(draft, place.of_layer(role))?;
    *stored = stored.permute_rows(|row| {
        let (head, channel) = (row / head_dim, row % head_dim);
        head * head_dim + channel / 2 + channel % 2 * (head_dim / 2)
    });
    Ok(())
}

fn q_permuted(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    row_permuted(place, draft, LayerRole::AttnQ)
}

fn k_permuted(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    row_permuted(place, draft, LayerRole::AttnK)
}

fn permutation_lost(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let head_dim = place.config.head_dim;
    for role in [LayerRole::AttnQ, LayerRole::AttnK] {
        let stored = place.tensor(draft, place.of_layer(role))?;
        // Pairs are stored as neighbours; the order before that had them half a head apart.
        *stored = stored.permute_rows(|row| {
            let (head, channel) = (row / head_dim, row % head_dim);
            head * head_dim + 2 * (channel % (head_dim / 2)) + channel / (head_dim / 2)
        });
    }
    Ok(())
}

fn gate_up_swapped(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let roles = match place.site.stage {
        Stage::MoeExpertGate => [LayerRole::FfnGateExps, LayerRole::FfnUpExps],
        _ => [LayerRole::FfnGate, LayerRole::FfnUp],
    };
    let [gate, up] = roles.map(|role| place.of_layer(role));
    place.swap(draft, gate, up)
}

fn k_v_swapped(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let [k, v] = [LayerRole::AttnK, LayerRole::AttnV].map(|role| place.of_layer(role));
    place.swap(draft, k, v)
}

fn norms_swapped(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let [first, second] =
        [LayerRole::AttnNorm, LayerRole::FfnNorm].map(|role| place.of_layer(role));
    place.swap(draft, first, second)
}

fn of_other_layer(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let operands = place.operands.at(place.site);
    let (role, _) = operands[place.rng().below(operands.len())];
    let Role::Layer(_, of_layer) = role else { return Ok(()) };
    let other = place.tensor(draft, Role::Layer(place.next_layer(), of_layer))?.clone();
    *place.tensor(draft, role)? = other;
    Ok(())
}

fn layers_swapped(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let prefix = |layer: usize| format!("blk.{layer}.");
    let (a, b) = (prefix(place.layer()), prefix(place.next_layer()));
    for (name, _) in &mut draft.tensors {
        *name = match (name.strip_prefix(&a), name.strip_prefix(&b)) {
            (Some(rest), _) => format!("{b}{rest}"),
            (_, Some(rest)) => format!("{a}{rest}"),
            _ => continue,
        };
    }
    Ok(())
}

/// Changes the numbers of an F32 tensor.
fn with_values(stored: &mut Stored, change: impl FnOnce(&mut Vec<f32>)) -> Result<()> {
    let mut values = stored.to_f32()?;
    change(&mut values);
    *stored = f32_tensor(stored.shape().dims(), &values)?;
    Ok(())
}

fn bias_lost(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    for role in [LayerRole::AttnQBias, LayerRole::AttnKBias, LayerRole::AttnVBias] {
        with_values(place.tensor(draft, place.of_layer(role))?, |bias| bias.fill(0.0))?;
    }
    Ok(())
}

fn bias_shifted(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let stored = place.tensor(draft, place.of_layer(LayerRole::AttnKBias))?;
    with_values(stored, |bias| bias.rotate_right(1))
}

fn norm_plus_one(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let add = |w: &mut Vec<f32>| w.iter_mut().for_each(|w| *w += 1.0);
    with_values(place.tensor(draft, place.role())?, add)
}

fn norm_ones(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    with_values(place.tensor(draft, place.role())?, |w| w.fill(1.0))
}

fn mislabelled(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let read = |w: f32| bf16::from_bits(f16::from_f32(w).to_bits()).to_f32();
    let change = |w: &mut Vec<f32>| w.iter_mut().for_each(|w| *w = read(*w));
    with_values(place.tensor(draft, place.role())?, change)
}

fn matrix_mislabelled(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let stored = place.tensor(draft, place.role())?;
    if stored.dtype() != DType::Q4_K {
        return mislabelled(place, draft);
    }
    *stored = Stored::new(DType::Q4_0, stored.shape().clone(), stored.bytes().clone())?;
    Ok(())
}

/// Multiplies a tensor by `factor`, through the scales of its blocks.
pub(super) fn scale(stored: &mut Stored, factor: f32) -> Result<()> {
    let scales: &[usize] = match stored.dtype() {
        DType::Q8_0 => &[0],
        DType::Q4_K => &[0, 2],
        DType::Q6_K => &[208],
        _ => return with_values(stored, |w| w.iter_mut().for_each(|w| *w *= factor)),
    };
    let mut bytes = stored.bytes().to_vec();
    for block in bytes.chunks_exact_mut(stored.dtype().block_bytes()) {
        for &at in scales {
            let d = f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
            block[at..at + 2].copy_from_slice(&f16::from_f32(d * factor).to_le_bytes());
        }
    }
    *stored = Stored::new(stored.dtype(), stored.shape().clone(), bytes.into())?;
    Ok(())
}

/// Whether one factor says it all: scales of blocks are rounded once more, each by itself, unless they are doubled.
pub(super) fn is_scaled_exactly(target: &Target<'_>, severity: Severity) -> bool {
    severity == Severity::Gross || target.weights.iter().all(|&dtype| dtype == DType::F32)
}

fn scaled(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let factor = match place.severity {
        Severity::Subtle => 0.99,
        Severity::Gross => 2.0,
    };
    scale(place.tensor(draft, place.role())?, factor)
}

pub(super) fn with_bytes(stored: &mut Stored, change: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
    let mut bytes = stored.bytes().to_vec();
    change(&mut bytes);
    *stored = Stored::new(stored.dtype(), stored.shape().clone(), bytes.into())?;
    Ok(())
}

fn zeroed(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    with_bytes(place.tensor(draft, place.role())?, |bytes| bytes.fill(0))
}

fn cut_off(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let eighths = if place.severity == Severity::Subtle { 7 } else { 4 };
    let stored = place.tensor(draft, place.role())?;
    let rows = stored.shape().rows();
    let row = stored.bytes().len() / rows;
    with_bytes(stored, |bytes| bytes[rows * eighths / 8 * row..].fill(0))
}

fn bytes_shifted(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let stored = place.tensor(draft, place.role())?;
    let block = stored.dtype().block_bytes();
    with_bytes(stored, |bytes| bytes.rotate_left(block))
}

fn reversed(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let stored = place.tensor(draft, place.role())?;
    let rows = stored.shape().rows();
    *stored = stored.permute_rows(|row| rows - 1 - row);
    Ok(())
}

fn transposed(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    transpose(place.tensor(draft, place.role())?)
}

/// Stores a matrix column by column.
pub(super) fn transpose(stored: &mut Stored) -> Result<()> {
    let [rows, cols] = stored.shape().dims()[..] else { return Ok(()) };
    let w = stored.to_f32()?;
    let index = (0..rows * cols).map(|i| i % cols * rows + i / cols);
    let read: Vec<f32> = index.map(|i| w[i]).collect();
    *stored = f32_tensor(&[rows, cols], &read)?;
    Ok(())
}

fn rounded_bf16(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    // Six bits of mantissa: bf16 has seven.
    let coarse = |w: f32| f32::from_bits(w.to_bits() & 0xfffe_0000);
    let round = match place.severity {
        Severity::Subtle => |w: f32| bf16::from_f32(w).to_f32(),
        Severity::Gross => coarse,
    };
    let change = |w: &mut Vec<f32>| w.iter_mut().for_each(|w| *w = round(*w));
    with_values(place.tensor(draft, place.role())?, change)
}

fn overflow(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    with_values(place.tensor(draft, place.role())?, |w| {
        let mut sizes: Vec<f32> = w.iter().map(|w| w.abs()).collect();
        sizes.sort_by(f32::total_cmp);
        let most = sizes[sizes.len() * 99 / 100];
        w.iter_mut().for_each(|w| *w = w.clamp(-most, most));
    })
}

fn heads_reordered(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let (heads, head_dim) = (place.config.num_attention_heads, place.config.head_dim);
    let stored = place.tensor(draft, place.of_layer(LayerRole::AttnQ))?;
    *stored = stored.permute_rows(|row| (row + head_dim) % (heads * head_dim));
    Ok(())
}

fn table_shifted(place: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    let stored = place.tensor(draft, place.role())?;
    let rows = stored.shape().rows();
    *stored = stored.permute_rows(|row| (row + 1) % rows);
    Ok(())
}

fn head_tied(_: &FilePlace<'_>, draft: &mut Draft) -> Result<()> {
    draft.remove_tensor(&Role::Output.gguf_name());
    Ok(())
}
