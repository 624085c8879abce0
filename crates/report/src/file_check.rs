//! What holds of a model file, and what is wrong or odd with which of its tensors.

use std::{collections::BTreeMap, fmt::Write};

use apr_check::{Break, Check, Checked, FileCheckup, Outcome};
use comfy_table::CellAlignment;
use serde::Serialize;

use crate::{
    check::{broken, checks_table, listed, not_looked_at, summary, verdict},
    table::{bytes, lines, plural, table},
};

/// Tensors of which what is found is written out; the JSON has them all.
const TENSORS_SHOWN: usize = 40;

/// The report of `apr inspect --check`.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct FileCheckReport {
    /// `apr-inspect-check/1`.
    pub schema: &'static str,
    pub path: String,
    /// `gguf`, `safetensors` or `apr`; `None` if the file cannot be read.
    pub container: Option<String>,
    /// The files that the tensors are in, and their sizes in bytes.
    pub files: Vec<FileLine>,
    /// `held`, `broken` or `unmeasured`, which decides the exit code.
    pub verdict: &'static str,
    pub checks: Vec<Checked>,
    /// The tensors with which something is wrong or odd, in the order of their names.
    pub tensors: Vec<TensorFindings>,
}

/// One file of a model.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct FileLine {
    pub path: String,
    pub bytes: u64,
}

/// What is wrong or odd with one tensor.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct TensorFindings {
    pub name: String,
    pub dtype: Option<String>,
    pub shape: Option<Vec<usize>>,
    pub findings: Vec<Finding>,
}

/// One thing that is wrong or odd.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// The check that says so.
    pub check: &'static str,
    /// Whether that breaks the check; else it may well be as it should.
    pub broken: bool,
    /// What it is.
    pub what: String,
}

impl FileCheckReport {
    /// The report of `checkup`, of the model at `path`.
    pub fn new(path: String, checkup: FileCheckup) -> Self {
        let verdict = verdict(checkup.exit_code());
        let FileCheckup { checkpoint, checks } = checkup;
        let files = checkpoint.iter().flat_map(|checkpoint| checkpoint.files()).map(|file| {
            let (path, bytes) = (file.path().display().to_string(), file.size());
            FileLine { path, bytes }
        });
        let files = files.collect();
        let mut tensors: BTreeMap<&str, Vec<Finding>> = BTreeMap::new();
        for (tensor, finding) in checks.iter().flat_map(of_tensors) {
            tensors.entry(tensor).or_default().push(finding);
        }
        let tensors = tensors.into_iter().map(|(name, findings)| {
            let stored = checkpoint.as_ref().and_then(|checkpoint| checkpoint.tensor(name));
            TensorFindings {
                name: name.to_owned(),
                dtype: stored.map(|stored| stored.dtype().to_string()),
                shape: stored.map(|stored| stored.shape().dims().to_vec()),
                findings,
            }
        });
        Self {
            schema: "apr-inspect-check/1",
            path,
            container: checkpoint.as_ref().map(|checkpoint| checkpoint.container().to_string()),
            files,
            verdict,
            tensors: tensors.collect(),
            checks,
        }
    }

    /// The report as text.
    pub fn text(&self) -> String {
        let mut out = match &self.container {
            Some(container) => format!("model    {} ({container})\n", self.path),
            None => format!("model    {}\n", self.path),
        };
        if !self.files.is_empty() {
            let all = self.files.iter().map(|file| file.bytes).sum();
            let _ = writeln!(out, "files    {}, {}", plural(self.files.len(), "file"), bytes(all));
        }
        out += "\n";
        out += &checks_table(&self.checks);
        for checked in &self.checks {
            out += &of_the_file(checked);
        }
        out += &not_looked_at(&self.checks);
        out += &self.of_tensors();
        out + "\n" + &summary(self.verdict, &self.checks)
    }

    /// One line per finding, the tensors with something broken first.
    fn of_tensors(&self) -> String {
        if self.tensors.is_empty() {
            return String::new();
        }
        let mut tensors: Vec<_> = self.tensors.iter().collect();
        tensors.sort_by_key(|tensor| !tensor.findings.iter().any(|finding| finding.broken));
        let mut t = table(&["tensor", "type", "shape", "", "check", "what"]);
        for column in t.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Left);
        }
        for tensor in tensors.iter().take(TENSORS_SHOWN) {
            let mut heading = [
                tensor.name.clone(),
                tensor.dtype.clone().unwrap_or_else(|| "-".to_owned()),
                tensor.shape.as_ref().map_or("-".to_owned(), |shape| format!("{shape:?}")),
            ];
            for Finding { check, broken, what } in &tensor.findings {
                let sign = if *broken { "✗" } else { "!" };
                let [name, dtype, shape] = std::mem::take(&mut heading);
                t.add_row([&name, &dtype, &shape, sign, *check, what]);
            }
        }
        let mut out = format!("\n{}", lines(&t));
        if let Some(more) = tensors.len().checked_sub(TENSORS_SHOWN + 1) {
            let _ = writeln!(out, "and {}", plural(more + 1, "more tensor"));
        }
        out
    }
}

/// What a check finds that is of a tensor.
fn of_tensors(checked: &Checked) -> Vec<(&str, Finding)> {
    let check = Check::name(checked.name);
    let mut found = Vec::new();
    if let Outcome::Broken { breaks } = &checked.outcome {
        found.extend(breaks.iter().filter_map(|one| match one {
            Break::Tensor { tensor, what } => {
                Some((tensor.as_str(), Finding { check, broken: true, what: what.clone() }))
            }
            _ => None,
        }));
    }
    found.extend(checked.notes.iter().filter_map(|note| {
        let what = note.what.clone();
        note.tensor.as_deref().map(|tensor| (tensor, Finding { check, broken: false, what }))
    }));
    found
}

/// What a check finds that is of no tensor.
fn of_the_file(checked: &Checked) -> String {
    let (name, holds) = (checked.name, checked.holds);
    let mut out = String::new();
    if let Outcome::Broken { breaks } = &checked.outcome {
        let of_file = |one: &&Break| !matches!(one, Break::Tensor { .. });
        let said: Vec<String> = breaks.iter().filter(of_file).map(broken).collect();
        let of_tensors = breaks.len() - said.len();
        let _ = write!(out, "\n{name} is BROKEN. What must hold: {holds}.\n");
        out += &listed(said.into_iter());
        if of_tensors > 0 {
            let _ = writeln!(out, "  {}: see the table below", plural(of_tensors, "tensor"));
        }
    }
    let notes = checked.notes.iter().filter(|note| note.tensor.is_none());
    let notes: Vec<String> = notes.map(ToString::to_string).collect();
    if !notes.is_empty() {
        let _ = write!(out, "\n{name}, notes:\n{}", listed(notes.into_iter()));
    }
    out
}
