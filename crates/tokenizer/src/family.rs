//! How byte-level vocabularies cut text into words before merging, by the name that GGUF gives
//! each way in `tokenizer.ggml.pre`.

use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::error::{Error, Place, Result};

/// One way to cut text into words.
#[derive(Debug)]
pub(crate) struct Family {
    /// The names of the vocabularies that are cut this way.
    names: &'static [&'static str],
    /// Cut out one after the other, each in what the ones before left.
    patterns: &'static [&'static str],
    /// Whether the models were trained on composed characters. A GGUF does not say this and
    /// llama.cpp does not do it; the models' own tokenizers do.
    composes: bool,
    /// A word that is a token is taken whole.
    pub(crate) ignore_merges: bool,
    /// Whether a text begins with BOS if the file does not say.
    pub(crate) adds_bos: bool,
}

/// GPT-2's pattern, which the library has built in.
pub(crate) const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PLAIN: Family =
    Family { names: &[], patterns: &[], composes: false, ignore_merges: false, adds_bos: false };

static FAMILIES: &[Family] = &[
    Family { names: &["qwen2", "deepseek-r1-qwen"], patterns: &[QWEN2], composes: true, ..PLAIN },
    Family {
        names: &["llama-bpe", "llama3", "llama-v3"],
        patterns: &[LLAMA3],
        ignore_merges: true,
        adds_bos: true,
        ..PLAIN
    },
    Family { names: &["gpt-2"], patterns: &[GPT2], ..PLAIN },
    Family { names: &["starcoder", "refact", "smollm"], patterns: &[r"\p{N}", GPT2], ..PLAIN },
    Family {
        names: &["deepseek-coder"],
        patterns: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\u{d7ff}]+", r"\p{N}"],
        ..PLAIN
    },
    Family {
        names: &["default"],
        patterns: &[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ..PLAIN
    },
];

impl Family {
    /// The family of this name. An unknown name is an error: a wrong guess changes ids in silence.
    pub(crate) fn named(place: &Place, name: &str) -> Result<&'static Self> {
        find(name).ok_or_else(|| Error::Unsupported {
            place: place.clone(),
            found: name.to_owned(),
            supported: Self::names(),
        })
    }

    /// All names, for messages.
    pub(crate) fn names() -> String {
        FAMILIES.iter().flat_map(|f| f.names).copied().collect::<Vec<_>>().join(", ")
    }

    /// The name of the family that all models of an architecture use, for files that do not say.
    pub(crate) fn of_architecture(
        architecture: &str,
        has_token: impl Fn(&str) -> bool,
    ) -> Option<&'static str> {
        match architecture {
            "qwen2" | "qwen2moe" | "qwen2_moe" | "qwen3" | "qwen3moe" | "qwen3_moe" => {
                Some("qwen2")
            }
            "gpt2" => Some("gpt-2"),
            "llama" if has_token("<|begin_of_text|>") => Some("llama-bpe"),
            _ => None,
        }
    }

    /// The name of the family that cuts by these patterns. Where several do, they differ in what else they do to
    /// a text, and the one that does as asked goes first.
    pub(crate) fn name_of(
        patterns: &[String],
        composes: bool,
        ignore_merges: bool,
    ) -> Option<&'static str> {
        let cuts = || FAMILIES.iter().filter(|family| family.patterns == patterns);
        let does = |f: &&Self| f.composes == composes && f.ignore_merges == ignore_merges;
        cuts().find(does).or_else(|| cuts().next()).map(|family| family.names[0])
    }

    /// Whether characters are composed before anything else.
    pub(crate) fn composes(&self) -> bool {
        self.composes
    }

    pub(crate) fn normalizer(&self) -> Option<NormalizerWrapper> {
        self.composes.then(|| NFC.into())
    }

    pub(crate) fn pre_tokenizer(&self) -> Result<PreTokenizerWrapper> {
        let mut steps = Vec::new();
        for &pattern in self.patterns {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            let place = || Place::new("pre-tokenizer", self.names[0]);
            steps.push(split.map_err(|source| Error::Library { place: place(), source })?.into());
        }
        steps.push(ByteLevel::new(false, false, false).into());
        Ok(Sequence::new(steps).into())
    }
}

fn find(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.names.contains(&name))
}

/// Whether two names are of the same way to cut.
pub(crate) fn are_one(first: &str, second: &str) -> bool {
    match (find(first), find(second)) {
        (Some(a), Some(b)) => std::ptr::eq(a, b),
        _ => first == second,
    }
}
