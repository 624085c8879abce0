//! What was written, opened again and compared with what it was made from.
//!
//! Bytes that were only moved must be the same. Numbers that were rounded must be near: an error beyond half a step, in the
//! root mean square over a tensor, is no rounding. The config must be the same on both sides.

use std::path::Path;

use apr_format::Checkpoint;
use apr_model::{Config, MoeConfig, RopeFrequencies, read_config};
use apr_tensor::{DType, Stored};
use rayon::prelude::*;

use crate::{
    Error, Plan, Planned, Result, Target, rope,
    stream::{MOVED, RECODED},
};

/// Compares the model at `path` with the sources of `plan`.
pub(crate) fn verify(plan: &Plan, path: &Path, progress: &mut dyn FnMut(u64)) -> Result<()> {
    let written = Checkpoint::open(path)?;
    let failed = |what: String, why: &str| Error::Verification { what, why: why.to_owned() };
    if written.tensors().len() != plan.tensors.len() {
        let (found, expected) = (written.tensors().len(), plan.tensors.len());
        return Err(failed(
            "tensors".to_owned(),
            &format!("{found} of them instead of {expected}"),
        ));
    }
    for tensor in &plan.tensors {
        let failed = |why: &str| failed(format!("tensor `{}`", tensor.name), why);
        let stored = written.require(&tensor.name)?;
        if (stored.dtype(), stored.shape()) != (tensor.dtype, &tensor.shape) {
            return Err(failed("its type or shape is another"));
        }
        compare(tensor, stored, progress)?.map_or(Ok(()), |why| Err(failed(&why)))?;
    }
    for checksum in written.checksums() {
        // Reading everything again must not keep everything in memory.
        let computed =
            checksum.compute(|_| written.files().iter().for_each(|file| file.bytes().release()));
        if computed != checksum.stated {
            let why = format!("{:#010x}, but it should be {computed:#010x}", checksum.stated);
            return Err(failed(format!("checksum of {}", checksum.what), &why));
        }
    }
    if plan.target == Target::Safetensors && !path.is_dir() {
        // A bare file of weights has no config.
        return Ok(());
    }
    let found = read_config(&written)?;
    let frequencies = rope::frequencies(&written, &found)?;
    match differing(&plan.config, &found) {
        Some(key) => Err(failed(format!("config key `{key}`"), "it is another in the source")),
        None if !same_frequencies(&plan.frequencies, &frequencies) => {
            Err(failed("rotary frequencies".to_owned(), "they are others in the source"))
        }
        None => Ok(()),
    }
}

/// What is wrong with `stored`, which was made as `tensor` was planned.
fn compare(
    tensor: &Planned,
    stored: &Stored,
    progress: &mut dyn FnMut(u64),
) -> Result<Option<String>> {
    let mut rows_before = 0;
    for index in 0..tensor.parts.len() {
        let part = tensor.part(index)?;
        let rows = part.shape().rows();
        let counterpart = stored.slice_rows(rows_before..rows_before + rows);
        let why = match part.dtype() == tensor.dtype {
            true => (!same_bytes(&part, &counterpart))
                .then(|| "its bytes are not those of the source".to_owned()),
            false => rounded_away(&part, &counterpart)?,
        };
        if why.is_some() {
            return Ok(why);
        }
        rows_before += rows;
        progress(part.bytes().len() as u64);
    }
    Ok(None)
}

fn same_bytes(part: &Stored, written: &Stored) -> bool {
    let mut pieces = part.bytes().chunks(MOVED).zip(written.bytes().chunks(MOVED));
    part.bytes().len() == written.bytes().len()
        && pieces.all(|(expected, found)| {
            let same = expected == found;
            [part, written].iter().for_each(|stored| stored.bytes().release());
            same
        })
}

/// What is wrong with `written`, which holds the numbers of `part` in another type.
fn rounded_away(part: &Stored, written: &Stored) -> Result<Option<String>> {
    let (rows, cols) = (part.shape().rows(), part.shape().cols());
    let exact = written.dtype() == DType::F32;
    let of_row = |row: usize, [expected, found, steps]: &mut [Vec<f32>; 3]| {
        part.dequantize_row(row, expected)?;
        written.dequantize_row(row, found)?;
        if exact {
            let differs = |(x, y): &(&f32, &f32)| x.to_bits() != y.to_bits();
            return Ok([expected.iter().zip(&*found).filter(differs).count() as f64, 0.0]);
        }
        written.row_steps(row, steps)?;
        let errors = expected.iter().zip(&*found).map(|(x, y)| square(x - y));
        Ok([errors.sum(), steps.iter().map(|&step| square(step / 2.0)).sum()])
    };
    let at_once = (RECODED / cols.max(1)).max(1);
    let [mut noise, mut bound] = [0.0; 2];
    for first in (0..rows).step_by(at_once) {
        let sums: Vec<[f64; 2]> = (first..rows.min(first + at_once))
            .into_par_iter()
            .map_init(|| [(); 3].map(|()| vec![0.0; cols]), |values, row| of_row(row, values))
            .collect::<apr_tensor::Result<_>>()?;
        for [of_errors, of_steps] in sums {
            noise += of_errors;
            bound += of_steps;
        }
        [part, written].iter().for_each(|stored| stored.bytes().release());
    }
    let count = (part.shape().elements() as f64).max(1.0);
    Ok(if exact && noise > 0.0 {
        Some(format!("{noise} of its numbers are not those of the source"))
    } else if noise <= bound {
        None
    } else {
        // Or a NaN: it is within no bound.
        let [noise, bound] = [noise, bound].map(|sum| (sum / count).sqrt());
        Some(format!("its numbers are off by {noise:.2e}, but rounding accounts for {bound:.2e}"))
    })
}

fn square(x: f32) -> f64 {
    f64::from(x) * f64::from(x)
}

/// The first key in which two configs differ by more than the rounding of a container; how frequencies are scaled is not
/// looked at, for it can be said in several ways.
pub(crate) fn differing(expected: &Config, found: &Config) -> Option<&'static str> {
    // All of them: a new key has to be compared as well.
    let Config {
        architecture,
        num_hidden_layers,
        hidden_size,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        intermediate_size,
        vocab_size,
        max_position_embeddings,
        rms_norm_eps,
        rope_theta,
        rope_scaling: _,
        rotary_dim,
        attention_bias,
        qk_norm,
        tie_word_embeddings,
        moe,
    } = expected;
    let layers = 0..*num_hidden_layers;
    let has_dense_layers = layers.clone().any(|layer| expected.experts_of(layer).is_none());
    let same = |x: f64, y: f64| x as f32 == y as f32;
    let keys = [
        ("architecture", *architecture == found.architecture),
        ("num_hidden_layers", *num_hidden_layers == found.num_hidden_layers),
        ("hidden_size", *hidden_size == found.hidden_size),
        ("num_attention_heads", *num_attention_heads == found.num_attention_heads),
        ("num_key_value_heads", *num_key_value_heads == found.num_key_value_heads),
        ("head_dim", *head_dim == found.head_dim),
        ("intermediate_size", !has_dense_layers || *intermediate_size == found.intermediate_size),
        ("vocab_size", *vocab_size == found.vocab_size),
        ("max_position_embeddings", *max_position_embeddings == found.max_position_embeddings),
        ("rms_norm_eps", same(*rms_norm_eps, found.rms_norm_eps)),
        ("rope_theta", same(*rope_theta, found.rope_theta)),
        ("rotary_dim", *rotary_dim == found.rotary_dim),
        ("attention_bias", *attention_bias == found.attention_bias),
        ("qk_norm", *qk_norm == found.qk_norm),
        ("tie_word_embeddings", *tie_word_embeddings == found.tie_word_embeddings),
        ("num_experts", moe.as_ref().map(of_experts) == found.moe.as_ref().map(of_experts)),
        (
            "decoder_sparse_step",
            layers.into_iter().all(|layer| {
                expected.experts_of(layer).is_some() == found.experts_of(layer).is_some()
            }),
        ),
    ];
    keys.into_iter().find(|(_, same)| !same).map(|(key, _)| key)
}

/// What holds of all layers with experts; which these are can be said in several ways.
fn of_experts(moe: &MoeConfig) -> (usize, usize, usize, bool) {
    let MoeConfig {
        num_experts,
        num_experts_per_tok,
        moe_intermediate_size,
        norm_topk_prob,
        decoder_sparse_step: _,
        mlp_only_layers: _,
    } = moe;
    (*num_experts, *num_experts_per_tok, *moe_intermediate_size, *norm_topk_prob)
}

/// Whether frequencies differ by no more than what GGUF's factors are rounded to, and llama.cpp's arithmetic for them is
/// off by: some units of the last place of an f32.
pub(crate) fn same_frequencies(expected: &RopeFrequencies, found: &RopeFrequencies) -> bool {
    let (expected, found) = (expected.as_slice(), found.as_slice());
    let near = |(x, y): (&f64, &f64)| (x - y).abs() <= 8.0 * f64::from(f32::EPSILON) * x.abs();
    expected.len() == found.len() && expected.iter().zip(found).all(near)
}
