//! What the reference rounds, and to what.

use apr_tensor::{DType, activation::ActivationType};
use half::{bf16, f16};

/// A declared arithmetic: where an engine rounds on purpose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arithmetic {
    /// What activations are rounded to before a product with a weight.
    pub activations: Activations,
    /// What keys and values are rounded to in the cache: `F64` (not at all), `F32`, `F16` or `BF16`.
    pub kv: DType,
    /// What queries are rounded to before they meet the keys.
    pub queries: ActivationType,
    /// What softmax weights are rounded to before they meet the values.
    pub probabilities: ActivationType,
}

/// What activations are rounded to before a product with a weight, by the weight's stored type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Activations {
    /// Nothing.
    Plain,
    /// As our CPU backend does: 8 bits for quantised weights, with exact sums where llama.cpp's Q8_1 has rounded ones;
    /// activations stay f32 for float weights.
    Cpu,
    /// As llama.cpp does: [`ActivationType::for_weight`].
    LlamaCpp,
    /// The same for every weight.
    All(ActivationType),
    /// As a plan says, type by type; a weight that is not in the list meets plain activations.
    Declared(Vec<(DType, ActivationType)>),
}

impl Activations {
    /// What is rounded to for a weight stored as `weight`.
    pub fn of(&self, weight: DType) -> ActivationType {
        match self {
            Self::Plain => ActivationType::F32,
            Self::Cpu => match (weight, ActivationType::for_weight(weight)) {
                // Multiplied as the Q4_0 that it is but for the order of nibbles.
                (DType::AprQ4, _) | (_, ActivationType::Q8_1) => ActivationType::Q8_0,
                (_, ActivationType::F16 | ActivationType::BF16) => ActivationType::F32,
                (_, kind) => kind,
            },
            Self::LlamaCpp => ActivationType::for_weight(weight),
            Self::All(kind) => *kind,
            Self::Declared(list) => {
                let found = list.iter().find(|(dtype, _)| *dtype == weight);
                found.map_or(ActivationType::F32, |(_, kind)| *kind)
            }
        }
    }
}

impl Arithmetic {
    /// Nothing is rounded.
    pub const EXACT: Self = Self {
        activations: Activations::Plain,
        kv: DType::F64,
        queries: ActivationType::F32,
        probabilities: ActivationType::F32,
    };

    /// llama.cpp's on a CPU with flash attention, its default: the weight's type decides what activations are rounded
    /// to, the cache is f16, and queries are rounded to the type of the keys.
    pub const LLAMA_CPP: Self = Self {
        activations: Activations::LlamaCpp,
        kv: DType::F16,
        queries: ActivationType::F16,
        probabilities: ActivationType::F32,
    };

    /// Our CPU backend's.
    pub const CPU: Self = Self { activations: Activations::Cpu, kv: DType::F16, ..Self::EXACT };

    /// The same with another type for keys and values.
    #[must_use]
    pub fn with_kv(self, kv: DType) -> Self {
        Self { kv, ..self }
    }

    /// `x` as the cache keeps it.
    pub(crate) fn round_kv(&self, x: f64) -> f64 {
        match self.kv {
            DType::F32 => f64::from(x as f32),
            // Through f32, where the engines have it.
            DType::F16 => f16::from_f32(x as f32).to_f64(),
            DType::BF16 => bf16::from_f32(x as f32).to_f64(),
            _ => x,
        }
    }
}
