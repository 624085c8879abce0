//! What an audit did not see: which stages are judged only together with others, and which not at all.
//!
//! Rows count, not stages: of a stage some steps or some rows may have been captured, and what is computed from others is not
//! judged by itself.

use std::collections::{BTreeMap, BTreeSet};

use apr_model::{Config, Site, Stage};

use crate::{
    NotMeasured, inputs,
    judge::{Bound, Record},
    replay::{Replay, is_inner},
};

/// Which rows of which stages a capture holds.
#[derive(Debug)]
pub(crate) struct Captured {
    /// Step and position of each.
    rows: BTreeMap<Site, BTreeSet<(usize, usize)>>,
    /// Tokens of each step.
    tokens: Vec<usize>,
}

impl Captured {
    pub(crate) fn all(records: &BTreeMap<Site, Record>, steps: &[Vec<u32>]) -> Self {
        let rows = |record: &Record| record.rows.iter().map(|&(step, at, _)| (step, at)).collect();
        Self {
            rows: records.iter().map(|(&site, record)| (site, rows(record))).collect(),
            tokens: steps.iter().map(Vec::len).collect(),
        }
    }

    /// The same of one step.
    fn of_step(&self, step: usize) -> Self {
        let of_step = |rows: &BTreeSet<(usize, usize)>| {
            rows.range((step, 0)..(step + 1, 0)).copied().collect::<BTreeSet<_>>()
        };
        let rows = self.rows.iter().map(|(&site, rows)| (site, of_step(rows)));
        Self {
            rows: rows.filter(|(_, rows)| !rows.is_empty()).collect(),
            tokens: self.tokens.clone(),
        }
    }

    /// Whether `input` is known wherever `rows` read it, and in all rows before them if `before`.
    fn knows(&self, input: Site, rows: &BTreeSet<(usize, usize)>, before: bool) -> bool {
        let (Some(known), Some(&last)) = (self.rows.get(&input), rows.last()) else { return false };
        // Within a fused op a value is put in place for all rows of a step or for none.
        let placed = |step: usize| {
            !is_inner(input) || known.range((step, 0)..(step + 1, 0)).count() == self.tokens[step]
        };
        match before {
            true => known.range(..=last).count() == last.1 + 1 && (0..=last.0).all(placed),
            false => rows.iter().all(|row| known.contains(row) && placed(row.0)),
        }
    }
}

/// The stages that the captured rows of `site` were computed from and of which not all that they read was captured.
pub(crate) fn span(site: Site, config: &Config, captured: &Captured) -> BTreeSet<Site> {
    let reads_rows_before = |site: Site, input: Site| {
        use Stage::*;
        matches!(
            (site.stage, input.stage),
            (AttnScores, KPostRope) | (Attention, QkvMatmul | QkvBias)
        )
    };
    let Some(rows) = captured.rows.get(&site) else { return BTreeSet::new() };
    let mut span = BTreeSet::new();
    let mut open = vec![(site, false)];
    while let Some((site, before)) = open.pop() {
        for input in inputs(site, config) {
            let before = before || reads_rows_before(site, input);
            if !captured.knows(input, rows, before) && span.insert((input, before)) {
                open.push((input, before));
            }
        }
    }
    span.into_iter().map(|(site, _)| site).collect()
}

/// What an audit did not judge, and why.
#[derive(Debug, Default)]
pub(crate) struct Gaps {
    /// What the capture holds, and could not be judged.
    unjudged: BTreeMap<Site, String>,
    /// What it does not hold.
    absent: BTreeMap<Site, String>,
}

impl Gaps {
    pub(crate) fn of(
        replay: &Replay<'_>,
        sites: &[Site],
        config: &Config,
        captured: &Captured,
        bound: Bound,
    ) -> Self {
        let mut gaps = Self { unjudged: replay.not_measured.clone(), ..Self::default() };
        for site in replay.captured_sites().into_iter().filter(|site| !sites.contains(site)) {
            gaps.unjudged.insert(site, "the model has no such stage".to_owned());
        }
        for (&site, record) in &replay.records {
            let Record { elements, not_finite, both_not_finite, unknown, .. } = *record;
            let because = if unknown > 0 {
                format!(
                    "{unknown} of its values are of experts that nobody knows: the captured ids are of none, or a near-tie of \
                     the router leaves them open and moe_router_indices was not captured"
                )
            } else if elements + not_finite == 0 {
                "no finite value on either side".to_owned()
            } else if both_not_finite > 0 {
                format!("{both_not_finite} of its values are not finite on either side")
            } else if record.is_drowned(bound) {
                "what it was computed from was not captured, and what that may add up to is as large as its value"
                    .to_owned()
            } else {
                continue;
            };
            gaps.unjudged.entry(site).or_insert(because);
        }
        for step in 0..captured.tokens.len() {
            let here = captured.of_step(step);
            let spans = here.rows.keys().flat_map(|&site| span(site, config, &here));
            let covered: BTreeSet<Site> = spans.chain(here.rows.keys().copied()).collect();
            for &site in sites.iter().filter(|site| !covered.contains(site)) {
                // An engine computes logits of the rows that it was asked for.
                let elsewhere = captured.rows.contains_key(&site);
                if elsewhere && site.stage == Stage::LmHead {
                    continue;
                }
                let of_step = if elsewhere { format!(" in step {step}") } else { String::new() };
                gaps.absent.entry(site).or_insert_with(|| {
                    format!("not captured{of_step}, nor any stage that follows from it")
                });
            }
        }
        for &site in &replay.partial {
            let rows = captured.rows.get(&site).map_or(0, BTreeSet::len);
            let because = format!("only {rows} of its rows were captured");
            gaps.absent.entry(site).or_insert(because);
        }
        gaps.absent.retain(|site, _| !gaps.unjudged.contains_key(site));
        gaps
    }

    pub(crate) fn unjudged(&self) -> Vec<NotMeasured> {
        self.unjudged.iter().map(NotMeasured::of).collect()
    }

    pub(crate) fn all(&self) -> Vec<NotMeasured> {
        let all: BTreeMap<_, _> = self.unjudged.iter().chain(&self.absent).collect();
        all.into_iter().map(NotMeasured::of).collect()
    }
}
