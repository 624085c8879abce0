//! The values of a forward pass as statistics, one line per stage.

use std::fmt::Write;

use apr_model::Site;
use apr_tensor::Summary;
use serde::Serialize;

use crate::{
    json::finite_or_text,
    table::{lines, number, plural, short, table},
};

/// The report of `apr trace`.
#[derive(Clone, Debug, Serialize)]
pub struct Trace {
    /// `apr-trace/1`.
    pub schema: &'static str,
    /// The model file, as given.
    pub model: String,
    /// Its architecture.
    pub architecture: &'static str,
    /// `cpu`, `reference`.
    pub backend: &'static str,
    /// The instruction set; results do not depend on it.
    pub isa: &'static str,
    /// Threads; results do not depend on it.
    pub threads: usize,
    /// The type of cached keys and values.
    pub kv: &'static str,
    /// The fingerprint of what was executed: the same, traced or not.
    pub plan: String,
    /// `text`, `chat` or `tokens`.
    pub prompt_mode: &'static str,
    /// The prompt, template applied; `None` for bare ids.
    pub prompt_text: Option<String>,
    /// The prompt's ids.
    pub prompt_token_ids: Vec<u32>,
    /// Each id as text.
    pub prompt_tokens: Vec<Option<String>>,
    /// The greedy continuation, as far as it was traced.
    pub token_ids: Vec<u32>,
    /// One entry per forward step.
    pub steps: Vec<TraceStep>,
    /// What deserves a look, in the order of computation.
    pub findings: Vec<String>,
    /// What was not done as asked, and why.
    pub notes: Vec<String>,
    /// Where the values were saved.
    pub capture: Option<String>,
}

/// One forward step.
#[derive(Clone, Debug, Serialize)]
pub struct TraceStep {
    /// The number of the step.
    pub index: usize,
    /// `prefill` or `decode`.
    pub phase: &'static str,
    /// The first position and the one after the last.
    pub positions: [usize; 2],
    /// The tokens that it reads.
    pub token_ids: Vec<u32>,
    /// Each of them as text.
    pub tokens: Vec<Option<String>>,
    /// One entry per stage, in the order of computation.
    pub stages: Vec<StageStatistics>,
    /// Logits of the step's last row that are NaN or infinite.
    pub wrong_logits: usize,
    /// The likeliest next tokens after the step's last row; none unless all its logits are finite.
    pub top: Vec<Candidate>,
}

/// One stage's statistics, over two samples.
#[derive(Clone, Debug, Serialize)]
pub struct StageStatistics {
    /// `layers.3.q_post_rope`.
    pub site: String,
    /// The layer; `None` for a stage of the whole model.
    pub layer: Option<u32>,
    /// `q_post_rope`.
    pub stage: &'static str,
    /// Over all rows of the step.
    pub all_rows: Statistics,
    /// Over its last row only.
    pub last_row: Statistics,
    /// Rows in which every element is 0.
    pub zero_rows: u64,
}

/// Statistics of one sample. NaN and infinite elements are counted, and left out of the rest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Statistics {
    /// Rows in the sample.
    pub rows: usize,
    pub count: u64,
    pub min: Option<f64>,
    pub max: Option<f64>,
    pub mean: Option<f64>,
    pub std: Option<f64>,
    pub nan: u64,
    pub inf: u64,
    pub zeros: u64,
}

impl Statistics {
    /// The statistics of a sample of `rows` rows.
    pub fn new(rows: usize, summary: &Summary) -> Self {
        Self {
            rows,
            count: summary.count(),
            min: summary.min(),
            max: summary.max(),
            mean: summary.mean(),
            std: summary.std(),
            nan: summary.nan(),
            inf: summary.inf(),
            zeros: summary.zeros(),
        }
    }

    /// Those of a sample of ids, of which there is no mean.
    pub fn of_ids(rows: usize, summary: &Summary) -> Self {
        Self { mean: None, std: None, zeros: 0, ..Self::new(rows, summary) }
    }
}

/// A possible next token.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Candidate {
    pub id: u32,
    pub text: Option<String>,
    #[serde(serialize_with = "finite_or_text")]
    pub logit: f64,
    #[serde(serialize_with = "finite_or_text")]
    pub probability: f64,
}

impl Trace {
    /// The report as text.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(
            out,
            "{} ({}) on {} ({}, {}, {} cache), plan {}",
            self.model,
            self.architecture,
            self.backend,
            self.isa,
            plural(self.threads, "thread"),
            self.kv,
            short(&self.plan),
        );
        let _ = writeln!(
            out,
            "prompt: {} ({}): {}",
            plural(self.prompt_token_ids.len(), "token"),
            self.prompt_mode,
            self.shown_prompt(),
        );
        for step in &self.steps {
            out += "\n";
            step.write_text(&mut out);
        }
        out += "\nWorth a look\n";
        match self.findings.is_empty() {
            true => {
                out += "  nothing in what is shown: no NaN, no Inf, no dead row, no jump of the residual stream between layers\n"
            }
            false => self.findings.iter().for_each(|finding| {
                let _ = writeln!(out, "  {finding}");
            }),
        }
        if !self.notes.is_empty() {
            out += "\nNotes\n";
            self.notes.iter().for_each(|note| {
                let _ = writeln!(out, "  {note}");
            });
        }
        if let Some(capture) = &self.capture {
            let _ = writeln!(out, "\nvalues saved in {capture}");
        }
        out
    }

    fn shown_prompt(&self) -> String {
        const SHOWN: usize = 24;
        let one = |(id, text): (&u32, &Option<String>)| match text {
            Some(text) => format!("{id}:{text:?}"),
            None => id.to_string(),
        };
        let tokens = self.prompt_token_ids.iter().zip(&self.prompt_tokens);
        let mut shown: Vec<String> = tokens.take(SHOWN).map(one).collect();
        if self.prompt_token_ids.len() > SHOWN {
            shown.push("...".to_owned());
        }
        shown.join(" ")
    }
}

impl TraceStep {
    fn write_text(&self, out: &mut String) {
        let [first, end] = self.positions;
        let rows = end - first;
        let place = match (&self.token_ids[..], &self.tokens[..]) {
            ([id], [Some(text)]) => format!("position {first}, token {id} {text:?}"),
            ([id], _) => format!("position {first}, token {id}"),
            _ => format!("positions {first}..{end}"),
        };
        let rows = plural(rows, "row");
        let _ = writeln!(out, "step {}: {}, {rows} at {place}", self.index, self.phase);
        let mut t =
            table(&["", "sample", "count", "min", "max", "mean", "std", "NaN", "Inf", "zeros"]);
        let mut layer = None;
        for stage in &self.stages {
            if stage.layer.is_some() && stage.layer != layer {
                t.add_row([format!("layer {}", stage.layer.unwrap_or_default())]);
            }
            layer = stage.layer;
            let indent = if stage.layer.is_some() { "  " } else { "" };
            let name = format!("{indent}{}", stage.stage);
            let samples = [(name, &stage.all_rows), (String::new(), &stage.last_row)];
            // One row is its own last row: said once.
            let shown = if stage.all_rows.rows > 1 { 2 } else { 1 };
            for (i, (name, s)) in samples.into_iter().take(shown).enumerate() {
                let of = |x: Option<f64>| x.map_or("-".to_owned(), number);
                let sample = match i {
                    0 => plural(s.rows, "row"),
                    _ => "last row".to_owned(),
                };
                t.add_row([
                    name,
                    sample,
                    s.count.to_string(),
                    of(s.min),
                    of(s.max),
                    of(s.mean),
                    of(s.std),
                    s.nan.to_string(),
                    s.inf.to_string(),
                    s.zeros.to_string(),
                ]);
            }
        }
        *out += &lines(&t);
        if self.wrong_logits > 0 {
            let (last, wrong) = (end - 1, self.wrong_logits);
            let _ = writeln!(
                out,
                "no next token after position {last}: NaN or infinite logits: {wrong}"
            );
        }
        if !self.top.is_empty() {
            let _ = writeln!(out, "likeliest next tokens after position {}", end - 1);
            let mut t = table(&["  token", "id", "logit", "probability"]);
            for candidate in &self.top {
                let text = candidate.text.as_ref().map_or("-".to_owned(), |t| format!("{t:?}"));
                t.add_row([
                    format!("  {text}"),
                    candidate.id.to_string(),
                    number(candidate.logit),
                    format!("{:.4}", candidate.probability),
                ]);
            }
            *out += &lines(&t);
        }
    }
}

/// The name of `site` and what it belongs to, for a [`StageStatistics`].
pub fn site_names(site: Site) -> (String, Option<u32>, &'static str) {
    (site.to_string(), site.layer, site.stage.name())
}
