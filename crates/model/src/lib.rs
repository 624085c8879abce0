//! The one forward pass, and who may look at it.
//!
//! Start at [`decoder`] (the model), [`Site`] (the names of its values), [`Cx`] (how model code runs an op, and where
//! observers look) and [`Backend`] (what runs the ops). Weights enter through [`bind`], the only place that
//! knows how checkpoints differ. This crate knows no data type, no device, no file of captures and no instruction set.

mod backend;
mod bind;
mod config;
mod cost;
mod cx;
mod decoder;
mod error;
mod generate;
mod model;
mod names;
mod observer;
mod plan;
mod rope;
mod sampler;
mod site;

pub use backend::*;
pub use bind::{HeadRows, LoadWatch, Loaded, head_rows, read_config, runnable_config};
pub use config::{Architecture, Config, MoeConfig, RopeScaling};
pub use cost::{Cost, Costs};
pub use cx::Cx;
pub use error::{Error, Result};
pub use generate::{Finish, GenerateOptions, Generated, NewToken, generate, prompt_chunks};
pub use model::{Cache, LogitRows, Logits, Model, StepInput};
pub use names::{LayerRole, Role, role_of};
pub use observer::*;
pub use plan::{Plan, PlanOp};
pub use rope::{Llama3Scaling, RopeFrequencies, RopeTable};
pub use sampler::{Sampler, SamplerOptions, top_k};
pub use site::*;
