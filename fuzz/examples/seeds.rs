//! Writes one small valid file per target into `corpus/TARGET/seed`.

use std::{fs, path::Path};

use apr_format::{Error, Map, apr, gguf, safetensors, write::Body};
use apr_tensor::DType;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (target, file) in
        [("gguf", a_gguf()?), ("safetensors", a_safetensors()?), ("apr", an_apr()?)]
    {
        let directory = directory.join(target);
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("seed"), file)?;
    }
    Ok(())
}

fn a_gguf() -> Result<Vec<u8>, Error> {
    let mut writer = gguf::Writer::new();
    writer
        .set("general.architecture", "llama")
        .set("general.alignment", 32u32)
        .set("tokens", vec!["a", "b"])
        .set("scores", vec![0.5f32])
        .set("nested", vec![vec![1u32], vec![2]])
        .set("bos", true)
        .set("types", vec![-1, 2])
        .set("eps", 1e-6f64);
    writer.tensor("a", DType::Q4_K, [1, 256])?.tensor("b", DType::F32, [2, 3])?;
    fill(writer.begin(Vec::new())?)
}

fn a_safetensors() -> Result<Vec<u8>, Error> {
    let mut writer = safetensors::Writer::new();
    writer.set("format", "pt");
    writer.tensor("a", DType::BF16, [2, 3])?.tensor("b", DType::F32, [])?;
    fill(writer.begin(Vec::new())?)
}

fn an_apr() -> Result<Vec<u8>, Error> {
    let mut writer = apr::Writer::new();
    writer.set("num_layers", 1u32).set("rope_theta", 1e4);
    writer.set("rope_scaling", [("factor", 8.0)].into_iter().collect::<Map>());
    writer.tensor("a", DType::AprQ4, [32])?.tensor("b", DType::AprQ8, [3])?;
    fill(writer.begin(Vec::new())?)
}

/// Ends a file with zeros for every tensor; all of them are small.
fn fill(mut body: Body<Vec<u8>>) -> Result<Vec<u8>, Error> {
    while let Some((name, len)) = body.next_tensor().map(|(name, len)| (name.to_owned(), len)) {
        body.tensor(&name, &vec![0; len as usize])?;
    }
    body.finish()
}
