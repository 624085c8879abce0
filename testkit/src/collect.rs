//! Observers for tests.

use std::collections::BTreeMap;

use apr_model::{HostTensor, Observer, ObserverError, Site, Step, TapSet, Values, View};

/// Keeps every wanted value of every step, and replaces those it was given replacements for.
#[derive(Clone, Debug, Default)]
pub struct Collect {
    taps: TapSet,
    replacements: BTreeMap<Site, HostTensor>,
    /// Values by step and site.
    pub shown: BTreeMap<(usize, Site), Shown>,
    /// Sites in the order in which they were shown.
    pub order: Vec<Site>,
}

/// A value as it was shown.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    /// The positions of its rows.
    pub positions: std::ops::Range<usize>,
    /// Its dimensions and elements, widened.
    pub tensor: HostTensor,
}

impl Collect {
    /// Wants `taps`.
    pub fn new(taps: TapSet) -> Self {
        Self { taps, ..Self::default() }
    }

    /// Puts `tensor` in place of what is computed at `site`, in every step.
    pub fn replacing(mut self, site: Site, tensor: HostTensor) -> Self {
        self.taps.insert(site);
        self.replacements.insert(site, tensor);
        self
    }

    /// The value of `site` in step `step`.
    ///
    /// # Panics
    /// If it was not shown.
    pub fn get(&self, step: usize, site: Site) -> &Shown {
        let shown = self.shown.get(&(step, site));
        shown.unwrap_or_else(|| panic!("{site} of step {step} was not shown"))
    }
}

impl Observer for Collect {
    fn wanted(&self) -> TapSet {
        self.taps.clone()
    }

    fn value(&mut self, step: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError> {
        let values = match view.values {
            Values::F32(v) => v.iter().map(|&x| x.into()).collect(),
            Values::F64(v) => v.to_vec(),
        };
        let tensor = HostTensor { shape: view.shape.to_vec(), values };
        let shown = Shown { positions: step.positions(site), tensor };
        self.order.push(site);
        match self.shown.insert((step.index, site), shown) {
            None => Ok(()),
            Some(_) => Err(format!("{site} was shown twice in step {}", step.index).into()),
        }
    }

    fn replace(&mut self, site: Site) -> Result<Option<HostTensor>, ObserverError> {
        Ok(self.replacements.get(&site).cloned())
    }
}

impl Shown {
    /// The part of the value at `positions`, which count along axis `row_axis`.
    ///
    /// # Panics
    /// If a position is not among the value's own.
    pub fn at(&self, row_axis: usize, positions: &[usize]) -> HostTensor {
        let (outer, inner) = self.tensor.shape.split_at(row_axis);
        let (pieces, rows) = (outer.iter().product::<usize>(), inner[0]);
        let len = inner[1..].iter().product::<usize>();
        let mut values = Vec::with_capacity(pieces * positions.len() * len);
        for piece in 0..pieces {
            for position in positions {
                assert!(self.positions.contains(position), "no row has position {position}");
                let row = piece * rows + position - self.positions.start;
                values.extend_from_slice(&self.tensor.values[row * len..][..len]);
            }
        }
        let mut shape = self.tensor.shape.clone();
        shape[row_axis] = positions.len();
        HostTensor { shape, values }
    }
}
