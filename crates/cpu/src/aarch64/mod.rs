//! Arm.

pub(crate) mod neon;
pub(crate) mod probe;
