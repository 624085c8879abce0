//! `apr convert`: a model in another container and in other types.

use std::{collections::BTreeMap, path::PathBuf, time::Instant};

use anyhow::{Result, bail};
use apr_convert::{
    Importance, Loss, Options, Output, Phase, Plan, Planned, Recipe, Settings, Target, Written,
    convert,
};
use apr_format::Checkpoint;
use apr_report::{
    convert::{Conversion, Outcome, TypeLine},
    inspect::TensorLine,
    plural,
};
use apr_tensor::DType;
use clap::ValueEnum;

use crate::{
    engine,
    output::{self, Exit, Progress},
};

const EXAMPLES: &str = "\
Examples:
  apr convert Qwen3-0.6B/ qwen3-0.6b.gguf                       the types stay as they are
  apr convert Qwen3-0.6B/ qwen3-0.6b-q4_k_m.gguf --quantize q4_k_m
  apr convert Qwen3-0.6B/ qwen3.gguf --quantize q3_k_m --imatrix imatrix.gguf
  apr convert model.gguf model.apr
  apr convert model-q8_0.gguf model/                            a Hugging Face directory, dequantised to F32
  apr convert model.gguf model/ --dtype bf16 --shard-size 2GB
  apr convert Qwen3-0.6B/ qwen3.gguf --quantize q5_k_m --dry-run

What the target cannot express is listed and refused unless --lossy says that it may go. What was written is read again
and compared with the source before it gets its name.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A .gguf, .safetensors or .apr file, or a Hugging Face directory.
    source: PathBuf,
    /// Where to write: NAME.gguf, NAME.apr, NAME.safetensors (weights alone), or else a Hugging Face directory.
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// The container to write [default: what the name OUT ends in].
    #[arg(long, value_enum, value_name = "CONTAINER")]
    to: Option<To>,
    /// What chooses the type of each tensor, as in llama.cpp: q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s,
    /// q4_1, q4_0, q3_k_l, q3_k_m, q3_k_s, q2_k, f16, bf16 or f32 [default: the types stay as they are, as far as the
    /// container has them].
    #[arg(long, value_name = "RECIPE", value_parser = recipe)]
    quantize: Option<Recipe>,
    /// The type of all weights but norms, biases and routers (of all in safetensors).
    #[arg(long, value_enum, value_name = "TYPE", conflicts_with = "quantize")]
    dtype: Option<FloatType>,
    /// An importance matrix of this model, as llama.cpp's llama-imatrix writes it (GGUF).
    #[arg(long, value_name = "FILE", requires = "quantize")]
    imatrix: Option<PathBuf>,
    /// Quantise weights that are quantised already: the errors of both add up.
    #[arg(long)]
    requantize: bool,
    /// Leave out what the target cannot express; it is listed.
    #[arg(long)]
    lossy: bool,
    /// Replace what is there under the name OUT.
    #[arg(long)]
    force: bool,
    /// Do not read the result again to compare it with the source.
    #[arg(long)]
    no_verify: bool,
    /// Bytes of weights per file of a Hugging Face directory, such as 2GB or 500MiB [default: 5GB].
    #[arg(long, value_name = "SIZE", value_parser = size)]
    shard_size: Option<u64>,
    /// Show the plan, and write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum To {
    /// A GGUF file.
    Gguf,
    /// An .apr file.
    Apr,
    /// A Hugging Face directory, or a file of weights alone.
    Safetensors,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
#[allow(missing_docs, reason = "the types name themselves")]
enum FloatType {
    F32,
    F16,
    Bf16,
}

pub(crate) fn run(args: Args) -> Result<Exit> {
    let source = engine::open(&args.source)?;
    let target = args.target()?;
    let output = Output::new(&args.output, target, &source, args.force)?;
    if args.shard_size.is_some() && !output.is_directory() {
        bail!(
            "--shard-size is for Hugging Face directories; {} is one file",
            args.output.display()
        );
    }
    let plan = Plan::new(&source, target, args.options(&output)?)?;
    let mut report = args.report(&source, &plan);
    if !args.json {
        output::print(&report.plan())?;
    }
    if !args.dry_run {
        let begun = Instant::now();
        let written = args.write(&plan, &output)?;
        for line in &mut report.types {
            let changed = written.changes.iter().find(|(dtype, _)| dtype.name() == line.dtype);
            // To F32 everything goes without rounding.
            let changed = changed.filter(|(dtype, _)| **dtype != DType::F32);
            line.relative_rmse = changed.map(|(_, change)| change.relative_rmse());
        }
        report.outcome = Some(Outcome {
            file_bytes: written.bytes,
            verified: !args.no_verify,
            seconds: begun.elapsed().as_secs_f64(),
        });
    }
    match (args.json, report.outcome()) {
        (true, _) => output::print_json(&report)?,
        (false, Some(outcome)) => output::print(&outcome)?,
        (false, None) => {}
    }
    Ok(Exit::Success)
}

impl Args {
    /// The container, from the option or the name.
    fn target(&self) -> Result<Target> {
        if let Some(to) = self.to {
            return Ok(match to {
                To::Gguf => Target::Gguf,
                To::Apr => Target::Apr,
                To::Safetensors => Target::Safetensors,
            });
        }
        let extension = self.output.extension().and_then(|extension| extension.to_str());
        let named = extension.and_then(|extension| extension.to_ascii_lowercase().parse().ok());
        if let Some(target) = named {
            return Ok(target);
        }
        let ends_as_directory = self.output.to_string_lossy().ends_with(std::path::is_separator);
        if extension.is_none() || ends_as_directory || self.output.is_dir() {
            return Ok(Target::Safetensors);
        }
        bail!(
            "{}: which container is not clear from the name; end it in .gguf, .apr, .safetensors or a slash (a Hugging Face \
             directory), or give --to",
            self.output.display()
        )
    }

    fn options(&self, output: &Output) -> Result<Options> {
        let recipe = self.quantize.or(self.dtype.map(|dtype| match dtype {
            FloatType::F32 => Recipe::F32,
            FloatType::F16 => Recipe::F16,
            FloatType::Bf16 => Recipe::BF16,
        }));
        let importance = self.imatrix.as_deref().map(Importance::open).transpose()?;
        Ok(Options {
            recipe,
            importance,
            requantize: self.requantize,
            weights_alone: output.is_weights_alone(),
            lossy: self.lossy,
        })
    }

    fn write(&self, plan: &Plan, output: &Output) -> Result<Written> {
        const SHARD: u64 = 5_000_000_000;
        let shard_size = self.shard_size.unwrap_or(SHARD);
        let settings = Settings { shard_size, verify: !self.no_verify };
        output::remove_if_interrupted(output.partial())?;
        // Everything is read twice.
        let passes = if settings.verify { 2 } else { 1 };
        let bar = Progress::of_bytes(passes * plan.source_bytes(), "converting");
        let written = convert(plan, output, &settings, &mut |phase, bytes| {
            if phase == Phase::Verifying {
                bar.say("verifying");
            }
            bar.advance_by(bytes);
        });
        bar.finish();
        Ok(written?)
    }

    fn report(&self, source: &Checkpoint, plan: &Plan) -> Conversion {
        let tensors: Vec<_> = plan.tensors.iter().map(tensor_line).collect();
        Conversion {
            schema: "apr-convert/1",
            source: self.source.display().to_string(),
            source_container: source.container().to_string(),
            path: self.output.display().to_string(),
            container: plan.target.to_string(),
            recipe: plan.layout.recipe.map(|recipe| recipe.to_string()),
            source_bytes: plan.source_bytes(),
            tensor_bytes: plan.bytes(),
            parameters: plan.tensors.iter().map(|t| t.shape.elements() as u64).sum(),
            types: mix(&plan.tensors),
            losses: plan.losses.iter().map(Loss::to_string).collect(),
            notes: notes(plan),
            unneeded: plan.metadata.notes.iter().map(Loss::to_string).collect(),
            tensors,
            outcome: None,
        }
    }
}

/// How much will be stored in which type.
fn mix(tensors: &[Planned]) -> Vec<TypeLine> {
    let mut types: BTreeMap<DType, TypeLine> = BTreeMap::new();
    for tensor in tensors {
        let line = types.entry(tensor.dtype).or_insert_with(|| TypeLine {
            dtype: tensor.dtype.name().to_owned(),
            tensors: 0,
            recoded: 0,
            bytes: 0,
            parameters: 0,
            relative_rmse: None,
        });
        line.tensors += 1;
        line.recoded += usize::from(tensor.is_recoded());
        line.bytes += tensor.bytes();
        line.parameters += tensor.shape.elements() as u64;
    }
    let mut types: Vec<_> = types.into_values().collect();
    types.sort_by_key(|line| std::cmp::Reverse(line.bytes));
    types
}

fn tensor_line(tensor: &Planned) -> TensorLine {
    TensorLine {
        name: tensor.name.clone(),
        dtype: tensor.dtype.name().to_owned(),
        shape: tensor.shape.dims().to_vec(),
        bytes: Some(tensor.bytes()),
    }
}

/// What was decided that nobody has asked for.
fn notes(plan: &Plan) -> Vec<String> {
    let mut notes = Vec::new();
    let dequantised = plan.tensors.iter().filter(|tensor| tensor.is_dequantised()).count();
    if dequantised > 0 && plan.layout.recipe.is_none() {
        notes.push(format!(
            "{} in types that {} files lack: stored as F32, exactly the numbers that they stand for",
            plural(dequantised, "tensor"),
            plan.target
        ));
    }
    if let Some(importance) = &plan.importance {
        let without = plan.without_importance().count();
        notes.push(format!(
            "importance of {} is known; {} quantised without",
            plural(importance.len(), "tensor"),
            plural(without, "tensor")
        ));
    }
    notes
}

fn recipe(text: &str) -> Result<Recipe, String> {
    text.parse().map_err(|()| {
        let known: Vec<_> = Recipe::all().map(Recipe::name).collect();
        format!("`{text}` is no recipe; there are: {}", known.join(", "))
    })
}

/// Parses a number of bytes such as 5GB or 512MiB. A bare number would be bytes, which nobody means.
fn size(text: &str) -> Result<u64, String> {
    let expected = || format!("`{text}` is no size; expected one such as 5GB, 500MB or 2GiB");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return Err(expected()),
    };
    let number: u64 = text[..digits].parse().map_err(|_| expected())?;
    number.checked_mul(unit).filter(|&bytes| bytes > 0).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_decimal_and_binary_units() {
        assert_eq!(size("5GB"), Ok(5_000_000_000));
        assert_eq!(size("2 MiB"), Ok(2 << 20));
        assert_eq!(size("77kb"), Ok(77_000));
        for wrong in ["", "77", "GB", "0", "-1GB", "1.5GB", "5XB", "99999999999GB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
