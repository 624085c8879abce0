//! Which rows of a step are recorded.

use std::{fmt, ops::Range, str::FromStr};

/// The rows of a step to keep.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Rows {
    /// All of them.
    #[default]
    All,
    /// The last of each step.
    Last,
    /// Those at token positions in this range.
    Range(Range<usize>),
}

impl Rows {
    /// Indices into a tensor's rows, which stand at `positions`.
    pub fn select(&self, positions: Range<usize>) -> Range<usize> {
        let len = positions.len();
        match self {
            Self::All => 0..len,
            Self::Last => len.saturating_sub(1)..len,
            Self::Range(wanted) => {
                let index = |position: usize| position.saturating_sub(positions.start).min(len);
                let start = index(wanted.start);
                start..index(wanted.end).max(start)
            }
        }
    }
}

/// A text that names no rows.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "rows `{text}`: expected `all`, `last`, a position such as `5`, or a range such as `0..7` (which excludes 7) or `0..=7`"
)]
pub struct UnknownRows {
    /// The text as given.
    pub text: String,
}

impl FromStr for Rows {
    type Err = UnknownRows;

    fn from_str(text: &str) -> Result<Self, UnknownRows> {
        let parse = || match text {
            "all" => Some(Self::All),
            "last" => Some(Self::Last),
            _ => {
                let (start, end) = match text.split_once("..") {
                    None => {
                        let position: usize = text.parse().ok()?;
                        (position, position.checked_add(1)?)
                    }
                    Some((start, end)) => {
                        let start = start.parse().ok()?;
                        match end.strip_prefix('=') {
                            Some(last) => (start, last.parse::<usize>().ok()?.checked_add(1)?),
                            None => (start, end.parse().ok()?),
                        }
                    }
                };
                (start < end).then_some(Self::Range(start..end))
            }
        };
        parse().ok_or_else(|| UnknownRows { text: text.to_owned() })
    }
}

impl fmt::Display for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Last => f.write_str("last"),
            Self::Range(range) => write!(f, "{}..{}", range.start, range.end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_position_and_not_by_index() {
        let rows = Rows::Range(5..8);
        assert_eq!(rows.select(0..4), 4..4);
        assert_eq!(rows.select(4..10), 1..4);
        assert_eq!(rows.select(7..20), 0..1);
        assert_eq!(rows.select(9..20), 0..0);
        assert_eq!(Rows::Last.select(4..10), 5..6);
        assert_eq!(Rows::Last.select(4..4), 0..0);
    }

    #[test]
    fn rows_round_trip_through_their_text() {
        for text in ["all", "last", "0..7", "3..4"] {
            assert_eq!(text.parse::<Rows>().unwrap().to_string(), text);
        }
        assert_eq!("3..=5".parse(), Ok(Rows::Range(3..6)));
        assert_eq!("3".parse(), Ok(Rows::Range(3..4)));
        for wrong in ["", "x", "4..4", "5..2", "..3", "1..", "-1", "3..=18446744073709551615"] {
            assert!(wrong.parse::<Rows>().is_err(), "{wrong}");
        }
    }
}
