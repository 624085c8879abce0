//! Names of the forward pass in words, and lists of numbers as people write them.

use apr_model::{Site, Stage};

/// What `site` is, in words: `the gate projection of layer 2`.
pub(crate) fn site(site: Site) -> String {
    use Stage::*;
    let stage = match site.stage {
        Embedding => "the token embedding",
        AttnNorm => "the norm before attention",
        QkvMatmul => "the query, key and value projections",
        QkvBias => "the bias of queries, keys and values",
        QNorm => "the norm of the queries",
        KNorm => "the norm of the keys",
        QPostRope => "the rotation of the queries",
        KPostRope => "the rotation of the keys",
        AttnScores => "the attention scores",
        AttnSoftmax => "the softmax of the scores",
        Attention => "the weighted sum of the values",
        AttnOut => "the output projection of attention",
        PostAttnResidual => "the residual sum after attention",
        FfnNorm => "the norm before the feed-forward network",
        FfnGate => "the gate projection",
        FfnUp => "the up projection",
        FfnSilu => "the SiLU of the gate",
        FfnSwigl => "the product of gate and up",
        MoeRouter => "the router's logits",
        MoeRouterIndices => "the choice of experts",
        MoeRouterWeights => "the weights of the chosen experts",
        MoeExpertGate => "the gate projections of the experts",
        MoeExpertUp => "the up projections of the experts",
        MoeExpertSilu => "the SiLU of the experts' gates",
        MoeExpertSwigl => "the products of the experts' gates and ups",
        MoeExpertOut => "the down projections of the experts",
        FfnOut => "the output of the feed-forward network",
        PostFfnResidual => "the residual sum after the feed-forward network",
        FinalNorm => "the final norm",
        LmHead => "the output projection to logits",
    };
    match site.layer {
        Some(layer) => format!("{stage} of layer {layer}"),
        None => stage.to_owned(),
    }
}

/// Lists are cut off after this many runs.
const RUNS: usize = 8;

/// Ascending numbers with runs drawn together: `3, 5-8 and 12`.
pub(crate) fn numbers(values: impl IntoIterator<Item = usize>) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for value in values {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == value => *last = value,
            _ => runs.push((value, value)),
        }
    }
    let more: usize = runs.iter().skip(RUNS).map(|(first, last)| last - first + 1).sum();
    let mut parts: Vec<String> = runs
        .iter()
        .take(RUNS)
        .map(|(first, last)| match last - first {
            0 => first.to_string(),
            1 => format!("{first}, {last}"),
            _ => format!("{first}-{last}"),
        })
        .collect();
    if more > 0 {
        parts.push(format!("{more} more"));
    }
    join(&parts)
}

/// `a`, `a and b`, `a, b and c`.
pub(crate) fn join(parts: &[String]) -> String {
    match parts {
        [] => String::new(),
        [one] => one.clone(),
        [head @ .., last] => format!("{} and {last}", head.join(", ")),
    }
}

/// `1 position 3`, but `positions 3-5`: `what` in the number of `values`, and which.
pub(crate) fn counted(what: &str, values: &[usize]) -> String {
    let s = if values.len() == 1 { "" } else { "s" };
    format!("{what}{s} {}", numbers(values.iter().copied()))
}

/// How many times larger something is than something else.
pub(crate) fn times(x: f64) -> String {
    match x {
        x if !x.is_finite() => "infinitely many times".to_owned(),
        x if x < 10.0 => format!("{x:.1} times"),
        x if x < 1e6 => {
            let digits = format!("{x:.0}");
            let head = digits.len() - (digits.len() - 1) / 3 * 3;
            let mut text = digits[..head].to_owned();
            for group in digits.as_bytes()[head..].chunks(3) {
                text.push(' ');
                text.extend(group.iter().map(|&digit| char::from(digit)));
            }
            text + " times"
        }
        x => format!("{x:.0e} times"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_numbers_are_drawn_together_and_long_lists_cut_off() {
        assert_eq!(numbers([]), "");
        assert_eq!(numbers([3]), "3");
        assert_eq!(numbers([3, 4]), "3, 4");
        assert_eq!(numbers([1, 3, 4, 5]), "1 and 3-5");
        assert_eq!(numbers((0..40).step_by(2)), "0, 2, 4, 6, 8, 10, 12, 14 and 12 more");
        assert_eq!(counted("row", &[7]), "row 7");
        assert_eq!(counted("row", &[7, 8, 9]), "rows 7-9");
    }

    #[test]
    fn multiples_are_readable_whatever_their_size() {
        let cases = [
            (1.26, "1.3 times"),
            (12.4, "12 times"),
            (1234.0, "1 234 times"),
            (123_456.0, "123 456 times"),
            (2.5e9, "2e9 times"),
            (f64::INFINITY, "infinitely many times"),
        ];
        for (x, text) in cases {
            assert_eq!(times(x), text);
        }
    }
}
