//! Whether tokens go to the experts that the router says, each once, with weights that are probabilities.

use std::collections::BTreeMap;

use apr_model::{LogitRows, MoeConfig, Observer, ObserverError, Site, Stage, Step, TapSet, View};

use crate::{
    Break, Check, Factory, Outcome, Watch, outcome::Verdict, rows::Rows, script::play,
    session::Session,
};

/// How far the sum of a token's weights may be from what it must be: weights are rounded to f32 some ten times.
const SUM: f64 = 1e-6;

const WATCHED: [Stage; 3] = [Stage::MoeRouter, Stage::MoeRouterIndices, Stage::MoeRouterWeights];

impl<F: Factory> Session<'_, F> {
    pub(crate) fn routing(&self) -> Result<Verdict, Outcome> {
        let model = self.model()?;
        let Some(moe) = &model.config().moe else {
            return Err(Outcome::not_applicable("the model has no experts"));
        };
        let taps: TapSet = model.all_taps().iter().filter(|s| WATCHED.contains(&s.stage)).collect();
        let whole = self.whole();
        self.begin(Check::Routing, &[&whole]);
        let mut routing = Routing::new(taps, moe, self.watch);
        play(model, &self.texts, &whole, LogitRows::None, &mut routing).map_err(Outcome::broken)?;
        let Routing { choices, closest, first, broken, .. } = routing;
        let more = match broken {
            0 | 1 => String::new(),
            n => format!(" ({} more such choices)", n - 1),
        };
        let breaks = first.map(|what| Break::Other { what: format!("{what}{more}") });
        let closest = closest.map_or(String::new(), |(margin, site, position)| {
            format!(
                "; the closest is {margin:.1e} apart (layer {}, position {position})",
                site.layer.unwrap_or_default(),
            )
        });
        Ok(Verdict::new(breaks.into_iter().collect(), format!("{choices} choices{closest}")))
    }
}

/// Looks at each choice of experts.
struct Routing<'a> {
    taps: TapSet,
    moe: &'a MoeConfig,
    watch: &'a dyn Watch,
    /// What was shown of the current layer, by stage and position.
    seen: BTreeMap<(Stage, usize), Vec<f64>>,
    choices: usize,
    /// The smallest margin between the last expert chosen and the first that was not, in logits.
    closest: Option<(f64, Site, usize)>,
    first: Option<String>,
    broken: usize,
}

impl<'a> Routing<'a> {
    fn new(taps: TapSet, moe: &'a MoeConfig, watch: &'a dyn Watch) -> Self {
        let (seen, choices, closest, first, broken) = Default::default();
        Self { taps, moe, watch, seen, choices, closest, first, broken }
    }

    /// What is wrong with a row's choice; else its margin.
    fn judge(&self, logits: &[f64], ids: &[f64], weights: &[f64]) -> Result<f64, String> {
        let mut chosen = Vec::with_capacity(ids.len());
        for &id in ids {
            if id.fract() != 0.0 || !(0.0..logits.len() as f64).contains(&id) {
                return Err(format!("{id} is no expert; there are {}", logits.len()));
            }
            if chosen.contains(&(id as usize)) {
                return Err(format!("expert {id} is chosen twice"));
            }
            chosen.push(id as usize);
        }
        let others = (0..logits.len()).filter(|id| !chosen.contains(id));
        let by_logit = |a: &usize, b: &usize| logits[*a].total_cmp(&logits[*b]);
        let (last, next) = (chosen.iter().copied().min_by(by_logit), others.max_by(by_logit));
        let margin = last.zip(next).map_or(f64::INFINITY, |(a, b)| logits[a] - logits[b]);
        if let (Some(last), Some(next), true) = (last, next, margin < 0.0) {
            return Err(format!(
                "expert {last} is chosen (logit {}), and {next} is not (logit {})",
                logits[last], logits[next]
            ));
        }
        if let Some(wrong) = weights.iter().position(|w| !(0.0..=1.0 + SUM).contains(w)) {
            return Err(format!("the weight of slot {wrong} is {}", weights[wrong]));
        }
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let power = |id: usize| (logits[id] - max).exp();
        let expected = match self.moe.norm_topk_prob {
            true => 1.0,
            false => {
                let all: f64 = (0..logits.len()).map(power).sum();
                chosen.iter().map(|&id| power(id)).sum::<f64>() / all
            }
        };
        let sum: f64 = weights.iter().sum();
        match (sum - expected).abs() <= SUM {
            true => Ok(margin),
            false => Err(format!("the weights sum to {sum} instead of {expected}")),
        }
    }
}

impl Observer for Routing<'_> {
    fn wanted(&self) -> TapSet {
        self.taps.clone()
    }

    fn value(&mut self, step: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError> {
        self.watch.advance(1);
        let rows = Rows::new(step, site, view);
        for position in rows.positions() {
            self.seen.insert((site.stage, position), rows.row(position).elements);
        }
        if site.stage != Stage::MoeRouterWeights {
            return Ok(());
        }
        for position in rows.positions() {
            let [logits, ids, weights] =
                WATCHED.map(|stage| self.seen.remove(&(stage, position)).unwrap_or_default());
            self.choices += 1;
            match self.judge(&logits, &ids, &weights) {
                Ok(margin) => {
                    if margin.is_finite() && self.closest.is_none_or(|(least, ..)| margin < least) {
                        self.closest = Some((margin, site, position));
                    }
                }
                Err(what) => {
                    self.broken += 1;
                    let layer = site.layer.unwrap_or_default();
                    let what = format!("layer {layer}, position {position}: {what}");
                    self.first.get_or_insert(what);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Unwatched;

    #[test]
    fn each_rule_is_told_by_what_breaks_it() {
        let mut moe = MoeConfig {
            num_experts: 4,
            num_experts_per_tok: 2,
            moe_intermediate_size: 8,
            norm_topk_prob: true,
            decoder_sparse_step: 1,
            mlp_only_layers: Vec::new(),
        };
        let logits = [0.5, 2.0, 1.0, 0.75];
        let judge = |moe: &MoeConfig, ids: &[f64], weights: &[f64]| {
            Routing::new(TapSet::none(), moe, &Unwatched).judge(&logits, ids, weights)
        };
        assert_eq!(judge(&moe, &[1.0, 2.0], &[0.7, 0.3]), Ok(0.25));
        for (ids, weights, word) in [
            ([1.0, 1.0], [0.7, 0.3], "twice"),
            ([1.0, 4.0], [0.7, 0.3], "no expert"),
            ([1.0, 0.5], [0.7, 0.3], "no expert"),
            ([1.0, 3.0], [0.7, 0.3], "and 2 is not"),
            ([1.0, 2.0], [0.7, 0.29], "instead of 1"),
            ([1.0, 2.0], [1.7, -0.7], "slot 0 is 1.7"),
            ([1.0, 2.0], [f64::NAN, 0.3], "NaN"),
        ] {
            let found = judge(&moe, &ids, &weights).unwrap_err();
            assert!(found.contains(word), "{found}");
        }
        moe.norm_topk_prob = false;
        let all: f64 = logits.iter().map(|x: &f64| x.exp()).sum();
        let probabilities = [2f64.exp() / all, 1f64.exp() / all];
        assert_eq!(judge(&moe, &[1.0, 2.0], &probabilities), Ok(0.25));
        assert!(judge(&moe, &[1.0, 2.0], &[0.7, 0.3]).is_err());
    }
}
