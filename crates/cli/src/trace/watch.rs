//! The small observers of a trace: the tokens before and after each step, and progress.

use apr_model::{Observer, ObserverError, Site, Stage, Step, TapSet, View, top_k};

use crate::output::Progress;

/// Keeps the tokens that each step reads, and those that its last row makes likely.
#[derive(Debug)]
pub(super) struct StepTokens {
    k: usize,
    pub(super) steps: Vec<InAndOut>,
}

/// The tokens of one step.
#[derive(Debug, Default)]
pub(super) struct InAndOut {
    pub(super) input: Vec<u32>,
    /// Id, logit, probability; nothing for a step without logits, or if not all of them are finite.
    pub(super) next: Vec<(u32, f64, f64)>,
    /// How many logits of the last row are NaN or infinite.
    pub(super) wrong_logits: usize,
}

impl StepTokens {
    pub(super) fn new(k: usize) -> Self {
        Self { k, steps: Vec::new() }
    }
}

impl Observer for StepTokens {
    fn wanted(&self) -> TapSet {
        [Site::whole(Stage::LmHead)].into_iter().collect()
    }

    fn begin(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        self.steps.push(InAndOut { input: step.tokens.to_vec(), ..InAndOut::default() });
        Ok(())
    }

    fn value(&mut self, _: &Step<'_>, _: Site, view: View<'_>) -> Result<(), ObserverError> {
        let [rows, vocab] = *view.shape else { return Err("logits have rows and columns".into()) };
        let start = rows.saturating_sub(1) * vocab;
        let last: Vec<f32> =
            (start..view.values.len()).map(|i| view.values.get(i) as f32).collect();
        let Some(step) = self.steps.last_mut() else { return Ok(()) };
        step.wrong_logits = last.iter().filter(|logit| !logit.is_finite()).count();
        if step.wrong_logits > 0 {
            return Ok(());
        }
        let max = last.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| f64::from(logit - max).exp();
        let total: f64 = last.iter().map(|&logit| weight(logit)).sum();
        let best = top_k(&last, self.k).into_iter().map(|id| {
            let logit = last[id as usize];
            (id, logit.into(), weight(logit) / total)
        });
        step.next.extend(best);
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
