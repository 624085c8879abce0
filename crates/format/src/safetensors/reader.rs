//! Reading one safetensors file.

use std::fmt;

use apr_tensor::{DType, Shape};
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::{MAX_HEADER, METADATA_KEY};
use crate::{
    Error, File, Map, Place, Result, Value,
    budget::Budget,
    cursor::Cursor,
    json,
    tensors::{self, Entry, Kind, MAX_DIMS, MAX_NAME},
};

/// What is in a safetensors file.
pub(crate) struct Contents {
    /// The texts under `__metadata__`.
    pub(crate) metadata: Map,
    /// In the order of the data.
    pub(crate) entries: Vec<Entry>,
    /// Where the data begins.
    pub(crate) data: u64,
}

/// Reads everything but the data.
pub(crate) fn read(file: &File, budget: &mut Budget) -> Result<Contents> {
    let mut cursor = Cursor::new(file.path(), file.bytes(), 0);
    let len = cursor.u64("the length of the header")?;
    if len > MAX_HEADER {
        return Err(Error::Limit {
            file: file.path().to_owned(),
            at: Place::Offset(0),
            what: "the length of the header",
            found: len,
            limit: MAX_HEADER,
        });
    }
    let header_at = cursor.offset();
    let header = cursor.take(len, "the header")?;
    let data = cursor.offset();
    let (metadata, lines) =
        json::parse(file.path(), header_at, header, budget, |parser, budget| {
            parser.deserialize_map(HeaderVisitor(budget))
        })?;

    let mut entries = Vec::with_capacity(lines.len());
    for line in lines {
        entries.push(line.into_entry(file, data)?);
    }
    entries.sort_by_key(|entry| (entry.start, entry.end()));
    check_cover(file, &entries, data)?;
    Ok(Contents { metadata, entries, data })
}

/// The tensors must cover the data exactly: no hole, no overlap, nothing left at the end.
fn check_cover(file: &File, entries: &[Entry], data: u64) -> Result<()> {
    let mut reached = data;
    let mut before: Option<&Entry> = None;
    for entry in entries {
        if let Some(first) = before.filter(|_| entry.start < reached) {
            return Err(Error::Overlap {
                file: file.path().to_owned(),
                first: first.name.clone(),
                end: reached,
                second: entry.name.clone(),
                start: entry.start,
            });
        }
        if entry.start != reached {
            return Err(Error::Malformed {
                file: file.path().to_owned(),
                at: Place::Tensor(entry.name.clone()),
                expected: format!("data from byte {reached} on, where the one before ends"),
                found: format!("a hole up to byte {}", entry.start),
            });
        }
        reached = entry.end();
        before = Some(entry);
    }
    if reached < file.size() {
        return Err(Error::Malformed {
            file: file.path().to_owned(),
            at: Place::Offset(reached),
            expected: "the end of the file after the last tensor".to_owned(),
            found: format!("{} more bytes", file.size() - reached),
        });
    }
    Ok(())
}

/// One tensor as the header has it.
struct Line {
    name: String,
    dtype: String,
    dims: Vec<usize>,
    offsets: [u64; 2],
}

impl Line {
    fn into_entry(self, file: &File, data: u64) -> Result<Entry> {
        let Self { name, dtype, dims, offsets: [start, end] } = self;
        let malformed = |expected: String, found: String| Error::Malformed {
            file: file.path().to_owned(),
            at: Place::Tensor(name.clone()),
            expected,
            found,
        };
        let Some(len) = end.checked_sub(start) else {
            return Err(malformed(
                "data_offsets that do not descend".into(),
                format!("[{start}, {end}]"),
            ));
        };
        if data.checked_add(end).is_none() {
            return Err(malformed(
                "data_offsets within the file".into(),
                format!("[{start}, {end}]"),
            ));
        }
        let shape = Shape::new(dims);
        let kind = match dtype_named(&dtype) {
            Some(dtype) => {
                let expected = Entry::size_of(file.path(), &name, dtype, &shape)?;
                if expected != len {
                    return Err(malformed(
                        format!("{expected} bytes for {dtype} {shape}"),
                        format!("data_offsets [{start}, {end}], which are {len} bytes"),
                    ));
                }
                Kind::Known { dtype, bytes: len }
            }
            None => Kind::Unknown { dtype, bytes: Some(len) },
        };
        Ok(Entry { name, kind, shape, start: data + start })
    }
}

/// The plain types, which safetensors names as we do.
fn dtype_named(name: &str) -> Option<DType> {
    DType::all().find(|dtype| super::holds(*dtype) && dtype.name() == name)
}

struct HeaderVisitor<'b>(&'b mut Budget);

impl<'de> Visitor<'de> for HeaderVisitor<'_> {
    type Value = (Map, Vec<Line>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the header, a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut header: A) -> Result<Self::Value, A::Error> {
        let mut metadata = None;
        let mut lines = Vec::new();
        while let Some(name) = header.next_key_seed(json::TextSeed(self.0))? {
            if name == METADATA_KEY {
                if metadata.replace(header.next_value_seed(MetadataSeed(self.0))?).is_some() {
                    return Err(json::repeated(&name));
                }
                continue;
            }
            if name.len() > MAX_NAME {
                return Err(A::Error::custom(format_args!(
                    "a tensor name of {} bytes; the limit is {MAX_NAME}",
                    name.len()
                )));
            }
            json::charge(self.0, tensors::ENTRY_COST + 2 * size_of::<Line>())?;
            lines.push(header.next_value_seed(LineSeed(name))?);
        }
        Ok((metadata.unwrap_or_default(), lines))
    }
}

/// Reads `__metadata__`, which maps texts to texts.
struct MetadataSeed<'b>(&'b mut Budget);

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_> {
    type Value = Map;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Map, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = Map;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of texts as __metadata__")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Map, A::Error> {
        let mut map = Map::default();
        while let Some(key) = entries.next_key_seed(json::TextSeed(self.0))? {
            if map.get(&key).is_some() {
                return Err(json::repeated(&key));
            }
            // A key costs at least what a value does.
            let value = entries.next_value_seed(json::TextSeed(self.0))?;
            map.insert(key, Value::String(value));
        }
        Ok(map)
    }
}

/// Reads what the header says of the tensor of this name.
struct LineSeed(String);

impl<'de> DeserializeSeed<'de> for LineSeed {
    type Value = Line;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Line, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for LineSeed {
    type Value = Line;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with dtype, shape and data_offsets for tensor `{}`", self.0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Line, A::Error> {
        let (mut dtype, mut dims, mut offsets) = (None, None, None);
        while let Some(Short(field)) = fields.next_key()? {
            let seen_before = match field.as_str() {
                "dtype" => dtype.replace(fields.next_value::<Short>()?.0).is_some(),
                "shape" => dims.replace(fields.next_value::<Dims>()?.0).is_some(),
                "data_offsets" => offsets.replace(fields.next_value::<[u64; 2]>()?).is_some(),
                _ => {
                    fields.next_value::<IgnoredAny>()?;
                    false
                }
            };
            if seen_before {
                return Err(A::Error::custom(format_args!(
                    "tensor `{}`: the key `{field}` occurs twice",
                    self.0
                )));
            }
        }
        match (dtype, dims, offsets) {
            (Some(dtype), Some(dims), Some(offsets)) => {
                Ok(Line { name: self.0, dtype, dims, offsets })
            }
            _ => Err(A::Error::custom(format_args!(
                "tensor `{}` lacks one of dtype, shape and data_offsets",
                self.0
            ))),
        }
    }
}

/// A text of at most 32 bytes: the name of a field or type.
struct Short(String);

impl<'de> serde::Deserialize<'de> for Short {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShortVisitor;
        impl Visitor<'_> for ShortVisitor {
            type Value = Short;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text of at most 32 bytes")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Short, E> {
                if text.len() > 32 {
                    return Err(E::invalid_length(text.len(), &self));
                }
                Ok(Short(text.to_owned()))
            }
        }
        deserializer.deserialize_str(ShortVisitor)
    }
}

/// Dimensions, at most `MAX_DIMS`.
struct Dims(Vec<usize>);

impl<'de> serde::Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DimsVisitor;
        impl<'de> Visitor<'de> for DimsVisitor {
            type Value = Dims;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_DIMS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Dims, A::Error> {
                let mut dims = Vec::with_capacity(4);
                while let Some(dim) = seq.next_element()? {
                    if dims.len() == MAX_DIMS {
                        return Err(A::Error::invalid_length(MAX_DIMS + 1, &self));
                    }
                    dims.push(dim);
                }
                Ok(Dims(dims))
            }
        }
        deserializer.deserialize_seq(DimsVisitor)
    }
}
