//! How much each column of a matrix matters: llama.cpp's importance matrices.
//!
//! `llama-imatrix` runs a text through a model and sums the squares of what each matrix is multiplied with, column by
//! column: `NAME.in_sum2`, over as many rows as `NAME.counts` says. A mixture has one row of sums for each expert.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use apr_format::Checkpoint;
use apr_model::{Role, role_of};

use crate::{Error, Planned, Result};

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

/// The mean squares of the inputs of matrices.
#[derive(Clone, Debug)]
pub struct Importance {
    file: PathBuf,
    entries: BTreeMap<Role, Entry>,
}

/// Of one tensor: a row for each of its matrices.
#[derive(Clone, Debug)]
struct Entry {
    name: String,
    columns: usize,
    means: Vec<f32>,
}

impl Importance {
    /// Reads a GGUF file of `llama-imatrix`.
    pub fn open(path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let refuse = |name: &str, why: String| Error::Importance {
            file: path.to_owned(),
            tensor: name.to_owned(),
            why,
        };
        let mut entries = BTreeMap::new();
        for (full, sums) in checkpoint.tensors() {
            let Some(name) = full.strip_suffix(SUMS) else { continue };
            let role = role_of(name)
                .ok_or_else(|| refuse(name, "no model that is known here has it".to_owned()))?;
            let columns = sums.shape().cols();
            let counts = checkpoint.require(&format!("{name}{COUNTS}"))?.to_f32()?;
            let mut means = sums.to_f32()?;
            if columns == 0 || counts.len() * columns != means.len() {
                let why = format!(
                    "{} sums of {columns} columns, but {} counts",
                    sums.shape(),
                    counts.len()
                );
                return Err(refuse(name, why));
            }
            for (row, &count) in means.chunks_exact_mut(columns).zip(&counts) {
                for mean in row {
                    // An expert that the text never chose: nothing is known of its columns.
                    *mean = if count > 0.0 { *mean / count } else { 1.0 };
                    if !(mean.is_finite() && *mean >= 0.0) {
                        return Err(refuse(name, format!("{mean} is no mean of squares")));
                    }
                }
            }
            entries.insert(role, Entry { name: name.to_owned(), columns, means });
        }
        if entries.is_empty() {
            return Err(Error::NoImportance { file: path.to_owned() });
        }
        Ok(Self { file: path.to_owned(), entries })
    }

    /// The means for the tensor of `role`: a row for each matrix in it.
    pub fn of(&self, role: Role) -> Option<&[f32]> {
        if let Role::Expert(layer, part, expert) = role {
            let all = self.entries.get(&Role::Layer(layer, part))?;
            return all.means.chunks_exact(all.columns).nth(expert);
        }
        Some(&self.entries.get(&role)?.means)
    }

    /// How many tensors it is of.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it is of none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Everything must be of one of `tensors`, and of its dimensions.
    pub(crate) fn check(&self, tensors: &[Planned]) -> Result<()> {
        for (&role, entry) in &self.entries {
            let refuse = |why: String| Error::Importance {
                file: self.file.clone(),
                tensor: entry.name.clone(),
                why,
            };
            let same = |tensor: &Role| match (*tensor, role) {
                (Role::Expert(l, p, _), Role::Layer(layer, part)) => (l, p) == (layer, part),
                (tensor, role) => tensor == role,
            };
            let mut matrices = 0;
            for tensor in tensors.iter().filter(|tensor| same(&tensor.role)) {
                let columns = tensor.shape.cols();
                if columns != entry.columns {
                    return Err(refuse(format!(
                        "{} columns; the model has {columns}",
                        entry.columns
                    )));
                }
                matrices += tensor.matrices();
            }
            let found = entry.means.len() / entry.columns;
            if matrices == 0 {
                return Err(refuse("the model has no such tensor".to_owned()));
            }
            if matrices != found {
                return Err(refuse(format!("{found} matrices; the model has {matrices}")));
            }
        }
        Ok(())
    }
}
