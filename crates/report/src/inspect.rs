//! What a model file holds.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::{
    json::all_finite_or_text,
    table::{bytes, lines, number, table},
};

/// The report of `apr inspect`.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// `apr-inspect/1`.
    pub schema: &'static str,
    /// The path as given.
    pub path: String,
    /// `gguf`, `safetensors`, `apr`.
    pub container: String,
    /// Why it cannot be run, if it cannot.
    pub not_runnable: Option<String>,
    /// Weights, counted from the shapes.
    pub parameters: u64,
    /// How many of them one token meets, in a mixture of experts.
    pub parameters_per_token: Option<u64>,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Bytes of keys and values per position, as f16; `None` where the config cannot be read.
    pub kv_bytes_per_position: Option<u64>,
    /// The longest context.
    pub context: Option<u64>,
    /// What the model runs with, under the keys of `config.json` and with defaults filled in; `None` where the file
    /// does not tell.
    pub config: Option<Map<String, Value>>,
    /// One entry per stored type, the largest first.
    pub types: Vec<TypeShare>,
    /// The metadata as the file has it; long arrays are shortened to their first entries and their length.
    pub metadata: Vec<(String, Value)>,
    /// All tensors, in file order.
    pub tensors: Vec<TensorLine>,
}

/// How much of the file is stored in one type.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct TypeShare {
    pub dtype: String,
    pub tensors: usize,
    pub bytes: u64,
    pub parameters: u64,
}

/// One tensor.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct TensorLine {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    /// `None` for a type of unknown size.
    pub bytes: Option<u64>,
}

impl Inspection {
    /// The report as text.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |key: &str, value: String| {
            let _ = writeln!(out, "{key:<14}{value}");
        };
        line("path", self.path.clone());
        line("container", self.container.clone());
        let millions = |n: u64| format!("{:.3} M", n as f64 / 1e6);
        let met = self.parameters_per_token;
        let met = met.map_or_else(String::new, |n| format!(", {} of them per token", millions(n)));
        line("parameters", format!("{} ({}){met}", self.parameters, millions(self.parameters)));
        line("tensors", format!("{} in {}", self.tensors.len(), bytes(self.tensor_bytes)));
        if let (Some(kv), Some(context)) = (self.kv_bytes_per_position, self.context) {
            let all = kv.saturating_mul(context);
            line(
                "kv cache",
                format!("{} per position as f16, {} for all {context}", bytes(kv), bytes(all)),
            );
            line(
                "memory",
                format!(
                    "about {} to run with a full cache",
                    bytes(self.tensor_bytes.saturating_add(all))
                ),
            );
        }
        line(
            "runs",
            self.not_runnable.clone().map_or("yes".to_owned(), |why| format!("no: {why}")),
        );

        if let Some(config) = &self.config {
            out += "\nConfig\n";
            for (key, value) in config {
                let _ = writeln!(out, "{key} = {value}");
            }
        }

        out += "\nTypes\n";
        let mut types = table(&["type", "tensors", "size", "bits/weight"]);
        for t in &self.types {
            let bits = t.bytes as f64 * 8.0 / t.parameters.max(1) as f64;
            types.add_row([
                t.dtype.clone(),
                t.tensors.to_string(),
                bytes(t.bytes),
                format!("{bits:.2}"),
            ]);
        }
        out += &lines(&types);

        out += "\nMetadata\n";
        for (key, value) in &self.metadata {
            let _ = writeln!(out, "{key} = {}", shortened(&value.to_string()));
        }

        out += "\nTensors\n";
        let mut tensors = table(&["name", "type", "shape", "size"]);
        for t in &self.tensors {
            tensors.add_row([
                t.name.clone(),
                t.dtype.clone(),
                format!("{:?}", t.shape),
                t.bytes.map_or("?".to_owned(), bytes),
            ]);
        }
        out + &lines(&tensors)
    }
}

/// The beginning of a long value, such as a chat template.
fn shortened(value: &str) -> String {
    const SHOWN: usize = 160;
    match value.char_indices().nth(SHOWN) {
        None => value.to_owned(),
        Some((end, _)) => {
            let more = value[end..].chars().count();
            format!("{} ... and {more} more characters", &value[..end])
        }
    }
}

/// The report of `apr inspect --tensor`.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct TensorInspection {
    pub schema: &'static str,
    pub path: String,
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: u64,
    pub count: u64,
    pub nan: u64,
    pub inf: u64,
    pub zeros: u64,
    /// Rows in which every element is 0.
    pub zero_rows: u64,
    pub min: Option<f64>,
    pub max: Option<f64>,
    pub mean: Option<f64>,
    pub std: Option<f64>,
    pub rms: Option<f64>,
    /// The first elements of the first row.
    #[serde(serialize_with = "all_finite_or_text")]
    pub first: Vec<f64>,
}

impl TensorInspection {
    /// The report as text.
    pub fn text(&self) -> String {
        let of = |x: Option<f64>| x.map_or("-".to_owned(), number);
        let first: Vec<String> = self.first.iter().map(|&x| number(x)).collect();
        let rows = [
            ("tensor", self.name.clone()),
            ("type", self.dtype.clone()),
            ("shape", format!("{:?}", self.shape)),
            ("size", bytes(self.bytes)),
            ("count", self.count.to_string()),
            ("min", of(self.min)),
            ("max", of(self.max)),
            ("mean", of(self.mean)),
            ("std", of(self.std)),
            ("rms", of(self.rms)),
            ("NaN", self.nan.to_string()),
            ("Inf", self.inf.to_string()),
            ("zeros", self.zeros.to_string()),
            ("zero rows", self.zero_rows.to_string()),
            ("first", first.join(" ")),
        ];
        rows.map(|(key, value)| format!("{key:<14}{value}\n")).concat()
    }
}
