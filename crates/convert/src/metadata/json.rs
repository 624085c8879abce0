//! JSON of other libraries' kind as metadata, and back.

use apr_format::{File, Map, Value};

use crate::{Error, Result};

/// The JSON in `file`.
pub(super) fn parsed(file: &File) -> Result<serde_json::Value> {
    serde_json::from_slice(file.bytes()).map_err(|source| {
        let file = file.path().display().to_string();
        Error::Tokenizer(apr_tokenizer::Error::Json { file, source })
    })
}

/// JSON as a metadata value.
pub(super) fn value_of(json: serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::Null,
        serde_json::Value::Bool(b) => b.into(),
        serde_json::Value::String(text) => text.into(),
        serde_json::Value::Array(values) => {
            Value::Array(values.into_iter().map(value_of).collect())
        }
        serde_json::Value::Object(map) => Value::Object(
            map.into_iter().map(|(key, value)| (key, value_of(value))).collect::<Map>(),
        ),
        serde_json::Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(n), _) => n.into(),
            (None, Some(n)) => n.into(),
            (None, None) => number.as_f64().map_or(Value::Null, Value::from),
        },
    }
}

/// Whether a value says nothing: false, an empty text, an empty list.
pub(super) fn is_neutral(value: &serde_json::Value) -> bool {
    match value {
        serde_json::Value::Null | serde_json::Value::Bool(false) => true,
        serde_json::Value::String(text) => text.is_empty(),
        serde_json::Value::Array(values) => values.is_empty(),
        serde_json::Value::Object(map) => map.is_empty(),
        _ => false,
    }
}
