//! The small observers of a trace: the likeliest next tokens, and progress.

use apr_model::{Observer, ObserverError, Site, Stage, Step, TapSet, View, top_k};

use crate::output::Progress;

/// Keeps the largest logits after the last row of each step.
#[derive(Debug)]
pub(super) struct TopTokens {
    k: usize,
    /// Per step: id, logit, probability; nothing for a step without logits.
    pub(super) steps: Vec<Vec<(u32, f64, f64)>>,
}

impl TopTokens {
    pub(super) fn new(k: usize) -> Self {
        Self { k, steps: Vec::new() }
    }
}

impl Observer for TopTokens {
    fn wanted(&self) -> TapSet {
        [Site::whole(Stage::LmHead)].into_iter().collect()
    }

    fn begin(&mut self, _: &Step<'_>) -> Result<(), ObserverError> {
        self.steps.push(Vec::new());
        Ok(())
    }

    fn value(&mut self, _: &Step<'_>, _: Site, view: View<'_>) -> Result<(), ObserverError> {
        let [rows, vocab] = *view.shape else { return Err("logits have rows and columns".into()) };
        let start = rows.saturating_sub(1) * vocab;
        let last: Vec<f32> =
            (start..view.values.len()).map(|i| view.values.get(i) as f32).collect();
        let max = last.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| f64::from(logit - max).exp();
        let total: f64 = last.iter().map(|&logit| weight(logit)).sum();
        let best = top_k(&last, self.k).into_iter().map(|id| {
            let logit = last[id as usize];
            (id, logit.into(), weight(logit) / total)
        });
        if let Some(step) = self.steps.last_mut() {
            step.extend(best);
        }
        Ok(())
    }
}

/// Advances the progress with each value that another observer sees.
#[derive(Debug)]
pub(super) struct Ticker {
    pub(super) taps: TapSet,
    pub(super) progress: Progress,
}

impl Observer for Ticker {
    fn wanted(&self) -> TapSet {
        self.taps.clone()
    }

    fn value(&mut self, _: &Step<'_>, _: Site, _: View<'_>) -> Result<(), ObserverError> {
        self.progress.advance();
        Ok(())
    }
}
