//! `apr inspect`: what a model file holds.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::Result;
use apr_check::check_file;
use apr_format::Checkpoint;
use apr_model::{Config, Role, RopeScaling, read_config, role_of};
use apr_report::{
    file_check::FileCheckReport,
    inspect::{Inspection, TensorInspection, TensorLine, TypeShare},
};
use apr_tensor::{Stored, Summary};
use serde_json::{Map, Value, json};

use crate::{
    check::Bars,
    engine,
    output::{self, Exit},
};

/// Elements of a metadata array that are shown.
const ARRAY_SHOWN: usize = 8;
/// Elements of a tensor that are shown.
const FIRST_SHOWN: usize = 8;

const EXAMPLES: &str = "\
Examples:
  apr inspect model.gguf
  apr inspect model.gguf --tensor blk.0.attn_q.weight
  apr inspect --check model_dir/
  apr inspect --check model.apr --json

Exit codes of --check: 0 all holds (there may be notes), 1 something is broken, 2 error, 3 not everything could be checked.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A .gguf, .safetensors or .apr file, or a Hugging Face directory.
    model: PathBuf,
    /// Statistics of one tensor.
    #[arg(long, value_name = "NAME")]
    tensor: Option<String>,
    /// Verify the file without running it: checksums, layout, shapes, weights, tokenizer.
    #[arg(long, conflicts_with = "tensor")]
    check: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Result<Exit> {
    if args.check {
        return check(&args);
    }
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

fn check(args: &Args) -> Result<Exit> {
    let bars = Bars::default();
    let checkup = check_file(&args.model, engine::runnable_config, &bars);
    bars.finish();
    let checkup = checkup?;
    let exit = Exit::of_verdict(checkup.exit_code());
    let report = FileCheckReport::new(args.model.display().to_string(), checkup);
    if args.json {
        output::print_json(&report)?
    } else {
        output::print(&report.text())?
    }
    Ok(exit)
}

fn inspect(checkpoint: &Checkpoint) -> Inspection {
    let bound = engine::runnable_config(checkpoint);
    let not_runnable = bound.as_ref().err().map(|error| error.to_string());
    // A file whose tensors are wrong may still say what they should have been.
    let config = bound.or_else(|_| read_config(checkpoint)).ok();
    let moe = config.as_ref().and_then(|config| config.moe.as_ref());
    let mut types: BTreeMap<&str, TypeShare> = BTreeMap::new();
    let mut tensors = Vec::new();
    let (mut parameters, mut parameters_per_token, mut tensor_bytes) = (0, 0, 0);
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
        parameters_per_token += match moe {
            Some(moe) if is_of_experts(name) => {
                elements * moe.num_experts_per_tok as u64 / moe.num_experts as u64
            }
            _ => elements,
        };
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
    Inspection {
        schema: "apr-inspect/1",
        path: checkpoint.path().display().to_string(),
        container: checkpoint.container().to_string(),
        not_runnable,
        parameters,
        parameters_per_token: moe.map(|_| parameters_per_token),
        tensor_bytes,
        kv_bytes_per_position: config
            .as_ref()
            .map(|c| 2 * 2 * (c.num_hidden_layers as u64) * (c.kv_dim() as u64)),
        context: config.as_ref().map(|c| c.max_position_embeddings as u64),
        config: config.as_ref().map(resolved),
        types,
        metadata: checkpoint
            .metadata()
            .iter()
            .map(|(key, value)| (key.to_owned(), shortened(Value::from(value))))
            .collect(),
        tensors,
    }
}

/// Whether the tensor holds a matrix of one expert, or of all.
fn is_of_experts(name: &str) -> bool {
    match role_of(name) {
        Some(Role::Expert(..)) => true,
        Some(Role::Layer(_, role)) => role.is_of_experts(),
        _ => false,
    }
}

/// The config under the keys of `config.json`, defaults filled in.
fn resolved(config: &Config) -> Map<String, Value> {
    let rope_scaling = match &config.rope_scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3(scaling) => json!({
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }),
        RopeScaling::Factors(factors) => {
            json!({ "rope_type": "factors", "factors": shortened(json!(factors)) })
        }
    };
    let mut values = vec![
        ("model_type", json!(config.architecture.name())),
        ("num_hidden_layers", json!(config.num_hidden_layers)),
        ("hidden_size", json!(config.hidden_size)),
        ("num_attention_heads", json!(config.num_attention_heads)),
        ("num_key_value_heads", json!(config.num_key_value_heads)),
        ("head_dim", json!(config.head_dim)),
        ("intermediate_size", json!(config.intermediate_size)),
        ("vocab_size", json!(config.vocab_size)),
        ("max_position_embeddings", json!(config.max_position_embeddings)),
        ("rms_norm_eps", json!(config.rms_norm_eps)),
        ("rope_theta", json!(config.rope_theta)),
        ("rope_scaling", rope_scaling),
        ("rotary_dim", json!(config.rotary_dim)),
        ("attention_bias", json!(config.attention_bias)),
        ("qk_norm", json!(config.qk_norm)),
        ("tie_word_embeddings", json!(config.tie_word_embeddings)),
    ];
    if let Some(moe) = &config.moe {
        values.extend([
            ("num_experts", json!(moe.num_experts)),
            ("num_experts_per_tok", json!(moe.num_experts_per_tok)),
            ("moe_intermediate_size", json!(moe.moe_intermediate_size)),
            ("norm_topk_prob", json!(moe.norm_topk_prob)),
            ("decoder_sparse_step", json!(moe.decoder_sparse_step)),
            ("mlp_only_layers", json!(moe.mlp_only_layers)),
        ]);
    }
    values.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// A value with long arrays cut to what a person wants to see.
fn shortened(value: Value) -> Value {
    match value {
        Value::Array(mut items) if items.len() > ARRAY_SHOWN => {
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
