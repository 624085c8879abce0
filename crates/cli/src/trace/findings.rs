//! What in a trace deserves a look.
//!
//! These are hints, not verdicts: only a comparison can say that a number is wrong.

use apr_capture::StepStatistics;
use apr_model::Stage;

/// How many times the std of the residual stream may grow or shrink from one layer to the next before it is
/// mentioned. Trained models stay below it but for one early layer with massive activations. The step from the
/// embedding to the first layer is no measure: it is large in every sound model whose embedding is small.
const JUMP: f64 = 10.0;
/// Rows that are listed by position.
const ROWS_SHOWN: usize = 8;

/// What deserves a look in `step`, in the order of computation.
pub(super) fn findings(step: &StepStatistics) -> Vec<String> {
    let mut findings = Vec::new();
    let mut say = |text: String| findings.push(format!("step {}: {text}", step.index));
    if let Some(site) = step.first_not_finite
        && let Some(s) = step.sites.iter().find(|s| s.site == site)
    {
        let (nan, inf, count) = (s.all_rows.nan(), s.all_rows.inf(), s.all_rows.count());
        say(format!("NaN or Inf first seen at {site}: {nan} NaN, {inf} Inf of {count}"));
    }
    let mut residual = None;
    for s in &step.sites {
        if !s.dead_rows.is_empty() {
            let shown: Vec<String> =
                s.dead_rows.iter().take(ROWS_SHOWN).map(|row| row.to_string()).collect();
            let more = match s.dead_rows.len().saturating_sub(ROWS_SHOWN) {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            say(format!("{} is zero throughout at position {}{more}", s.site, shown.join(", ")));
        }
        if s.site.stage == Stage::PostFfnResidual {
            if let (Some((before, from)), Some(to)) = (residual, s.all_rows.std())
                && !(from / JUMP..=from * JUMP).contains(&to)
            {
                say(format!(
                    "the std of the residual stream jumps from {} at {before} to {} at {}",
                    apr_report::number(from),
                    apr_report::number(to),
                    s.site,
                ));
            }
            residual = s.all_rows.std().map(|std| (s.site, std));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use apr_capture::Telemetry;
    use apr_model::{Observer, Phase, Site, Step, Values, View};

    use super::*;

    /// The findings of one step that computes these values, two rows each.
    fn of(values: &[(Site, [f32; 4])]) -> Vec<String> {
        let step = Step {
            index: 0,
            phase: Phase::Prefill,
            chunk: 0,
            tokens: &[5, 6],
            first_position: 0,
            logit_rows: 0..2,
        };
        let mut telemetry = Telemetry::new(values.iter().map(|v| v.0).collect());
        telemetry.begin(&step).unwrap();
        for (site, values) in values {
            let view = View { shape: &[2, 2], values: Values::F32(values) };
            telemetry.value(&step, *site, view).unwrap();
        }
        telemetry.end(&step).unwrap();
        findings(&telemetry.steps()[0])
    }

    #[test]
    fn healthy_values_are_not_mentioned() {
        let residual = |layer| Site::layer(layer, Stage::PostFfnResidual);
        let values = [
            (Site::whole(Stage::Embedding), [0.01, -0.01, 0.02, 0.0]),
            (residual(0), [4.0, -3.0, 0.0, 1.0]),
            (residual(1), [8.0, -6.0, 0.0, 2.0]),
        ];
        assert_eq!(of(&values), Vec::<String>::new());
    }

    #[test]
    fn the_first_value_that_is_not_finite_is_named() {
        let values = [
            (Site::layer(0, Stage::AttnNorm), [1.0, 2.0, 3.0, 4.0]),
            (Site::layer(0, Stage::FfnOut), [f32::NAN, f32::INFINITY, 3.0, 4.0]),
            (Site::layer(1, Stage::AttnNorm), [f32::NAN; 4]),
        ];
        let found = of(&values);
        assert_eq!(found, ["step 0: NaN or Inf first seen at layers.0.ffn_out: 1 NaN, 1 Inf of 4"]);
    }

    #[test]
    fn dead_rows_and_jumps_are_mentioned() {
        let values = [
            (Site::layer(0, Stage::PostFfnResidual), [1.0, -1.0, 2.0, 0.5]),
            (Site::layer(1, Stage::AttnOut), [0.0, 0.0, 1.0, 2.0]),
            (Site::layer(1, Stage::PostFfnResidual), [100.0, -100.0, 200.0, 50.0]),
        ];
        let found = of(&values);
        assert_eq!(found[0], "step 0: layers.1.attn_out is zero throughout at position 0");
        assert!(
            found[1].contains("the std of the residual stream jumps from")
                && found[1].ends_with("layers.1.post_ffn_residual")
        );
        assert_eq!(found.len(), 2);
    }
}
