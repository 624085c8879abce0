//! llama.cpp, by its own `llama-bench`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{
    Peer,
    build::{Workshop, output, said},
    measurement::{Kind, Lengths, Measurement, Setting, count, speeds},
};

#[derive(Debug)]
pub(super) struct LlamaCpp {
    bench: PathBuf,
    version: String,
}

impl LlamaCpp {
    /// The `llama-bench` at this path, or one that is built.
    pub(super) fn ready(workshop: &Workshop, bench: Option<&Path>) -> Result<Self> {
        let bench = match bench {
            Some(path) => path.to_owned(),
            None => workshop.llama_bench()?,
        };
        // Older ones have no such option; they say their build in each result.
        let version = said(Command::new(&bench).arg("--version")).unwrap_or_default();
        let version = version.strip_prefix("version: ").unwrap_or(&version).to_owned();
        Ok(Self { bench, version })
    }
}

impl Peer for LlamaCpp {
    fn version(&self) -> &str {
        &self.version
    }

    fn measure(&self, setting: &Setting) -> Result<Vec<Measurement>> {
        let Lengths { prompt, generate, depth } = setting.lengths;
        let mut command = Command::new(&self.bench);
        command.arg("-m").arg(&setting.model);
        for (option, number) in [
            ("-t", setting.threads),
            ("-p", prompt),
            ("-n", generate),
            ("-d", depth),
            ("-r", 1),
            ("-ngl", 0),
        ] {
            command.args([option, &number.to_string()]);
        }
        results(&output(command.args(["-o", "json"]))?)
    }
}

/// The results in what `llama-bench -o json` prints.
fn results(json: &str) -> Result<Vec<Measurement>> {
    let value: Value = serde_json::from_str(json).context("llama-bench printed no JSON")?;
    value.as_array().context("llama-bench printed no list")?.iter().map(result).collect()
}

fn result(result: &Value) -> Result<Measurement> {
    let (kind, tokens) = match (count(result, "n_prompt")?, count(result, "n_gen")?) {
        (prompt, 0) => (Kind::Prefill, prompt),
        (0, generate) => (Kind::Decode, generate),
        _ => {
            bail!("llama-bench measured a prompt and what follows together, which nobody asked for")
        }
    };
    let depth = count(result, "n_depth")?;
    Ok(Measurement { kind, tokens, depth, samples: speeds(result, "samples_ts")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_llama_bench_prints_is_read() {
        let found = results(include_str!("samples/llama_bench.json")).unwrap();
        let prefill =
            Measurement { kind: Kind::Prefill, tokens: 32, depth: 0, samples: vec![14.0916] };
        let decode =
            Measurement { kind: Kind::Decode, tokens: 8, depth: 0, samples: vec![2.15825] };
        assert_eq!(found, [prefill, decode]);
        assert!(results("[{}]").is_err() && results("{}").is_err());
    }
}
