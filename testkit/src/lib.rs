//! What the tests of several crates share: where the fixtures are, an observer that keeps everything, one that
//! replaces, and distances. Not published.

mod collect;
mod distance;
mod fixtures;
mod gguf;
pub mod invariants;
mod isolated;

pub use collect::{Collect, Shown};
pub use distance::relative_l2;
pub use fixtures::{Golden, TINY, fixture, golden};
pub use gguf::f16_gguf;
pub use isolated::Isolated;
