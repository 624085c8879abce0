//! Isolated replay: which stage of a capture is wrong, and whether arithmetic explains the rest.
//!
//! [`audit`] takes a capture of any engine and the model file. It runs the one forward pass on a backend that computes
//! each value twice, exactly and in the arithmetic that the engine declares, and from what the engine itself had: each
//! stage is judged alone, and errors of earlier stages cannot enter. Four numbers come out of each stage:
//!
//! - *local*: captured against exact, all that the stage does to its value;
//! - *floor*: emulated against exact, what the declared arithmetic must do to it;
//! - *unexplained*: captured against emulated, what is left; it is held against
//! - *bound*: what accumulation in the declared type may add, derived from the data.
//!
//! A stage whose unexplained error is beyond its bound does something else than it should. The method is that of
//! `docs/audit.md`.

mod arithmetic;
mod audit;
mod bisect;
mod diagnosis;
mod engine;
mod error;
mod gaps;
mod graft;
mod inputs;
mod judge;
mod replay;
mod routing;
mod stage;
mod twin;

pub use arithmetic::{ArithmeticFrom, ArithmeticOrigin, Declared};
pub use audit::{Audit, NotMeasured, Options, Verdict, audit};
pub use bisect::{
    Against, Bisect, BisectOptions, BisectProgress, BisectVerdict, Blame, Culprit, Graft, Harm,
    Parts, PromptDifference, SideReport, bisect,
};
pub use diagnosis::{Diagnosis, Explained, Geometry, diagnose};
pub use engine::{Engine, Loaded, Run, Script, record};
pub use error::{Error, Result};
pub use graft::{Consequence, consequence};
pub use inputs::inputs;
pub use judge::Errors;
pub use replay::Progress;
pub use routing::{Flip, NearTie, Routing};
pub use stage::{ChannelAudit, ExpertAudit, Finding, Group, RowAudit, StageAudit, Test};

use apr_model::Site;
use serde::Serializer;

fn site<S: Serializer>(site: &Site, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(site)
}

fn sites<S: Serializer>(sites: &[Site], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(sites.iter().map(Site::to_string))
}

fn numbers<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
    /// One of them.
    #[derive(serde::Serialize)]
    struct Number(#[serde(serialize_with = "number")] f64);
    serializer.collect_seq(values.iter().map(|&value| Number(value)))
}

/// JSON has no infinities and no NaN; they are spelt out rather than turned into `null`.
fn number<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        v if v.is_finite() => serializer.serialize_f64(*v),
        v if v.is_nan() => serializer.serialize_str("NaN"),
        v => serializer.serialize_str(if *v > 0.0 { "inf" } else { "-inf" }),
    }
}
