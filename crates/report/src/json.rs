//! Numbers that JSON does not have: NaN and infinities are written as their names, never as `null`.

use serde::{Serialize, Serializer};

pub(crate) fn finite_or_text<S: Serializer>(x: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    match x.is_finite() {
        true => serializer.serialize_f64(*x),
        false => serializer.serialize_str(&x.to_string()),
    }
}

pub(crate) fn all_finite_or_text<S: Serializer>(
    values: &[f64],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Number(#[serde(serialize_with = "finite_or_text")] f64);
    serializer.collect_seq(values.iter().copied().map(Number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_json_has_no_number_for_is_written_by_name() {
        #[derive(Serialize)]
        struct Values(#[serde(serialize_with = "all_finite_or_text")] Vec<f64>);
        let values = Values(vec![1.5, f64::NAN, f64::NEG_INFINITY]);
        assert_eq!(serde_json::to_string(&values).unwrap(), r#"[1.5,"NaN","-inf"]"#);
    }
}
