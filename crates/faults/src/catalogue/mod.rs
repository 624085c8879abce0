//! Every kind of fault, by family.

mod activations;
mod attention;
mod capture;
mod config;
mod experts;
mod kernel;
mod weights;

use std::collections::BTreeSet;

use crate::{Error, Family, Fault, Result};

/// All kinds.
pub fn all() -> impl Iterator<Item = &'static Fault> {
    [
        kernel::FAULTS,
        weights::FAULTS,
        config::FAULTS,
        attention::FAULTS,
        activations::FAULTS,
        capture::FAULTS,
    ]
    .into_iter()
    .chain(experts::FAULTS)
    .flatten()
}

/// The families of all kinds.
pub fn families() -> BTreeSet<Family> {
    all().map(|fault| fault.family).collect()
}

/// The kind called `name`.
pub fn find(name: &str) -> Result<&'static Fault> {
    let found = all().find(|fault| fault.name == name);
    let families = || families().iter().map(Family::to_string).collect();
    found.ok_or_else(|| Error::UnknownFault { name: name.to_owned(), families: families() })
}
