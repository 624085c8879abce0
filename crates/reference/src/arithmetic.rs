//! What the reference rounds, and to what.

use apr_tensor::{DType, activation::ActivationType};
use half::{bf16, f16};

/// A declared arithmetic: where an engine rounds on purpose.
#[derive(Clone, Copy, Debug)]
pub struct Arithmetic {
    /// What activations are rounded to before a product with a weight stored in this type.
    pub activations: fn(DType) -> ActivationType,
    /// What keys and values are rounded to in the cache: `F64` (not at all), `F32`, `F16` or `BF16`.
    pub kv: DType,
}

impl Arithmetic {
    /// Nothing is rounded.
    pub const EXACT: Self = Self { activations: |_| ActivationType::F32, kv: DType::F64 };

    /// llama.cpp's: the weight's type decides what activations are rounded to, the cache is f16.
    pub const LLAMA_CPP: Self = Self { activations: ActivationType::for_weight, kv: DType::F16 };

    /// Our CPU backend's: 8 bits for quantised weights, with exact sums where llama.cpp's Q8_1 has rounded ones;
    /// activations stay f32 for float weights.
    pub const CPU: Self = Self {
        activations: |weight| match (weight, ActivationType::for_weight(weight)) {
            // Multiplied as the Q4_0 that it is but for the order of nibbles.
            (DType::AprQ4, _) | (_, ActivationType::Q8_1) => ActivationType::Q8_0,
            (_, ActivationType::F16 | ActivationType::BF16) => ActivationType::F32,
            (_, kind) => kind,
        },
        kv: DType::F16,
    };

    /// The same with another type for keys and values.
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
