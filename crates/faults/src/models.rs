//! The models of the bench: a trained one that the caller brings, and random ones made by seed.

mod random;

use std::fmt;

use apr_format::{Checkpoint, Draft};
use apr_model::Architecture;
use apr_tensor::{DType, Shape, Stored, activation::quantize_q8_0};
use half::f16;

use crate::{Error, Result};

/// How the matrices of a model are stored; vectors are F32 in each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[allow(non_camel_case_types, missing_docs, reason = "the names of the field")]
pub enum Format {
    F32,
    Q8_0,
    Q4_K_M,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::Q8_0, Self::Q4_K_M];
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::F32 => "F32",
            Self::Q8_0 => "Q8_0",
            Self::Q4_K_M => "Q4_K_M",
        })
    }
}

/// A model of the bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ModelSpec {
    /// The trained model, stored otherwise: from its own numbers, so that no two formats are the same model.
    Trained {
        /// How it is stored.
        format: Format,
    },
    /// Random weights, with norms and activations as outrageous as those of real models.
    Random {
        /// The architecture.
        architecture: Architecture,
        /// How it is stored.
        format: Format,
    },
}

impl ModelSpec {
    /// All of them: the trained one, then the random ones.
    pub fn all() -> impl Iterator<Item = Self> {
        let trained = Format::ALL.into_iter().map(|format| Self::Trained { format });
        let random = Architecture::ALL.into_iter().flat_map(|architecture| {
            Format::ALL.into_iter().map(move |format| Self::Random { architecture, format })
        });
        trained.chain(random)
    }

    /// Those called by one of `names`, with or without the format; all of them if there are no names.
    pub(crate) fn named(names: &[String]) -> Result<Vec<Self>> {
        let is_called = |spec: Self, name: &String| {
            let full = spec.to_string();
            full == *name || full.strip_suffix(&format!("-{}", spec.format())) == Some(name)
        };
        if let Some(name) = names.iter().find(|name| !Self::all().any(|s| is_called(s, name))) {
            let models = Self::all().map(|spec| spec.to_string()).collect();
            return Err(Error::UnknownModel { name: name.clone(), models });
        }
        let is_wanted =
            |spec: &Self| names.is_empty() || names.iter().any(|name| is_called(*spec, name));
        Ok(Self::all().filter(is_wanted).collect())
    }

    /// How it is stored.
    pub fn format(self) -> Format {
        match self {
            Self::Trained { format } | Self::Random { format, .. } => format,
        }
    }

    /// Makes the model, and the tokens to run it on.
    pub fn build(self, trained: Option<&Trained>, seed: u64) -> Result<Subject> {
        let name = format!("{self}.gguf");
        let (draft, prompt) = match self {
            Self::Trained { format } => {
                let Trained { model, prompt } = trained.ok_or(Error::NoTrainedModel)?;
                (stored_as(Draft::of(model), format)?, prompt.clone())
            }
            Self::Random { architecture, format } => random::model(architecture, format, seed)?,
        };
        Ok(Subject { model: draft.to_gguf(&name)?, prompt })
    }
}

impl fmt::Display for ModelSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Trained { format } => format!("trained-{format}"),
            Self::Random { architecture, format } => format!("{architecture}-{format}"),
        };
        f.pad(&name)
    }
}

/// The trained model: a small GGUF file, and tokens that it knows.
#[derive(Debug)]
pub struct Trained {
    /// The model.
    pub model: Checkpoint,
    /// Tokens of a text like those it was trained on; two dozen or more.
    pub prompt: Vec<u32>,
}

/// A model with the tokens to run it on.
#[derive(Debug)]
pub struct Subject {
    /// The model.
    pub model: Checkpoint,
    /// The tokens.
    pub prompt: Vec<u32>,
}

/// The same model with its matrices in `format`; what is stored as Q4_K_M stays as it is.
fn stored_as(mut draft: Draft, format: Format) -> Result<Draft> {
    if format == Format::Q4_K_M {
        return Ok(draft);
    }
    for (_, stored) in &mut draft.tensors {
        let is_matrix = stored.shape().dims().len() > 1;
        let values = stored.to_f32()?;
        let dims = stored.shape().dims().to_vec();
        *stored = match format {
            Format::Q8_0 if is_matrix => q8_0(&dims, &values)?,
            _ => f32_tensor(&dims, &values)?,
        };
    }
    Ok(draft)
}

/// `values` as an F32 tensor.
pub(crate) fn f32_tensor(
    dims: &[usize],
    values: &[f32],
) -> std::result::Result<Stored, apr_tensor::Error> {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Stored::new(DType::F32, Shape::new(dims), bytes.into())
}

/// `values` as a Q8_0 tensor, in rows of whole blocks.
fn q8_0(dims: &[usize], values: &[f32]) -> std::result::Result<Stored, apr_tensor::Error> {
    let mut bytes = Vec::with_capacity(values.len() / 32 * 34);
    for block in values.as_chunks::<32>().0 {
        let mut quants = [0; 32];
        let scale = quantize_q8_0(block, &mut quants);
        bytes.extend(f16::from_f32(scale).to_le_bytes());
        bytes.extend(quants.map(|q| q as u8));
    }
    Stored::new(DType::Q8_0, Shape::new(dims), bytes.into())
}
