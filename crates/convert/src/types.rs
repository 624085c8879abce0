//! The type that each tensor gets: what is asked for, as far as the container has it.

use apr_format::apr::Apr;
use apr_model::{Config, LayerRole, Role};
use apr_tensor::{DType, Stored};

use crate::{Error, Recipe, Result, Target};

/// The type for the tensor of `role` made of parts like `stored`.
pub(crate) fn stored_as(
    target: Target,
    recipe: Option<Recipe>,
    config: &Config,
    role: Role,
    stored: &Stored,
    importance: bool,
) -> DType {
    let cols = stored.shape().cols();
    match (target, recipe) {
        (Target::Safetensors, Some(recipe)) => recipe.dtype(),
        // As llama.cpp does: what is small, and what its kernels want in F32.
        (Target::Gguf, _) | (Target::Apr, Some(_)) if is_kept_exact(role, stored) => DType::F32,
        (Target::Gguf, Some(recipe)) => recipe.dtype_of(config, role, cols, importance),
        (Target::Apr, Some(recipe)) => {
            in_apr(recipe.dtype_of(config, role, cols, importance), cols)
        }
        (_, None) if target.holds(stored.dtype()) => stored.dtype(),
        // The numbers that a stored type stands for are F32 by definition.
        (_, None) => DType::F32,
    }
}

/// Norms, biases, rotary factors, and the router of a mixture of experts.
fn is_kept_exact(role: Role, stored: &Stored) -> bool {
    stored.shape().dims().len() < 2 || matches!(role, Role::Layer(_, LayerRole::FfnGateInp))
}

/// `dtype`, or the next better one that `.apr` has a number for.
fn in_apr(dtype: DType, cols: usize) -> DType {
    match Apr::holds(dtype) {
        true => dtype,
        false if cols.is_multiple_of(DType::Q6_K.block_len()) => DType::Q6_K,
        false => DType::F16,
    }
}

impl Target {
    /// Whether this container has tensors of `dtype`.
    fn holds(self, dtype: DType) -> bool {
        match self {
            // ggml has a number for F64 as well, and no engine computes with it.
            Self::Gguf => dtype.ggml_id().is_some() && dtype != DType::F64,
            Self::Apr => Apr::holds(dtype),
            Self::Safetensors => !dtype.is_quantized(),
        }
    }

    /// The recipes whose main type this container has.
    pub fn recipes(self) -> impl Iterator<Item = Recipe> {
        Recipe::all().filter(move |recipe| self.holds(recipe.dtype()))
    }

    pub(crate) fn check_recipe(self, recipe: Recipe) -> Result<()> {
        match self.holds(recipe.dtype()) {
            true => Ok(()),
            false => {
                let supported: Vec<_> = self.recipes().map(Recipe::name).collect();
                Err(Error::Recipe { target: self, recipe, supported: supported.join(", ") })
            }
        }
    }
}
