//! What the tests of several crates share: where the fixtures are, an observer that keeps everything, one that
//! replaces, and distances. Not published.

mod collect;
mod distance;
mod fixtures;
pub mod invariants;

pub use collect::{Collect, Shown};
pub use distance::relative_l2;
pub use fixtures::{Golden, TINY, fixture, golden};
