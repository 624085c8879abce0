//! Stage by stage: how much of a difference is due to the weights, how much to the arithmetic, how much to neither.

use apr_diff::Comparison;
use apr_model::Site;
use serde::Serialize;

use crate::Audit;

/// What the error of a stage is made of; all are relative L2.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Parts {
    /// The stage.
    #[serde(serialize_with = "crate::site")]
    pub site: Site,
    /// What the stage's own arithmetic does to it: the floor.
    #[serde(serialize_with = "crate::number")]
    pub arithmetic: f64,
    /// What its weights do to it, being others than the reference's; `None` if there is one file only.
    ///
    /// The local error under the reference's weights, less that under its own, in squares: the two are independent.
    pub weights: Option<f64>,
    /// What neither explains.
    #[serde(serialize_with = "crate::number")]
    pub unexplained: f64,
    /// What accumulation may do to it.
    #[serde(serialize_with = "crate::number")]
    pub bound: f64,
    /// The difference of the two sides, errors of all earlier stages included; `None` if it was not compared.
    pub cumulative: Option<f64>,
}

pub(super) fn of(
    ours: &Audit,
    with_their_weights: Option<&Audit>,
    comparison: &Comparison,
) -> Vec<Parts> {
    let part = |stage: &crate::StageAudit| {
        let weights = with_their_weights.and_then(|audit| audit.stage(stage.site)).map(|theirs| {
            (theirs.errors.local.powi(2) - stage.errors.local.powi(2)).max(0.0).sqrt()
        });
        let compared = comparison.stages.iter().find(|compared| compared.site == stage.site);
        Parts {
            site: stage.site,
            arithmetic: stage.errors.floor,
            weights: weights.filter(|error| error.is_finite()),
            unexplained: stage.errors.unexplained,
            bound: stage.errors.bound,
            cumulative: compared
                .and_then(|stage| stage.metrics.relative_l2)
                .filter(|e| e.is_finite()),
        }
    };
    ours.stages.iter().map(part).collect()
}
