//! Rows of `llama-bench -o json`, and which of ours measure the same.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use apr_report::{
    bench::{Comparison, Pair, ResultLine, Unpaired},
    plural,
};
use apr_tensor::DType;
use serde::Deserialize;

use super::measure::{Kind, median};

/// What `llama-bench` measured.
#[derive(Debug)]
pub(super) struct LlamaBench {
    file: String,
    rows: Vec<Row>,
}

/// One of its rows, as far as it matters here. Older versions lack some keys.
#[derive(Debug, Deserialize)]
struct Row {
    n_prompt: usize,
    n_gen: usize,
    #[serde(default)]
    n_depth: usize,
    n_threads: usize,
    avg_ts: f64,
    #[serde(default)]
    samples_ts: Vec<f64>,
    /// Bytes of all tensors.
    model_size: Option<u64>,
    model_type: Option<String>,
    type_k: Option<String>,
    type_v: Option<String>,
}

impl LlamaBench {
    /// Reads a file that `llama-bench -o json` or `-o jsonl` printed.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let file = path.display().to_string();
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {file}"))?;
        let lines = || {
            let lines = text.lines().filter(|line| !line.trim().is_empty());
            lines.map(serde_json::from_str).collect::<Result<Vec<Row>, _>>()
        };
        let rows = serde_json::from_str(&text).or_else(|error| lines().map_err(|_| error));
        let rows: Vec<Row> =
            rows.with_context(|| format!("{file}: expected what `llama-bench -o json` prints"))?;
        ensure!(!rows.is_empty(), "{file} has no rows: there is nothing to compare with");
        Ok(Self { file, rows })
    }

    /// Its rows beside ours, of a model whose tensors are of so many bytes, with a cache of type `kv`.
    pub(super) fn against(&self, ours: &[ResultLine], tensor_bytes: u64, kv: DType) -> Comparison {
        let (mut pairs, mut unpaired) = (Vec::new(), Vec::new());
        let mut lacks_partner = vec![true; ours.len()];
        for theirs in &self.rows {
            match theirs.partner(ours, tensor_bytes, kv) {
                Ok(i) => {
                    lacks_partner[i] = false;
                    pairs.push(theirs.beside(&ours[i]));
                }
                Err(because) => {
                    unpaired.push(Unpaired { of: "llama.cpp", row: theirs.to_string(), because });
                }
            }
        }
        let without = ours.iter().zip(lacks_partner).filter(|(_, lacks)| *lacks);
        unpaired.extend(without.map(|(ours, _)| Unpaired {
            of: "apr",
            row: words(ours.kind, ours.tokens, ours.depth, ours.threads),
            because: format!("{} has no such row of this model", self.file),
        }));
        Comparison { file: self.file.clone(), pairs, unpaired }
    }
}

impl Row {
    fn run(&self) -> Option<(Kind, usize)> {
        match (self.n_prompt, self.n_gen) {
            (n, 0) if n > 0 => Some((Kind::Prefill, n)),
            (0, n) if n > 0 => Some((Kind::Decode, n)),
            _ => None,
        }
    }

    /// Which of ours measures the same, or why none does.
    fn partner(&self, ours: &[ResultLine], tensor_bytes: u64, kv: DType) -> Result<usize, String> {
        let Some((kind, tokens)) = self.run() else {
            return Err("apr measures prompts and generation apart".to_owned());
        };
        if let Some(size) = self.model_size.filter(|&size| size != tensor_bytes) {
            return Err(format!(
                "another model: its tensors have {size} bytes, those of ours {tensor_bytes}"
            ));
        }
        let kv = kv.name();
        for theirs in [&self.type_k, &self.type_v].into_iter().flatten() {
            if !theirs.eq_ignore_ascii_case(kv) {
                return Err(format!("its cache is {theirs}, ours {kv}"));
            }
        }
        let same = |line: &ResultLine| {
            (line.kind, line.tokens, line.depth, line.threads)
                == (kind.name(), tokens, self.n_depth, self.n_threads)
        };
        ours.iter().position(same).ok_or_else(|| {
            let option = if kind == Kind::Prefill { "-p" } else { "-n" };
            let (depth, threads) = (self.n_depth, self.n_threads);
            format!("not measured; give {option} {tokens} -d {depth} -t {threads}")
        })
    }

    fn beside(&self, ours: &ResultLine) -> Pair {
        let llama_cpp = match &self.samples_ts[..] {
            [] => self.avg_ts,
            samples => median(samples),
        };
        Pair {
            kind: ours.kind,
            tokens: ours.tokens,
            depth: ours.depth,
            threads: ours.threads,
            apr: ours.median,
            llama_cpp,
            ratio: ours.median / llama_cpp,
        }
    }
}

/// The row in words, with its model if it names one.
impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(model) = &self.model_type {
            write!(f, "{model}, ")?;
        }
        match self.run() {
            Some((kind, n)) => f.write_str(&words(kind.name(), n, self.n_depth, self.n_threads)),
            None => write!(f, "prompt {} and generation {} in one", self.n_prompt, self.n_gen),
        }
    }
}

fn words(kind: &str, tokens: usize, depth: usize, threads: usize) -> String {
    format!("{kind} {tokens} at depth {depth} on {}", plural(threads, "thread"))
}
