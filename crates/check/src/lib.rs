//! What must hold of a model and of the backend that runs it, without anything to compare with.
//!
//! A file is asked whether it is sound (shapes, weights, tokenizer), and a backend whether it keeps its promise that
//! bits depend on nothing but the tokens: not on how a prompt is cut into steps, on threads, on the instruction set,
//! on other sequences, on going back, or on who looks. Start at [`check_model`], or at [`check_file`] for what needs no
//! run; [`Check`] lists what is checked.
//!
//! Runs are compared site by site while they run, so a broken promise is told with the first value that broke
//! it. What was not compared is never held: it is [`Outcome::NotMeasured`], with the reason. This crate judges no
//! quality: a model that keeps all promises may still be a bad one.

mod catalog;
mod compare;
mod error;
mod file;
mod outcome;
mod routing;
mod rows;
mod runs;
mod script;
mod session;
mod statistics;
mod tokens;
mod watch;
mod weights;

pub use catalog::Check;
pub use error::{Error, Result};
pub use file::{FileCheckup, check_file};
pub use outcome::{Break, Checked, Checkup, Note, Outcome};
pub use rows::Place;
pub use session::{Factory, FactoryError, Options, Way, check_model};
pub use watch::{Unwatched, Watch};
