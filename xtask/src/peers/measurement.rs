//! What is asked of an engine, and what it answers.

use std::{fmt, path::PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// What is measured: all lengths in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lengths {
    /// Of the prompt that is read.
    pub(super) prompt: usize,
    /// Of what is generated.
    pub(super) generate: usize,
    /// Of what is in the context before.
    pub(super) depth: usize,
}

/// What one run of an engine measures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) model: PathBuf,
    pub(super) threads: usize,
    pub(super) lengths: Lengths,
}

impl Setting {
    /// The model's file name.
    pub(super) fn model_name(&self) -> String {
        self.model.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Lengths { prompt, generate, depth } = self.lengths;
        write!(f, "{}, threads {}, prompt {prompt}", self.model_name(), self.threads)?;
        write!(f, ", generate {generate}, depth {depth}")
    }
}

/// Which of the two ways to run a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// A prompt is read.
    Prefill,
    /// Tokens are generated, one by one.
    Decode,
}

impl Kind {
    /// The name in JSON.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// Speeds of one kind, in tokens per second.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Measurement {
    pub(super) kind: Kind,
    pub(super) tokens: usize,
    pub(super) depth: usize,
    pub(super) samples: Vec<f64>,
}

impl Measurement {
    /// What `apr bench --json` prints, and candle's runner: `{"results": [{"kind": "prefill", "tokens": 512, "depth": 0,
    /// "samples": [...]}, ...]}`.
    pub(super) fn all_of(json: &str) -> Result<Vec<Self>> {
        let value: Value = serde_json::from_str(json).context("this is no JSON")?;
        let results = value["results"].as_array().context("there are no `results`")?;
        results.iter().map(Self::of_result).collect()
    }

    fn of_result(result: &Value) -> Result<Self> {
        let kind = match result["kind"].as_str() {
            Some("prefill") => Kind::Prefill,
            Some("decode") => Kind::Decode,
            _ => bail!("`kind` is {}, not prefill or decode", result["kind"]),
        };
        let (tokens, depth) = (count(result, "tokens")?, count(result, "depth")?);
        Ok(Self { kind, tokens, depth, samples: speeds(result, "samples")? })
    }
}

/// The number under `key`.
pub(super) fn count(value: &Value, key: &str) -> Result<usize> {
    let number = value[key].as_u64().and_then(|number| usize::try_from(number).ok());
    number.with_context(|| format!("`{key}` is {}, no number of tokens", value[key]))
}

/// The speeds under `key`, of which there is at least one.
pub(super) fn speeds(value: &Value, key: &str) -> Result<Vec<f64>> {
    let list = value[key].as_array().filter(|list| !list.is_empty());
    let list = list.with_context(|| format!("`{key}` is {}, no list of speeds", value[key]))?;
    let speed = |x: &Value| x.as_f64().filter(|x| x.is_finite() && *x > 0.0);
    list.iter().map(|x| speed(x).with_context(|| format!("`{key}` has {x}, no speed"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_apr_bench_prints_is_read() {
        let found = Measurement::all_of(include_str!("samples/apr_bench.json")).unwrap();
        let [prefill, decode] = &found[..] else { panic!("{found:?}") };
        assert_eq!((prefill.kind, prefill.tokens, prefill.depth), (Kind::Prefill, 512, 0));
        assert_eq!(prefill.samples.len(), 1);
        assert_eq!((decode.kind, decode.tokens), (Kind::Decode, 64));
    }

    #[test]
    fn what_says_no_speed_is_refused_by_its_key() {
        for (json, key) in [
            ("nonsense", "JSON"),
            ("{}", "results"),
            (
                r#"{"results": [{"kind": "train", "tokens": 1, "depth": 0, "samples": [1.0]}]}"#,
                "kind",
            ),
            (
                r#"{"results": [{"kind": "decode", "tokens": -1, "depth": 0, "samples": [1.0]}]}"#,
                "tokens",
            ),
            (
                r#"{"results": [{"kind": "decode", "tokens": 1, "depth": 0, "samples": []}]}"#,
                "samples",
            ),
            (
                r#"{"results": [{"kind": "decode", "tokens": 1, "depth": 0, "samples": [0]}]}"#,
                "samples",
            ),
        ] {
            let error = format!("{:#}", Measurement::all_of(json).unwrap_err());
            assert!(error.contains(key), "{json}: {error}");
        }
    }
}
