//! The likeliest next tokens of two captures, side by side.

use anyhow::Result;
use apr_capture::{Capture, Dims, OpenOptions, RowRef};
use apr_diff::Comparison;
use apr_format::Checkpoint;
use apr_model::{Site, Stage, read_config};
use apr_report::{Favourite, LogitRow};
use apr_tokenizer::Tokenizer;

/// Tokens of each side.
const TOP: usize = 5;
/// Rows with other favourites; the last row is shown anyway.
const DISAGREEMENTS: usize = 4;

/// The rows of logits of both sides of `comparison` that say most: the first in which the favourites differ, and the last.
/// Sides that do not know their positions have none.
pub(crate) fn side_by_side(
    comparison: &Comparison,
    checkpoint: &Checkpoint,
) -> Result<Vec<LogitRow>> {
    let dims = Some(Dims::from(&read_config(checkpoint)?));
    let options = OpenOptions { dims, allow_partial: true, ..OpenOptions::default() };
    let open = |path: &str| Capture::open_with(path, &options);
    let (a, b) = (open(&comparison.a.path)?, open(&comparison.b.path)?);
    let tokenizer = Tokenizer::from_checkpoint(checkpoint).ok();
    let text = |id: usize| {
        let id = u32::try_from(id).ok()?;
        Some(tokenizer.as_ref()?.token_text(id).into_owned())
    };

    let head = Site::whole(Stage::LmHead);
    let theirs = b.rows(head);
    let mut shown = Vec::new();
    let mut last = None;
    for ours in a.rows(head) {
        let Some(position) = ours.position else { continue };
        let Some(theirs) = theirs.iter().find(|row| row.position == Some(position)) else {
            continue;
        };
        let token = token_at(&a, ours, position).and_then(|id| text(id as usize));
        let row = LogitRow {
            position,
            token,
            a: Favourite::of(&logits(&a, ours)?, TOP, text),
            b: Favourite::of(&logits(&b, *theirs)?, TOP, text),
        };
        let favourite = |side: &[Favourite]| side.first().map(|f| f.id);
        if favourite(&row.a) != favourite(&row.b) && shown.len() < DISAGREEMENTS {
            shown.push(row.clone());
        }
        last = Some(row);
    }
    let missing = last.filter(|last| shown.last() != Some(last));
    shown.extend(missing);
    Ok(shown)
}

fn logits(capture: &Capture, row: RowRef) -> Result<Vec<f64>> {
    let mut values = Vec::new();
    capture.tensor(row.step, Site::whole(Stage::LmHead))?.read_piece(0, row.row, &mut values);
    Ok(values)
}

fn token_at(capture: &Capture, row: RowRef, position: usize) -> Option<u32> {
    let step = &capture.steps()[row.step];
    let index = step.positions.as_ref()?.iter().position(|p| *p == position)?;
    step.token_ids.as_ref()?.get(index).copied()
}
