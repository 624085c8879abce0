//! Which tensor of one file belongs to which of the other.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use apr_format::Checkpoint;
use apr_model::{Config, HeadRows, LayerRole, Role, head_rows, read_config, role_of};
use apr_tensor::Stored;

use crate::{Error, NotCompared, Reason, Result, Side as WhichSide};

/// What a tensor is known by: what it is for, or its name if that says nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Role(Role),
    Name(String),
}

impl Key {
    fn name(&self) -> String {
        match self {
            Self::Role(role) => role.to_string(),
            Self::Name(name) => name.clone(),
        }
    }

    fn role(&self) -> Option<Role> {
        match self {
            Self::Role(role) => Some(*role),
            Self::Name(_) => None,
        }
    }
}

/// A tensor, or the part of one expert in a tensor of many.
#[derive(Clone, Debug)]
pub(super) struct Named<'c> {
    pub(super) name: Cow<'c, str>,
    pub(super) stored: Stored,
}

/// A model file, as far as its tensors need to know it.
pub(super) struct Side<'c> {
    checkpoint: &'c Checkpoint,
    tensors: BTreeMap<Key, Named<'c>>,
    /// Dimensions and the order of head rows, or why they are not known.
    config: Result<(Config, HeadRows), apr_model::Error>,
}

impl<'c> Side<'c> {
    pub(super) fn of(checkpoint: &'c Checkpoint) -> Self {
        let mut tensors = BTreeMap::new();
        for (name, stored) in checkpoint.tensors() {
            let own_name = Key::Name(name.to_owned());
            let key = role_of(name).map_or(own_name.clone(), Key::Role);
            for (key, tensor) in by_expert(key, Named { name: name.into(), stored: stored.clone() })
            {
                // A role may be filled once; a second tensor for it is known by its name.
                let key = if tensors.contains_key(&key) { own_name.clone() } else { key };
                tensors.insert(key, tensor);
            }
        }
        let config = read_config(checkpoint)
            .and_then(|config| head_rows(checkpoint, &config).map(|rows| (config, rows)));
        Self { checkpoint, tensors, config }
    }

    pub(super) fn path(&self) -> &'c Path {
        self.checkpoint.path()
    }

    pub(super) fn config(&self) -> Result<&Config, &apr_model::Error> {
        self.config.as_ref().map(|(config, _)| config)
    }

    /// The factors that the file divides rotary frequencies by, if it stores such a tensor and it can be read.
    pub(super) fn rope_factors(&self) -> Option<Vec<f32>> {
        self.tensors.get(&Key::Role(Role::RopeFreqs))?.stored.to_f32().ok()
    }

    pub(super) fn head_dim(&self) -> Option<usize> {
        self.config.as_ref().ok().map(|(config, _)| config.head_dim)
    }

    /// What is to be said of how the tensors were taken.
    pub(super) fn note(&self) -> Option<String> {
        match &self.config {
            Ok((_, HeadRows::Halves)) => None,
            Ok((_, HeadRows::Interleaved)) => Some(
                "the rows of q and k are stored in interleaved pairs, as llama.cpp does for Llama; they were \
                 compared in Hugging Face's order"
                    .to_owned(),
            ),
            Err(error) => Some(format!(
                "the config cannot be read, so q and k are compared as they are stored: {error}"
            )),
        }
    }

    /// The tensor with the rows of its heads in Hugging Face's order, if it has heads.
    pub(super) fn in_halves(&self, role: Option<Role>, tensor: &Named<'_>) -> Result<Stored> {
        match (&self.config, role) {
            (Ok((config, rows)), Some(role))
                if whole_heads(&tensor.stored, role, config.head_dim) =>
            {
                rows.to_halves(role, &tensor.stored, config.head_dim)
                    .map_err(|error| Error::model(self.path(), error))
            }
            _ => Ok(tensor.stored.clone()),
        }
    }

    /// All tensors that can be read as numbers: what each is called or for, and the tensor.
    pub(super) fn readable(&self) -> impl Iterator<Item = (String, Option<Role>, Named<'c>)> {
        let readable = self.tensors.iter().filter(|(_, t)| t.stored.dtype().can_dequantize());
        readable.map(|(key, tensor)| (key.name(), key.role(), tensor.clone()))
    }

    /// The tensor of `key`, or the one that stands for it.
    fn get(&self, key: &Key) -> Option<Named<'c>> {
        let tied = || match &self.config {
            Ok((config, _)) if *key == Key::Role(Role::Output) && config.tie_word_embeddings => {
                self.tensors.get(&Key::Role(Role::TokenEmbd))
            }
            _ => None,
        };
        self.tensors.get(key).or_else(tied).cloned()
    }
}

/// The matrices of the experts that one tensor holds, so that they are compared one by one: other files have them in
/// tensors of their own. Any other tensor as it is.
fn by_expert<'c>(key: Key, tensor: Named<'c>) -> Vec<(Key, Named<'c>)> {
    match (&key, tensor.stored.shape().dims()) {
        (&Key::Role(Role::Layer(layer, role)), &[experts, rows, _]) if role.is_of_experts() => {
            let part = |expert: usize| {
                let name = format!("{}[{expert}]", tensor.name).into();
                let stored = tensor.stored.slice_rows(expert * rows..(expert + 1) * rows);
                (Key::Role(Role::Expert(layer, role, expert)), Named { name, stored })
            };
            (0..experts).map(part).collect()
        }
        _ => vec![(key, tensor)],
    }
}

/// Whether the rows of the tensor of `role` are whole heads.
pub(super) fn whole_heads(stored: &Stored, role: Role, head_dim: usize) -> bool {
    use LayerRole::{AttnK, AttnKBias, AttnQ, AttnQBias};
    let rows = match role {
        Role::Layer(_, AttnQ | AttnK) => stored.shape().rows(),
        Role::Layer(_, AttnQBias | AttnKBias) => stored.shape().elements(),
        _ => return false,
    };
    head_dim >= 2 && head_dim.is_multiple_of(2) && rows.is_multiple_of(head_dim)
}

/// The tensors that belong together, and those that are alone.
pub(super) struct Pairing<'c> {
    pub(super) pairs: Vec<(String, Option<Role>, Named<'c>, Named<'c>)>,
    pub(super) not_compared: Vec<NotCompared>,
}

pub(super) fn pair<'c>(a: &Side<'c>, b: &Side<'c>, filter: Option<&str>) -> Result<Pairing<'c>> {
    let mut keys: Vec<&Key> = a.tensors.keys().chain(b.tensors.keys()).collect();
    keys.sort();
    keys.dedup();
    let mut pairing = Pairing { pairs: Vec::new(), not_compared: Vec::new() };
    let mut matched = false;
    for key in keys {
        let (in_a, in_b) = (a.get(key), b.get(key));
        let (name, role) = (key.name(), key.role());
        let name_in = |tensor: &'_ Option<Named<'c>>| tensor.as_ref().map(|t| t.name.clone());
        let names = [Some(Cow::from(name.as_str())), name_in(&in_a), name_in(&in_b)];
        if let Some(filter) = filter
            && !names.into_iter().flatten().any(|name| name.contains(filter))
        {
            continue;
        }
        matched = true;
        let reason = match (in_a, in_b) {
            (Some(in_a), Some(in_b)) => {
                pairing.pairs.push((name, role, in_a, in_b));
                continue;
            }
            (in_a, _) => {
                let side = if in_a.is_none() { WhichSide::A } else { WhichSide::B };
                match role {
                    // Hugging Face's config says what GGUF stores as a tensor.
                    Some(Role::RopeFreqs) => Reason::Derived { side },
                    _ => Reason::Missing { side },
                }
            }
        };
        pairing.not_compared.push(NotCompared { name, reason });
    }
    for (side, model) in [(WhichSide::A, a), (WhichSide::B, b)] {
        for (name, tensor) in model.checkpoint.unreadable() {
            if filter.is_none_or(|filter| name.contains(filter)) {
                matched = true;
                let reason = Reason::Unreadable { side, dtype: tensor.dtype.clone() };
                pairing.not_compared.push(NotCompared { name: name.to_owned(), reason });
            }
        }
    }
    match filter {
        Some(filter) if !matched => {
            let names = [a, b].into_iter().flat_map(|m| m.checkpoint.tensors().take(2));
            let mut examples: Vec<_> = names.map(|(name, _)| format!("`{name}`")).collect();
            examples.sort();
            examples.dedup();
            Err(Error::NothingMatches { filter: filter.to_owned(), examples: examples.join(", ") })
        }
        _ => Ok(pairing),
    }
}
