//! Lists, which in a vocabulary are long.

use super::Value;

/// A list of values, of one type in GGUF, of any in JSON.
///
/// A file of half a gigabyte has some 450,000 texts and numbers for its vocabulary. Where all values are texts, or all numbers
/// of one of the types that vocabularies have, they are therefore kept without what a [`Value`] takes apiece.
#[derive(Clone, Debug, PartialEq)]
pub struct Array(Box<Packed>);

/// Equal lists are packed alike: what is packed depends on the values alone.
#[derive(Clone, Debug, PartialEq)]
enum Packed {
    /// One after the other, and where each ends; not empty.
    Texts {
        text: String,
        ends: Vec<usize>,
    },
    /// Not empty.
    I64(Vec<i64>),
    /// Not empty.
    F32(Vec<f32>),
    Mixed(Vec<Value>),
}

/// What a value in a list takes at most: vectors double as they grow, and for a moment both are there.
pub(crate) const VALUE_COST: usize = 3 * size_of::<Value>();

/// The same of a value in a list of texts, or of numbers that are packed.
pub(crate) const PACKED_COST: usize = 3 * size_of::<u64>();

/// What the bytes of a text in a list take at most.
pub(crate) fn text_cost(text: &str) -> usize {
    3 * text.len()
}

impl Array {
    /// The number of values.
    pub fn len(&self) -> usize {
        match &*self.0 {
            Packed::Texts { ends, .. } => ends.len(),
            Packed::I64(values) => values.len(),
            Packed::F32(values) => values.len(),
            Packed::Mixed(values) => values.len(),
        }
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values, each of them made anew.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Value> {
        (0..self.len()).map(|i| match &*self.0 {
            Packed::Texts { text, ends } => text_at(text, ends, i).into(),
            Packed::I64(values) => values[i].into(),
            Packed::F32(values) => values[i].into(),
            Packed::Mixed(values) => values[i].clone(),
        })
    }

    /// The values, if they are texts.
    pub fn texts(&self) -> Option<Vec<&str>> {
        match &*self.0 {
            Packed::Texts { text, ends } => {
                Some((0..ends.len()).map(|i| text_at(text, ends, i)).collect())
            }
            _ => self.is_empty().then(Vec::new),
        }
    }

    /// Appends a value.
    pub fn push(&mut self, value: Value) {
        match (&mut *self.0, value) {
            (Packed::Texts { text, ends }, Value::String(value)) => {
                text.push_str(&value);
                ends.push(text.len());
            }
            (Packed::I64(values), Value::I64(value)) => values.push(value),
            (Packed::F32(values), Value::F32(value)) => values.push(value),
            (Packed::Mixed(values), value) if !values.is_empty() => values.push(value),
            (packed @ Packed::Mixed(_), value) => *packed = Packed::one(value),
            (_, value) => {
                let values = self.iter().chain([value]).collect();
                *self.0 = Packed::Mixed(values);
            }
        }
    }
}

impl Packed {
    fn one(value: Value) -> Self {
        match value {
            Value::String(text) => Self::Texts { ends: vec![text.len()], text },
            Value::I64(value) => Self::I64(vec![value]),
            Value::F32(value) => Self::F32(vec![value]),
            value => Self::Mixed(vec![value]),
        }
    }
}

fn text_at<'a>(text: &'a str, ends: &[usize], i: usize) -> &'a str {
    let start = i.checked_sub(1).map_or(0, |before| ends[before]);
    &text[start..ends[i]]
}

impl Default for Array {
    fn default() -> Self {
        Self(Box::new(Packed::Mixed(Vec::new())))
    }
}

impl<T: Into<Value>> FromIterator<T> for Array {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        let mut array = Self::default();
        values.into_iter().for_each(|value| array.push(value.into()));
        array
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_list_comes_back_as_it_was() {
        let lists: [Vec<Value>; 9] = [
            vec![],
            vec!["".into()],
            vec!["a".into(), "".into(), "bc".into(), "ä".into()],
            vec![1i64.into(), (-1i64).into()],
            vec![1u64.into(), (-1i64).into()],
            vec![0.5f32.into(), 1.5f32.into()],
            vec![0.5f32.into(), 1.5f64.into()],
            vec!["a".into(), "b".into(), 3u64.into(), "c".into()],
            vec![vec!["a", "b"].into(), Value::Null, vec![1i64].into()],
        ];
        for list in &lists {
            let array: Array = list.iter().cloned().collect();
            assert_eq!(array.len(), list.len());
            assert_eq!(array.iter().collect::<Vec<_>>(), *list);
            let texts: Option<Vec<_>> = list.iter().map(Value::as_str).collect();
            assert_eq!(array.texts(), texts, "{list:?}");
            for other in &lists {
                assert_eq!(
                    array == other.iter().cloned().collect(),
                    list == other,
                    "{list:?}, {other:?}"
                );
            }
        }
    }

    #[test]
    fn long_lists_of_one_type_take_less_than_their_values() {
        let packed = |value: Value| {
            let array: Array = std::iter::repeat_n(value, 3).collect();
            !matches!(*array.0, Packed::Mixed(_))
        };
        assert!(packed("text".into()));
        assert!(packed(7i64.into()));
        assert!(packed(0.5f32.into()));
    }
}
