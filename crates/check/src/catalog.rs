//! The checks by name, in the order in which they are made: the file first, then what the file is used for.

use std::{fmt, str::FromStr};

use crate::Error;

/// Something that must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the table below says what each is")]
pub enum Check {
    Checksum,
    Layout,
    Config,
    Vocabulary,
    FiniteWeights,
    DeadWeights,
    DuplicateWeights,
    NormScale,
    RowScale,
    BlockScale,
    Tokenizer,
    SpecialTokens,
    TokenIds,
    ChatTemplate,
    Plan,
    FiniteValues,
    Routing,
    Repeat,
    Traced,
    LogitRows,
    Chunks,
    Decode,
    Interleaved,
    Snapshot,
    Rewind,
    Threads,
    Isa,
}

const TABLE: [(Check, &str, &str); 27] = [
    (Check::Checksum, "checksum", "the checksums that the file states are those of its bytes"),
    (
        Check::Layout,
        "layout",
        "the files can be read: tensors lie within them, in whole blocks, apart from each other, where the index says",
    ),
    (
        Check::Config,
        "config",
        "the file declares a model that runs here, and each tensor has the shape that the config asks for",
    ),
    (Check::Vocabulary, "vocabulary", "every id of the tokenizer has a row in the embedding"),
    (Check::FiniteWeights, "finite-weights", "no weight is NaN or infinite"),
    (Check::DeadWeights, "dead-weights", "no matrix is one number throughout, and no norm is zero"),
    (
        Check::DuplicateWeights,
        "duplicate-weights",
        "no two tensors hold the same bytes, unless tied",
    ),
    (Check::NormScale, "norm-scale", "norm weights are of ordinary size (oddities are notes)"),
    (Check::RowScale, "row-scale", "the rows of a matrix are of one scale (oddities are notes)"),
    (
        Check::BlockScale,
        "block-scale",
        "no weight is beyond what F16 holds, and the blocks of a matrix are of one scale (oddities are notes)",
    ),
    (Check::Tokenizer, "tokenizer", "decoding an encoded text gives the text back"),
    (
        Check::SpecialTokens,
        "special-tokens",
        "each special token, written out, is one token: itself",
    ),
    (
        Check::TokenIds,
        "token-ids",
        "the text of each token can be encoded again (losses are notes)",
    ),
    (
        Check::ChatTemplate,
        "chat-template",
        "the chat template renders, and what it writes is tokens",
    ),
    (
        Check::Plan,
        "plan",
        "the same kernels are planned whatever the threads and the instruction set",
    ),
    (Check::FiniteValues, "finite-values", "every value of the forward pass is finite"),
    (
        Check::Routing,
        "routing",
        "each token goes to the experts of the largest logits, to each once, with weights that are their probabilities",
    ),
    (Check::Repeat, "repeat", "the same run twice gives the same bits"),
    (
        Check::Traced,
        "traced",
        "the run that is observed and the run that is not give the same logits",
    ),
    (Check::LogitRows, "logit-rows", "one row's logits are the same whichever rows are asked for"),
    (Check::Chunks, "chunks", "a prompt read in chunks gives the bits of a prompt read at once"),
    (
        Check::Decode,
        "decode",
        "a prompt read token by token gives the bits of a prompt read at once",
    ),
    (
        Check::Interleaved,
        "interleaved",
        "sequences that take turns on one model do not change each other",
    ),
    (
        Check::Snapshot,
        "snapshot",
        "a sequence goes on from a copy of its cache as if nothing had happened",
    ),
    (
        Check::Rewind,
        "rewind",
        "a sequence that went astray and was cut back goes on as if it had not",
    ),
    (Check::Threads, "threads", "the bits do not depend on the number of threads"),
    (Check::Isa, "isa", "the bits do not depend on the instruction set"),
];

impl Check {
    /// All checks, in the order in which they are made.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    /// The checks of the file alone: no model has to run for them.
    pub fn of_file() -> impl Iterator<Item = Self> {
        Self::all().filter(|check| !check.needs_run())
    }

    /// Whether the model has to run, or at least to be planned.
    pub fn needs_run(self) -> bool {
        self >= Self::Plan
    }

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].1
    }

    /// What must hold.
    pub fn holds(self) -> &'static str {
        TABLE[self as usize].2
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Check {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::all().find(|check| check.name() == name).ok_or_else(|| Error::UnknownCheck {
            name: name.to_owned(),
            known: Self::all().map(Self::name).collect::<Vec<_>>().join(", "),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum_and_every_name_finds_its_check() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, i, "{}", row.1);
            assert_eq!(row.1.parse::<Check>().ok(), Some(row.0));
        }
    }

    #[test]
    fn a_name_that_no_check_has_is_answered_with_all_that_there_are() {
        let message = "decoed".parse::<Check>().unwrap_err().to_string();
        assert!(
            message.contains("`decoed`")
                && message.contains("checksum, layout, config, vocabulary"),
            "{message}"
        );
    }
}
