//! What is to be written, and what it cannot say.

use std::{fmt, str::FromStr};

use apr_model::HeadRows;
use apr_tensor::DType;

use crate::Recipe;

/// The container to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A GGUF file.
    Gguf,
    /// An `.apr` file.
    Apr,
    /// A Hugging Face directory, or one safetensors file.
    Safetensors,
}

impl Target {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Gguf, Self::Apr, Self::Safetensors];

    /// The name, which is the extension of its files as well.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gguf => "gguf",
            Self::Apr => "apr",
            Self::Safetensors => "safetensors",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Target {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|target| target.name() == name).ok_or(())
    }
}

/// What metadata has to say about the tensors that will be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The order of the rows of `q_proj` and `k_proj`.
    pub head_rows: HeadRows,
    /// The type of most weights.
    pub dtype: DType,
    /// The recipe that chose the types, if one did.
    pub recipe: Option<Recipe>,
    /// Whether a head of its own is written; else it is tied to the embedding.
    pub head: bool,
}

/// Something of the source that will not be in the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// What: a key, a tensor, a file.
    pub what: String,
    /// Why the target cannot have it.
    pub why: String,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}
