//! Which tensors will be written: their names, types and shapes, and what each is made of.
//!
//! A plan costs nothing but the reading of metadata. All that can be refused without looking at weights is refused
//! here, before any work is done.

use std::collections::BTreeMap;

use apr_format::Checkpoint;
use apr_model::{
    Architecture, Config, HeadRows, LayerRole, Role, head_rows, role_of, runnable_config,
};
use apr_tensor::{DType, Shape, Stored};

use crate::{
    Error, Importance, Layout, Loss, Recipe, Result, Target,
    metadata::{Translated, translate},
    rope,
    types::stored_as,
};

/// What is asked for beside the container.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// What chooses the types; without, they stay as they are where the target has them.
    pub recipe: Option<Recipe>,
    /// How much each column of a matrix matters.
    pub importance: Option<Importance>,
    /// Whether quantised weights may be quantised again: the errors of both add up.
    pub requantize: bool,
    /// Whether there is nothing but weights: one safetensors file, in no directory.
    pub weights_alone: bool,
    /// Whether what the target cannot express may be left out.
    pub lossy: bool,
}

/// What will be written.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The container.
    pub target: Target,
    /// The config that the source runs with.
    pub config: Config,
    /// The tensors, in the order of the model.
    pub tensors: Vec<Planned>,
    /// The metadata.
    pub metadata: Translated,
    /// What the target will not have.
    pub losses: Vec<Loss>,
    /// How much each column of a matrix matters.
    pub importance: Option<Importance>,
    /// How the tensors are stored.
    pub layout: Layout,
}

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Its name in the target.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Its type in the target.
    pub dtype: DType,
    /// Its shape in the target.
    pub shape: Shape,
    /// What it is made of, one below the other.
    pub(crate) parts: Vec<Stored>,
    /// How the rows of its heads are to be moved.
    pub(crate) turn: Option<Turn>,
}

/// A change of the order of the rows in each head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    to: HeadRows,
    head_dim: usize,
}

impl Plan {
    /// What is to be written of `source`.
    ///
    /// A source that does not run is refused: what lacks a tensor, or has one that nobody would use, is no better in another
    /// container.
    pub fn new(source: &Checkpoint, target: Target, options: Options) -> Result<Self> {
        let Options { recipe, importance, requantize, weights_alone, lossy } = options;
        if let Some(recipe) = recipe {
            target.check_recipe(recipe)?;
        }
        let config = runnable_config(source)?;
        let mut by_role = by_role(source);
        if config.tie_word_embeddings {
            // Some files store a tied head all the same. It is the embedding: binding has compared them.
            by_role.remove(&Role::Output);
        }
        if target == Target::Gguf
            && let Some(factors) = rope::llama3_factors(&config)
        {
            by_role.insert(Role::RopeFreqs, vec![factors]);
        }

        let to = target.head_rows(&config)?;
        let turn = Turn { to, head_dim: config.head_dim };
        let turn = (to != head_rows(source, &config)?).then_some(turn);
        let mut tensors = Vec::new();
        let mut losses = Vec::new();
        for (role, parts) in target.arranged(by_role) {
            let shape = shape_of(role, &parts);
            let importance = importance.is_some();
            let dtype = stored_as(target, recipe, &config, role, &parts[0], importance);
            if let Some(from) = parts.iter().map(Stored::dtype).find(|&from| {
                !requantize && from != dtype && from.is_quantized() && dtype.is_quantized()
            }) {
                return Err(Error::Requantize { tensor: target.name_of(role), from, to: dtype });
            }
            let unreadable =
                |part: &&Stored| part.dtype() != dtype && !part.dtype().can_dequantize();
            if let Some(part) = parts.iter().find(unreadable) {
                let reason = apr_tensor::Error::NotNumeric(part.dtype());
                return Err(Error::Unreadable { tensor: target.name_of(role), to: dtype, reason });
            }
            let rounded = |part: &Stored| part.dtype() == DType::F64 && dtype != DType::F64;
            if recipe.is_none() && parts.iter().any(rounded) {
                let what = format!("tensor `{}`", target.name_of(role));
                losses.push(Loss { what, why: format!("F64 is rounded to {dtype}") });
            }
            let name = target.name_of(role);
            let turn = turn.filter(|_| is_of_heads(role));
            tensors.push(Planned { name, role, dtype, shape, parts, turn });
        }
        if let Some(importance) = &importance {
            importance.check(&tensors)?;
        }

        let head = tensors.iter().any(|tensor| tensor.role == Role::Output);
        let dtype = recipe.map_or_else(|| most_weights(&tensors), Recipe::dtype);
        let layout = Layout { head_rows: to, dtype, recipe, head };
        let metadata = translate(source, &config, target, &layout)?;
        // In Hugging Face's words it is a part of the config, and there is no such tensor.
        if target == Target::Safetensors || rope::says_scaling(&metadata.map) {
            tensors.retain(|tensor| tensor.role != Role::RopeFreqs);
        }
        losses.extend(metadata.losses.iter().cloned());
        if weights_alone {
            losses.extend(metadata.files.iter().map(|(name, _)| Loss {
                what: name.clone(),
                why: "a safetensors file has weights alone; a directory has all".to_owned(),
            }));
        }
        if !losses.is_empty() && !lossy {
            return Err(Error::Lossy { losses });
        }
        Ok(Self { target, config, tensors, metadata, losses, importance, layout })
    }

    /// Bytes of all tensors as they will be.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(Planned::bytes).sum()
    }

    /// Bytes of all that they are made of.
    pub fn source_bytes(&self) -> u64 {
        self.tensors.iter().map(Planned::source_bytes).sum()
    }

    /// The matrices that are quantised without an importance, although there is a file of them.
    pub fn without_importance(&self) -> impl Iterator<Item = &Planned> {
        let importance = self.importance.as_ref();
        self.tensors.iter().filter(move |tensor| {
            let quantised = tensor.is_recoded() && tensor.dtype.is_quantized();
            quantised && importance.is_some_and(|importance| importance.of(tensor.role).is_none())
        })
    }
}

impl Planned {
    /// Bytes that it will have.
    pub fn bytes(&self) -> u64 {
        self.dtype.tensor_bytes(&self.shape).expect("planned in whole blocks") as u64
    }

    /// Bytes of what it is made of.
    pub fn source_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes().len() as u64).sum()
    }

    /// How many matrices lie one below the other in it.
    pub(crate) fn matrices(&self) -> usize {
        match self.shape.dims() {
            [experts, _, _] => *experts,
            _ => 1,
        }
    }

    /// Whether its numbers are written in another type; else bytes are moved.
    pub fn is_recoded(&self) -> bool {
        self.parts.iter().any(|part| part.dtype() != self.dtype)
    }

    /// Whether blocks become plain numbers.
    pub fn is_dequantised(&self) -> bool {
        !self.dtype.is_quantized() && self.parts.iter().any(|part| part.dtype().is_quantized())
    }

    /// Part `index`, with its rows in the target's order.
    pub(crate) fn part(&self, index: usize) -> Result<Stored> {
        let stored = &self.parts[index];
        let Some(Turn { to, head_dim }) = self.turn else { return Ok(stored.clone()) };
        let pairs = HeadRows::Interleaved;
        Ok(match to {
            HeadRows::Interleaved => pairs.from_halves(self.role, stored, head_dim)?,
            HeadRows::Halves => pairs.to_halves(self.role, stored, head_dim)?,
        })
    }
}

/// The tensors of `source` by what they are for; it has no others. Several of one role are the matrices of its experts.
fn by_role(source: &Checkpoint) -> BTreeMap<Role, Vec<Stored>> {
    let known = |(name, stored): (&str, &Stored)| Some((role_of(name)?, vec![stored.clone()]));
    source.tensors().filter_map(known).collect()
}

impl Target {
    /// What this container calls the tensor of `role`.
    pub fn name_of(self, role: Role) -> String {
        match self {
            Self::Gguf => role.gguf_name(),
            Self::Apr | Self::Safetensors => role.hf_name(),
        }
    }

    /// The order of the rows of heads that this container has.
    fn head_rows(self, config: &Config) -> Result<HeadRows> {
        if self != Self::Gguf || config.architecture != Architecture::Llama {
            return Ok(HeadRows::Halves);
        }
        if config.rotary_dim != config.head_dim {
            return Err(Error::Inexpressible {
                target: self,
                what: format!("{} of {} rotated channels", config.rotary_dim, config.head_dim),
                why: "its Llama rotates whole heads",
            });
        }
        Ok(HeadRows::Interleaved)
    }

    /// The same tensors as this container has them: GGUF has one of all experts, Hugging Face one of each.
    fn arranged(self, by_role: BTreeMap<Role, Vec<Stored>>) -> BTreeMap<Role, Vec<Stored>> {
        let mut arranged: BTreeMap<Role, Vec<Stored>> = BTreeMap::new();
        for (role, mut parts) in by_role {
            match (self, role) {
                (Self::Gguf, Role::Expert(layer, part, _)) => {
                    // In the order of the experts: so the map is ordered.
                    arranged.entry(Role::Layer(layer, part)).or_default().append(&mut parts);
                }
                (Self::Apr | Self::Safetensors, Role::Layer(layer, part))
                    if part.is_of_experts() =>
                {
                    let &[experts, rows, _] = parts[0].shape().dims() else {
                        unreachable!("binding has checked the shape of {role}")
                    };
                    for expert in 0..experts {
                        let one = parts[0].slice_rows(expert * rows..(expert + 1) * rows);
                        arranged.insert(Role::Expert(layer, part, expert), vec![one]);
                    }
                }
                _ => {
                    arranged.insert(role, parts);
                }
            }
        }
        arranged
    }
}

/// The shape of a tensor that is made of `parts`.
fn shape_of(role: Role, parts: &[Stored]) -> Shape {
    let shape = parts[0].shape();
    match role {
        Role::Layer(_, part) if part.is_of_experts() && shape.dims().len() == 2 => {
            Shape::new([&[parts.len()], shape.dims()].concat())
        }
        _ => shape.clone(),
    }
}

fn is_of_heads(role: Role) -> bool {
    use LayerRole::{AttnK, AttnKBias, AttnQ, AttnQBias};
    matches!(role, Role::Layer(_, AttnQ | AttnK | AttnQBias | AttnKBias))
}

/// The type that most weights will be in.
fn most_weights(tensors: &[Planned]) -> DType {
    let mut weights: BTreeMap<DType, usize> = BTreeMap::new();
    for tensor in tensors {
        *weights.entry(tensor.dtype).or_default() += tensor.shape.elements();
    }
    weights.into_iter().max_by_key(|&(_, weights)| weights).map_or(DType::F32, |(dtype, _)| dtype)
}
