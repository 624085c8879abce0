//! JSON that a stranger wrote: a repeated key is an error, not the last one's victory, and memory is
//! charged before it is taken.

use std::{fmt, path::Path};

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use crate::{
    Array, Error, Map, Place, Result, Value,
    budget::Budget,
    error::Shortened,
    metadata::{MAP_COST, array},
};

/// Parses `text`, found at `offset` in `file`, which must be an object.
pub(crate) fn parse_object(
    file: &Path,
    offset: u64,
    text: &[u8],
    budget: &mut Budget,
) -> Result<Map> {
    parse(file, offset, text, budget, |parser, budget| {
        match ValueSeed(budget).deserialize(parser)? {
            Value::Object(map) => Ok(map),
            other => {
                Err(serde_json::Error::custom(format!("expected a JSON object, found {other}")))
            }
        }
    })
}

/// Parses `text` with `read`, and places its errors.
pub(crate) fn parse<'a, T>(
    file: &Path,
    offset: u64,
    text: &'a [u8],
    budget: &mut Budget,
    read: impl FnOnce(
        &mut serde_json::Deserializer<serde_json::de::SliceRead<'a>>,
        &mut Budget,
    ) -> serde_json::Result<T>,
) -> Result<T> {
    // The parser unescapes strings in a buffer that doubles as it grows.
    budget.charge(2 * text.len(), || Place::Offset(offset))?;
    let mut parser = serde_json::Deserializer::from_slice(text);
    read(&mut parser, budget).and_then(|value| parser.end().map(|()| value)).map_err(|reason| {
        Error::Json { file: file.to_owned(), offset: offset + position(text, &reason), reason }
    })
}

/// The offset that an error's line and column point at.
fn position(text: &[u8], error: &serde_json::Error) -> u64 {
    let lines_before = error.line().saturating_sub(1);
    let line_start: usize =
        text.split_inclusive(|&b| b == b'\n').take(lines_before).map(<[u8]>::len).sum();
    (line_start + error.column().saturating_sub(1)).min(text.len()) as u64
}

/// The error of a key that is there already.
pub(crate) fn repeated<E: serde::de::Error>(key: &str) -> E {
    E::custom(format_args!("the key `{}` occurs twice", Shortened(key)))
}

/// Charges `bytes`, as an error of the parser.
pub(crate) fn charge<E: serde::de::Error>(budget: &mut Budget, bytes: usize) -> Result<(), E> {
    if budget.take(bytes) {
        return Ok(());
    }
    Err(E::custom(
        "this would take more memory than twice the file and 48 MiB; the file is damaged or hostile",
    ))
}

/// What an entry of a map costs beyond the bytes of its key: its bucket, twice for growth, and its place
/// in the table of hashes.
pub(crate) const ENTRY_COST: usize = 2 * (size_of::<(usize, String, Value)>() + 16);

/// Reads any value.
struct ValueSeed<'b>(&'b mut Budget);

impl<'de> DeserializeSeed<'de> for ValueSeed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueSeed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::U64(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::I64(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::F64(value))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Value, E> {
        charge(self.0, array::text_cost(text))?;
        Ok(Value::String(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Array::default();
        while let Some(value) = seq.next_element_seed(ValueSeed(self.0))? {
            charge(self.0, array::VALUE_COST)?;
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        charge(self.0, MAP_COST)?;
        let mut map = Map::default();
        while let Some(key) = entries.next_key_seed(TextSeed(self.0))? {
            if map.get(&key).is_some() {
                return Err(repeated(&key));
            }
            let value = entries.next_value_seed(ValueSeed(self.0))?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

/// Reads a text, and charges what an entry of a map costs: a key, or the value of one.
pub(crate) struct TextSeed<'b>(pub(crate) &'b mut Budget);

impl<'de> DeserializeSeed<'de> for TextSeed<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for TextSeed<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<String, E> {
        charge(self.0, ENTRY_COST + key.len())?;
        Ok(key.to_owned())
    }
}
