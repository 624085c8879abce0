//! Planted faults, and a bench that scores who finds them.
//!
//! A [`Fault`] of the [`catalogue`] is planted in a real run: in an op of a real backend ([`Faulty`]), in the model
//! file that the engine runs, or in the capture it leaves. A judge is given that capture and the original model, nothing else,
//! and says which stage is wrong; [`Bench`] asks about many of them and keeps the score, beside that of the two
//! methods that are in common use. Nothing here shares code with a judge: a mistake in both
//! would go unseen.

pub mod catalogue;

mod bench;
mod case;
mod classic;
mod effect;
mod error;
mod fault;
mod faulty;
mod models;
mod op;
mod recording;
mod rng;
mod score;

use bench::CONTROL;
pub use bench::{Bench, BenchOptions};
pub use case::{Case, Engine, Planted, Planting, Rig};
pub use effect::Effect;
pub use error::{Error, Result};
pub use fault::{Expectation, Family, Fault, Severity, Target};
pub use faulty::{Faulty, Kv, Vector, Weight};
pub use models::{Format, ModelSpec, Subject, Trained};
pub use score::{Diagnosis, Finding, Judge, Outcome, Score, Tally, Verdict};
