//! What the tests of several crates share: where the fixtures are, an observer that keeps everything, one that
//! replaces, and distances. Not published.

mod collect;
mod distance;
mod draft;
mod fixtures;
pub mod hub;
pub mod invariants;
mod isolated;
mod mutants;

pub use collect::{Collect, Shown};
pub use distance::relative_l2;
pub use draft::Draft;
pub use fixtures::{Golden, TINY, fixture, golden};
pub use isolated::Isolated;
pub use mutants::Mutants;
