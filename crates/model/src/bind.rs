//! From a checkpoint to a decoder: the only place that knows how checkpoints differ.
//!
//! Names, permuted rows, ties, missing keys and their defaults are settled here, from what the file
//! says; where it does not say, binding fails rather than guesses. A tensor that the decoder would not use is refused
//! too: a model run without one of its biases is another model.

mod config;
mod loader;
mod weights;

pub use config::{HeadRows, head_rows, read_config};
pub(crate) use loader::Loader;
pub use loader::{LoadWatch, Loaded};
pub use weights::runnable_config;
pub(crate) use weights::{Keeper, Named, bind};
