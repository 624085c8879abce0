//! Ops of a mixture of experts.

use std::collections::BTreeMap;

use apr_model::{HostTensor, Result};
use apr_tensor::Stored;

use super::{Kernels, Linear, Place, row_len, select_rows};

/// The choice of each row's experts.
pub(crate) struct TopK<'a> {
    pub(crate) place: &'a Place,
    pub(crate) kernels: &'a dyn Kernels,
    pub(crate) logits: HostTensor, // [n, experts]
    pub(crate) k: usize,
}

/// The weights of the chosen experts.
pub(crate) struct RouteWeights<'a> {
    pub(crate) place: &'a Place,
    pub(crate) kernels: &'a dyn Kernels,
    pub(crate) logits: HostTensor, // [n, experts]
    pub(crate) ids: HostTensor,    // [n, k]
    pub(crate) normalize: bool,
}

impl RouteWeights<'_> {
    /// The weights with `f` of the logits in place of the logits.
    pub(crate) fn with_logits(&self, f: impl Fn(f64) -> f64) -> Result<HostTensor> {
        let mut logits = self.logits.clone();
        logits.values.iter_mut().for_each(|logit| *logit = f(*logit));
        self.kernels.route_weights(&logits, &self.ids, self.normalize)
    }
}

/// The products of each row with the matrices of its experts.
pub(crate) struct Experts<'a> {
    pub(crate) place: &'a Place,
    pub(crate) kernels: &'a dyn Kernels,
    /// `[n, in]` for all experts of a row, or `[n, k, in]`.
    pub(crate) x: HostTensor,
    /// The matrices of all experts, one below the other.
    pub(crate) w: &'a Stored,
    pub(crate) experts: usize,
    pub(crate) ids: HostTensor, // [n, k]
}

impl Experts<'_> {
    /// Experts of a row.
    pub(crate) fn k(&self) -> usize {
        self.ids.shape[1]
    }

    /// Rows of an expert's matrix.
    pub(crate) fn out(&self) -> usize {
        self.w.shape().rows() / self.experts
    }

    /// The products with the matrices of other experts.
    pub(crate) fn by_ids(&self, ids: &HostTensor) -> Result<HostTensor> {
        self.kernels.expert_linear(&self.x, self.w, self.experts, ids)
    }

    /// The products with other matrices.
    pub(crate) fn by_matrices(&self, w: &Stored) -> Result<HostTensor> {
        self.kernels.expert_linear(&self.x, w, self.experts, &self.ids)
    }

    /// The products of other rows.
    pub(crate) fn by_input(&self, x: &HostTensor) -> Result<HostTensor> {
        self.kernels.expert_linear(x, self.w, self.experts, &self.ids)
    }

    /// What each slot of each row is multiplied with, `[n, k, in]`.
    pub(crate) fn input(&self) -> HostTensor {
        if self.x.shape.len() == 3 {
            return self.x.clone();
        }
        let [n, k] = [self.x.shape[0], self.k()];
        let slots = select_rows(&self.x, (0..n * k).map(|slot| slot / k));
        HostTensor { shape: vec![n, k, self.x.shape[1]], ..slots }
    }

    /// The slots of each expert, counted over all rows.
    pub(crate) fn groups(&self) -> BTreeMap<usize, Vec<usize>> {
        let mut groups = BTreeMap::<usize, Vec<usize>>::new();
        for (slot, &id) in self.ids.values.iter().enumerate() {
            groups.entry(id as usize).or_default().push(slot);
        }
        groups
    }

    /// Lets `damage` strike the product with the matrix of every expert, or of the busiest one: the seed decides.
    pub(crate) fn strike(
        &self,
        y: &mut HostTensor,
        damage: fn(&Linear<'_>, &mut HostTensor) -> Result<()>,
    ) -> Result<()> {
        let all = self.place.rng().below(2) == 0;
        let (width, out) = (self.w.shape().cols(), self.out());
        let as_rows = |x: HostTensor, width| HostTensor {
            shape: vec![x.values.len() / width, width],
            values: x.values,
        };
        let input = as_rows(self.input(), width);
        let right = as_rows(y.clone(), out);
        for (expert, slots) in self.groups() {
            if !all && expert != self.place.expert {
                continue;
            }
            let parts = [self.w.slice_rows(expert * out..(expert + 1) * out)];
            let x = select_rows(&input, slots.iter().copied());
            let linear =
                Linear { place: self.place, kernels: self.kernels, x, parts: &parts, part: 0 };
            let mut wrong = select_rows(&right, slots.iter().copied());
            damage(&linear, &mut wrong)?;
            for (&slot, wrong) in slots.iter().zip(wrong.values.chunks_exact(out)) {
                y.values[slot * out..][..out].copy_from_slice(wrong);
            }
        }
        Ok(())
    }
}

/// The sum of what a row's experts have made.
pub(crate) struct ExpertSum<'a> {
    pub(crate) place: &'a Place,
    pub(crate) kernels: &'a dyn Kernels,
    pub(crate) x: HostTensor,       // [n, k, hidden]
    pub(crate) weights: HostTensor, // [n, k]
}

impl ExpertSum<'_> {
    /// The sum with the weights of each row changed.
    pub(crate) fn weighted(&self, change: impl Fn(&mut [f64])) -> Result<HostTensor> {
        let mut weights = self.weights.clone();
        weights.values.chunks_exact_mut(row_len(&self.weights)).for_each(change);
        self.kernels.weighted_sum(&self.x, &weights)
    }
}
