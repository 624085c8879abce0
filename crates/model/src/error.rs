//! What can go wrong between a checkpoint and its logits.

use apr_tensor::{DType, Shape, Stored};

use crate::{ObserverError, Site};

/// An error of the model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system gives no memory for the weights.
    #[error(
        "no memory for {bytes} bytes of weights: {source}; a smaller type of weights needs less"
    )]
    Memory {
        /// Of one tensor.
        bytes: usize,
        /// What the system says.
        source: std::io::Error,
    },
    /// The checkpoint is of an architecture that this engine does not run.
    #[error(
        "{file}: architecture `{found}` is not supported; supported: {supported} (`apr inspect` still reads the file)"
    )]
    UnsupportedArchitecture {
        /// The checkpoint.
        file: String,
        /// The architecture that it names.
        found: String,
        /// What runs.
        supported: String,
    },
    /// The checkpoint does not say something that the model needs.
    #[error("{file}: the metadata has no `{key}`{hint}")]
    MissingKey {
        /// The checkpoint.
        file: String,
        /// The key, as this container spells it.
        key: String,
        /// What to do, if anything is known to help.
        hint: &'static str,
    },
    /// The checkpoint asks for something that this engine would compute wrongly.
    #[error("{file}: `{key}` is {found}; {supported}")]
    UnsupportedValue {
        /// The checkpoint.
        file: String,
        /// The key, as this container spells it.
        key: String,
        /// The value.
        found: String,
        /// What is supported.
        supported: String,
    },
    /// The checkpoint says something that no model can be.
    #[error("{file}: `{key}` is {found}; {why}")]
    ImpossibleValue {
        /// The checkpoint.
        file: String,
        /// The key, as this container spells it.
        key: String,
        /// The value.
        found: String,
        /// What it contradicts.
        why: String,
    },
    /// Whoever watched the loading did not want it to go on.
    #[error("loading the model was stopped")]
    LoadingStopped,
    /// There is no memory for a cache of this size.
    #[error(
        "no memory for the keys and values of {positions} positions in one layer; \
         ask for fewer tokens"
    )]
    CacheMemory {
        /// The positions asked for.
        positions: usize,
    },
    /// A tensor that the model needs is not in the checkpoint.
    #[error("{file}: tensor `{name}` is missing; the model cannot be run without it")]
    MissingTensor {
        /// The checkpoint.
        file: String,
        /// The names tried.
        name: String,
    },
    /// A tensor's shape contradicts the metadata.
    #[error("{file}: tensor `{name}` has shape {found}, but the metadata asks for {expected}")]
    TensorShape {
        /// The checkpoint.
        file: String,
        /// The tensor.
        name: String,
        /// The shape that the metadata asks for.
        expected: Shape,
        /// The shape found.
        found: Shape,
    },
    /// A tensor is stored in a type that the backend cannot compute with.
    #[error(
        "{file}: tensor `{name}` is stored as {types}; the {backend} backend computes with: {supported}"
    )]
    UnsupportedType {
        /// The checkpoint.
        file: String,
        /// The tensor.
        name: String,
        /// Its type, or those of the tensors joined with it.
        types: String,
        /// The backend.
        backend: &'static str,
        /// What it can compute with.
        supported: String,
    },
    /// A weight could not be taken by the backend.
    #[error(
        "the {backend} backend cannot hold a weight of types {types}; it computes with: {supported}"
    )]
    WeightType {
        /// The backend.
        backend: &'static str,
        /// The types of the weight's parts.
        types: String,
        /// What it can compute with.
        supported: String,
    },
    /// The sequence does not fit in the context.
    #[error("{needed} positions do not fit in a context of {capacity}")]
    ContextFull {
        /// Positions that the step would reach.
        needed: usize,
        /// Positions that there are.
        capacity: usize,
    },
    /// A step of this cache's sequence ended half-way: some layers may have rows that others lack.
    #[error("an earlier step of this sequence failed: begin again with a new cache")]
    BrokenCache,
    /// There is no most likely token.
    #[error(
        "{wrong} of {vocab_size} logits are NaN or infinite: no token can be chosen; `apr trace --payload` shows where it begins"
    )]
    LogitsNotFinite {
        /// How many.
        wrong: usize,
        /// Of how many.
        vocab_size: usize,
    },
    /// The checkpoint has tensors that this engine would not use.
    #[error(
        "{file}: tensors that a {architecture} model is not known to have: {names}; running without them would be another model"
    )]
    UnknownTensors {
        /// The checkpoint.
        file: String,
        /// The architecture.
        architecture: &'static str,
        /// The tensors, the first few by name.
        names: String,
    },
    /// One tensor is there twice, under two names.
    #[error("{file}: `{first}` and `{second}` are both the {role} of the model")]
    DuplicateTensor {
        /// The checkpoint.
        file: String,
        /// What both are.
        role: String,
        /// One name.
        first: String,
        /// The other.
        second: String,
    },
    /// There is nothing to compute.
    #[error("no tokens: a step needs at least one")]
    NoTokens,
    /// A token id that the vocabulary does not have.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// The number of ids.
        vocab_size: usize,
    },
    /// The plan's kernel cannot hand out this inner value.
    #[error("{site} is fused away in this backend's kernel and cannot be shown")]
    NotSpillable {
        /// The value asked for.
        site: Site,
    },
    /// A replacement does not have the shape of what it replaces.
    #[error("the replacement of {site} has shape {found:?}, but the value has {expected:?}")]
    ReplacementShape {
        /// Where.
        site: Site,
        /// The computed value's shape.
        expected: Vec<usize>,
        /// The replacement's.
        found: Vec<usize>,
    },
    /// A replacement for ids of experts has a value that is none.
    #[error("the replacement of {site} holds {found}, but ids are whole numbers below {experts}")]
    ReplacementId {
        /// Where.
        site: Site,
        /// The value.
        found: f64,
        /// The number of experts.
        experts: usize,
    },
    /// The observer failed.
    #[error("{source}{}", site.map_or(String::new(), |site| format!(" (at {site})")))]
    Observer {
        /// The site it was looking at; `None` at the beginning or the end of a step.
        site: Option<Site>,
        /// What it says.
        source: ObserverError,
    },
    /// The checkpoint is damaged or contradicts itself.
    #[error(transparent)]
    Format(#[from] apr_format::Error),
    /// A stored tensor cannot be read as numbers.
    #[error(transparent)]
    Tensor(#[from] apr_tensor::Error),
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The error of a backend that was given a weight of types it cannot compute with.
    pub fn weight_type(
        backend: &'static str,
        parts: &[Stored],
        supports: impl Fn(DType) -> bool,
    ) -> Self {
        let names = |types: &mut dyn Iterator<Item = DType>| {
            types.map(DType::name).collect::<Vec<_>>().join(", ")
        };
        Self::WeightType {
            backend,
            types: names(&mut parts.iter().map(Stored::dtype)),
            supported: names(&mut DType::all().filter(|&d| supports(d))),
        }
    }
}
