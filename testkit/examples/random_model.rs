//! Writes a GGUF file of random weights in the shape of a mixture of 64 experts, of which each token takes 8: 1.78 billion
//! parameters. For measuring what size costs; the text that it makes is noise.
//!
//! ```sh
//! cargo run --release -p apr-testkit --example random_model -- moe.gguf F16
//! ```

use std::{
    env,
    error::Error,
    fs::File,
    io::{BufWriter, Write},
};

use apr_format::gguf::Writer;
use apr_model::{LayerRole, Role};
use apr_tensor::{DType, Shape, quantize_row};

const LAYERS: usize = 16;
const HIDDEN: usize = 1024;
const HEADS: usize = 16;
const KV_HEADS: usize = 4;
const HEAD_DIM: usize = 64;
const EXPERTS: usize = 64;
const EXPERTS_PER_TOK: usize = 8;
const MOE_FFN: usize = 512;
const VOCAB: usize = 151_936;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [path, dtype] = &arguments[..] else { return Err("usage: random_model OUT TYPE".into()) };
    let dtype = [DType::F32, DType::F16, DType::BF16, DType::Q8_0, DType::Q6_K, DType::Q4_K]
        .into_iter()
        .find(|known| known.name() == dtype)
        .ok_or("the types are F32, F16, BF16, Q8_0, Q6_K and Q4_K")?;

    let mut writer = Writer::new();
    writer.set("general.architecture", "qwen3moe");
    writer.set("general.name", "random mixture of experts");
    writer.set("tokenizer.ggml.model", "none");
    for (key, value) in [
        ("block_count", LAYERS),
        ("context_length", 4096),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", 4 * MOE_FFN),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", KV_HEADS),
        ("attention.key_length", HEAD_DIM),
        ("attention.value_length", HEAD_DIM),
        ("expert_count", EXPERTS),
        ("expert_used_count", EXPERTS_PER_TOK),
        ("expert_feed_forward_length", MOE_FFN),
        ("vocab_size", VOCAB),
    ] {
        writer.set(&format!("qwen3moe.{key}"), value as u64);
    }
    writer.set("qwen3moe.rope.freq_base", 1e6f32);
    writer.set("qwen3moe.attention.layer_norm_rms_epsilon", 1e-6f32);

    let tensors = tensors();
    for (role, shape) in &tensors {
        let dtype = if is_matrix(*role) { dtype } else { DType::F32 };
        writer.tensor(&role.gguf_name(), dtype, Shape::new(shape.clone()))?;
    }
    let parameters: usize = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let mut body = writer.begin(BufWriter::with_capacity(1 << 20, File::create(path)?))?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for (role, shape) in &tensors {
        let dtype = if is_matrix(*role) { dtype } else { DType::F32 };
        let cols = shape[shape.len() - 1];
        let rows = shape.iter().product::<usize>() / cols;
        let mut bytes = Vec::new();
        let mut values = vec![0.0; cols];
        let mut row = vec![0; dtype.row_bytes(cols).ok_or("rows are whole blocks")?];
        for _ in 0..rows {
            match shape.len() {
                1 => values.fill(1.0),
                _ => values.iter_mut().for_each(|x| *x = random.normal() / (cols as f32).sqrt()),
            }
            quantize_row(dtype, &values, None, &mut row)?;
            bytes.extend_from_slice(&row);
        }
        body.tensor(&role.gguf_name(), &bytes)?;
    }
    body.finish()?.flush()?;
    let size = std::fs::metadata(path)?.len();
    writeln!(std::io::stdout(), "{path}: {parameters} parameters, {size} bytes")?;
    Ok(())
}

/// What there is, and its shape.
fn tensors() -> Vec<(Role, Vec<usize>)> {
    use LayerRole::*;
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let mut tensors = vec![(Role::TokenEmbd, vec![VOCAB, HIDDEN])];
    for layer in 0..LAYERS {
        for (role, shape) in [
            (AttnNorm, vec![HIDDEN]),
            (AttnQ, vec![q, HIDDEN]),
            (AttnK, vec![kv, HIDDEN]),
            (AttnV, vec![kv, HIDDEN]),
            (AttnQNorm, vec![HEAD_DIM]),
            (AttnKNorm, vec![HEAD_DIM]),
            (AttnOutput, vec![HIDDEN, q]),
            (FfnNorm, vec![HIDDEN]),
            (FfnGateInp, vec![EXPERTS, HIDDEN]),
            (FfnGateExps, vec![EXPERTS, MOE_FFN, HIDDEN]),
            (FfnUpExps, vec![EXPERTS, MOE_FFN, HIDDEN]),
            (FfnDownExps, vec![EXPERTS, HIDDEN, MOE_FFN]),
        ] {
            tensors.push((Role::Layer(layer, role), shape));
        }
    }
    tensors.push((Role::OutputNorm, vec![HIDDEN]));
    tensors
}

/// Norms and the router stay in F32, as in llama.cpp's files.
fn is_matrix(role: Role) -> bool {
    use LayerRole::*;
    !matches!(
        role,
        Role::OutputNorm | Role::Layer(_, AttnNorm | AttnQNorm | AttnKNorm | FfnNorm | FfnGateInp)
    )
}

/// Marsaglia's xorshift.
struct Random(u64);

impl Random {
    /// Nearly normal: the sum of four uniform numbers of 16 bits, with mean 0 and variance 1.
    fn normal(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let sum: u32 = (0..4).map(|i| (self.0 >> (16 * i)) as u32 & 0xffff).sum();
        (sum as f32 / 65536.0 - 2.0) * 3f32.sqrt()
    }
}
