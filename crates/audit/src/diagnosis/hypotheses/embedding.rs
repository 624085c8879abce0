//! The embedding: rows of a table.

use apr_model::{Backend, Stage, Stage::*};

use super::{Hypothesis, named};
use crate::{
    Result,
    diagnosis::suspect::{Answer, Guess, Suspect},
};

const EMBEDDING: &[Stage] = &[Embedding];

pub(super) const TABLE: &[Hypothesis] = &[
    named("embedding-rows-shifted", EMBEDDING, |s| tokens(s, true)),
    named("other-tokens", EMBEDDING, |s| tokens(s, false)),
];

/// Looks the captured rows up in the table. Where all are the same distance from what they should be, the table is shifted.
fn tokens(suspect: &Suspect<'_>, shifted: bool) -> Answer {
    let Some(found) = look_up(suspect)? else { return Ok(None) };
    let own: Vec<u32> =
        suspect.case.rows.iter().map(|&row| suspect.case.evidence.token(row)).collect();
    let by = |i: usize| i64::from(found[i]) - i64::from(own[i]);
    let is_shift = (1..found.len()).all(|i| by(i) == by(0));
    if is_shift != shifted {
        return Ok(None);
    }
    let table = suspect.weight();
    let value = suspect.twin().embed(table, &found)?;
    let guess = if shifted {
        let sentence = format!("each row is that of the token {:+} from it", by(0));
        Guess::new(value, sentence).with("rows", by(0) as f64)
    } else {
        let other: Vec<String> = (0..found.len())
            .filter(|&i| by(i) != 0)
            .map(|i| format!("{} for {} at position {}", found[i], own[i], suspect.case.rows[i]))
            .collect();
        const SHOWN: usize = 4;
        let more = match other.len() {
            0..=SHOWN => String::new(),
            n => format!(" and {} more", n - SHOWN),
        };
        let shown = other[..other.len().min(SHOWN)].join(", ");
        Guess::new(value, format!("the rows are those of other tokens: {shown}{more}"))
    };
    Ok(Some(guess))
}

/// The token of each captured row, if each is in the table.
fn look_up(suspect: &Suspect<'_>) -> Result<Option<Vec<u32>>> {
    let Some(captured) = suspect.captured() else { return Ok(None) };
    let table = &suspect.weight().parts[0];
    let width = table.shape().cols();
    let wanted: Vec<&[f64]> = captured.data.chunks_exact(width).collect();
    let mut found = vec![None; wanted.len()];
    let mut row = vec![0.0f32; width];
    for token in 0..table.shape().rows() {
        table.dequantize_row(token, &mut row)?;
        let largest = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        // A row that is kept in half precision is still nearer to its own than to another.
        let near = 0.01 * f64::from(largest);
        for (found, wanted) in found.iter_mut().zip(&wanted) {
            let own = || row.iter().zip(*wanted).all(|(&a, b)| (f64::from(a) - b).abs() <= near);
            if found.is_none() && own() {
                *found = Some(token as u32);
            }
        }
    }
    Ok(found.into_iter().collect())
}
