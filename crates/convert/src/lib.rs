//! A checkpoint in another container and in other types, with nothing lost silently.
//!
//! Start at [`Plan::new`]: a [`Recipe`] chooses the type of each tensor, [`metadata::translate`] says in the target's
//! words what the source says in its own, and what the target cannot express becomes a [`Loss`], known before any work is
//! done. [`convert`] then writes the plan, with a bounded part of the model in memory, reads it again, compares it with the
//! source, and gives it its name last.
//!
//! No number is changed but by rounding to a type that was asked for. What is no model that is known here is not converted.

pub mod metadata;

mod convert;
mod error;
mod importance;
mod output;
mod plan;
mod recipe;
mod rope;
mod stream;
mod target;
mod types;
mod verify;

pub use convert::{Phase, Put, Settings, Weights, Written, convert, fill};
pub use error::{Error, Result};
pub use importance::Importance;
pub use output::Output;
pub use plan::{Options, Plan, Planned};
pub use recipe::Recipe;
pub use stream::Change;
pub use target::{Layout, Loss, Target};
pub use verify::verify;
