//! Tensors by role, checked against the config, in the order of rows that the decoder wants.

use std::collections::BTreeMap;

use apr_format::Checkpoint;
use apr_tensor::{Shape, Stored};

use super::config::{HeadRows, head_rows, read_config};
use crate::{
    Architecture, Config, Error, LayerRole, Result, RopeScaling,
    decoder::{Decoder, Ffn, Layer},
    names::{Role, role_of},
};

/// The config that `checkpoint` runs with, or why it does not run: what binding finds out, without a backend and
/// without a look at the weights (but for a head that is stored although it is tied).
///
/// Whether a backend takes the types of the weights is for the backend to say.
pub fn runnable_config(checkpoint: &Checkpoint) -> Result<Config> {
    Ok(bind(&Unkept, checkpoint)?.config)
}

/// Takes the weights of `checkpoint` to `keeper`.
pub(crate) fn bind<K: Keeper>(
    keeper: &K,
    checkpoint: &Checkpoint,
) -> Result<Decoder<K::Matrix, K::Vector>> {
    let mut config = read_config(checkpoint)?;
    let mut tensors = Tensors::of(checkpoint, &config)?;
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    let (q_dim, kv_dim, head_dim) = (config.q_dim(), config.kv_dim(), config.head_dim);

    let table = tensors.take(Role::TokenEmbd, [config.vocab_size, hidden])?;
    let head = match config.tie_word_embeddings {
        true => {
            let stored_too = tensors.take_if_there(Role::Output, [config.vocab_size, hidden])?;
            stored_too.map_or(Ok(()), |head| head.refuse_unless_tied(&table))?;
            None
        }
        false => Some(tensors.take(Role::Output, [config.vocab_size, hidden])?),
    };
    if let Some(factors) = tensors.take_if_there(Role::RopeFreqs, [config.rotary_dim / 2])? {
        if config.rope_scaling != RopeScaling::None {
            return Err(Error::UnsupportedValue {
                file: factors.file,
                key: factors.name,
                found: "there beside another scaling of rotary frequencies".to_owned(),
                supported: "supported: one of the two".to_owned(),
            });
        }
        config.rope_scaling = RopeScaling::Factors(factors.original.to_f32()?);
    }

    // Grows with the layers that are there: their number is only the file's word.
    let mut layers = Vec::new();
    for index in 0..config.num_hidden_layers {
        let mut take = |role: LayerRole, shape: &[usize]| {
            tensors.take(Role::Layer(index, role), Shape::new(shape))
        };
        let qkv = [
            take(LayerRole::AttnQ, &[q_dim, hidden])?,
            take(LayerRole::AttnK, &[kv_dim, hidden])?,
            take(LayerRole::AttnV, &[kv_dim, hidden])?,
        ];
        let qkv_bias = match config.attention_bias {
            false => None,
            true => Some([
                take(LayerRole::AttnQBias, &[q_dim])?,
                take(LayerRole::AttnKBias, &[kv_dim])?,
                take(LayerRole::AttnVBias, &[kv_dim])?,
            ]),
        };
        let mut head_norm = |role| match config.qk_norm {
            false => Ok(None),
            true => take(role, &[head_dim])?.vector(keeper).map(Some),
        };
        let (q_norm, k_norm) = (head_norm(LayerRole::AttnQNorm)?, head_norm(LayerRole::AttnKNorm)?);
        layers.push(Layer {
            attn_norm: take(LayerRole::AttnNorm, &[hidden])?.vector(keeper)?,
            qkv: keeper.matrix(&qkv)?,
            qkv_bias: qkv_bias.map(|parts| keeper.vector(&parts)).transpose()?,
            q_norm,
            k_norm,
            attn_output: take(LayerRole::AttnOutput, &[hidden, q_dim])?.matrix(keeper)?,
            ffn_norm: take(LayerRole::FfnNorm, &[hidden])?.vector(keeper)?,
            ffn: match config.experts_of(index) {
                None => Ffn::Dense {
                    gate: take(LayerRole::FfnGate, &[ffn, hidden])?.matrix(keeper)?,
                    up: take(LayerRole::FfnUp, &[ffn, hidden])?.matrix(keeper)?,
                    down: take(LayerRole::FfnDown, &[hidden, ffn])?.matrix(keeper)?,
                },
                Some(moe) => {
                    let (experts, moe_ffn) = (moe.num_experts, moe.moe_intermediate_size);
                    let router = take(LayerRole::FfnGateInp, &[experts, hidden])?.matrix(keeper)?;
                    let mut stacked = |role, shape| {
                        keeper.matrix(&tensors.take_experts(index, role, experts, shape)?)
                    };
                    Ffn::Moe {
                        config: moe.clone(),
                        router,
                        gate: stacked(LayerRole::FfnGateExps, [moe_ffn, hidden])?,
                        up: stacked(LayerRole::FfnUpExps, [moe_ffn, hidden])?,
                        down: stacked(LayerRole::FfnDownExps, [hidden, moe_ffn])?,
                    }
                }
            },
        });
    }
    let norm = tensors.take(Role::OutputNorm, [hidden])?.vector(keeper)?;
    tensors.all_used(config.architecture)?;

    Ok(Decoder {
        rope: config.rope_frequencies(),
        embed_tokens: table.matrix(keeper)?,
        lm_head: head.map(|head| head.matrix(keeper)).transpose()?,
        layers,
        norm,
        config,
    })
}

/// What becomes of the tensors that are bound.
pub(crate) trait Keeper {
    /// What becomes of a matrix.
    type Matrix;
    /// What becomes of a norm weight or a bias.
    type Vector;

    /// Takes the matrix whose rows are those of `parts`, one part after the other.
    fn matrix(&self, parts: &[Named]) -> Result<Self::Matrix>;

    /// Takes the vector made of `parts`, one after the other.
    fn vector(&self, parts: &[Named]) -> Result<Self::Vector>;
}

/// Keeps nothing.
struct Unkept;

impl Keeper for Unkept {
    type Matrix = ();
    type Vector = ();

    fn matrix(&self, _: &[Named]) -> Result<()> {
        Ok(())
    }

    fn vector(&self, _: &[Named]) -> Result<()> {
        Ok(())
    }
}

/// A tensor and what to call it in an error.
pub(crate) struct Named {
    file: String,
    name: String,
    role: Role,
    /// As in the file, in the shape that the decoder wants.
    original: Stored,
    head_rows: HeadRows,
    head_dim: usize,
}

impl Named {
    /// The tensor as the file has it, in the shape that the decoder wants.
    pub(crate) fn in_file(&self) -> &Stored {
        &self.original
    }

    fn matrix<K: Keeper>(self, keeper: &K) -> Result<K::Matrix> {
        keeper.matrix(&[self])
    }

    fn vector<K: Keeper>(self, keeper: &K) -> Result<K::Vector> {
        keeper.vector(&[self])
    }

    /// The tensor with the rows of heads in the order of rotation by halves: copied where the file has another.
    fn stored(&self) -> Result<Stored> {
        self.head_rows.to_halves(self.role, &self.original, self.head_dim)
    }

    /// Some files store a tied head all the same. Where it is another matrix than the `table` it is tied to,
    /// engines differ in which they use (transformers before 5 the table, since then the head).
    fn refuse_unless_tied(&self, table: &Self) -> Result<()> {
        let (head, table) = (&self.original, &table.original);
        if head.dtype() == table.dtype() && head.bytes()[..] == table.bytes()[..] {
            return Ok(());
        }
        Err(Error::UnsupportedValue {
            file: self.file.clone(),
            key: "tie_word_embeddings".to_owned(),
            found: format!("true, but `{}` is not the embedding", self.name),
            supported: "remove the tensor, or set the key to false to use it".to_owned(),
        })
    }

    /// What the tensor takes in its file.
    pub(super) fn bytes(&self) -> u64 {
        self.original.bytes().len() as u64
    }

    pub(super) fn all_stored(parts: &[Self]) -> Result<Vec<Stored>> {
        parts.iter().map(Self::stored).collect()
    }

    /// Names the tensors in an error that the backend could only give types for.
    pub(super) fn blame(parts: &[Self], error: Error) -> Error {
        match error {
            Error::WeightType { backend, types, supported } => Error::UnsupportedType {
                file: parts[0].file.clone(),
                name: parts.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join("`, `"),
                types,
                backend,
                supported,
            },
            other => other,
        }
    }
}

impl HeadRows {
    /// The tensor of `role` with the rows of its heads in the order of [`HeadRows::Halves`]. Its rows are whole heads.
    pub fn to_halves(self, role: Role, stored: &Stored, head_dim: usize) -> Result<Stored> {
        // Rows `2i` and `2i + 1` of each head go to `i` and `i + head_dim / 2`.
        let half = head_dim / 2;
        self.moved(role, stored, head_dim, |channel| 2 * (channel % half) + channel / half)
    }

    /// The way back: the tensor of `role`, which is in the order of [`HeadRows::Halves`], in this order.
    pub fn from_halves(self, role: Role, stored: &Stored, head_dim: usize) -> Result<Stored> {
        let half = head_dim / 2;
        self.moved(role, stored, head_dim, |channel| channel / 2 + channel % 2 * half)
    }

    /// The tensor with each channel of its heads from another one, where heads are not stored in halves.
    fn moved(
        self,
        role: Role,
        stored: &Stored,
        head_dim: usize,
        source_of: impl Fn(usize) -> usize,
    ) -> Result<Stored> {
        use LayerRole::{AttnK, AttnKBias, AttnQ, AttnQBias};
        let source_of = |row: usize| row / head_dim * head_dim + source_of(row % head_dim);
        Ok(match (self, role) {
            (Self::Interleaved, Role::Layer(_, AttnQ | AttnK)) => stored.permute_rows(source_of),
            (Self::Interleaved, Role::Layer(_, AttnQBias | AttnKBias)) => {
                let column = stored.with_shape([stored.shape().elements(), 1])?;
                column.permute_rows(source_of).with_shape(stored.shape().clone())?
            }
            _ => stored.clone(),
        })
    }
}

/// The tensors of a checkpoint that nobody has taken yet.
struct Tensors<'c> {
    file: String,
    by_role: BTreeMap<Role, (&'c str, &'c Stored)>,
    foreign: Vec<&'c str>,
    head_rows: HeadRows,
    head_dim: usize,
}

impl<'c> Tensors<'c> {
    fn of(checkpoint: &'c Checkpoint, config: &Config) -> Result<Self> {
        // Passed over, a head of an unknown type would pass for a tied one.
        if let Some((name, _)) = checkpoint.unreadable().next() {
            checkpoint.require(name)?;
        }
        let file = checkpoint.path().display().to_string();
        let mut by_role = BTreeMap::new();
        let mut foreign = Vec::new();
        for (name, stored) in checkpoint.tensors() {
            match role_of(name) {
                Some(role) => {
                    if let Some((first, _)) = by_role.insert(role, (name, stored)) {
                        let (first, second) = (first.to_owned(), name.to_owned());
                        let role = role.to_string();
                        return Err(Error::DuplicateTensor { file, role, first, second });
                    }
                }
                // Old Hugging Face checkpoints store what the config already says.
                None if name.ends_with(".rotary_emb.inv_freq") => {}
                None => foreign.push(name),
            }
        }
        let head_rows = head_rows(checkpoint, config)?;
        Ok(Self { file, by_role, foreign, head_rows, head_dim: config.head_dim })
    }

    fn take(&mut self, role: Role, shape: impl Into<Shape>) -> Result<Named> {
        self.take_if_there(role, shape)?.ok_or_else(|| Error::MissingTensor {
            file: self.file.clone(),
            name: format!("{}` or `{}", role.gguf_name(), role.hf_name()),
        })
    }

    fn take_if_there(&mut self, role: Role, shape: impl Into<Shape>) -> Result<Option<Named>> {
        let Some((name, stored)) = self.by_role.remove(&role) else { return Ok(None) };
        let (expected, found) = (shape.into(), stored.shape().clone());
        let (file, name) = (self.file.clone(), name.to_owned());
        if found != expected {
            return Err(Error::TensorShape { file, name, expected, found });
        }
        let (original, head_rows, head_dim) = (stored.clone(), self.head_rows, self.head_dim);
        Ok(Some(Named { file, name, role, original, head_rows, head_dim }))
    }

    /// The matrices of all experts, one below the other: the tensor that holds all of them, or one of each.
    fn take_experts(
        &mut self,
        layer: usize,
        role: LayerRole,
        experts: usize,
        [out, cols]: [usize; 2],
    ) -> Result<Vec<Named>> {
        if let Some(mut all) = self.take_if_there(Role::Layer(layer, role), [experts, out, cols])? {
            all.original = all.original.with_shape([experts * out, cols])?;
            return Ok(vec![all]);
        }
        (0..experts).map(|e| self.take(Role::Expert(layer, role, e), [out, cols])).collect()
    }

    fn all_used(self, architecture: Architecture) -> Result<()> {
        let left = self.by_role.values().map(|(name, _)| *name);
        let unused: Vec<&str> = left.chain(self.foreign).collect();
        if unused.is_empty() {
            return Ok(());
        }
        const SHOWN: usize = 6;
        let mut names = format!("`{}`", unused[..unused.len().min(SHOWN)].join("`, `"));
        if unused.len() > SHOWN {
            names += &format!(" and {} more", unused.len() - SHOWN);
        }
        let architecture = architecture.name();
        Err(Error::UnknownTensors { file: self.file, architecture, names })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_head_rows_goes_there_and_back() {
        let bytes: Vec<u8> = (0..12u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
        let pairs = Stored::new(apr_tensor::DType::F32, [12, 1].into(), bytes.into()).unwrap();
        let role = Role::Layer(0, LayerRole::AttnQ);
        let halves = HeadRows::Interleaved.to_halves(role, &pairs, 6).unwrap();
        let expected = [0.0, 2.0, 4.0, 1.0, 3.0, 5.0, 6.0, 8.0, 10.0, 7.0, 9.0, 11.0];
        assert_eq!(halves.to_f32().unwrap(), expected);
        let back = HeadRows::Interleaved.from_halves(role, &halves, 6).unwrap();
        assert_eq!(back.to_f32().unwrap(), pairs.to_f32().unwrap());
    }
}
