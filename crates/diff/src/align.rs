//! Which row of one capture belongs to which row of the other.
//!
//! A row belongs to a token position, whatever step computed it: a row of a prefill chunk is compared with that
//! of a decode step. Captures that do not say their positions are aligned on their last rows, which has to be told.
//! From the first position on at which the tokens differ, rows have different contexts and are not scored.

use std::{cmp::Ordering, collections::BTreeMap};

use apr_capture::{Capture, RowRef};
use serde::Serialize;

use crate::Side;

/// How rows were aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Alignment {
    /// By token position.
    Positions,
    /// On the last row of both, because a side does not know its positions; tokens could not be compared.
    LastRow,
}

impl Alignment {
    pub(crate) fn of(a: &Capture, b: &Capture) -> Self {
        match a.knows_positions() && b.knows_positions() {
            true => Self::Positions,
            false => Self::LastRow,
        }
    }
}

/// The first position of a sequence at which the tokens differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TokenDifference {
    /// The sequence within a batch.
    pub slot: usize,
    /// The position.
    pub position: usize,
    /// The token id of the side under test.
    pub a: u32,
    /// The reference's.
    pub b: u32,
}

/// The first difference of each sequence.
pub(crate) fn token_differences(a: &Capture, b: &Capture) -> Vec<TokenDifference> {
    let (a, b) = (tokens(a), tokens(b));
    let mut differences: Vec<TokenDifference> = Vec::new();
    for (&(slot, position), &a) in &a {
        let Some(&b) = b.get(&(slot, position)) else { continue };
        if a != b && differences.last().is_none_or(|last| last.slot != slot) {
            differences.push(TokenDifference { slot, position, a, b });
        }
    }
    differences
}

fn tokens(capture: &Capture) -> BTreeMap<(usize, usize), u32> {
    let mut tokens = BTreeMap::new();
    for step in capture.steps() {
        if let (Some(positions), Some(ids)) = (&step.positions, &step.token_ids) {
            tokens.extend(positions.iter().map(|&p| (step.slot, p)).zip(ids.iter().copied()));
        }
    }
    tokens
}

/// The rows of one stage, aligned.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Rows {
    /// Rows that belong together.
    pub(crate) pairs: Vec<(RowRef, RowRef)>,
    /// Rows that only one side has.
    pub(crate) only_a: usize,
    pub(crate) only_b: usize,
    /// Pairs left out because the tokens up to there differ.
    pub(crate) other_tokens: usize,
}

/// A position that one capture holds twice: there is no telling which row is meant.
#[derive(Debug, PartialEq)]
pub(crate) struct Ambiguous {
    pub(crate) side: Side,
    pub(crate) position: usize,
}

pub(crate) fn align(
    alignment: Alignment,
    a: &[RowRef],
    b: &[RowRef],
    differences: &[TokenDifference],
) -> Result<Rows, Ambiguous> {
    match alignment {
        Alignment::LastRow => {
            let both = a.len().min(b.len());
            let (only_a, only_b) = (a.len() - both, b.len() - both);
            let pairs = a[only_a..].iter().copied().zip(b[only_b..].iter().copied()).collect();
            Ok(Rows { pairs, only_a, only_b, other_tokens: 0 })
        }
        Alignment::Positions => {
            for (side, rows) in [(Side::A, a), (Side::B, b)] {
                if let Some(pair) = rows.windows(2).find(|pair| key(&pair[0]) == key(&pair[1])) {
                    let position = pair[0].position.unwrap_or_default();
                    return Err(Ambiguous { side, position });
                }
            }
            Ok(by_position(a, b, differences))
        }
    }
}

/// Both sides are sorted by slot and position.
fn by_position(a: &[RowRef], b: &[RowRef], differences: &[TokenDifference]) -> Rows {
    let mut rows = Rows::default();
    let (mut i, mut j) = (0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        match key(x).cmp(&key(y)) {
            Ordering::Less => {
                rows.only_a += 1;
                i += 1;
            }
            Ordering::Greater => {
                rows.only_b += 1;
                j += 1;
            }
            Ordering::Equal => {
                let other =
                    |d: &TokenDifference| d.slot == x.slot && Some(d.position) <= x.position;
                match differences.iter().any(other) {
                    true => rows.other_tokens += 1,
                    false => rows.pairs.push((*x, *y)),
                }
                (i, j) = (i + 1, j + 1);
            }
        }
    }
    rows.only_a += a.len() - i;
    rows.only_b += b.len() - j;
    rows
}

fn key(row: &RowRef) -> (usize, Option<usize>) {
    (row.slot, row.position)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(positions: &[usize]) -> Vec<RowRef> {
        let row = |(row, &p)| RowRef { slot: 0, position: Some(p), step: 0, row };
        positions.iter().enumerate().map(row).collect()
    }

    fn pairs(rows: &Rows) -> Vec<(usize, usize)> {
        rows.pairs.iter().map(|(a, b)| (a.row, b.row)).collect()
    }

    #[test]
    fn rows_meet_at_their_positions() {
        let found =
            align(Alignment::Positions, &rows(&[2, 3, 5, 9]), &rows(&[3, 4, 5]), &[]).unwrap();
        assert_eq!(pairs(&found), [(1, 0), (2, 2)]);
        assert_eq!((found.only_a, found.only_b), (2, 1));
    }

    #[test]
    fn rows_without_positions_meet_at_the_end() {
        let found = align(Alignment::LastRow, &rows(&[0; 7]), &rows(&[0]), &[]).unwrap();
        assert_eq!((pairs(&found), found.only_a, found.only_b), (vec![(6, 0)], 6, 0));
    }

    #[test]
    fn rows_after_another_token_are_left_out() {
        let difference = TokenDifference { slot: 0, position: 1, a: 7, b: 8 };
        let found =
            align(Alignment::Positions, &rows(&[0, 1, 2]), &rows(&[0, 1, 2]), &[difference])
                .unwrap();
        assert_eq!((pairs(&found), found.other_tokens), (vec![(0, 0)], 2));
    }

    #[test]
    fn a_position_held_twice_is_ambiguous() {
        let found = align(Alignment::Positions, &rows(&[0]), &rows(&[0, 4, 4]), &[]);
        assert_eq!(found, Err(Ambiguous { side: Side::B, position: 4 }));
    }
}
