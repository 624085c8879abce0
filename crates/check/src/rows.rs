//! The elements that belong to one token position, wherever in a step they stand.
//!
//! A row of scores has as many keys as the step could see, which depends on how the tokens were cut into steps. What
//! belongs to a position are the keys up to itself; only these are compared.

use apr_model::{Axes, Site, Step, Values, View};
use serde::Serialize;

use crate::outcome::displayed;

/// Where an element of the forward pass stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The stage and its layer.
    #[serde(serialize_with = "displayed")]
    pub site: Site,
    /// The token position, from 0.
    pub position: usize,
    /// The head, where the stage has heads.
    pub head: Option<usize>,
    /// Which of the row's experts, where the stage has experts.
    pub slot: Option<usize>,
    /// The channel of the row, head or expert.
    pub channel: Option<usize>,
    /// The position of the key, for scores.
    pub key: Option<usize>,
}

/// The value of one site in one step, row by row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'v> {
    site: Site,
    first_position: usize,
    shape: &'v [usize],
    values: Values<'v>,
}

/// The elements of one position at one site.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) elements: Vec<f64>,
    /// Elements per head; all of them where the site has no heads.
    head_len: usize,
}

impl<'v> Rows<'v> {
    /// The rows of `view`, the value of `site` in `step`.
    pub(crate) fn new(step: &Step<'_>, site: Site, view: View<'v>) -> Self {
        let View { shape, values } = view;
        Self { site, first_position: step.positions(site).start, shape, values }
    }

    /// The positions that there are rows of.
    pub(crate) fn positions(&self) -> std::ops::Range<usize> {
        self.first_position..self.first_position + self.shape[self.site.stage.axes().row_axis()]
    }

    /// The row of `position`.
    pub(crate) fn row(&self, position: usize) -> Row {
        let index = position - self.first_position;
        let last = self.shape.last().copied().unwrap_or(1);
        let elements = |start: usize, len: usize| (start..start + len).map(|i| self.values.get(i));
        match (self.site.stage.axes(), self.shape) {
            (Axes::HeadRowKey, &[heads, n, keys]) => {
                let visible = position + 1;
                let of_head = |head| elements((head * n + index) * keys, visible);
                Row { elements: (0..heads).flat_map(of_head).collect(), head_len: visible }
            }
            _ => {
                let len = self.shape[1..].iter().product();
                Row { elements: elements(index * len, len).collect(), head_len: last }
            }
        }
    }
}

impl Row {
    /// A hash of the bits.
    pub(crate) fn hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for chunk in self.elements.chunks(512) {
            let mut bytes = [0; 8 * 512];
            for (to, &x) in bytes.as_chunks_mut().0.iter_mut().zip(chunk) {
                *to = bits(x).to_le_bytes();
            }
            hasher.update(&bytes[..8 * chunk.len()]);
        }
        hasher.finalize()
    }

    /// Where element `index` of the row of `position` at `site` stands.
    pub(crate) fn place(&self, site: Site, position: usize, index: usize) -> Place {
        let (head, inner) = (index / self.head_len.max(1), index % self.head_len.max(1));
        let (head, slot, channel, key) = match site.stage.axes() {
            Axes::RowChannel => (None, None, Some(index), None),
            Axes::RowSlot => (None, Some(index), None, None),
            Axes::RowSlotChannel => (None, Some(head), Some(inner), None),
            Axes::RowHeadChannel => (Some(head), None, Some(inner), None),
            Axes::HeadRowKey => (Some(head), None, None, Some(inner)),
        };
        Place { site, position, head, slot, channel, key }
    }
}

/// What is compared: the bits, with all NaN being one. Widening from f32 keeps different bits different.
pub(crate) fn bits(x: f64) -> u64 {
    if x.is_nan() { f64::NAN.to_bits() } else { x.to_bits() }
}

#[cfg(test)]
mod tests {
    use apr_model::{Phase, Stage};

    use super::*;

    fn step(tokens: &[u32], first_position: usize) -> Step<'_> {
        let logit_rows = 0..tokens.len();
        Step { index: 0, phase: Phase::Prefill, chunk: 0, tokens, first_position, logit_rows }
    }

    #[test]
    fn a_row_of_scores_is_the_same_whatever_the_step_could_see() {
        let site = Site::layer(0, Stage::AttnScores);
        // Two heads; positions 1 and 2 in one step, then position 1 as the last of its step.
        let both = [1., 2., 0., 3., 4., 5., 6., 7., 0., 8., 9., 10.];
        let alone = [1., 2., 6., 7.];
        let view = |shape, values| View { shape, values: Values::F64(values) };
        let (two, one) = (step(&[0, 0], 1), step(&[0], 1));
        let wide = Rows::new(&two, site, view(&[2, 2, 3], &both));
        let narrow = Rows::new(&one, site, view(&[2, 1, 2], &alone));
        assert_eq!(wide.positions(), 1..3);
        assert_eq!(wide.row(1).elements, narrow.row(1).elements);
        assert_eq!(wide.row(1).hash(), narrow.row(1).hash());
        assert_ne!(wide.row(2).hash(), narrow.row(1).hash());
        let place = wide.row(2).place(site, 2, 4);
        assert_eq!((place.head, place.channel, place.key), (Some(1), None, Some(1)));
    }

    #[test]
    fn signs_of_zero_count_and_payloads_of_nan_do_not() {
        let row = |x: f64| Row { elements: vec![x; 600], head_len: 600 }.hash();
        assert_ne!(row(0.0), row(-0.0));
        assert_eq!(row(f64::NAN), row(-f64::NAN));
    }
}
