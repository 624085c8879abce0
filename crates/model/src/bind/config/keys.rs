//! Lookups in metadata, with errors that name the file and the key.

use apr_format::{Checkpoint, Metadata, Value};

use crate::{Architecture, Error, Result};

const MAX_DIMENSION: u64 = 1 << 24;

/// Metadata, with errors that name the file and the key.
pub(super) struct Keys<'c> {
    pub(super) file: String,
    pub(super) metadata: &'c Metadata,
}

impl<'c> Keys<'c> {
    pub(super) fn of(checkpoint: &'c Checkpoint) -> Self {
        Self { file: checkpoint.path().display().to_string(), metadata: checkpoint.metadata() }
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        Error::MissingKey { file: self.file.clone(), key: key.to_owned(), hint: "" }
    }

    pub(super) fn unsupported(
        &self,
        key: &str,
        found: impl ToString,
        supported: impl Into<String>,
    ) -> Error {
        Error::UnsupportedValue {
            file: self.file.clone(),
            key: key.to_owned(),
            found: found.to_string(),
            supported: supported.into(),
        }
    }

    pub(super) fn impossible(
        &self,
        key: &str,
        found: impl ToString,
        why: impl Into<String>,
    ) -> Error {
        Error::ImpossibleValue {
            file: self.file.clone(),
            key: key.to_owned(),
            found: found.to_string(),
            why: why.into(),
        }
    }

    pub(super) fn architecture(&self, found: &str) -> Result<Architecture> {
        found.parse().map_err(|()| Error::UnsupportedArchitecture {
            file: self.file.clone(),
            found: found.to_owned(),
            supported: Architecture::ALL.map(Architecture::name).join(", "),
        })
    }

    pub(super) fn str(&self, key: &str) -> Result<&'c str> {
        self.metadata.str(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn number(&self, key: &str) -> Result<f64> {
        self.metadata.f64(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn any_f64(&self, keys: &[&str]) -> Result<Option<f64>> {
        for key in keys {
            if let Some(value) = self.metadata.f64(key)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    pub(super) fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        match self.metadata.u64(key)? {
            // Larger than any dimension that exists; products of two do not overflow.
            Some(n) if n > MAX_DIMENSION => {
                Err(self.impossible(key, n, format!("at most {MAX_DIMENSION} is sensible")))
            }
            n => Ok(n.map(|n| n as usize)),
        }
    }

    pub(super) fn count(&self, key: &str) -> Result<usize> {
        match self.optional_count(key)? {
            None => Err(self.missing(key)),
            Some(0) => Err(self.impossible(key, 0, "at least 1 is needed")),
            Some(n) => Ok(n),
        }
    }

    /// A list of whole numbers; empty if it is not there.
    pub(super) fn numbers(&self, key: &str) -> Result<Vec<usize>> {
        let Some(values) = self.metadata.array(key)? else { return Ok(Vec::new()) };
        let number = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        values
            .iter()
            .map(|value| {
                number(&value)
                    .ok_or_else(|| self.impossible(key, &value, "whole numbers are needed"))
            })
            .collect()
    }

    pub(super) fn any_optional_count(&self, keys: &[&str]) -> Result<Option<usize>> {
        for key in keys {
            if let Some(n) = self.optional_count(key)? {
                return Ok(Some(n));
            }
        }
        Ok(None)
    }

    pub(super) fn any_count(&self, keys: &[&str]) -> Result<usize> {
        self.any_optional_count(keys)?.ok_or_else(|| self.missing(keys[0]))
    }

    pub(super) fn head_dim(&self, hidden_size: usize, heads: usize) -> Result<usize> {
        if !hidden_size.is_multiple_of(heads) {
            let why = "not a whole multiple of the number of heads, and no head_dim is given";
            return Err(self.impossible("hidden_size", hidden_size, why));
        }
        Ok(hidden_size / heads)
    }

    /// Refuses a number that is there and not `neutral`; 0 is how many writers say "not set".
    pub(super) fn refuse_unless(&self, key: &str, neutral: f64) -> Result<()> {
        match self.metadata.f64(key)? {
            Some(value) if value != neutral && value != 0.0 => {
                Err(self.unsupported(key, value, format!("supported: absent or {neutral}")))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn refuse_if(&self, key: &str, value: bool) -> Result<()> {
        match self.metadata.bool(key)? == Some(value) {
            true => Err(self.unsupported(key, value, format!("supported: absent or {}", !value))),
            false => Ok(()),
        }
    }
}
