//! The observer that keeps statistics of values instead of the values.

use std::collections::BTreeMap;

use apr_model::{Axes, Observer, ObserverError, Phase, Site, Step, TapSet, Values, View};
use apr_tensor::Summary;

/// The statistics of one value of one step, each with the sample it is of.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteStatistics {
    /// Which value.
    pub site: Site,
    /// The positions of its rows.
    pub positions: std::ops::Range<usize>,
    /// Over all rows.
    pub all_rows: Summary,
    /// Over the last row.
    pub last_row: Summary,
    /// The positions of rows that are zero throughout.
    pub dead_rows: Vec<usize>,
}

/// The statistics of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepStatistics {
    /// The number of the step in its sequence.
    pub index: usize,
    /// Prompt or continuation.
    pub phase: Phase,
    /// The positions of its tokens.
    pub positions: std::ops::Range<usize>,
    /// The values, in the order of computation.
    pub sites: Vec<SiteStatistics>,
    /// The first value with a NaN or an infinity, in the order of computation.
    pub first_not_finite: Option<Site>,
}

/// Keeps the statistics of every step it observes.
#[derive(Clone, Debug)]
pub struct Telemetry {
    sites: TapSet,
    current: BTreeMap<Site, SiteStatistics>,
    steps: Vec<StepStatistics>,
}

impl Telemetry {
    /// Statistics of `sites`.
    pub fn new(sites: TapSet) -> Self {
        Self { sites, current: BTreeMap::new(), steps: Vec::new() }
    }

    /// The steps observed so far.
    pub fn steps(&self) -> &[StepStatistics] {
        &self.steps
    }
}

impl Observer for Telemetry {
    fn wanted(&self) -> TapSet {
        self.sites.clone()
    }

    fn begin(&mut self, _: &Step<'_>) -> Result<(), ObserverError> {
        self.current.clear();
        Ok(())
    }

    fn value(&mut self, step: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError> {
        let positions = step.positions(site);
        let mut statistics = SiteStatistics {
            site,
            positions: positions.clone(),
            all_rows: Summary::default(),
            last_row: Summary::default(),
            dead_rows: Vec::new(),
        };
        let axes = site.stage.axes();
        let axis = axes.row_axis();
        let (pieces, rows) = (view.shape[..axis].iter().product::<usize>(), view.shape[axis]);
        let len: usize = view.shape[axis + 1..].iter().product();
        for (row, position) in positions.enumerate() {
            // Masked scores are zeros that nobody computed.
            let seen = if axes == Axes::HeadRowKey { len.min(position + 1) } else { len };
            let row: Summary = (0..pieces)
                .map(|piece| (piece * rows + row) * len)
                .map(|start| summary(view.values, start..start + seen))
                .fold(Summary::default(), Summary::merge);
            // Expert 0 is an expert.
            let is_dead = row.zeros() == row.count() && !site.stage.holds_ids();
            if row.count() > 0 && is_dead {
                statistics.dead_rows.push(position);
            }
            statistics.all_rows = statistics.all_rows.merge(row);
            statistics.last_row = row;
        }
        self.current.insert(site, statistics);
        Ok(())
    }

    fn end(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        let sites: Vec<_> = std::mem::take(&mut self.current).into_values().collect();
        let first_not_finite = sites
            .iter()
            .find(|s| s.all_rows.nan() + s.all_rows.inf() > 0)
            .map(|statistics| statistics.site);
        self.steps.push(StepStatistics {
            index: step.index,
            phase: step.phase,
            positions: step.first_position..step.first_position + step.tokens.len(),
            sites,
            first_not_finite,
        });
        Ok(())
    }
}

fn summary(values: Values<'_>, range: std::ops::Range<usize>) -> Summary {
    match values {
        Values::F32(values) => Summary::of(&values[range]),
        Values::F64(values) => Summary::of(&values[range]),
    }
}
