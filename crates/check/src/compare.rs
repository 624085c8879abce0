//! One run against another, site by site, while it runs.
//!
//! The first run leaves a hash of each row of each site; memory does not grow with the model's width. The other run is
//! compared with these, and only the rows of the first site that differs are kept. Their counterparts are fetched by
//! repeating the first run.

use std::collections::BTreeMap;

use apr_model::{Observer, ObserverError, Site, Step, TapSet, View};

use crate::{
    Break, Place, Watch,
    rows::{Row, Rows, bits},
};

/// What a run computed, in hashes.
#[derive(Debug)]
pub(crate) struct Baseline {
    /// By position.
    hashes: BTreeMap<Site, Vec<blake3::Hash>>,
    pub(crate) logits: Vec<f32>,
    pub(crate) not_finite: NotFinite,
}

/// NaN and infinities of a run.
#[derive(Debug, Default)]
pub(crate) struct NotFinite {
    /// The first such element in the order of computation, and how many there are at each site.
    first: Option<(Place, f64)>,
    elements: BTreeMap<Site, u64>,
}

impl Baseline {
    pub(crate) fn sites(&self) -> usize {
        self.hashes.len()
    }

    fn taps(&self) -> TapSet {
        self.hashes.keys().copied().collect()
    }

    fn hash(&self, site: Site, position: usize) -> Option<&blake3::Hash> {
        self.hashes.get(&site)?.get(position)
    }
}

impl NotFinite {
    fn see(&mut self, site: Site, position: usize, row: &Row) {
        let mut wrong = row.elements.iter().enumerate().filter(|(_, x)| !x.is_finite());
        let Some((index, &value)) = wrong.next() else { return };
        *self.elements.entry(site).or_default() += 1 + wrong.count() as u64;
        if self.first.is_none_or(|(first, _)| site < first.site) {
            self.first = Some((row.place(site, position, index), value));
        }
    }

    pub(crate) fn to_break(&self) -> Option<Break> {
        let (at, found) = self.first?;
        let sites = self.elements.len() as u64;
        Some(Break::NotFinite { at, found, elements: self.elements[&at.site], sites })
    }
}

/// Makes a [`Baseline`].
pub(crate) struct Record<'w> {
    taps: TapSet,
    watch: &'w dyn Watch,
    baseline: Baseline,
}

impl<'w> Record<'w> {
    /// Records `taps` of a run that reads each position once, in order.
    pub(crate) fn new(taps: TapSet, watch: &'w dyn Watch) -> Self {
        let (hashes, not_finite) = Default::default();
        Self { taps, watch, baseline: Baseline { hashes, logits: Vec::new(), not_finite } }
    }

    pub(crate) fn finish(self, logits: Vec<f32>) -> Baseline {
        Baseline { logits, ..self.baseline }
    }
}

impl Observer for Record<'_> {
    fn wanted(&self) -> TapSet {
        self.taps.clone()
    }

    fn value(&mut self, step: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError> {
        self.watch.advance(1);
        let rows = Rows::new(step, site, view);
        for position in rows.positions() {
            let row = rows.row(position);
            self.baseline.not_finite.see(site, position, &row);
            self.baseline.hashes.entry(site).or_default().push(row.hash());
        }
        Ok(())
    }
}

/// Compares a run with a [`Baseline`].
pub(crate) struct Compare<'b> {
    baseline: &'b Baseline,
    watch: &'b dyn Watch,
    /// The rows that differ at the first site that does, by position.
    first: Option<(Site, BTreeMap<usize, Row>)>,
    compared: usize,
    expected: usize,
}

impl<'b> Compare<'b> {
    pub(crate) fn new(baseline: &'b Baseline, watch: &'b dyn Watch) -> Self {
        Self { baseline, watch, first: None, compared: 0, expected: 0 }
    }

    /// How many rows were compared, and how many should have been.
    pub(crate) fn rows(&self) -> (usize, usize) {
        (self.compared, self.expected)
    }

    /// The rows that differ at the first site that does.
    pub(crate) fn difference(self) -> Option<Difference> {
        self.first.map(|(site, found)| Difference { site, found })
    }
}

impl Observer for Compare<'_> {
    fn wanted(&self) -> TapSet {
        self.baseline.taps()
    }

    fn value(&mut self, step: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError> {
        self.watch.advance(1);
        let rows = Rows::new(step, site, view);
        for position in rows.positions() {
            let row = rows.row(position);
            let Some(expected) = self.baseline.hash(site, position) else { continue };
            self.compared += 1;
            if row.hash() == *expected || self.first.as_ref().is_some_and(|(s, _)| *s < site) {
                continue;
            }
            match &mut self.first {
                Some((first, rows)) if *first == site => {
                    rows.insert(position, row);
                }
                first => *first = Some((site, BTreeMap::from([(position, row)]))),
            }
        }
        Ok(())
    }

    fn end(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        let rows = |site: &Site| step.positions(*site).len();
        self.expected += self.baseline.hashes.keys().map(rows).sum::<usize>();
        Ok(())
    }
}

/// The rows of one site in which a run differs from its baseline.
#[derive(Debug)]
pub(crate) struct Difference {
    pub(crate) site: Site,
    found: BTreeMap<usize, Row>,
}

impl Difference {
    /// The difference in words and numbers. `again` is what the baseline's run computes at the site when it is repeated.
    pub(crate) fn to_break(&self, run: &str, baseline: &Baseline, again: &Fetch) -> Break {
        let mut first = None;
        let mut elements = 0;
        for (&position, found) in &self.found {
            let expected = again.rows.get(&position).filter(|row| {
                // A baseline that cannot be repeated has no values to show.
                row.elements.len() == found.elements.len()
                    && baseline.hash(self.site, position) == Some(&row.hash())
            });
            let Some(expected) = expected else {
                let value = found.elements.first().copied().unwrap_or(f64::NAN);
                first = first.or(Some((found.place(self.site, position, 0), None, value)));
                elements += found.elements.len() as u64;
                continue;
            };
            let pairs = expected.elements.iter().zip(&found.elements).enumerate();
            let mut wrong = pairs.filter(|(_, (a, b))| bits(**a) != bits(**b));
            if let Some((index, (&a, &b))) = wrong.next() {
                elements += 1 + wrong.count() as u64;
                first = first.or(Some((found.place(self.site, position, index), Some(a), b)));
            }
        }
        let rows = self.found.len() as u64;
        let (at, expected, found) = first.expect("rows with other hashes have other elements");
        Break::Bits { run: run.to_owned(), at, expected, found, elements, rows }
    }
}

/// Keeps the rows of one site.
pub(crate) struct Fetch {
    taps: TapSet,
    site: Site,
    rows: BTreeMap<usize, Row>,
}

impl Fetch {
    /// Keeps those of `site`; all that `baseline` looked at is looked at again, should looking matter.
    pub(crate) fn new(baseline: &Baseline, site: Site) -> Self {
        Self { taps: baseline.taps(), site, rows: BTreeMap::new() }
    }
}

impl Observer for Fetch {
    fn wanted(&self) -> TapSet {
        self.taps.clone()
    }

    fn value(&mut self, step: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError> {
        if site == self.site {
            let rows = Rows::new(step, site, view);
            self.rows.extend(rows.positions().map(|position| (position, rows.row(position))));
        }
        Ok(())
    }
}

/// Looks, and sees nothing.
pub(crate) struct Glance(pub(crate) TapSet);

impl Observer for Glance {
    fn wanted(&self) -> TapSet {
        self.0.clone()
    }

    fn value(&mut self, _: &Step<'_>, _: Site, _: View<'_>) -> Result<(), ObserverError> {
        Ok(())
    }
}
