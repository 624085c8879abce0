//! Arm.

pub(crate) mod neon;
