//! Model files made in memory: from others, altered.

use apr_tensor::{Bytes, Stored};

use crate::{
    Checkpoint, Map, Result,
    apr::Apr,
    gguf::Gguf,
    safetensors::Safetensors,
    write::{Format, Writer},
};

/// A model file that is yet to be written: metadata and tensors, to be altered at will.
///
/// What a container cannot hold is refused when the draft becomes a file, not before.
#[derive(Clone, Debug, Default)]
pub struct Draft {
    /// Keys and values.
    pub metadata: Map,
    /// Names and tensors, in the order of the file.
    pub tensors: Vec<(String, Stored)>,
}

impl Draft {
    /// Everything that `checkpoint` holds and that can be read. Tensors are shared, not copied.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let metadata = checkpoint.metadata().iter().map(|(k, v)| (k, v.clone())).collect();
        let tensors = checkpoint.tensors().map(|(name, stored)| (name.to_owned(), stored.clone()));
        Self { metadata, tensors: tensors.collect() }
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&Stored> {
        self.tensors.iter().find(|(n, _)| n == name).map(|(_, stored)| stored)
    }

    /// The tensor called `name`, to be altered.
    pub fn tensor_mut(&mut self, name: &str) -> Option<&mut Stored> {
        self.tensors.iter_mut().find(|(n, _)| n == name).map(|(_, stored)| stored)
    }

    /// Takes the tensor called `name` out.
    pub fn remove_tensor(&mut self, name: &str) -> Option<Stored> {
        let index = self.tensors.iter().position(|(n, _)| n == name)?;
        Some(self.tensors.remove(index).1)
    }

    /// The draft as a GGUF file; `name` stands for its path in messages.
    pub fn to_gguf(&self, name: &str) -> Result<Checkpoint> {
        Checkpoint::from_bytes(name, Bytes::from(self.written::<Gguf>(&self.metadata)?))
    }

    /// The draft as an `.apr` file; `name` stands for its path in messages.
    pub fn to_apr(&self, name: &str) -> Result<Checkpoint> {
        Checkpoint::from_bytes(name, Bytes::from(self.written::<Apr>(&self.metadata)?))
    }

    /// The tensors as the bytes of a safetensors file. The metadata is not in it: Hugging Face keeps that in
    /// `config.json`.
    pub fn safetensors(&self) -> Result<Vec<u8>> {
        self.written::<Safetensors>(&Map::default())
    }

    /// The bytes of a file of the tensors and `metadata`.
    fn written<F: Format>(&self, metadata: &Map) -> Result<Vec<u8>> {
        let mut writer = Writer::<F>::new();
        for (key, value) in metadata.iter() {
            writer.set(key, value.clone());
        }
        for (name, stored) in &self.tensors {
            writer.tensor(name, stored.dtype(), stored.shape().clone())?;
        }
        let mut body = writer.begin(Vec::new())?;
        while let Some((next, _)) = body.next_tensor() {
            let next = next.to_owned();
            // Names are unique: `begin` has checked that.
            let stored = self.tensor(&next).expect("every tensor was declared from the draft");
            body.tensor(&next, stored.bytes())?;
        }
        body.finish()
    }
}

#[cfg(test)]
mod tests {
    use apr_tensor::DType;

    use super::*;

    fn vector(values: &[f32]) -> Stored {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Stored::new(DType::F32, [values.len()].into(), bytes.into()).unwrap()
    }

    fn draft() -> Draft {
        let mut draft = Draft::default();
        draft.metadata.insert("general.architecture", "qwen2");
        draft.tensors.push(("b".to_owned(), vector(&[1.0, 2.0])));
        draft.tensors.push(("a".to_owned(), vector(&[3.0])));
        draft
    }

    #[test]
    fn a_draft_of_a_file_is_that_file() {
        let file = draft().to_gguf("one.gguf").unwrap();
        let again = Draft::of(&file).to_gguf("two.gguf").unwrap();
        assert_eq!(again.file_sha256(), file.file_sha256());
        assert_eq!(again.path().to_str(), Some("two.gguf"));
    }

    #[test]
    fn tensors_can_be_replaced_and_removed() {
        let mut draft = draft();
        *draft.tensor_mut("a").unwrap() = vector(&[5.0, 6.0, 7.0]);
        assert!(draft.remove_tensor("b").is_some() && draft.remove_tensor("b").is_none());
        let file = draft.to_apr("x.apr").unwrap();
        assert_eq!(file.tensors().len(), 1);
        assert_eq!(file.require("a").unwrap().to_f32().unwrap(), [5.0, 6.0, 7.0]);
    }

    #[test]
    fn what_a_container_cannot_hold_is_an_error() {
        let mut draft = draft();
        draft.tensors.push(("a".to_owned(), vector(&[9.0])));
        let error = draft.to_gguf("x.gguf").unwrap_err().to_string();
        assert!(error.contains("two tensors `a`"), "{error}");
    }
}
