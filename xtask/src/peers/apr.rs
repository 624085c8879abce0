//! This engine, by `apr bench`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{
    Peer,
    build::{Workshop, output, said},
    measurement::{Kind, Lengths, Measurement, Setting},
};

#[derive(Debug)]
pub(super) struct Apr {
    program: PathBuf,
    version: String,
    /// Whether it has `bench`; one that has not is timed by `run`, whose first step pays for caches that are cold.
    benches: bool,
}

impl Apr {
    /// The `apr` at this path, or one that is built.
    pub(super) fn ready(workshop: &Workshop, program: Option<&Path>) -> Result<Self> {
        let program = match program {
            Some(path) => path.to_owned(),
            None => workshop.apr()?,
        };
        let version = said(Command::new(&program).arg("--version"))?;
        let version = version.strip_prefix("apr ").unwrap_or(&version).to_owned();
        let benches = said(Command::new(&program).args(["bench", "--help"])).is_ok();
        Ok(Self { program, version, benches })
    }
}

impl Peer for Apr {
    fn version(&self) -> &str {
        &self.version
    }

    fn measure(&self, setting: &Setting) -> Result<Vec<Measurement>> {
        if !self.benches {
            return self.measure_by_run(setting);
        }
        let Lengths { prompt, generate, depth } = setting.lengths;
        let mut command = Command::new(&self.program);
        command.arg("bench").arg(&setting.model).args(["--no-probe", "--json"]);
        for (option, number) in
            [("-t", setting.threads), ("-p", prompt), ("-n", generate), ("-d", depth), ("-r", 1)]
        {
            command.args([option, &number.to_string()]);
        }
        Measurement::all_of(&output(&mut command)?)
    }
}

impl Apr {
    fn measure_by_run(&self, setting: &Setting) -> Result<Vec<Measurement>> {
        let Lengths { prompt, generate, depth } = setting.lengths;
        let mut measured = Vec::new();
        if prompt > 0 {
            let seconds = self.timed(setting, prompt, 1)?.0;
            let samples = vec![prompt as f64 / seconds];
            measured.push(Measurement { kind: Kind::Prefill, tokens: prompt, depth: 0, samples });
        }
        if generate > 0 {
            let seconds = self.timed(setting, depth.max(1), generate + 1)?.1;
            let samples = vec![generate as f64 / seconds];
            measured.push(Measurement { kind: Kind::Decode, tokens: generate, depth, samples });
        }
        Ok(measured)
    }

    /// The seconds that a prompt took, and all tokens but the first after it.
    fn timed(&self, setting: &Setting, prompt: usize, generate: usize) -> Result<(f64, f64)> {
        let ids = (0..prompt).map(|id| (1000 + id).to_string()).collect::<Vec<_>>().join(",");
        let mut command = Command::new(&self.program);
        command.arg("run").arg(&setting.model).args(["--json", "--ignore-eos", "--tokens", &ids]);
        command.args(["-n", &generate.to_string(), "--threads", &setting.threads.to_string()]);
        seconds(&output(&mut command)?)
    }
}

/// What `apr run --json` says of time: of the prompt, and of all tokens but the first after it.
fn seconds(json: &str) -> Result<(f64, f64)> {
    let value: Value = serde_json::from_str(json).context("this is no JSON")?;
    let prefill = value["prefill_seconds"].as_f64().context("there are no `prefill_seconds`")?;
    let tokens = value["tokens"].as_array().context("there are no `tokens`")?;
    let after = tokens.iter().skip(1).filter_map(|token| token["seconds"].as_f64());
    Ok((prefill, after.sum()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_token_is_the_prompts() {
        let json = r#"{"prefill_seconds": 0.5, "tokens": [{"seconds": 0.5}, {"seconds": 0.25}, {"seconds": 0.125}]}"#;
        assert_eq!(seconds(json).unwrap(), (0.5, 0.375));
        assert!(seconds("{}").is_err());
    }
}
