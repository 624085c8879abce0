//! Reading GGUF.

use apr_tensor::{DType, Shape};

use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, SPLIT_KEY, value_type};
use crate::{
    Array, Error, File, Map, Metadata, Place, Result, Value,
    budget::Budget,
    cursor::Cursor,
    error::Shortened,
    json,
    metadata::array::{PACKED_COST, VALUE_COST, text_cost},
    tensors::{self, Data, Entry, Kind, MAX_DIMS, MAX_NAME, Tensors},
};

/// The longest key, in bytes, as the specification has it.
const MAX_KEY: u64 = u16::MAX as u64;

/// How deep arrays may be nested; known files have no nested ones.
const MAX_ARRAY_DEPTH: u32 = 4;

/// The least that a key-value pair takes: length of the key, type, a one-byte value.
const MIN_PAIR: u64 = 8 + 4 + 1;

/// The least that a line of the tensor index takes: length of the name, dimension count, type, offset.
const MIN_ENTRY: u64 = 8 + 4 + 4 + 8;

/// What is in a GGUF file.
pub(crate) struct Contents {
    pub(crate) version: u32,
    pub(crate) metadata: Metadata,
    pub(crate) tensors: Tensors,
}

/// Reads everything but the data.
pub(crate) fn read(file: &File, budget: &mut Budget) -> Result<Contents> {
    let mut reader = Reader { file, cursor: Cursor::new(file.path(), file.bytes(), 0), budget };
    let version = reader.version()?;
    let at = reader.cursor.offset();
    let tensor_count = reader.cursor.u64("the number of tensors")?;
    let pair_at = reader.cursor.offset();
    let pair_count = reader.cursor.u64("the number of metadata keys")?;
    reader.cursor.check_count(pair_at, pair_count, MIN_PAIR, "metadata keys")?;
    let pairs = reader.pairs(pair_count)?;
    reader.cursor.check_count(at, tensor_count, MIN_ENTRY, "tensors")?;
    reader.check_whole(&pairs)?;
    let alignment = reader.alignment(&pairs)?;
    let (entries, start) = reader.entries(tensor_count, alignment)?;
    let mut tensors = Tensors::default();
    tensors.add(file, entries, Data { start, alignment, footer: 0 })?;
    Ok(Contents { version, metadata: Metadata::new(file.path(), pairs), tensors })
}

struct Reader<'a> {
    file: &'a File,
    cursor: Cursor<'a>,
    budget: &'a mut Budget,
}

impl<'a> Reader<'a> {
    fn version(&mut self) -> Result<u32> {
        let magic = self.cursor.array::<4>("the magic number")?;
        assert_eq!(&magic, MAGIC, "the caller has looked at the magic number");
        let at = self.cursor.offset();
        let version = self.cursor.u32("the version")?;
        let unsupported = |what: &str, help| {
            Err(Error::Unsupported {
                file: self.file.path().to_owned(),
                at: Place::Offset(at),
                what: what.to_owned(),
                help,
            })
        };
        match version {
            2 | 3 => Ok(version),
            1 => unsupported(
                "GGUF version 1",
                "convert the original model again with a current llama.cpp",
            ),
            _ if version.swap_bytes() <= u16::MAX.into() => unsupported(
                "a big-endian GGUF file",
                "convert it with llama.cpp's gguf_convert_endian.py, or download the little-endian one",
            ),
            _ => Err(self.cursor.malformed_at(at, "GGUF version 2 or 3", version.to_string())),
        }
    }

    fn pairs(&mut self, count: u64) -> Result<Map> {
        let mut pairs = Map::default();
        for _ in 0..count {
            let key = self.key()?;
            self.budget.charge(json::ENTRY_COST + key.len(), || Place::Key(key.to_owned()))?;
            let at = self.cursor.offset();
            let kind =
                self.cursor.u32(format_args!("the value type of key `{}`", Shortened(key)))?;
            let value = self.value(key, kind, at, MAX_ARRAY_DEPTH)?;
            if pairs.insert(key, value).is_some() {
                return Err(Error::Duplicate {
                    file: self.file.path().to_owned(),
                    at: Place::Key(key.to_owned()),
                });
            }
        }
        Ok(pairs)
    }

    fn key(&mut self) -> Result<&'a str> {
        let at = self.cursor.offset();
        let len = self.cursor.u64("the length of a metadata key")?;
        self.limit(at, "the length of a metadata key", len, MAX_KEY)?;
        self.cursor.text(len, "a metadata key")
    }

    /// A value of type number `kind`, which was read at `kind_at`.
    fn value(&mut self, key: &str, kind: u32, kind_at: u64, depth: u32) -> Result<Value> {
        let what = format_args!("the value of key `{}`", Shortened(key));
        let cursor = &mut self.cursor;
        Ok(match kind {
            value_type::U8 => Value::U64(cursor.u8(what)?.into()),
            value_type::U16 => Value::U64(cursor.u16(what)?.into()),
            value_type::U32 => Value::U64(cursor.u32(what)?.into()),
            value_type::U64 => Value::U64(cursor.u64(what)?),
            value_type::I8 => Value::I64(i8::from_le_bytes(cursor.array(what)?).into()),
            value_type::I16 => Value::I64(i16::from_le_bytes(cursor.array(what)?).into()),
            value_type::I32 => Value::I64(i32::from_le_bytes(cursor.array(what)?).into()),
            value_type::I64 => Value::I64(i64::from_le_bytes(cursor.array(what)?)),
            value_type::F32 => Value::F32(f32::from_le_bytes(cursor.array(what)?)),
            value_type::F64 => Value::F64(f64::from_le_bytes(cursor.array(what)?)),
            value_type::BOOL => match (cursor.offset(), cursor.u8(what)?) {
                (_, 0) => Value::Bool(false),
                (_, 1) => Value::Bool(true),
                (at, other) => {
                    let expected = format!("0 or 1 as {what}, a truth value");
                    return Err(cursor.malformed_at(at, expected, other.to_string()));
                }
            },
            value_type::STRING => {
                let len = cursor.u64(what)?;
                let text = cursor.text(len, what)?;
                self.budget.charge(text_cost(text), || Place::Key(key.to_owned()))?;
                Value::String(text.to_owned())
            }
            value_type::ARRAY => Value::Array(self.array(key, depth)?),
            _ => {
                let expected = format!("a value type of 0 to 12 for key `{}`", Shortened(key));
                return Err(cursor.malformed_at(kind_at, expected, kind.to_string()));
            }
        })
    }

    fn array(&mut self, key: &str, depth: u32) -> Result<Array> {
        let what = format_args!("the array of key `{}`", Shortened(key));
        let kind_at = self.cursor.offset();
        let kind = self.cursor.u32(what)?;
        let count_at = self.cursor.offset();
        let count = self.cursor.u64(what)?;
        let least = match kind {
            value_type::U8 | value_type::I8 | value_type::BOOL => 1,
            value_type::U16 | value_type::I16 => 2,
            value_type::U32 | value_type::I32 | value_type::F32 => 4,
            value_type::STRING | value_type::U64 | value_type::I64 | value_type::F64 => 8,
            value_type::ARRAY if depth > 0 => 12,
            value_type::ARRAY => {
                let expected = format!(
                    "arrays nested at most {MAX_ARRAY_DEPTH} deep under key `{}`",
                    Shortened(key)
                );
                return Err(self.cursor.malformed_at(kind_at, expected, "one more"));
            }
            _ => {
                let expected = format!("an element type of 0 to 12 for key `{}`", Shortened(key));
                return Err(self.cursor.malformed_at(kind_at, expected, kind.to_string()));
            }
        };
        self.cursor.check_count(
            count_at,
            count,
            least,
            format_args!("elements of key `{}`", Shortened(key)),
        )?;
        let each = match kind {
            value_type::I8 | value_type::I16 | value_type::I32 | value_type::I64 => PACKED_COST,
            value_type::F32 | value_type::STRING => PACKED_COST,
            _ => VALUE_COST,
        };
        let bytes = (count as usize).saturating_mul(each);
        self.budget.charge(bytes, || Place::Key(key.to_owned()))?;
        (0..count).map(|_| self.value(key, kind, kind_at, depth.saturating_sub(1))).collect()
    }

    /// A part of a model has some of its tensors, and would look like one that lacks the others.
    fn check_whole(&self, pairs: &Map) -> Result<()> {
        match pairs.get(SPLIT_KEY).and_then(Value::as_u64) {
            Some(count) if count > 1 => Err(Error::Unsupported {
                file: self.file.path().to_owned(),
                at: Place::Key(SPLIT_KEY.to_owned()),
                what: format!("one of {count} parts of a model"),
                help: "merge the parts with `llama-gguf-split --merge`",
            }),
            _ => Ok(()),
        }
    }

    fn alignment(&self, pairs: &Map) -> Result<u64> {
        let Some(value) = pairs.get(ALIGNMENT_KEY) else { return Ok(DEFAULT_ALIGNMENT) };
        value.as_u64().filter(|n| n.is_power_of_two()).ok_or_else(|| Error::Malformed {
            file: self.file.path().to_owned(),
            at: Place::Key(ALIGNMENT_KEY.to_owned()),
            expected: "a power of two".to_owned(),
            found: value.to_string(),
        })
    }

    /// The tensor index, and where the data begins: after it, at the next multiple of `alignment`.
    fn entries(&mut self, count: u64, alignment: u64) -> Result<(Vec<Entry>, u64)> {
        let bytes = (count as usize).saturating_mul(tensors::ENTRY_COST);
        self.budget.charge(bytes, || Place::Offset(self.cursor.offset()))?;
        let mut entries = Vec::with_capacity(count as usize);
        for _ in 0..count {
            entries.push(self.entry(alignment)?);
        }
        let data = self.cursor.offset().checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
        for entry in &mut entries {
            entry.start = entry.start.saturating_add(data);
        }
        Ok((entries, data))
    }

    /// One line of the index; its start counts from the start of the data.
    fn entry(&mut self, alignment: u64) -> Result<Entry> {
        let cursor = &mut self.cursor;
        let at = cursor.offset();
        let len = cursor.u64("the length of a tensor name")?;
        self.limit(at, "the length of a tensor name", len, MAX_NAME as u64)?;
        let cursor = &mut self.cursor;
        let name = cursor.text(len, "a tensor name")?.to_owned();
        self.budget.charge(tensors::name_cost(&name), || Place::Tensor(name.clone()))?;

        let what = format_args!("the index entry of tensor `{}`", Shortened(&name));
        let at = cursor.offset();
        let ndim = cursor.u32(what)?;
        self.limit(at, "the number of dimensions", ndim.into(), MAX_DIMS as u64)?;
        let cursor = &mut self.cursor;
        let mut dims = Vec::with_capacity(ndim as usize);
        for _ in 0..ndim {
            let at = cursor.offset();
            let dim = cursor.u64(what)?;
            dims.push(usize::try_from(dim).map_err(|_| {
                cursor.malformed_at(at, "a dimension that memory can hold", dim.to_string())
            })?);
        }
        dims.reverse();
        let shape = Shape::new(dims);

        let id = cursor.u32(what)?;
        let at = cursor.offset();
        let start = cursor.u64(what)?;
        if !start.is_multiple_of(alignment) {
            let expected =
                format!("a multiple of {alignment} as offset of tensor `{}`", Shortened(&name));
            return Err(cursor.malformed_at(at, expected, start.to_string()));
        }
        let kind = match DType::from_ggml_id(id) {
            Some(dtype) => {
                let bytes = Entry::size_of(self.file.path(), &name, dtype, &shape)?;
                Kind::Known { dtype, bytes }
            }
            None => Kind::Unknown { dtype: format!("ggml-{id}"), bytes: None },
        };
        Ok(Entry { name, kind, shape, start })
    }

    fn limit(&self, at: u64, what: &'static str, found: u64, limit: u64) -> Result<()> {
        if found <= limit {
            return Ok(());
        }
        let file = self.file.path().to_owned();
        Err(Error::Limit { file, at: Place::Offset(at), what, found, limit })
    }
}
