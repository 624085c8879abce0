//! `manifest.json`: what a capture says about itself.
//!
//! The structs are the file format of `docs/capture.md`, field for field. Unknown fields are tolerated, an
//! unknown schema is not. Nothing here looks at tensors.

use std::{fs, io::Read, path::Path};

use apr_model::BackendInfo;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Dims, Error, Result};

/// The schema that this version writes and reads.
pub const SCHEMA: &str = "apr-capture/1";
/// The name of the manifest in a capture's directory.
pub const MANIFEST: &str = "manifest.json";
/// A manifest larger than this is refused unread.
const MAX_MANIFEST_BYTES: u64 = 1 << 30;

/// A whole manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: String,
    /// What computed the values, and from what.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// How the tensors are stored.
    #[serde(default, skip_serializing_if = "Layout::is_default")]
    pub layout: Layout,
    /// The forward steps, in order.
    pub steps: Vec<Step>,
    /// Written last: every file is whole.
    pub complete: bool,
}

/// What computed the values of a capture, and from what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// The program that wrote the capture.
    pub tool: Tool,
    /// The model.
    pub model: Model,
    /// The prompt; its token ids stand in the steps.
    #[serde(default)]
    pub prompt: Option<Prompt>,
    /// What ran the ops.
    #[serde(default)]
    pub backend: Option<Backend>,
    /// The ops and their arithmetic; `None` is an undeclared arithmetic.
    #[serde(default)]
    pub plan: Option<Plan>,
    /// The type that keys and values are rounded to in the cache.
    #[serde(default)]
    pub kv: Option<String>,
}

impl Provenance {
    /// Of values that `model`, loaded from `checkpoint`, computes.
    pub fn of<B: apr_model::Backend>(
        model: &apr_model::Model<B>,
        checkpoint: &apr_format::Checkpoint,
        prompt: Option<Prompt>,
    ) -> Self {
        let info = model.backend().info();
        Self {
            tool: Tool { name: "apr".into(), version: env!("CARGO_PKG_VERSION").into() },
            model: Model {
                path: checkpoint.path().display().to_string(),
                format: checkpoint.container().to_string(),
                architecture: Some(model.config().architecture.name().to_owned()),
                index_sha256: Some(checkpoint.index_sha256()),
                file_sha256: None,
                config: Some(Dims::from(model.config())),
            },
            prompt,
            backend: Some((&info).into()),
            plan: Some(model.plan().into()),
            kv: Some(info.kv.name().to_lowercase()),
        }
    }
}

/// A program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Tool {
    pub name: String,
    pub version: String,
}

/// A model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// The file, as it was given.
    pub path: String,
    /// `gguf`, `safetensors`, `apr` or `huggingface`.
    pub format: String,
    /// The architecture, e.g. `qwen2`.
    #[serde(default)]
    pub architecture: Option<String>,
    /// A hash of the names, types and shapes of the file's tensors.
    #[serde(default)]
    pub index_sha256: Option<String>,
    /// A hash of the whole file, where it was asked for.
    #[serde(default)]
    pub file_sha256: Option<String>,
    /// The model's dimensions.
    #[serde(default)]
    pub config: Option<Dims>,
}

/// A prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prompt {
    /// `text`, `chat` or `tokens`.
    pub mode: String,
    /// The text, unless token ids were given.
    #[serde(default)]
    pub text: Option<String>,
}

/// What ran the ops.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Backend {
    pub name: String,
    #[serde(default)]
    pub isa: Option<String>,
    #[serde(default)]
    pub threads: Option<usize>,
}

impl From<&BackendInfo> for Backend {
    fn from(info: &BackendInfo) -> Self {
        Self {
            name: info.name.to_owned(),
            isa: Some(info.isa.to_owned()),
            threads: Some(info.threads),
        }
    }
}

/// The ops of a step and their arithmetic.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// A hash of everything that decides the bits of the result; `None` for foreign engines.
    #[serde(default)]
    pub fingerprint: Option<String>,
    /// The ops, in the order of computation.
    #[serde(default)]
    pub ops: Vec<PlanOp>,
}

impl From<&apr_model::Plan> for Plan {
    fn from(plan: &apr_model::Plan) -> Self {
        let op = |op: &apr_model::PlanOp| PlanOp {
            op: op.op.clone(),
            sites: op.sites.clone(),
            kernel: op.kernel.kernel.clone(),
            weights: op.kernel.weights.clone(),
            activations: op.kernel.activations.clone(),
            accumulation: op.kernel.accumulation.clone(),
            output: op.kernel.output.clone(),
        };
        Self {
            fingerprint: Some(plan.fingerprint().to_owned()),
            ops: plan.ops().iter().map(op).collect(),
        }
    }
}

/// One op and its arithmetic.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PlanOp {
    /// The op's name, e.g. `linear`.
    pub op: String,
    /// The names of the sites it computes.
    pub sites: Vec<String>,
    /// The kernel.
    pub kernel: String,
    /// The stored types of the weights it reads, in the order of the weight's parts.
    pub weights: Vec<String>,
    /// What activations are rounded to before the product: one type for all parts, or one each.
    #[serde(serialize_with = "one_or_many", deserialize_with = "one_or_many_de")]
    pub activations: Vec<String>,
    /// The type that sums are kept in.
    pub accumulation: String,
    /// The type of the result.
    pub output: String,
}

fn one_or_many<S: Serializer>(values: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    match values {
        [one] => one.serialize(serializer),
        many => many.serialize(serializer),
    }
}

fn one_or_many_de<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(one) => vec![one],
        OneOrMany::Many(many) => many,
    })
}

/// How the tensors of a capture are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// One safetensors file per step.
    #[default]
    Safetensors,
    /// One APRT file per tensor, in one tree per step.
    Aprt,
}

impl Layout {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// One forward step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The file that holds the tensors, or the directory of the APRT tree.
    pub file: String,
    /// `prefill` or `decode`.
    pub phase: String,
    /// The number of the prefill chunk.
    #[serde(default)]
    pub chunk: usize,
    /// The sequence within a batch.
    #[serde(default)]
    pub slot: usize,
    /// The input tokens.
    pub token_ids: Vec<u32>,
    /// Their positions.
    pub positions: Vec<usize>,
    /// Their texts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_text: Option<Vec<String>>,
    /// The values recorded, in the order of computation.
    pub tensors: Vec<Tensor>,
}

/// One recorded value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensor {
    /// The name of its site.
    pub name: String,
    /// The site's stage.
    pub stage: String,
    /// The site's layer.
    #[serde(default)]
    pub layer: Option<u32>,
    /// Row-major dimensions.
    pub shape: Vec<usize>,
    /// What they are: `row`, `channel`, `head`, `key`.
    pub axes: Vec<String>,
    /// The type of the elements.
    pub dtype: String,
    /// The position of each row.
    pub positions: Vec<usize>,
    /// A hash of the tensor's bytes.
    #[serde(default)]
    pub blake3: Option<String>,
}

impl Manifest {
    /// A manifest without steps, of a capture that has just been begun.
    pub(crate) fn begun(provenance: Provenance, layout: Layout) -> Self {
        Self { schema: SCHEMA.to_owned(), provenance, layout, steps: Vec::new(), complete: false }
    }

    /// Reads and parses a manifest; `path` is the file.
    pub fn read(path: &Path) -> Result<Self> {
        let file = fs::File::open(path).map_err(Error::read(path))?;
        let mut json = Vec::new();
        file.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut json).map_err(Error::read(path))?;
        if json.len() as u64 > MAX_MANIFEST_BYTES {
            let expected = format!("at most {MAX_MANIFEST_BYTES} bytes");
            return Err(Error::malformed(path, "the manifest's length", expected, "more"));
        }
        Self::parse(&json, path)
    }

    /// Parses a manifest; `path` is named in errors.
    pub fn parse(json: &[u8], path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Schema {
            schema: String,
        }
        let malformed = |source| Error::Manifest { path: path.to_owned(), source };
        let Schema { schema } = serde_json::from_slice(json).map_err(malformed)?;
        if schema != SCHEMA {
            return Err(Error::Schema { path: path.to_owned(), found: schema });
        }
        serde_json::from_slice(json).map_err(malformed)
    }

    /// Writes the manifest into `directory`.
    pub(crate) fn write(&self, directory: &Path) -> Result<()> {
        let path = directory.join(MANIFEST);
        let mut json = serde_json::to_vec(self).expect("a manifest is plain data");
        json.push(b'\n');
        // On a full disk the manifest that was there stays readable.
        let new = directory.join(format!("{MANIFEST}.new"));
        fs::write(&new, json).map_err(Error::write(&new))?;
        fs::rename(&new, &path).map_err(Error::write(&path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = r#"{
      "schema": "apr-capture/1", "tool": {"name": "apr", "version": "0.1.0"},
      "model": {"path": "m.gguf", "format": "gguf", "architecture": "qwen2", "index_sha256": "00", "file_sha256": null,
        "config": {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
          "head_dim": 64, "intermediate_size": 768, "vocab_size": 2048, "attention_bias": true, "qk_norm": false}},
      "prompt": {"mode": "text", "text": "What is 2+2?"},
      "backend": {"name": "cpu", "isa": "avx512", "threads": 2},
      "plan": {"fingerprint": "00", "ops": [
        {"op": "rms_norm", "sites": ["layers.0.attn_norm"], "kernel": "rms_norm/f32", "weights": ["F32"],
         "activations": "F32", "accumulation": "f32", "output": "F32"},
        {"op": "linear", "sites": [], "kernel": "k", "weights": ["Q4_K", "Q8_0"], "activations": ["Q8_K", "Q8_0"],
         "accumulation": "f32", "output": "F32"}]},
      "kv": "f16", "from_the_future": 1,
      "steps": [{"file": "step-0000.safetensors", "phase": "prefill", "chunk": 0, "slot": 0, "token_ids": [1, 2],
        "positions": [0, 1], "tensors": [{"name": "embedding", "stage": "embedding", "layer": null, "shape": [2, 8],
          "axes": ["row", "channel"], "dtype": "F32", "positions": [0, 1], "blake3": "00"}]}],
      "complete": true }"#;

    fn parse(json: &str) -> Result<Manifest> {
        Manifest::parse(json.as_bytes(), Path::new("c/manifest.json"))
    }

    #[test]
    fn the_documented_manifest_round_trips_and_unknown_fields_are_tolerated() {
        let manifest = parse(EXAMPLE).unwrap();
        let ops = &manifest.provenance.plan.as_ref().unwrap().ops;
        assert_eq!(ops[0].activations, ["F32"]);
        assert_eq!(ops[1].activations, ["Q8_K", "Q8_0"]);
        assert_eq!(manifest.layout, Layout::Safetensors);
        let json = serde_json::to_string(&manifest).unwrap();
        assert_eq!(parse(&json).unwrap(), manifest);
        assert!(json.ends_with(r#""complete":true}"#), "`complete` comes last");
        assert!(json.contains(r#""activations":"F32""#) && !json.contains("layout"));
    }

    #[test]
    fn an_unknown_schema_is_refused_by_name() {
        let error = parse(&EXAMPLE.replace("capture/1", "capture/2")).unwrap_err().to_string();
        assert!(error.contains("c/manifest.json") && error.contains("apr-capture/2"), "{error}");
    }

    #[test]
    fn a_manifest_without_its_required_fields_is_refused() {
        for field in
            ["\"complete\": true", "\"token_ids\": [1, 2],", "\"schema\": \"apr-capture/1\","]
        {
            let json = EXAMPLE.replace(field, "");
            assert!(matches!(parse(&json), Err(Error::Manifest { .. })), "{field}");
        }
    }
}
