//! `apr inspect`: what a model file holds.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::Result;
use apr_format::Checkpoint;
use apr_model::read_config;
use apr_report::inspect::{Inspection, TensorInspection, TensorLine, TypeShare};
use apr_tensor::{Stored, Summary};

use crate::{
    engine,
    output::{self, Exit},
};

/// Elements of a metadata array that are shown.
const ARRAY_SHOWN: usize = 8;
/// Elements of a tensor that are shown.
const FIRST_SHOWN: usize = 8;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A .gguf, .safetensors or .apr file, or a Hugging Face directory.
    model: PathBuf,
    /// Statistics of one tensor.
    #[arg(long, value_name = "NAME")]
    tensor: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Result<Exit> {
    let checkpoint = engine::open(&args.model)?;
    match &args.tensor {
        Some(name) => {
            let report = inspect_tensor(&checkpoint, name)?;
            if args.json { output::print_json(&report)? } else { output::print(&report.text())? }
        }
        None => {
            let report = inspect(&checkpoint);
            if args.json { output::print_json(&report)? } else { output::print(&report.text())? }
        }
    }
    Ok(Exit::Success)
}

fn inspect(checkpoint: &Checkpoint) -> Inspection {
    let config = read_config(checkpoint);
    let mut types: BTreeMap<&str, TypeShare> = BTreeMap::new();
    let mut tensors = Vec::new();
    let (mut parameters, mut tensor_bytes) = (0, 0);
    for (name, stored) in checkpoint.tensors() {
        let (dtype, elements) = (stored.dtype().name(), stored.shape().elements() as u64);
        let size = stored.bytes().len() as u64;
        let share = types.entry(dtype).or_insert_with(|| TypeShare {
            dtype: dtype.to_owned(),
            tensors: 0,
            bytes: 0,
            parameters: 0,
        });
        share.tensors += 1;
        share.bytes += size;
        share.parameters += elements;
        parameters += elements;
        tensor_bytes += size;
        tensors.push(TensorLine {
            name: name.to_owned(),
            dtype: dtype.to_owned(),
            shape: stored.shape().dims().to_vec(),
            bytes: Some(size),
        });
    }
    for (name, unknown) in checkpoint.unreadable() {
        tensors.push(TensorLine {
            name: name.to_owned(),
            dtype: unknown.dtype.clone(),
            shape: unknown.shape.dims().to_vec(),
            bytes: unknown.bytes,
        });
    }
    let mut types: Vec<TypeShare> = types.into_values().collect();
    types.sort_by_key(|t| std::cmp::Reverse(t.bytes));
    let config = config.as_ref();
    Inspection {
        schema: "apr-inspect/1",
        path: checkpoint.path().display().to_string(),
        container: checkpoint.container().to_string(),
        not_runnable: config.err().map(|error| error.to_string()),
        parameters,
        tensor_bytes,
        kv_bytes_per_position: config
            .ok()
            .map(|c| 2 * 2 * (c.num_hidden_layers as u64) * (c.kv_dim() as u64)),
        context: config.ok().map(|c| c.max_position_embeddings as u64),
        types,
        metadata: checkpoint
            .metadata()
            .iter()
            .map(|(key, value)| (key.to_owned(), shortened(serde_json::Value::from(value))))
            .collect(),
        tensors,
    }
}

/// A value with long arrays cut to what a person wants to see.
fn shortened(value: serde_json::Value) -> serde_json::Value {
    match value {
        serde_json::Value::Array(mut items) if items.len() > ARRAY_SHOWN => {
            let more = items.len() - ARRAY_SHOWN;
            items.truncate(ARRAY_SHOWN);
            items.push(format!("... and {more} more").into());
            items.into()
        }
        other => other,
    }
}

fn inspect_tensor(checkpoint: &Checkpoint, name: &str) -> Result<TensorInspection> {
    let stored: &Stored = checkpoint.require(name)?;
    let mut row = vec![0.0f32; stored.shape().cols()];
    let mut summary: Option<Summary> = None;
    let mut zero_rows = 0;
    let mut first = Vec::new();
    for index in 0..stored.shape().rows() {
        stored.dequantize_row(index, &mut row)?;
        if index == 0 {
            first = row.iter().take(FIRST_SHOWN).map(|&x| x.into()).collect();
        }
        zero_rows += u64::from(row.iter().all(|&x| x == 0.0));
        let of_row = Summary::of(&row);
        summary = Some(summary.map_or(of_row, |s| s.merge(of_row)));
    }
    let summary = summary.unwrap_or_else(|| Summary::of::<f32>(&[]));
    Ok(TensorInspection {
        schema: "apr-inspect-tensor/1",
        path: checkpoint.path().display().to_string(),
        name: name.to_owned(),
        dtype: stored.dtype().name().to_owned(),
        shape: stored.shape().dims().to_vec(),
        bytes: stored.bytes().len() as u64,
        count: summary.count(),
        nan: summary.nan(),
        inf: summary.inf(),
        zeros: summary.zeros(),
        zero_rows,
        min: summary.min(),
        max: summary.max(),
        mean: summary.mean(),
        std: summary.std(),
        rms: summary.rms(),
        first,
    })
}
