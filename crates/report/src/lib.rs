//! Findings as terminal tables and as JSON.
//!
//! Each module holds one report: plain data that serialises under a schema version, and its text. Whatever stands in
//! the text stands in the JSON too. Nothing is computed here beyond sums for a footer, and nothing is printed.

pub mod audit;
pub mod bench;
pub mod bisect;
pub mod check;
pub mod convert;
pub mod diff;
pub mod faultbench;
pub mod file_check;
pub mod html;
pub mod inspect;
mod json;
mod logits;
mod table;
pub mod tensors;
pub mod trace;
mod words;

pub use logits::{Favourite, LogitRow};
pub use table::{bytes, number, plural};
