//! How far a check-up is, for whoever waits.

use crate::Check;

/// Somebody who waits.
pub trait Watch {
    /// A check begins, of about so many units of work.
    fn begin(&self, check: Check, units: u64);

    /// So many units are done.
    fn advance(&self, units: u64);
}

/// Nobody waits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn begin(&self, _: Check, _: u64) {}

    fn advance(&self, _: u64) {}
}
