//! A checkpoint in another container and in other types, with nothing lost silently.
//!
//! Three steps. A [`Recipe`] chooses the type of each tensor, [`metadata::translate`] says in the target's words
//! what the source says in its own, and what the target cannot express becomes a [`Loss`], known before any
//! work is done. No number is changed but by quantising and dequantising.

pub mod metadata;

mod error;
mod recipe;
mod target;

pub use error::{Error, Result};
pub use recipe::Recipe;
pub use target::{Layout, Loss, Target};
