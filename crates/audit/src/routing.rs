//! Which experts a row goes to.
//!
//! Ids are equal or not, and never near. What may be near is the choice: an engine that was about to take the other one of two
//! experts has logits of them that hardly differ. So a row's ids are compared as a set, and each that should not be in it
//! stands against one that should by their logits, which are those that the engine itself chose by where they were
//! captured. The order within the set is no matter of the choice: weights and results are judged slot by slot.

use serde::Serialize;

use crate::{
    judge::{Bound, Compared},
    twin::slack::Choice,
};

/// What is known of a choice of experts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Routing {
    /// Experts to choose from.
    pub experts: usize,
    /// Experts that a row goes to.
    pub per_row: usize,
    /// The row that was nearest to another choice.
    pub nearest: Option<NearTie>,
    /// Rows that went elsewhere than their logits say: the first ones, at most [`Routing::FLIPS`] of them.
    pub flips: Vec<Flip>,
    /// How many rows did.
    pub flipped: usize,
}

/// A row whose last chosen expert is hardly ahead of the first that was not.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct NearTie {
    /// The step.
    pub step: usize,
    /// The position.
    pub position: usize,
    /// The last expert that the logits choose.
    pub chosen: usize,
    /// The next one.
    pub next: usize,
    /// By how much its logit is smaller.
    #[serde(serialize_with = "crate::number")]
    pub margin: f64,
    /// The standard deviation that this difference may have.
    #[serde(serialize_with = "crate::number")]
    pub slack: f64,
    /// The margin in units of the root mean square of the row's logits.
    #[serde(serialize_with = "crate::number")]
    pub relative: f64,
}

/// A row that went elsewhere than its logits say.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Flip {
    /// The step.
    pub step: usize,
    /// The position.
    pub position: usize,
    /// The experts that the logits choose, the largest first.
    pub expected: Vec<usize>,
    /// The ids that were captured, slot by slot, whatever they are.
    #[serde(serialize_with = "crate::numbers")]
    pub captured: Vec<f64>,
    /// By how much the logit of the best expert that was left out is larger than that of the worst that was taken; infinite
    /// where an id is of no expert or occurs twice.
    #[serde(serialize_with = "crate::number")]
    pub margin: f64,
    /// The standard deviation that this difference may have.
    #[serde(serialize_with = "crate::number")]
    pub slack: f64,
    /// Whether that explains the flip: the engine may have been unable to tell the two apart.
    pub explained: bool,
}

impl Flip {
    /// The experts that were left out.
    pub fn left_out(&self) -> impl Iterator<Item = usize> {
        self.expected.iter().copied().filter(|&id| !self.captured.contains(&(id as f64)))
    }

    /// The ids that stand in their place; one that occurs before in the row among them.
    pub fn taken(&self) -> impl Iterator<Item = f64> {
        let is_extra = |&(slot, id): &(usize, f64)| {
            self.captured[..slot].contains(&id) || !self.expected.iter().any(|&e| e as f64 == id)
        };
        self.captured.iter().copied().enumerate().filter(is_extra).map(|(_, id)| id)
    }
}

impl Routing {
    /// How many rows that went elsewhere are listed.
    pub const FLIPS: usize = 32;

    /// With its flips held against `bound`.
    pub(crate) fn judged(&self, bound: Bound) -> Self {
        let mut routing = self.clone();
        for flip in &mut routing.flips {
            flip.explained = flip.margin.abs() <= bound.of(1) * flip.slack;
        }
        routing
    }

    pub(crate) fn add(&mut self, flip: Option<Flip>, tie: Option<NearTie>) {
        if let Some(flip) = flip {
            self.flipped += 1;
            self.flips.extend((self.flips.len() < Self::FLIPS).then_some(flip));
        }
        if let Some(tie) = tie
            && self.nearest.is_none_or(|nearest| tie.margin < nearest.margin)
        {
            self.nearest = Some(tie);
        }
    }
}

/// A row's captured ids against the expected ones: of each slot the logits of the two, and what may lie between them.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) captured: Vec<f64>,
    pub(crate) exact: Vec<f64>,
    pub(crate) expected: Vec<f64>,
    pub(crate) slack: Vec<f32>,
    /// The largest difference, and what it may be; `None` if the two are one set.
    pub(crate) flip: Option<(f64, f64)>,
}

impl Exchange {
    /// Of ids `captured` and `expected` by `choice`, the exact logits being `exact`.
    pub(crate) fn of(
        choice: &Choice<'_>,
        exact: &[f64],
        expected: &[f64],
        captured: &[f64],
    ) -> Self {
        let logits = choice.logits;
        let k = captured.len();
        if !choice.is_ordered() {
            let nothing = || vec![f64::NAN; k];
            let (captured, exact, expected) = (nothing(), nothing(), nothing());
            return Self { captured, exact, expected, slack: vec![0.0; k], flip: None };
        }
        let at =
            |x: &[f64], id: f64| if is_id(id, x.len()) { x[id as usize] } else { f64::INFINITY };
        let mut exchange = Self {
            captured: captured.iter().map(|&id| at(logits, id)).collect(),
            exact: captured.iter().map(|&id| at(exact, id)).collect(),
            expected: captured.iter().map(|&id| at(logits, id)).collect(),
            slack: vec![0.0; k],
            flip: None,
        };
        let (mut left_out, mut taken) = (expected.to_vec(), Vec::new());
        for (slot, id) in captured.iter().enumerate() {
            match left_out.iter().position(|expected| expected == id) {
                Some(found) => {
                    left_out.remove(found);
                }
                None => taken.push(slot),
            }
        }
        // The largest that was left out stands against the smallest that was taken.
        left_out.sort_by(|&a, &b| at(logits, b).total_cmp(&at(logits, a)));
        taken.sort_by(|&a, &b| exchange.captured[a].total_cmp(&exchange.captured[b]));
        for (slot, left_out) in taken.into_iter().zip(left_out) {
            let id = captured[slot];
            (exchange.exact[slot], exchange.expected[slot]) =
                (at(exact, left_out), at(logits, left_out));
            let (lead, off) = match is_id(id, logits.len()) && !captured[..slot].contains(&id) {
                true => choice.lead(left_out as usize, id as usize),
                false => (f64::INFINITY, 0.0),
            };
            exchange.captured[slot] = exchange.expected[slot] - lead;
            exchange.slack[slot] = off as f32;
            if exchange.flip.is_none_or(|(most, _)| lead.abs() > most.abs()) {
                exchange.flip = Some((lead, off));
            }
        }
        exchange
    }
}

impl Exchange {
    pub(crate) fn compared(&self) -> Compared<'_> {
        Compared {
            captured: &self.captured,
            exact: &self.exact,
            emulated: &self.expected,
            slack: Some(&self.slack),
        }
    }
}

/// Whether `id` is of one of so many experts.
pub(crate) fn is_id(id: f64, experts: usize) -> bool {
    id >= 0.0 && id < experts as f64 && id.fract() == 0.0
}

/// The last expert that `choice` takes of `k` and the first that it does not.
pub(crate) fn near_tie(
    choice: &Choice<'_>,
    k: usize,
    step: usize,
    position: usize,
) -> Option<NearTie> {
    let logits = choice.logits;
    if !choice.is_ordered() || k == 0 || k >= logits.len() {
        return None;
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let (chosen, next) = (order[k - 1], order[k]);
    let (margin, slack) = choice.lead(chosen, next);
    let squares: f64 = logits.iter().filter(|x| x.is_finite()).map(|x| x * x).sum();
    let relative = margin / (squares / logits.len() as f64).sqrt();
    Some(NearTie { step, position, chosen, next, margin, slack, relative })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f64; 5] = [3.0, 1.0, 2.0, 2.0 - 1e-7, -1.0];

    fn exchange(expected: &[f64], captured: &[f64]) -> Exchange {
        Exchange::of(&Choice::new(&LOGITS, None), &LOGITS, expected, captured)
    }

    #[test]
    fn the_order_of_a_set_is_no_difference() {
        let found = exchange(&[0.0, 2.0], &[2.0, 0.0]);
        assert_eq!(found.flip, None);
        assert_eq!(found.captured, found.expected);
    }

    #[test]
    fn an_exchanged_expert_is_as_far_off_as_its_logit() {
        let found = exchange(&[0.0, 2.0], &[4.0, 0.0]);
        assert_eq!((found.captured, found.expected), (vec![-1.0, 3.0], vec![2.0, 3.0]));
        let (margin, slack) = found.flip.unwrap();
        assert!(margin == 3.0 && slack < 1e-5, "{margin} {slack}");
        // Logits that softmax makes equal in f32.
        let (margin, slack) = exchange(&[0.0, 2.0], &[0.0, 3.0]).flip.unwrap();
        assert!(margin > 0.0 && margin < slack, "{margin} {slack}");
    }

    #[test]
    fn the_best_that_is_left_out_stands_against_the_worst_that_is_taken() {
        let found = exchange(&[0.0, 2.0], &[1.0, 4.0]);
        assert_eq!(found.expected, [2.0, 3.0]);
        assert_eq!(found.captured, [1.0, -1.0]);
        assert_eq!(found.flip.unwrap().0, 4.0);
    }

    #[test]
    fn ids_that_are_none_or_occur_twice_are_beyond_any_bound() {
        for captured in [[0.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [0.5, 0.0], [f64::NAN, 0.0]] {
            let found = exchange(&[0.0, 2.0], &captured);
            assert_eq!(found.flip.unwrap().0, f64::INFINITY, "{captured:?}");
            assert!(found.captured.contains(&f64::NEG_INFINITY), "{captured:?}: {found:?}");
        }
    }

    #[test]
    fn logits_that_are_none_choose_nothing() {
        let logits = [1.0, f64::NAN, 0.0];
        let choice = Choice::new(&logits, None);
        let found = Exchange::of(&choice, &logits, &[0.0], &[2.0]);
        assert!(found.flip.is_none() && found.captured[0].is_nan() && found.expected[0].is_nan());
        assert_eq!(near_tie(&choice, 1, 0, 0), None);
    }

    #[test]
    fn experts_whose_probabilities_underflow_are_all_the_same() {
        let logits = [0.0, -200.0, -300.0, f64::NEG_INFINITY];
        let choice = Choice::new(&logits, None);
        let (margin, slack) =
            Exchange::of(&choice, &logits, &[0.0, 1.0], &[0.0, 3.0]).flip.unwrap();
        assert!(margin <= slack, "{margin} {slack}");
        let tie = near_tie(&choice, 1, 0, 7).unwrap();
        assert_eq!((tie.chosen, tie.next, tie.position), (0, 1, 7));
    }
}
