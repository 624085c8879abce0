//! A checkpoint in another container and in other types: what was planned, and what came of it.

use std::fmt::Write;

use serde::Serialize;

use crate::{
    inspect::TensorLine,
    table::{bytes, lines, number, plural, table},
};

/// The report of `apr convert`.
#[derive(Clone, Debug, Serialize)]
pub struct Conversion {
    /// `apr-convert/1`.
    pub schema: &'static str,
    /// The path of what was converted, as given.
    pub source: String,
    /// Its container.
    pub source_container: String,
    /// The path written, as given.
    pub path: String,
    /// Its container.
    pub container: String,
    /// What chose the types; `None` where they stayed as they were.
    pub recipe: Option<String>,
    /// Bytes of the tensors that it was made from.
    pub source_bytes: u64,
    /// Bytes of the tensors in it.
    pub tensor_bytes: u64,
    /// Weights, counted from the shapes.
    pub parameters: u64,
    /// One entry per type, the largest first.
    pub types: Vec<TypeLine>,
    /// What the target does not have, in words.
    pub losses: Vec<String>,
    /// What was decided, in words.
    pub notes: Vec<String>,
    /// What the target has no place for and no one who runs the model needs; the text has only its number.
    pub unneeded: Vec<String>,
    /// All tensors, in the order of the model.
    pub tensors: Vec<TensorLine>,
    /// What came of it; `None` for a plan.
    pub outcome: Option<Outcome>,
}

/// How much is stored in one type.
#[derive(Clone, Debug, Serialize)]
pub struct TypeLine {
    /// The type.
    pub dtype: String,
    /// How many tensors have it.
    pub tensors: usize,
    /// How many of these had another before.
    pub recoded: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Their weights.
    pub parameters: u64,
    /// The root mean square of what rounding to it changed, over that of the weights, both weighted with their importance
    /// if there is one; `None` before it is done and where nothing was rounded.
    pub relative_rmse: Option<f64>,
}

/// What came of a plan.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Bytes of all files written.
    pub file_bytes: u64,
    /// Whether all was read again and compared with the source.
    pub verified: bool,
    /// How long it took, in seconds.
    pub seconds: f64,
}

impl Conversion {
    /// The plan as text: to be read before the work is done.
    pub fn plan(&self) -> String {
        let mut out = String::new();
        let arrow = format!("{} -> {}", self.source_container, self.container);
        let recipe = self.recipe.as_deref().map_or(String::new(), |recipe| format!(", {recipe}"));
        let _ = writeln!(out, "{arrow}{recipe}: {}", plural(self.tensors.len(), "tensor"));
        let bits = self.tensor_bytes as f64 * 8.0 / self.parameters.max(1) as f64;
        let (before, after) = (bytes(self.source_bytes), bytes(self.tensor_bytes));
        let _ = writeln!(out, "{before} -> {after}, {bits:.2} bits per weight\n");
        let mut types = table(&["type", "tensors", "recoded", "size", "weights"]);
        for t in &self.types {
            types.add_row([
                t.dtype.clone(),
                t.tensors.to_string(),
                t.recoded.to_string(),
                bytes(t.bytes),
                t.parameters.to_string(),
            ]);
        }
        out += &lines(&types);
        for note in &self.notes {
            let _ = writeln!(out, "note: {note}");
        }
        if !self.unneeded.is_empty() {
            let keys = plural(self.unneeded.len(), "key");
            let (container, no) = (&self.container, "running the model needs none of them");
            let _ = writeln!(
                out,
                "note: {container} has no place for {keys}; {no} (--json lists them)"
            );
        }
        for loss in &self.losses {
            let _ = writeln!(out, "lost: {loss}");
        }
        out
    }

    /// What came of it as text, if anything was done.
    pub fn outcome(&self) -> Option<String> {
        let outcome = self.outcome.as_ref()?;
        let mut out = String::new();
        let rounded = self.types.iter().filter_map(|t| Some((&t.dtype, t.relative_rmse?)));
        let mut errors = table(&["type", "relative error (rms)"]);
        let mut any = false;
        for (dtype, error) in rounded {
            errors.add_row([dtype.clone(), number(error)]);
            any = true;
        }
        if any {
            out += &format!("\n{}", lines(&errors));
        }
        let verified = match outcome.verified {
            true => "verified: read again and compared with the source",
            false => "not verified (--no-verify)",
        };
        let (size, seconds) = (bytes(outcome.file_bytes), outcome.seconds);
        let _ = writeln!(out, "\n{}: {size} in {seconds:.1} s, {verified}", self.path);
        Some(out)
    }
}
