//! How large a capture will be, and whether it fits.

use std::path::Path;

use apr_model::{Phase, Step, TapSet};

use crate::{Dims, Error, Layout, Precision, Result, Rows, recorder::planned};

/// What is known of a step before it runs, as far as sizes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSize {
    /// The position of the first token.
    pub first_position: usize,
    /// The number of tokens.
    pub tokens: usize,
    /// How many of the last rows get logits.
    pub logit_rows: usize,
}

/// The bytes that the values of `steps` take, without headers and manifest; `u64::MAX` if that is beyond counting.
pub fn estimate(
    sites: &TapSet,
    rows: &Rows,
    precision: Precision,
    dims: &Dims,
    steps: impl IntoIterator<Item = StepSize>,
) -> u64 {
    let dtype = |stage| precision.dtype(stage, Layout::Safetensors);
    steps
        .into_iter()
        .flat_map(|size| {
            let StepSize { first_position, tokens, logit_rows } = size;
            let tokens = vec![0; tokens];
            let step = Step {
                index: 0,
                phase: Phase::Prefill,
                chunk: 0,
                tokens: &tokens,
                first_position,
                logit_rows: tokens.len().saturating_sub(logit_rows)..tokens.len(),
            };
            planned(sites, rows, dtype, dims, &step)
        })
        .map(|tensor| {
            let element = tensor.dtype.block_bytes() as u64;
            tensor.shape().iter().fold(element, |n, &d| n.saturating_mul(d as u64))
        })
        .fold(0, u64::saturating_add)
}

/// Refuses an output whose file system has fewer than `needed` bytes left. `output` need not exist yet.
pub fn check_space(output: &Path, needed: u64) -> Result<()> {
    let absolute = std::path::absolute(output).map_err(Error::read(output))?;
    let existing = absolute.ancestors().find(|path| path.exists()).unwrap_or(&absolute);
    let available = fs4::available_space(existing).map_err(Error::read(existing))?;
    match available >= needed {
        true => Ok(()),
        false => Err(Error::NoSpace { path: output.to_owned(), needed, available }),
    }
}

#[cfg(test)]
mod tests {
    use apr_model::{Site, Stage};

    use super::*;
    use crate::dims::tests::tiny;

    #[test]
    fn the_estimate_counts_every_element_once() {
        let sites = TapSet::from_iter([
            Site::layer(0, Stage::AttnScores),
            Site::layer(1, Stage::FfnGate),
            Site::whole(Stage::LmHead),
        ]);
        let steps = [
            StepSize { first_position: 0, tokens: 5, logit_rows: 1 },
            StepSize { first_position: 5, tokens: 1, logit_rows: 1 },
        ];
        let bytes = |rows, precision| estimate(&sites, &rows, precision, &tiny(), steps);
        let scores = 4 * 5 * 5 + 4 * 6;
        assert_eq!(bytes(Rows::All, Precision::F32), 4 * (scores + 12 * 6 + 16 * 2));
        assert_eq!(bytes(Rows::All, Precision::F64), 8 * (scores + 12 * 6 + 16 * 2));
        assert_eq!(bytes(Rows::Last, Precision::F32), 4 * (4 * (5 + 6) + 12 * 2 + 16 * 2));
    }

    #[test]
    fn a_disk_that_is_too_small_is_refused_with_both_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("not/there/yet");
        check_space(&output, 1).unwrap();
        match check_space(&output, u64::MAX) {
            Err(Error::NoSpace { needed: u64::MAX, available, .. }) => assert!(available > 0),
            other => panic!("{other:?}"),
        }
    }
}
