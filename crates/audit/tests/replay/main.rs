//! Isolated replay: quiet where nothing is wrong, and right about what is.

#![allow(clippy::print_stdout, reason = "what was measured, for those who ask with --nocapture")]

mod arithmetic;
mod bisect;
mod categories;
mod controls;
mod engine;
mod faults;
mod inputs;
mod routing;
mod rows;
mod spans;
