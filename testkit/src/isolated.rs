//! Each stage judged by itself: compared, then overwritten with what the other engine had.

use std::collections::BTreeMap;

use apr_model::{HostTensor, Observer, ObserverError, Site, Step, TapSet, Values, View};

use crate::{Collect, relative_l2};

/// Compares each value with the one that another engine computed from the same inputs, and goes on with the
/// other engine's, so that no difference is carried downstream.
#[derive(Debug)]
pub struct Isolated<'c> {
    theirs: &'c Collect,
    step: usize,
    /// How far each of their values is from ours, by step and site.
    pub distances: BTreeMap<(usize, Site), f64>,
}

impl<'c> Isolated<'c> {
    /// An observer that replays `theirs`.
    pub fn new(theirs: &'c Collect) -> Self {
        Self { theirs, step: 0, distances: BTreeMap::new() }
    }

    /// The site with the largest distance.
    pub fn worst(&self) -> (f64, Site) {
        let (&(_, site), &distance) = self
            .distances
            .iter()
            .max_by(|a, b| a.1.total_cmp(b.1))
            .expect("at least one site was compared");
        (distance, site)
    }
}

impl Observer for Isolated<'_> {
    fn wanted(&self) -> TapSet {
        self.theirs.wanted()
    }

    fn begin(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        self.step = step.index;
        Ok(())
    }

    fn value(&mut self, step: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError> {
        let ours: Vec<f64> = match view.values {
            Values::F32(v) => v.iter().map(|&x| x.into()).collect(),
            Values::F64(v) => v.to_vec(),
        };
        let theirs = &self.theirs.get(step.index, site).tensor.values;
        self.distances.insert((step.index, site), relative_l2(theirs, &ours));
        Ok(())
    }

    fn replace(&mut self, site: Site) -> Result<Option<HostTensor>, ObserverError> {
        Ok(Some(self.theirs.get(self.step, site).tensor.clone()))
    }
}
