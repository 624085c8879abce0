//! Model files made in memory, for tests: what cannot fail there panics.

use std::{
    fs,
    ops::{Deref, DerefMut},
    path::Path,
};

use apr_format::Checkpoint;
use apr_model::role_of;
use apr_tensor::{Bytes, DType, Stored};
use half::f16;

/// An [`apr_format::Draft`] whose methods panic where its own return errors.
#[derive(Clone, Debug, Default)]
pub struct Draft(apr_format::Draft);

impl Deref for Draft {
    type Target = apr_format::Draft;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Draft {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl Draft {
    /// Everything that `checkpoint` holds.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        Self(apr_format::Draft::of(checkpoint))
    }

    /// The Hugging Face checkpoint `weights` under the metadata of the GGUF file `metadata`. Matrices become F16
    /// and vectors F32, as in llama.cpp's converter; the architecture's rows must not need permuting.
    ///
    /// # Panics
    /// If a tensor has no role or no numbers.
    pub fn f16_gguf(weights: &Checkpoint, metadata: &Checkpoint) -> Self {
        let mut draft = Self::of(metadata);
        draft.tensors.clear();
        for (name, stored) in weights.tensors() {
            let name = role_of(name).unwrap_or_else(|| panic!("{name} has no role")).gguf_name();
            let values = stored.to_f32().unwrap_or_else(|e| panic!("{name}: {e}"));
            let (dtype, bytes): (DType, Vec<u8>) = match stored.shape().dims().len() {
                1 => (DType::F32, values.iter().flat_map(|x| x.to_le_bytes()).collect()),
                _ => {
                    let halves = values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes());
                    (DType::F16, halves.collect())
                }
            };
            let stored = Stored::new(dtype, stored.shape().clone(), Bytes::from(bytes));
            draft.tensors.push((name, stored.unwrap_or_else(|e| panic!("{e}"))));
        }
        draft
    }

    /// The tensor called `name`, to be altered.
    ///
    /// # Panics
    /// If there is none.
    pub fn tensor(&mut self, name: &str) -> &mut Stored {
        self.tensor_mut(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// The draft as a GGUF file.
    ///
    /// # Panics
    /// If it cannot be written and read.
    pub fn gguf(&self) -> Checkpoint {
        self.to_gguf("draft.gguf").unwrap_or_else(|e| panic!("{e}"))
    }

    /// The draft as an `.apr` file.
    ///
    /// # Panics
    /// If it cannot be written and read.
    pub fn apr(&self) -> Checkpoint {
        self.to_apr("draft.apr").unwrap_or_else(|e| panic!("{e}"))
    }

    /// The draft as a Hugging Face model in `directory`, which has no other files.
    ///
    /// # Panics
    /// If it cannot be written and read.
    pub fn hugging_face(&self, directory: &Path) -> Checkpoint {
        let weights = self.safetensors().unwrap_or_else(|e| panic!("{e}"));
        let config = serde_json::Value::from(&self.metadata).to_string();
        for (name, bytes) in [("model.safetensors", weights), ("config.json", config.into())] {
            fs::write(directory.join(name), bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        Checkpoint::open(directory).unwrap_or_else(|e| panic!("{e}"))
    }
}
