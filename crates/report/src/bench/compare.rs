//! Our figures beside those of `llama-bench`.

use std::fmt::Write;

use serde::Serialize;

use crate::table::{lines, table};

/// What was compared with a file of `llama-bench`, and what was not.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The file, as given.
    pub file: String,
    /// Its rows that we measured too.
    pub pairs: Vec<Pair>,
    /// Rows of either side without a partner.
    pub unpaired: Vec<Unpaired>,
}

/// The same measured by both.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Pair {
    pub kind: &'static str,
    pub tokens: usize,
    pub depth: usize,
    pub threads: usize,
    /// Median tokens per second of ours.
    pub apr: f64,
    /// The same of llama.cpp's, or their mean where the file has no samples.
    pub llama_cpp: f64,
    /// The first over the second.
    pub ratio: f64,
}

/// A row that the other side lacks.
#[derive(Clone, Debug, Serialize)]
pub struct Unpaired {
    /// `apr` or `llama.cpp`.
    pub of: &'static str,
    /// The row, in words.
    pub row: String,
    /// Why it has no partner.
    pub because: String,
}

impl Comparison {
    /// 0 if every row of both sides has a partner, 3 otherwise.
    pub fn exit_code(&self) -> u8 {
        match self.pairs.is_empty() || !self.unpaired.is_empty() {
            true => 3,
            false => 0,
        }
    }

    pub(super) fn text(&self) -> String {
        let mut out = format!("\nagainst  {}\n", self.file);
        if !self.pairs.is_empty() {
            let header = ["", "tokens", "depth", "threads", "apr", "llama.cpp", "apr / llama.cpp"];
            let mut t = table(&header);
            for pair in &self.pairs {
                t.add_row([
                    pair.kind.to_owned(),
                    pair.tokens.to_string(),
                    pair.depth.to_string(),
                    pair.threads.to_string(),
                    super::rate(pair.apr),
                    super::rate(pair.llama_cpp),
                    format!("{:.2}", pair.ratio),
                ]);
            }
            out += &lines(&t);
        }
        for Unpaired { of, row, because } in &self.unpaired {
            let _ = writeln!(out, "not compared: {of}: {row}: {because}");
        }
        if self.pairs.is_empty() {
            out += "UNMEASURED: nothing was compared\n";
        }
        out
    }
}
