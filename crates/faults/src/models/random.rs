//! Random models as outrageous as real ones.
//!
//! Trained decoders have a few channels of the residual stream hundreds of times larger than the others, and norm
//! weights that undo it. That is what makes tolerances that work on random weights fail on real ones, so our
//! random weights have it too: the first down projection writes a huge channel, and the norms after it damp that
//! channel and lift the others.

use apr_format::{Draft, Map};
use apr_model::{Architecture, LayerRole, Llama3Scaling, Role, RopeFrequencies};
use apr_tensor::{DType, Shape, Stored};
use half::f16;

use super::{Format, f32_tensor, q8_0};
use crate::{Result, rng::Rng};

const LAYERS: usize = 4;
const HIDDEN: usize = 256;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const FFN: usize = 512;
/// More than ten: names of experts do not sort as their numbers do.
const EXPERTS: usize = 12;
const EXPERTS_PER_TOK: usize = 3;
const MOE_FFN: usize = 256;
const VOCAB: usize = 512;
const PROMPT: usize = 26;

/// The channel of the residual stream that is huge, and how many times.
const MASSIVE: usize = 100;
const TIMES: f32 = 300.0;
/// How many times norms lift the others after it.
const LIFT: f32 = 12.0;

/// The model, and tokens for it.
pub(super) fn model(
    architecture: Architecture,
    format: Format,
    seed: u64,
) -> Result<(Draft, Vec<u32>)> {
    let mut rng = Rng::new(crate::rng::seed_of(seed, architecture.name()));
    let mut draft = Draft { metadata: metadata(architecture, format), tensors: Vec::new() };
    let mut push = |role: Role, stored: Stored| draft.tensors.push((role.gguf_name(), stored));

    // As in their own small models: Qwen3 ties the head. The others here do not.
    let tied = architecture == Architecture::Qwen3;
    let high = if format == Format::Q4_K_M { DType::Q6_K } else { dtype(format) };
    let table = if tied { high } else { dtype(format) };
    // A tied table is the head as well, whose logits should not be too sure of themselves.
    push(
        Role::TokenEmbd,
        matrix(&mut rng, table, VOCAB, HIDDEN, if tied { 0.1 } else { 1.0 }, |_| 1.0)?,
    );
    for layer in 0..LAYERS {
        use LayerRole::*;
        let mut push = |role, stored| push(Role::Layer(layer, role), stored);
        // Half of the layers have these two in more bits, as llama.cpp's recipe does.
        let high = if layer % 2 == 0 { high } else { dtype(format) };
        let low = dtype(format);
        let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        let into = |cols: usize| 1.0 / (cols as f32).sqrt();
        let one = |_: usize| 1.0;
        let massive = |row: usize| if layer == 0 && row == MASSIVE { TIMES } else { 1.0 };
        push(AttnNorm, norm(&mut rng, layer > 0)?);
        push(AttnQ, matrix(&mut rng, low, q, HIDDEN, into(HIDDEN), one)?);
        push(AttnK, matrix(&mut rng, low, kv, HIDDEN, into(HIDDEN), one)?);
        push(AttnV, matrix(&mut rng, high, kv, HIDDEN, into(HIDDEN), one)?);
        if architecture == Architecture::Qwen2 {
            // Qwen2's key biases are large.
            for (role, width, size) in
                [(AttnQBias, q, 0.5), (AttnKBias, kv, 3.0), (AttnVBias, kv, 0.1)]
            {
                let values: Vec<f32> = (0..width).map(|_| size * rng.normal()).collect();
                push(role, f32_tensor(&[width], &values)?);
            }
        }
        if architecture.has_qk_norm() {
            for role in [AttnQNorm, AttnKNorm] {
                let values: Vec<f32> = (0..HEAD_DIM).map(|_| 0.5 + 1.5 * rng.uniform()).collect();
                push(role, f32_tensor(&[HEAD_DIM], &values)?);
            }
        }
        push(AttnOutput, matrix(&mut rng, low, HIDDEN, q, into(q), one)?);
        push(FfnNorm, norm(&mut rng, layer > 0)?);
        if architecture == Architecture::Qwen3Moe {
            let mut experts =
                |role, dtype, rows: usize, cols, std, row_scale: &dyn Fn(usize) -> f32| {
                    let scale = |row: usize| row_scale(row % rows);
                    let all = matrix(&mut rng, dtype, EXPERTS * rows, cols, std, scale)?;
                    push(role, all.with_shape([EXPERTS, rows, cols])?);
                    Ok::<(), crate::Error>(())
                };
            experts(FfnGateExps, low, MOE_FFN, HIDDEN, 1.5 * into(HIDDEN), &one)?;
            experts(FfnUpExps, low, MOE_FFN, HIDDEN, into(HIDDEN), &one)?;
            experts(FfnDownExps, high, HIDDEN, MOE_FFN, 2.0 * into(MOE_FFN), &massive)?;
            // Logits of about 1: the lifted norms would leave one expert all the weight.
            let std = into(HIDDEN) / if layer > 0 { LIFT } else { 1.0 };
            push(FfnGateInp, matrix(&mut rng, DType::F32, EXPERTS, HIDDEN, std, one)?);
            continue;
        }
        push(FfnGate, matrix(&mut rng, low, FFN, HIDDEN, 1.5 * into(HIDDEN), one)?);
        push(FfnUp, matrix(&mut rng, low, FFN, HIDDEN, into(HIDDEN), one)?);
        push(FfnDown, matrix(&mut rng, high, HIDDEN, FFN, into(FFN), massive)?);
    }
    push(Role::OutputNorm, norm(&mut rng, true)?);
    if !tied {
        push(Role::Output, matrix(&mut rng, high, VOCAB, HIDDEN, 0.04, |_| 1.0)?);
    }
    if architecture == Architecture::Llama {
        push(Role::RopeFreqs, f32_tensor(&[HEAD_DIM / 2], &llama3_factors())?);
    }
    let prompt = (0..PROMPT).map(|_| rng.below(VOCAB) as u32).collect();
    Ok((draft, prompt))
}

fn metadata(architecture: Architecture, format: Format) -> Map {
    let mut map = Map::default();
    let key = |suffix: &str| format!("{}.{suffix}", architecture.gguf_name());
    map.insert("general.architecture", architecture.gguf_name());
    map.insert("general.name", "random");
    let mut set = |suffix: &str, n: usize| {
        map.insert(key(suffix), n as u64);
    };
    set("block_count", LAYERS);
    set("context_length", 256);
    set("embedding_length", HIDDEN);
    set("feed_forward_length", FFN);
    set("attention.head_count", HEADS);
    set("attention.head_count_kv", KV_HEADS);
    set("attention.key_length", HEAD_DIM);
    set("attention.value_length", HEAD_DIM);
    set("rope.dimension_count", HEAD_DIM);
    if architecture == Architecture::Qwen3Moe {
        set("expert_count", EXPERTS);
        set("expert_used_count", EXPERTS_PER_TOK);
        set("expert_feed_forward_length", MOE_FFN);
        // Most models divide the weights of the chosen experts by their sum, some do not.
        map.insert(key("expert_weights_norm"), format != Format::Q8_0);
    }
    let (theta, eps) = match architecture {
        Architecture::Llama => (500_000.0f32, 1e-5f32),
        _ => (1_000_000.0, 1e-6),
    };
    map.insert(key("rope.freq_base"), theta);
    map.insert(key("attention.layer_norm_rms_epsilon"), eps);
    map
}

/// The divisors of Llama 3.1's frequencies, for an old context so short that a test prompt feels them.
fn llama3_factors() -> Vec<f32> {
    let plain = RopeFrequencies::new(500_000.0, HEAD_DIM);
    let scaled = plain.clone().llama3(&Llama3Scaling {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64.0,
    });
    plain.as_slice().iter().zip(scaled.as_slice()).map(|(p, s)| (p / s) as f32).collect()
}

/// A norm weight; after the huge channel has appeared it damps that one and lifts the others.
fn norm(rng: &mut Rng, after: bool) -> Result<Stored> {
    let lift = if after { LIFT } else { 1.0 };
    let weight = |channel: usize, rng: &mut Rng| match after && channel == MASSIVE {
        true => 0.05,
        false => lift * (0.3 + 1.2 * rng.uniform()),
    };
    let values: Vec<f32> = (0..HIDDEN).map(|channel| weight(channel, rng)).collect();
    Ok(f32_tensor(&[HIDDEN], &values)?)
}

fn dtype(format: Format) -> DType {
    match format {
        Format::F32 => DType::F32,
        Format::Q8_0 => DType::Q8_0,
        Format::Q4_K_M => DType::Q4_K,
    }
}

/// A matrix of numbers of standard deviation `std`, row `r` times `row_scale(r)`.
fn matrix(
    rng: &mut Rng,
    dtype: DType,
    rows: usize,
    cols: usize,
    std: f32,
    row_scale: impl Fn(usize) -> f32,
) -> Result<Stored> {
    let dims = [rows, cols];
    let stds = (0..rows).map(|row| std * row_scale(row));
    if matches!(dtype, DType::F32 | DType::Q8_0) {
        let values: Vec<f32> = stds
            .flat_map(|std| (0..cols).map(|_| std * rng.normal()).collect::<Vec<_>>())
            .collect();
        return Ok(if dtype == DType::F32 {
            f32_tensor(&dims, &values)?
        } else {
            q8_0(&dims, &values)?
        });
    }
    let block = if dtype == DType::Q4_K { q4_k } else { q6_k };
    let mut bytes = Vec::new();
    for std in stds {
        (0..cols / dtype.block_len()).for_each(|_| block(rng, std, &mut bytes));
    }
    Ok(Stored::new(dtype, Shape::new(dims), bytes.into())?)
}

/// A random valid block of Q4_K whose weights have about this standard deviation, and mean 0.
fn q4_k(rng: &mut Rng, std: f32, bytes: &mut Vec<u8>) {
    // Four bits, evenly: standard deviation 4.6; scales of 42 on average.
    let d = std / (4.6 * 42.0) * spread(rng);
    bytes.extend(f16::from_f32(d).to_le_bytes());
    bytes.extend(f16::from_f32(7.5 * d).to_le_bytes());
    let pairs: [(u8, u8); 8] = std::array::from_fn(|_| {
        let scale = 21 + rng.below(43) as u8;
        (scale, (scale + 2).saturating_sub(rng.below(5) as u8).min(63))
    });
    let mut packed = [0u8; 12];
    for i in 0..4 {
        let ((scale, min), (scale_high, min_high)) = (pairs[i], pairs[i + 4]);
        packed[i] = scale | scale_high >> 4 << 6;
        packed[i + 4] = min | min_high >> 4 << 6;
        packed[i + 8] = scale_high & 0xf | (min_high & 0xf) << 4;
    }
    bytes.extend(packed);
    bytes.extend((0..128).map(|_| rng.next_u64() as u8));
}

/// No block has the scale of its neighbour.
fn spread(rng: &mut Rng) -> f32 {
    0.6 + 0.8 * rng.uniform()
}

/// A random valid block of Q6_K whose weights have about this standard deviation, and mean near 0.
fn q6_k(rng: &mut Rng, std: f32, bytes: &mut Vec<u8>) {
    bytes.extend((0..192).map(|_| rng.next_u64() as u8));
    bytes.extend((0..16).map(|_| {
        let size = 20 + rng.below(60) as i8;
        (if rng.next_u64() & 1 == 0 { size } else { -size }) as u8
    }));
    // Six bits, evenly: standard deviation 18.5; scales of 50 on average.
    bytes.extend(f16::from_f32(std / (18.5 * 50.0) * spread(rng)).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use apr_tensor::block::scale_min;

    use super::*;

    #[test]
    fn matrices_have_about_the_spread_asked_for_in_every_type() {
        for dtype in [DType::F32, DType::Q8_0, DType::Q4_K, DType::Q6_K] {
            let mut rng = Rng::new(1);
            let massive = |row| if row == 3 { 300.0 } else { 1.0 };
            let stored = matrix(&mut rng, dtype, 16, 256, 0.06, massive).unwrap();
            let values = stored.to_f32().unwrap();
            let std = |row: usize| {
                let row = &values[row * 256..][..256];
                (row.iter().map(|x| x * x).sum::<f32>() / 256.0).sqrt()
            };
            assert!((0.045..0.08).contains(&std(0)), "{dtype}: {}", std(0));
            assert!((200.0..400.0).contains(&(std(3) / std(0))), "{dtype}");
        }
    }

    #[test]
    fn blocks_of_q4_k_hold_the_scales_that_were_packed() {
        let mut bytes = Vec::new();
        q4_k(&mut Rng::new(7), 1.0, &mut bytes);
        assert_eq!(bytes.len(), DType::Q4_K.block_bytes());
        let packed: &[u8; 12] = bytes[4..16].first_chunk().unwrap();
        for i in 0..8 {
            let (scale, min) = scale_min(packed, i);
            assert!((21..64).contains(&scale) && scale.abs_diff(min) <= 2, "{i}: {scale} {min}");
        }
    }

    #[test]
    fn the_scaling_of_llama_3_is_felt_within_a_test_prompt() {
        let factors = llama3_factors();
        assert_eq!((factors[0], factors[31]), (1.0, 8.0));
        assert!(factors.iter().filter(|&&f| f > 1.0).count() > 16);
    }
}
