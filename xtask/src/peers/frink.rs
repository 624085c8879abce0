//! frink, by its own `frink bench`.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{
    Peer,
    build::{Workshop, output, said},
    measurement::{Kind, Lengths, Measurement, Setting, speeds},
};

#[derive(Debug)]
pub(super) struct Frink {
    program: PathBuf,
    receipt: PathBuf,
    version: String,
}

impl Frink {
    pub(super) fn ready(workshop: &Workshop) -> Result<Self> {
        let program = workshop.frink()?;
        let version = said(Command::new(&program).arg("--version"))?;
        let version = version.strip_prefix("frink ").unwrap_or(&version).to_owned();
        Ok(Self { program, receipt: workshop.path("frink-receipt.json"), version })
    }
}

impl Peer for Frink {
    fn version(&self) -> &str {
        &self.version
    }

    fn measure(&self, setting: &Setting) -> Result<Vec<Measurement>> {
        let Lengths { prompt, generate, depth } = setting.lengths;
        if depth > 0 {
            // It has no such option.
            return Ok(Vec::new());
        }
        let mut command = Command::new(&self.program);
        command.args(["bench", "--max-load", "0", "-m"]).arg(&setting.model);
        for (option, number) in
            [("-t", setting.threads), ("-p", prompt), ("-n", generate), ("-r", 1)]
        {
            command.args([option, &number.to_string()]);
        }
        output(command.arg("--receipt").arg(&self.receipt))?;
        let receipt = fs::read_to_string(&self.receipt)
            .with_context(|| self.receipt.display().to_string())?;
        results(&receipt)
    }
}

/// The results in a receipt.
fn results(json: &str) -> Result<Vec<Measurement>> {
    let value: Value = serde_json::from_str(json).context("frink's receipt is no JSON")?;
    let tests = value["tests"].as_array().context("frink's receipt has no `tests`")?;
    tests.iter().map(result).collect()
}

/// A result: its test is called after its kind and its tokens, `pp512` or `tg64`.
fn result(test: &Value) -> Result<Measurement> {
    let name = test["test"].as_str().unwrap_or_default();
    let kinds = [("pp", Kind::Prefill), ("tg", Kind::Decode)];
    let known = kinds
        .into_iter()
        .find_map(|(prefix, kind)| Some((kind, name.strip_prefix(prefix)?.parse().ok()?)));
    let (kind, tokens) = known.with_context(|| format!("frink measured `{name}`"))?;
    Ok(Measurement { kind, tokens, depth: 0, samples: speeds(test, "frink_samples")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_frink_writes_is_read() {
        let found = results(include_str!("samples/frink_bench.json")).unwrap();
        let kinds: Vec<_> = found.iter().map(|m| (m.kind, m.tokens, m.samples.len())).collect();
        assert_eq!(kinds, [(Kind::Prefill, 32, 1), (Kind::Decode, 8, 1)]);
        assert!(results(r#"{"tests": [{"test": "xx8", "frink_samples": [1.0]}]}"#).is_err());
    }
}
