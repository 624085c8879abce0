//! Model files made in memory: from others, altered.

use std::{fs, io::Write, path::Path};

use apr_format::{Checkpoint, Map, Metadata, apr, gguf, safetensors, write::Body};
use apr_model::role_of;
use apr_tensor::{Bytes, DType, Stored};
use half::f16;

/// A model file that is yet to be written: metadata and tensors, to be altered at will.
#[derive(Clone, Debug, Default)]
pub struct Draft {
    /// Keys and values.
    pub metadata: Map,
    /// Names and tensors.
    pub tensors: Vec<(String, Stored)>,
}

impl Draft {
    /// Everything that `checkpoint` holds.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let tensors =
            checkpoint.tensors().map(|(name, stored)| (name.to_owned(), stored.clone())).collect();
        Self { metadata: map(checkpoint.metadata()), tensors }
    }

    /// The Hugging Face checkpoint `weights` under the metadata of the GGUF file `metadata`. Matrices become F16
    /// and vectors F32, as in llama.cpp's converter; the architecture's rows must not need permuting.
    ///
    /// # Panics
    /// If a tensor has no role or no numbers.
    pub fn f16_gguf(weights: &Checkpoint, metadata: &Checkpoint) -> Self {
        let mut draft = Self { metadata: map(metadata.metadata()), tensors: Vec::new() };
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
        let found = self.tensors.iter_mut().find(|(n, _)| n == name);
        &mut found.unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    /// The draft as a GGUF file.
    ///
    /// # Panics
    /// If it cannot be written and read.
    pub fn gguf(&self) -> Checkpoint {
        let mut writer = gguf::Writer::new();
        for (key, value) in self.metadata.iter() {
            writer.set(key, value.clone());
        }
        for (name, stored) in &self.tensors {
            let declared = writer.tensor(name, stored.dtype(), stored.shape().clone());
            declared.unwrap_or_else(|e| panic!("{e}"));
        }
        self.read("draft.gguf", writer.begin(Vec::new()).unwrap_or_else(|e| panic!("{e}")))
    }

    /// The draft as an `.apr` file.
    ///
    /// # Panics
    /// If it cannot be written and read.
    pub fn apr(&self) -> Checkpoint {
        let mut writer = apr::Writer::new();
        for (key, value) in self.metadata.iter() {
            writer.set(key, value.clone());
        }
        for (name, stored) in &self.tensors {
            let declared = writer.tensor(name, stored.dtype(), stored.shape().clone());
            declared.unwrap_or_else(|e| panic!("{e}"));
        }
        self.read("draft.apr", writer.begin(Vec::new()).unwrap_or_else(|e| panic!("{e}")))
    }

    /// The draft as a Hugging Face model in `directory`, which has no other files.
    ///
    /// # Panics
    /// If it cannot be written and read.
    pub fn hugging_face(&self, directory: &Path) -> Checkpoint {
        let mut writer = safetensors::Writer::new();
        for (name, stored) in &self.tensors {
            let declared = writer.tensor(name, stored.dtype(), stored.shape().clone());
            declared.unwrap_or_else(|e| panic!("{e}"));
        }
        let weights = self.fill(writer.begin(Vec::new()).unwrap_or_else(|e| panic!("{e}")));
        let config = serde_json::Value::from(&self.metadata).to_string();
        for (name, bytes) in [("model.safetensors", weights), ("config.json", config.into())] {
            fs::write(directory.join(name), bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        Checkpoint::open(directory).unwrap_or_else(|e| panic!("{e}"))
    }

    fn read(&self, name: &str, body: Body<Vec<u8>>) -> Checkpoint {
        let file = Bytes::from(self.fill(body));
        Checkpoint::from_bytes(name, file).unwrap_or_else(|e| panic!("{e}"))
    }

    fn fill<W: Write>(&self, mut body: Body<W>) -> W {
        while let Some((next, _)) = body.next_tensor() {
            let next = next.to_owned();
            let (_, stored) = self.tensors.iter().find(|(n, _)| *n == next).expect("declared");
            body.tensor(&next, stored.bytes()).unwrap_or_else(|e| panic!("{e}"));
        }
        body.finish().unwrap_or_else(|e| panic!("{e}"))
    }
}

fn map(metadata: &Metadata) -> Map {
    let mut map = Map::default();
    for (key, value) in metadata.iter() {
        map.insert(key, value.clone());
    }
    map
}
