//! Names of models and revisions. They become parts of addresses and paths, so nothing else is let through.

use std::{fmt, str::FromStr};

use crate::{Error, Result};

/// `ORG/NAME`, or a bare `NAME` as the oldest models have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelName(String);

/// A branch, a tag or a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revision(String);

impl ModelName {
    /// The name as the hub writes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Reads `ORG/NAME` or `ORG/NAME:LABEL`, as other tools write a choice among the files of a repository.
    pub fn with_label(text: &str) -> Result<(Self, Option<String>)> {
        match text.split_once(':') {
            None => Ok((text.parse()?, None)),
            Some((name, label)) if !label.is_empty() => Ok((name.parse()?, Some(label.to_owned()))),
            Some(_) => Err(no_model(text)),
        }
    }
}

impl FromStr for ModelName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        const LONGEST: usize = 96;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let good_part = |part: &str| {
            !part.is_empty()
                && part.chars().all(plain)
                && !part.starts_with(['-', '.'])
                && !part.ends_with(['-', '.'])
                // The cache writes `--` for a slash.
                && !part.contains("--")
                && !part.contains("..")
        };
        let good =
            text.len() <= LONGEST && text.split('/').count() <= 2 && text.split('/').all(good_part);
        if good { Ok(Self(text.to_owned())) } else { Err(no_model(text)) }
    }
}

fn no_model(given: &str) -> Error {
    Error::Name {
        what: "model of the hub",
        given: given.to_owned(),
        expected: "ORG/NAME or ORG/NAME:LABEL, such as Qwen/Qwen3-0.6B or Qwen/Qwen3-0.6B-GGUF:Q8_0",
    }
}

impl Revision {
    /// The revision as git writes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is a commit, which never changes.
    pub fn is_commit(&self) -> bool {
        is_hex(&self.0, 40)
    }
}

impl Default for Revision {
    fn default() -> Self {
        Self("main".to_owned())
    }
}

impl FromStr for Revision {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let plain =
            |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | '+' | '=');
        let good_part =
            |part: &str| !part.is_empty() && !part.starts_with(['-', '.']) && !part.contains("..");
        if text.chars().all(plain) && text.split('/').all(good_part) {
            return Ok(Self(text.to_owned()));
        }
        Err(Error::Name {
            what: "revision",
            given: text.to_owned(),
            expected: "a branch, a tag or a commit hash, such as main",
        })
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether `text` is `digits` lower-case hexadecimal digits.
pub(crate) fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_carry_a_label() {
        let (name, label) = ModelName::with_label("org/some.Model-7B:Q4_K_M").unwrap();
        assert_eq!((name.as_str(), label.as_deref()), ("org/some.Model-7B", Some("Q4_K_M")));
        assert_eq!(ModelName::with_label("gpt2").unwrap().1, None);
    }

    #[test]
    fn a_name_that_would_leave_the_cache_is_refused() {
        for bad in
            ["", "/", "a/b/c", "../x", "a/..", "a/.b", "a b/c", "a--b/c", "a/b:", "a/b?x", "a\\b"]
        {
            assert!(ModelName::with_label(bad).is_err(), "{bad}");
        }
        for bad in ["", "..", "a/../b", "/a", "a/", "a b", "a%2e", "-x"] {
            assert!(bad.parse::<Revision>().is_err(), "{bad}");
        }
        assert!("refs/pr/1".parse::<Revision>().is_ok());
    }
}
