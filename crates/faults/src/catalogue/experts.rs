//! Mixtures of experts: who is chosen, with which weight, whose matrices are read, and what becomes of the results.

mod captures;
mod files;
mod products;
mod routing;

use crate::{Fault, Target};

/// All of them, by where they are.
pub(super) const FAULTS: [&[Fault]; 4] =
    [routing::FAULTS, products::FAULTS, files::FAULTS, captures::FAULTS];

/// For tables: a model that divides the weights of a row's experts by their sum.
fn normalizes(target: &Target<'_>) -> bool {
    target.config.moe.as_ref().is_some_and(|moe| moe.norm_topk_prob)
}
