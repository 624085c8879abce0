//! GGUF files that are too large to commit, made from those that are.

use apr_format::{Checkpoint, gguf};
use apr_model::role_of;
use apr_tensor::{Bytes, DType};
use half::f16;

/// The model in the Hugging Face directory `weights` as an F16 GGUF file in memory, under the metadata of the
/// GGUF file `metadata`. Matrices become F16 and vectors F32, as in llama.cpp's converter; the architecture's rows must
/// not need permuting.
///
/// # Panics
/// If either is not as expected.
pub fn f16_gguf(weights: &Checkpoint, metadata: &Checkpoint) -> Checkpoint {
    let mut writer = gguf::Writer::new();
    for (key, value) in metadata.metadata().iter() {
        writer.set(key, value.clone());
    }
    let mut bodies = Vec::new();
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
        writer.tensor(&name, dtype, stored.shape().clone()).unwrap_or_else(|e| panic!("{e}"));
        bodies.push((name, bytes));
    }
    let mut body = writer.begin(Vec::new()).unwrap_or_else(|e| panic!("{e}"));
    for (name, bytes) in bodies {
        body.tensor(&name, &bytes).unwrap_or_else(|e| panic!("{e}"));
    }
    let file = body.finish().unwrap_or_else(|e| panic!("{e}"));
    Checkpoint::from_bytes("f16.gguf", Bytes::from(file)).unwrap_or_else(|e| panic!("{e}"))
}
