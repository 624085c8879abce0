//! How fast candle runs a GGUF file: `RAYON_NUM_THREADS=2 candle-bench MODEL -p 512 -n 64 -d 0 -r 1`, in llama-bench's words.
//!
//! The models are those of candle-transformers as they are. Prompts are read at once, tokens generated one by one;
//! token ids are pseudo-random, so nothing depends on what a model says. Each measurement has a run before it that does not
//! count.

use std::{fs::File, io::BufReader, time::Instant};

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor, quantized::gguf_file::Content, utils::get_num_threads};
use candle_transformers::models::{quantized_qwen2, quantized_qwen3};
use serde_json::json;

/// Token ids are below this, which every vocabulary is larger than.
const IDS: u32 = 30_000;

struct Args {
    model: String,
    prompt: usize,
    generate: usize,
    depth: usize,
    repetitions: usize,
}

impl Args {
    fn parse() -> Result<Self> {
        let mut words = std::env::args().skip(1);
        let model = words.next().context("usage: candle-bench MODEL -p N -n N -d N -r N")?;
        let mut args =
            Self { model, prompt: 512, generate: 64, depth: 0, repetitions: 5 };
        while let Some(option) = words.next() {
            let number = words.next().with_context(|| format!("{option} needs a number"))?;
            let number = number.parse().with_context(|| format!("{option} {number}"))?;
            match option.as_str() {
                "-p" => args.prompt = number,
                "-n" => args.generate = number,
                "-d" => args.depth = number,
                "-r" => args.repetitions = number,
                _ => bail!("{option} is no option"),
            }
        }
        Ok(args)
    }
}

fn main() -> Result<()> {
    let args = Args::parse()?;
    let mut model = Model::load(&args.model)?;
    let mut results = Vec::new();
    for (kind, tokens) in [("prefill", args.prompt), ("decode", args.generate)] {
        if tokens == 0 {
            continue;
        }
        let mut samples = Vec::new();
        for repetition in 0..=args.repetitions {
            model.clear();
            if args.depth > 0 {
                model.read(args.depth, 0)?;
            }
            let begun = Instant::now();
            match kind {
                "prefill" => model.read(tokens, args.depth)?,
                _ => (0..tokens).try_for_each(|i| model.read(1, args.depth + i))?,
            }
            // The first one is for the caches.
            if repetition > 0 {
                samples.push(tokens as f64 / begun.elapsed().as_secs_f64());
            }
        }
        results.push(json!({
            "kind": kind,
            "tokens": tokens,
            "depth": args.depth,
            "threads": get_num_threads(),
            "samples": samples,
        }));
    }
    println!("{}", json!({ "schema": "candle-bench/1", "results": results }));
    Ok(())
}

enum Model {
    Qwen2(quantized_qwen2::ModelWeights),
    Qwen3(quantized_qwen3::ModelWeights),
}

impl Model {
    fn load(path: &str) -> Result<Self> {
        let mut file = BufReader::new(File::open(path).with_context(|| path.to_owned())?);
        let content = Content::read(&mut file)?;
        let architecture = content.metadata.get("general.architecture");
        let architecture = architecture.context("no general.architecture")?.to_string()?.clone();
        let device = Device::Cpu;
        Ok(match architecture.as_str() {
            "qwen2" => {
                Self::Qwen2(quantized_qwen2::ModelWeights::from_gguf(content, &mut file, &device)?)
            }
            "qwen3" => {
                Self::Qwen3(quantized_qwen3::ModelWeights::from_gguf(content, &mut file, &device)?)
            }
            other => bail!("candle runs no GGUF files of {other} on CPUs; qwen2 and qwen3 it does"),
        })
    }

    /// Computes `tokens` positions from `start` on, and the logits of the last.
    fn read(&mut self, tokens: usize, start: usize) -> Result<()> {
        let ids = (start..start + tokens).map(|i| (i as u32).wrapping_mul(2_654_435_761) % IDS);
        let ids = Tensor::new(ids.collect::<Vec<_>>(), &Device::Cpu)?.unsqueeze(0)?;
        let logits = match self {
            Self::Qwen2(model) => model.forward(&ids, start)?,
            Self::Qwen3(model) => model.forward(&ids, start)?,
        };
        // As an engine does that looks at them.
        logits.flatten_all()?.argmax(0)?.to_scalar::<u32>()?;
        Ok(())
    }

    fn clear(&mut self) {
        match self {
            Self::Qwen2(model) => model.clear_kv_cache(),
            Self::Qwen3(model) => model.clear_kv_cache(),
        }
    }
}
