//! Stages of a mixture of experts: ids are compared as sets, and what experts compute is compared expert by expert.
//!
//! Where two probabilities are nearly equal, the smallest rounding decides which of two experts is chosen, or which comes
//! first. So the slots of the two sides are brought together by id, and for a row whose experts differ it is said how close the
//! choice was.

use apr_capture::{Capture, CaptureTensor, RowRef};
use apr_model::{Axes, Site, Stage};
use serde::Serialize;

use crate::{Result, stages::Reader};

/// A row whose experts are not the same on both sides.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Flip {
    /// The sequence within a batch.
    pub slot: usize,
    /// The position, where it is known.
    pub position: Option<usize>,
    /// Experts that only side A chose.
    pub only_a: Vec<usize>,
    /// Experts that only side B chose.
    pub only_b: Vec<usize>,
    /// How far apart these are in the reference's router: the smallest logit of `only_b` less the largest of `only_a`. `None` if the logits
    /// were not captured.
    pub margin: Option<f64>,
    /// The largest difference of a logit of these experts between the sides.
    pub logits_moved: Option<f64>,
}

impl Flip {
    /// Whether the sides' logits differ by enough to explain the choice: two of them may move towards each other.
    pub fn is_near_tie(&self) -> Option<bool> {
        Some(self.margin? <= 2.0 * self.logits_moved?)
    }
}

/// What says which experts the slots of a site belong to.
pub(crate) struct Routing<'c> {
    ids: [Reader<'c>; 2],
    logits: [Reader<'c>; 2],
}

/// Two rows' experts.
pub(crate) struct Chosen {
    a: Vec<usize>,
    b: Vec<usize>,
}

impl<'c> Routing<'c> {
    /// Of a site whose rows have slots.
    pub(crate) fn of(a: &'c Capture, b: &'c Capture, site: Site) -> Option<Self> {
        let has_slots = matches!(site.stage.axes(), Axes::RowSlot | Axes::RowSlotChannel);
        let of = |stage| [a, b].map(|capture| Reader::new(capture, Site { stage, ..site }));
        has_slots.then(|| Self { ids: of(Stage::MoeRouterIndices), logits: of(Stage::MoeRouter) })
    }

    /// The experts of these rows; `None` if a side does not say them.
    pub(crate) fn chosen(&mut self, rows: [RowRef; 2]) -> Result<Option<Chosen>> {
        let [a, b] = &mut self.ids;
        let (a, b) = (a.row_like(rows[0])?, b.row_like(rows[1])?);
        Ok(a.zip(b).map(|(a, b)| {
            let ids = |row: Vec<f64>| row.into_iter().map(|id| id as usize).collect();
            Chosen { a: ids(a), b: ids(b) }
        }))
    }

    /// What is to be said of rows that chose otherwise.
    pub(crate) fn flip(&mut self, rows: [RowRef; 2], chosen: &Chosen) -> Result<Option<Flip>> {
        let only = |of: &[usize], other: &[usize]| -> Vec<usize> {
            of.iter().copied().filter(|id| !other.contains(id)).collect()
        };
        let (only_a, only_b) = (only(&chosen.a, &chosen.b), only(&chosen.b, &chosen.a));
        if only_a.is_empty() && only_b.is_empty() {
            return Ok(None);
        }
        let [a, b] = &mut self.logits;
        let logits = a.row_like(rows[0])?.zip(b.row_like(rows[1])?);
        let of = |logits: &[f64], ids: &[usize]| -> Vec<f64> {
            ids.iter().filter_map(|&id| logits.get(id).copied()).collect()
        };
        let margin = logits.as_ref().map(|(_, b)| {
            let least = of(b, &only_b).into_iter().fold(f64::INFINITY, f64::min);
            least - of(b, &only_a).into_iter().fold(f64::NEG_INFINITY, f64::max)
        });
        let logits_moved = logits.as_ref().map(|(a, b)| {
            let both = [&only_a[..], &only_b[..]].concat();
            let pairs = of(a, &both).into_iter().zip(of(b, &both));
            pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
        });
        let RowRef { slot, position, .. } = rows[0];
        Ok(Some(Flip { slot, position, only_a, only_b, margin, logits_moved }))
    }
}

impl Chosen {
    /// Whether both sides list the same experts in the same order.
    pub(crate) fn in_one_order(&self) -> bool {
        self.a == self.b
    }

    /// The experts that either side chose, and for each 1 or 0 by side: two sets as two vectors.
    pub(crate) fn membership(&self) -> (Vec<usize>, [Vec<f64>; 2]) {
        let mut all = [&self.a[..], &self.b[..]].concat();
        all.sort_unstable();
        all.dedup();
        let of = |ids: &[usize]| all.iter().map(|id| f64::from(ids.contains(id))).collect();
        let sides = [of(&self.a), of(&self.b)];
        (all, sides)
    }

    /// The experts that both sides chose, in the order of side B, and their slots' values in rows of slots.
    pub(crate) fn common(&self, a: &[f64], b: &[f64]) -> (Vec<usize>, [Vec<f64>; 2]) {
        let mut experts = Vec::new();
        let mut values = [Vec::new(), Vec::new()];
        for (slot_b, id) in self.b.iter().enumerate() {
            let Some(slot_a) = self.a.iter().position(|other| other == id) else { continue };
            experts.push(*id);
            for (values, (row, slots, slot)) in
                values.iter_mut().zip([(a, self.a.len(), slot_a), (b, self.b.len(), slot_b)])
            {
                let width = row.len() / slots;
                values.extend(&row[slot * width..][..width]);
            }
        }
        (experts, values)
    }

    /// Slots whose expert only one side chose.
    pub(crate) fn slots_left_out(&self) -> usize {
        self.b.iter().filter(|id| !self.a.contains(id)).count()
    }
}

impl Reader<'_> {
    /// The values of the row that stands for the same token as `row`, a row of another stage.
    fn row_like(&mut self, row: RowRef) -> Result<Option<Vec<f64>>> {
        let same = |other: &RowRef| match row.position {
            Some(_) => (other.slot, other.position) == (row.slot, row.position),
            None => other.row == row.row,
        };
        let rows = self.rows();
        let Some(found) = rows.iter().find(|other| other.step == row.step && same(other)) else {
            return Ok(None);
        };
        let tensor: &CaptureTensor = self.load(found.step)?;
        let mut values = Vec::new();
        tensor.read_piece(0, found.row, &mut values);
        Ok(Some(values))
    }
}
