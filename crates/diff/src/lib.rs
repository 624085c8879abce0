//! Comparison of captures, of APRT files and of checkpoints. Needs no model to run and links no backend.
//!
//! [`compare`] takes two captures, [`compare_aprt`] two files of values, [`compare_checkpoints`] two model files. The results are data;
//! [`Outcome`] says what follows from them. A comparison is cumulative: errors add up along the forward pass, so
//! it shows where a difference becomes visible and never whose fault it is. What was not compared is named and never
//! scored, and a comparison of nothing is never a match. Ids of experts are compared as sets.

mod align;
mod aprt;
mod checkpoints;
mod comparison;
mod error;
mod experts;
mod logits;
mod metrics;
mod stages;

pub use align::{Alignment, TokenDifference};
pub use aprt::{AprtComparison, compare_aprt};
pub use checkpoints::{
    Cell, CheckpointComparison, ConfigComparison, ConfigDifference, Damage, Extent, Peak, Relation,
    RelationKind, Steps, TensorComparison, TensorOptions, UnreadableConfig, compare_checkpoints,
};
pub use comparison::*;
pub use error::{Error, Result};
pub use experts::Flip;
pub use logits::{Disagreement, Logits};
pub use metrics::{Categories, Metrics, Pair, ZeroNorm};
pub use stages::{Options, compare};
