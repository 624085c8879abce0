//! Typed, ordered metadata: one kind of lookup for GGUF keys, `config.json` and `.apr`.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use indexmap::IndexMap;

use crate::{Error, Result, error::Shortened};

pub(crate) mod array;

pub use array::Array;

/// A metadata value. Integers of all widths are `U64` or, if the container says signed, `I64`.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// JSON `null`: the same as an absent key in every lookup.
    Null,
    /// A truth value.
    Bool(bool),
    /// An unsigned integer, or a JSON integer that is not negative.
    U64(u64),
    /// A signed integer, or a negative JSON integer.
    I64(i64),
    /// A GGUF `float32`.
    F32(f32),
    /// A GGUF `float64`, or a JSON number that is no integer.
    F64(f64),
    /// A text.
    String(String),
    /// A list.
    Array(Array),
    /// A JSON object.
    Object(Map),
}

/// An ordered map of keys to values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Map(Box<IndexMap<String, Value>>);

/// What an object takes, apart from its entries.
pub(crate) const MAP_COST: usize = size_of::<IndexMap<String, Value>>() + 64;

impl Map {
    /// The value of exactly this key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// Keys and values, in the order of the file.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Sets `key`, and returns what it was before.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) -> Option<Value> {
        self.0.insert(key.into(), value.into())
    }

    /// Removes `key`, and keeps the order of the others.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        self.0.shift_remove(key)
    }

    /// The number of keys.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A literal key, else a path through objects: `rope_scaling.factor`.
    fn find(&self, key: &str) -> Option<&Value> {
        if let Some(value) = self.0.get(key) {
            return (*value != Value::Null).then_some(value);
        }
        key.match_indices('.').find_map(|(dot, _)| match self.0.get(&key[..dot]) {
            Some(Value::Object(inner)) => inner.find(&key[dot + 1..]),
            _ => None,
        })
    }
}

impl<K: Into<String>, V: Into<Value>> FromIterator<(K, V)> for Map {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let entries = entries.into_iter().map(|(key, value)| (key.into(), value.into()));
        Self(Box::new(entries.collect()))
    }
}

/// The metadata of a checkpoint: the key-value section of a GGUF, `config.json`, the JSON of an `.apr`.
///
/// A lookup takes a literal key first, then a dotted path through JSON objects. An absent key (or JSON
/// `null`) is `Ok(None)`; a value of another type is an error that names file, key and value.
#[derive(Clone, Debug)]
pub struct Metadata {
    file: PathBuf,
    map: Map,
    aliases: &'static [(&'static str, &'static str)],
}

impl Metadata {
    pub(crate) fn new(file: &Path, map: Map) -> Self {
        Self { file: file.to_owned(), map, aliases: &[] }
    }

    /// As `new`; each pair of `aliases` is two spellings of one key, and a lookup of either finds both.
    pub(crate) fn with_aliases(
        file: &Path,
        map: Map,
        aliases: &'static [(&'static str, &'static str)],
    ) -> Result<Self> {
        let metadata = Self { file: file.to_owned(), map, aliases };
        for &(first, second) in aliases {
            if let (Some(a), Some(b)) = (metadata.map.find(first), metadata.map.find(second))
                && a != b
                && (a.as_f64().is_none() || a.as_f64() != b.as_f64())
            {
                return Err(Error::Conflict {
                    file: file.to_owned(),
                    first: first.to_owned(),
                    first_value: a.to_string(),
                    second: second.to_owned(),
                    second_value: b.to_string(),
                });
            }
        }
        Ok(metadata)
    }

    /// The file that holds the metadata.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Keys and values at the top level, in the order of the file.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.map.iter()
    }

    /// The value of `key`, whatever its type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.find(key).or_else(|| {
            self.aliases.iter().find_map(|&(a, b)| match key {
                _ if key == a => self.map.find(b),
                _ if key == b => self.map.find(a),
                _ => None,
            })
        })
    }

    /// An integer that is not negative.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "an integer that is not negative", Value::as_u64)
    }

    /// A number; integers are converted.
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A text.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A list of anything.
    pub fn array(&self, key: &str) -> Result<Option<&Array>> {
        self.typed(key, "a list", Value::as_array)
    }

    /// A list of texts.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.typed(key, "a list of strings", |value| value.as_array()?.texts())
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| Error::WrongType {
            file: self.file.clone(),
            key: key.to_owned(),
            expected,
            found: value.to_string(),
        })
    }
}

impl Value {
    /// The value as an integer that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U64(n) => Some(n),
            Self::I64(n) => n.try_into().ok(),
            _ => None,
        }
    }

    /// The value as an integer.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Self::U64(n) => n.try_into().ok(),
            Self::I64(n) => Some(n),
            _ => None,
        }
    }

    /// The value as a number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::U64(n) => Some(n as f64),
            Self::I64(n) => Some(n as f64),
            Self::F32(x) => Some(x.into()),
            Self::F64(x) => Some(x),
            _ => None,
        }
    }

    /// The value as a truth value.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(b) = *self { Some(b) } else { None }
    }

    /// The value as a text.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(text) = self { Some(text) } else { None }
    }

    /// The value as a list.
    pub fn as_array(&self) -> Option<&Array> {
        if let Self::Array(values) = self { Some(values) } else { None }
    }

    /// The value as an object.
    pub fn as_object(&self) -> Option<&Map> {
        if let Self::Object(map) = self { Some(map) } else { None }
    }
}

/// Type and, shortened, value: `the string "llama"`, `a list of 3`.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(b) => write!(f, "{b}"),
            Self::U64(n) => write!(f, "the integer {n}"),
            Self::I64(n) => write!(f, "the integer {n}"),
            Self::F32(x) => write!(f, "the number {x}"),
            Self::F64(x) => write!(f, "the number {x}"),
            Self::String(text) => write!(f, "the string \"{}\"", Shortened(text)),
            Self::Array(values) => write!(f, "a list of {}", values.len()),
            Self::Object(map) => write!(f, "an object with {} keys", map.len()),
        }
    }
}

macro_rules! value_from {
    ($($from:ty => $variant:ident),*) => {$(
        impl From<$from> for Value {
            fn from(value: $from) -> Self {
                Self::$variant(value.into())
            }
        }
    )*};
}

value_from!(bool => Bool, u32 => U64, u64 => U64, i32 => I64, i64 => I64, f32 => F32, f64 => F64, &str => String, String => String);

impl From<Map> for Value {
    fn from(map: Map) -> Self {
        Self::Object(map)
    }
}

impl<T: Into<Value>> From<Vec<T>> for Value {
    fn from(values: Vec<T>) -> Self {
        Self::Array(values.into_iter().collect())
    }
}

/// For output as JSON. What JSON cannot say (NaN, infinities) becomes a string.
impl From<&Value> for serde_json::Value {
    fn from(value: &Value) -> Self {
        let number = |x: f64, text: String| {
            serde_json::Number::from_f64(x).map_or(Self::String(text), Self::Number)
        };
        match value {
            Value::Null => Self::Null,
            Value::Bool(b) => (*b).into(),
            Value::U64(n) => (*n).into(),
            Value::I64(n) => (*n).into(),
            // Through the shortest decimal of the f32, so that 1e-6 does not print as 9.999999974752427e-7.
            Value::F32(x) => number(x.to_string().parse().unwrap_or(f64::from(*x)), x.to_string()),
            Value::F64(x) => number(*x, x.to_string()),
            Value::String(text) => text.as_str().into(),
            Value::Array(values) => values.iter().map(|value| Self::from(&value)).collect(),
            Value::Object(map) => map.into(),
        }
    }
}

impl From<&Map> for serde_json::Value {
    fn from(map: &Map) -> Self {
        Self::Object(map.iter().map(|(key, value)| (key.to_owned(), value.into())).collect())
    }
}

impl From<&Metadata> for serde_json::Value {
    fn from(metadata: &Metadata) -> Self {
        (&metadata.map).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(entries: impl IntoIterator<Item = (&'static str, Value)>) -> Metadata {
        Metadata::new(Path::new("config.json"), entries.into_iter().collect())
    }

    #[test]
    fn a_literal_key_goes_before_a_path() {
        let inner: Map = [("b", 1u32)].into_iter().collect();
        let metadata = metadata([("a", inner.into()), ("a.b", 2u32.into())]);
        assert_eq!(metadata.u64("a.b").unwrap(), Some(2));
    }

    #[test]
    fn a_path_goes_through_objects_whose_keys_have_dots_themselves() {
        let inner: Map = [("c.d", 1u32)].into_iter().collect();
        let metadata = metadata([("a", 7u32.into()), ("a.b", inner.into())]);
        assert_eq!(metadata.u64("a.b.c.d").unwrap(), Some(1));
        assert_eq!(metadata.get("a.b.c"), None);
        assert_eq!(metadata.get("a.x"), None, "7 is no object");
    }

    #[test]
    fn null_counts_as_absent_and_lets_no_path_shine_through() {
        let inner: Map = [("b", 1u32)].into_iter().collect();
        let metadata = metadata([("n", Value::Null), ("a", inner.into()), ("a.b", Value::Null)]);
        assert_eq!(metadata.u64("n").unwrap(), None);
        assert_eq!(metadata.get("a.b"), None);
        assert_eq!(metadata.iter().len(), 3, "but it is listed");
    }

    #[test]
    fn json_output_has_the_shortest_decimal_of_an_f32_and_texts_for_what_is_no_number() {
        let list = [1e-6f32.into(), f32::NAN.into(), f64::INFINITY.into()];
        let list = Value::from(Vec::<Value>::from(list));
        let json = serde_json::Value::from(&list).to_string();
        assert_eq!(json, r#"[1e-6,"NaN","inf"]"#);
    }
}
