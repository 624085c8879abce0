//! What was written, opened again and compared with what it was made from.
//!
//! Weights are made from the source a second time and must be the same, byte by byte: no bit of them depends on threads or
//! on the size of pieces. Metadata must read as it was written, and the whole must run with the config of the source.

use std::{fs, path::Path};

use apr_format::Checkpoint;
use apr_model::{Config, MoeConfig, RopeFrequencies, runnable_config};
use apr_tensor::Stored;
use serde_json::Value;

use crate::{Error, Plan, Planned, Result, Target, output::io_error, rope, stream::stream};

/// Compares the model at `path` with the sources of `plan`. `progress` is told of bytes of the source as they are done.
pub fn verify(plan: &Plan, path: &Path, progress: &mut dyn FnMut(u64)) -> Result<()> {
    let written = Checkpoint::open(path)?;
    let (found, expected) = (written.tensors().len(), plan.tensors.len());
    if found != expected {
        return Err(failed("tensors", format!("{found} of them instead of {expected}")));
    }
    for tensor in &plan.tensors {
        let stored = written.tensor(&tensor.name);
        let stored = stored.ok_or_else(|| failed_at(tensor, "it is not there"))?;
        compare(plan, tensor, stored, progress)?;
    }
    for checksum in written.checksums() {
        // Reading everything again must not keep everything in memory.
        let computed =
            checksum.compute(|_| written.files().iter().for_each(|file| file.bytes().release()));
        if computed != checksum.stated {
            let why = format!("{:#010x}, but it should be {computed:#010x}", checksum.stated);
            return Err(failed(&format!("checksum of {}", checksum.what), why));
        }
    }
    if plan.target == Target::Safetensors && !path.is_dir() {
        // A bare file of weights says nothing else.
        return Ok(());
    }
    match plan.target {
        Target::Gguf | Target::Apr => compare_keys(plan, &written)?,
        Target::Safetensors => compare_files(plan, path)?,
    }
    let found = runnable_config(&written)?;
    let mut expected = plan.config.clone();
    if plan.target == Target::Safetensors {
        // What cannot be said in numbers is a loss that somebody has consented to.
        expected.rope_scaling = rope::in_numbers(&expected).0;
    }
    match differing(&expected, &found) {
        Some(key) => Err(failed(&format!("config key `{key}`"), "it is another in the source")),
        None if !same_frequencies(&expected.rope_frequencies(), &found.rope_frequencies()) => {
            Err(failed("rotary frequencies", "they are others in the source"))
        }
        None => Ok(()),
    }
}

/// `written` must be what `tensor` is made as.
fn compare(
    plan: &Plan,
    tensor: &Planned,
    written: &Stored,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    if (written.dtype(), written.shape()) != (tensor.dtype, &tensor.shape) {
        return Err(failed_at(tensor, "its type or shape is another"));
    }
    let mut rest = &written.bytes()[..];
    stream(tensor, plan.importance.as_ref(), &mut |piece, of_source| {
        let found = rest.split_off(..piece.len());
        if found != Some(piece) {
            return Err(failed_at(tensor, "its bytes are not those that the source makes"));
        }
        written.bytes().release();
        progress(of_source);
        Ok(())
    })?;
    Ok(())
}

/// The keys of `written` must be those of `plan`, as far as JSON tells values apart: `.apr` has no finer types.
fn compare_keys(plan: &Plan, written: &Checkpoint) -> Result<()> {
    let differs = |(key, planned): &(&str, _)| {
        written.metadata().get(key).map(Value::from) != Some(Value::from(*planned))
    };
    plan.metadata.map.iter().find(differs).map_or(Ok(()), |(key, _)| {
        Err(failed(&format!("key `{key}`"), "it does not read as it was written"))
    })
}

/// The files beside the weights must be those of `plan`.
fn compare_files(plan: &Plan, directory: &Path) -> Result<()> {
    for (name, content) in &plan.metadata.files {
        let path = directory.join(name);
        if fs::read(&path).map_err(io_error(&path))? != *content {
            return Err(failed(name, "it does not read as it was written"));
        }
    }
    Ok(())
}

fn failed(what: &str, why: impl Into<String>) -> Error {
    Error::Verification { what: what.to_owned(), why: why.into() }
}

fn failed_at(tensor: &Planned, why: &str) -> Error {
    failed(&format!("tensor `{}`", tensor.name), why)
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
