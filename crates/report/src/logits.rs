//! The likeliest next tokens of two sides.

/// What two sides make of one position.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitRow {
    /// The position.
    pub position: usize,
    /// The token that was read there, as text.
    pub token: Option<String>,
    /// The likeliest next tokens of the side under test, best first.
    pub a: Vec<Favourite>,
    /// The reference's.
    pub b: Vec<Favourite>,
}

/// A likely next token.
#[derive(Clone, Debug, PartialEq)]
pub struct Favourite {
    /// Its id.
    pub id: usize,
    /// Its text, where there is a tokenizer.
    pub text: Option<String>,
    /// Its logit.
    pub logit: f64,
    /// Its share of the whole.
    pub probability: f64,
}

impl Favourite {
    /// The `top` likeliest of a row of logits. A row with NaN has none.
    pub fn of(logits: &[f64], top: usize, text: impl Fn(usize) -> Option<String>) -> Vec<Self> {
        if logits.iter().any(|x| x.is_nan()) {
            return Vec::new();
        }
        let mut ids: Vec<usize> = (0..logits.len()).collect();
        ids.sort_by(|&x, &y| logits[y].total_cmp(&logits[x]).then(x.cmp(&y)));
        let Some(&best) = ids.first() else { return Vec::new() };
        let weight = |id: usize| (logits[id] - logits[best]).exp();
        let whole: f64 = (0..logits.len()).map(weight).sum();
        ids.into_iter()
            .take(top)
            .map(|id| Self {
                id,
                text: text(id),
                logit: logits[id],
                probability: weight(id) / whole,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_tokens_come_first_and_probabilities_add_up() {
        let all = Favourite::of(&[0.0, 2.0, 2.0, 1.0], 4, |id| Some(format!("t{id}")));
        assert_eq!(all.iter().map(|f| f.id).collect::<Vec<_>>(), [1, 2, 3, 0]);
        assert!((all.iter().map(|f| f.probability).sum::<f64>() - 1.0).abs() < 1e-12);
        assert_eq!(all[0].text.as_deref(), Some("t1"));
        assert!(Favourite::of(&[1.0, f64::NAN], 2, |_| None).is_empty());
    }
}
