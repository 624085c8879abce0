//! Writing GGUF version 3.

use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, value_type};
use crate::{
    Array, Map, Result, Value,
    write::{Declared, Header, pad, sealed::Layout, unwritable},
};

/// GGUF version 3, as a container to write.
///
/// An integer is written in 32 bits if it fits, else in 64, as llama.cpp's own keys have it. The key
/// `general.alignment` is obeyed.
#[derive(Clone, Copy, Debug)]
pub struct Gguf;

/// Declares metadata and tensors of a GGUF file, then writes them in the order of declaration.
pub type Writer = crate::write::Writer<Gguf>;

impl Layout for Gguf {
    const NAME: &'static str = "a GGUF file";

    fn refusal(tensor: &Declared) -> Option<String> {
        let dtype = tensor.dtype;
        dtype.ggml_id().is_none().then(|| format!(" of type {dtype}"))
    }

    fn header(metadata: &Map, tensors: &mut [Declared]) -> Result<Header> {
        let alignment = alignment(metadata)?;
        let mut bytes = MAGIC.to_vec();
        put_u32(&mut bytes, 3);
        put_u64(&mut bytes, tensors.len());
        put_u64(&mut bytes, metadata.len());
        for (key, value) in metadata.iter() {
            put_text(&mut bytes, key);
            let kind = match value {
                Value::Array(_) => Some(value_type::ARRAY),
                one => kind_of(&[one.clone()].into_iter().collect()),
            };
            let kind =
                kind.ok_or_else(|| unwritable::<Self>(format_args!("key `{key}`, {value}")))?;
            put_u32(&mut bytes, kind);
            put_value(&mut bytes, kind, value).ok_or_else(|| {
                unwritable::<Self>(format_args!("key `{key}`, a list of several types"))
            })?;
        }
        let mut offset = 0u64;
        for tensor in tensors {
            put_text(&mut bytes, &tensor.name);
            put_u32(&mut bytes, tensor.shape.dims().len() as u32);
            for &dim in tensor.shape.dims().iter().rev() {
                put_u64(&mut bytes, dim);
            }
            put_u32(&mut bytes, tensor.dtype.ggml_id().expect("`refusal` has checked the type"));
            bytes.extend(offset.to_le_bytes());
            offset += tensor.len.next_multiple_of(alignment);
        }
        pad(&mut bytes, alignment);
        Ok(Header { bytes, alignment, checksum: false })
    }
}

fn alignment(metadata: &Map) -> Result<u64> {
    let Some(value) = metadata.get(ALIGNMENT_KEY) else { return Ok(DEFAULT_ALIGNMENT) };
    value.as_u64().filter(|n| n.is_power_of_two()).ok_or_else(|| {
        unwritable::<Gguf>(format_args!(
            "key `{ALIGNMENT_KEY}`, {value}, for it is no power of two"
        ))
    })
}

/// The narrowest of the types that we write which holds each of `values`.
fn kind_of(values: &Array) -> Option<u32> {
    let all = |is: fn(&Value) -> bool| values.iter().all(|value| is(&value));
    Some(match values.iter().next()? {
        Value::Bool(_) => value_type::BOOL,
        Value::U64(_) if all(|v| v.as_u64().is_some_and(|n| n <= u32::MAX.into())) => {
            value_type::U32
        }
        Value::U64(_) if all(|v| v.as_u64().is_some()) => value_type::U64,
        Value::U64(_) | Value::I64(_) => {
            match all(|v| v.as_i64().is_some_and(|n| i32::try_from(n).is_ok())) {
                true => value_type::I32,
                false => value_type::I64,
            }
        }
        Value::F32(_) => value_type::F32,
        Value::F64(_) => value_type::F64,
        Value::String(_) => value_type::STRING,
        Value::Array(_) => value_type::ARRAY,
        Value::Null | Value::Object(_) => return None,
    })
}

/// Appends `value` as type number `kind`; `None` if it is of another type.
fn put_value(out: &mut Vec<u8>, kind: u32, value: &Value) -> Option<()> {
    match kind {
        value_type::BOOL => out.push(value.as_bool()?.into()),
        value_type::U32 => put_u32(out, value.as_u64()?.try_into().ok()?),
        value_type::U64 => out.extend(value.as_u64()?.to_le_bytes()),
        value_type::I32 => out.extend(i32::try_from(value.as_i64()?).ok()?.to_le_bytes()),
        value_type::I64 => out.extend(value.as_i64()?.to_le_bytes()),
        value_type::F32 => match *value {
            Value::F32(x) => out.extend(x.to_le_bytes()),
            _ => return None,
        },
        value_type::F64 => match *value {
            Value::F64(x) => out.extend(x.to_le_bytes()),
            _ => return None,
        },
        value_type::STRING => put_text(out, value.as_str()?),
        value_type::ARRAY => {
            let values = value.as_array()?;
            // An empty list has no type of its own; the lists that may be empty are of texts.
            let kind = if values.is_empty() { value_type::STRING } else { kind_of(values)? };
            put_u32(out, kind);
            put_u64(out, values.len());
            for value in values.iter() {
                put_value(out, kind, &value)?;
            }
        }
        _ => return None,
    }
    Some(())
}

fn put_u32(out: &mut Vec<u8>, n: u32) {
    out.extend(n.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, n: usize) {
    out.extend((n as u64).to_le_bytes());
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put_u64(out, text.len());
    out.extend(text.as_bytes());
}
