//! Scores of tokens and merge rules are two ways to say in which order SentencePiece merges.
//!
//! SentencePiece merges any two neighbours that make a token, the best score first. Hugging Face lists every split of
//! every token into two tokens, by the scores of the products. So rules follow from scores, and scores from
//! rules if those are complete; rules of any other making are refused.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

use crate::vocabulary::Kind;

/// The merge rules that say what `scores` say: by score, then the longest left part first, as transformers has them.
pub(crate) fn merges_of_scores(tokens: &[(String, Kind)], scores: &[f32]) -> Vec<(String, String)> {
    let mut by_score: Vec<_> = normal(tokens).collect();
    by_score.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then(a.0.cmp(&b.0)));
    let known: HashSet<&str> = normal(tokens).map(|(_, text)| text).collect();
    by_score.iter().flat_map(|(_, text)| splits(text, &known)).collect()
}

/// The scores that say what `merges` say: the first product is best, and what is no product comes last, by id.
/// `None` if merging by score would not follow these rules.
pub(crate) fn scores_of_merges(
    tokens: &[(String, Kind)],
    merges: &[(String, String)],
) -> Option<Vec<f32>> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    let mut latest = None;
    let made: HashSet<&str> = normal(tokens).map(|(_, text)| text).collect();
    let mut rules = Vec::new();
    for (left, right) in merges {
        let product = format!("{left}{right}");
        // What is matched whole before anything is merged is never made of parts.
        if ![left, right, &product].iter().all(|text| made.contains(text.as_str())) {
            continue;
        }
        rules.push((left.clone(), right.clone()));
        let next = ranks.len();
        let rank = *ranks.entry(product).or_insert(next);
        // All rules of one product stand together.
        if latest.is_some_and(|latest| rank < latest) {
            return None;
        }
        latest = Some(rank);
    }
    let mut scores = vec![0.0; tokens.len()];
    let mut last = ranks.len();
    for (id, text) in normal(tokens) {
        let rank = ranks.get(text).copied().unwrap_or_else(|| {
            last += 1;
            last - 1
        });
        scores[id] = 0.0 - rank as f32;
    }
    let (mut complete, mut given) = (merges_of_scores(tokens, &scores), rules);
    complete.sort_unstable();
    given.sort_unstable();
    (complete == given).then_some(scores)
}

/// Two tokens of one score that two pairs can make: SentencePiece takes the leftmost first, rules the first of them.
pub(crate) fn tie<'a>(tokens: &'a [(String, Kind)], scores: &[f32]) -> Option<(&'a str, &'a str)> {
    let known: HashSet<&str> = normal(tokens).map(|(_, text)| text).collect();
    let mut products: Vec<_> =
        normal(tokens).filter(|(_, text)| !splits(text, &known).is_empty()).collect();
    products.sort_by(|a, b| scores[a.0].total_cmp(&scores[b.0]));
    let tied = products.windows(2).find(|pair| scores[pair[0].0] == scores[pair[1].0])?;
    Some((tied[0].1, tied[1].1))
}

/// The tokens that merging makes.
fn normal(tokens: &[(String, Kind)]) -> impl Iterator<Item = (usize, &str)> {
    let tokens = tokens.iter().enumerate();
    tokens.filter(|(_, (_, kind))| *kind == Kind::Normal).map(|(id, (text, _))| (id, text.as_str()))
}

fn splits(text: &str, known: &HashSet<&str>) -> Vec<(String, String)> {
    let mut cuts: Vec<_> = text.char_indices().skip(1).map(|(cut, _)| text.split_at(cut)).collect();
    cuts.sort_by_key(|(left, _)| Reverse(left.len()));
    cuts.into_iter()
        .filter(|(left, right)| known.contains(left) && known.contains(right))
        .map(|(left, right)| (left.to_owned(), right.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> Vec<(String, Kind)> {
        let mut tokens = vec![("<s>".to_owned(), Kind::Control)];
        tokens.extend(["ab", "abc", "bc", "a", "b", "c"].map(|t| (t.to_owned(), Kind::Normal)));
        tokens
    }

    #[test]
    fn scores_become_rules_and_the_same_scores_again() {
        let scores = [0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0];
        let merges = merges_of_scores(&tokens(), &scores);
        let texts: Vec<_> = merges.iter().map(|(l, r)| format!("{l} {r}")).collect();
        assert_eq!(texts, ["a b", "ab c", "a bc", "b c"]);
        assert_eq!(scores_of_merges(&tokens(), &merges).unwrap(), scores);
    }

    #[test]
    fn rules_that_scores_would_not_follow_are_refused() {
        let rules = |list: &[(&str, &str)]| -> Vec<_> {
            list.iter().map(|(l, r)| (l.to_string(), r.to_string())).collect()
        };
        let complete = [("a", "b"), ("ab", "c"), ("a", "bc"), ("b", "c")];
        assert!(scores_of_merges(&tokens(), &rules(&complete)).is_some());
        assert!(scores_of_merges(&tokens(), &rules(&complete[..3])).is_none(), "b c is missing");
        let apart = [("ab", "c"), ("a", "b"), ("a", "bc"), ("b", "c")];
        assert!(scores_of_merges(&tokens(), &rules(&apart)).is_none(), "abc has two ranks");
    }

    #[test]
    fn rules_about_added_tokens_do_not_matter() {
        let mut tokens = tokens();
        tokens[1].1 = Kind::UserDefined;
        let rules = [("a", "b"), ("ab", "c"), ("a", "bc"), ("b", "c")];
        let rules: Vec<_> = rules.iter().map(|(l, r)| (l.to_string(), r.to_string())).collect();
        let scores = scores_of_merges(&tokens, &rules).unwrap();
        assert_eq!(scores, [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0]);
    }

    #[test]
    fn equal_scores_of_two_products_are_a_tie() {
        let mut scores = [0.0, 0.0, -1.0, -2.0, -3.0, -3.0, -3.0];
        assert_eq!(tie(&tokens(), &scores), None, "single characters are no products");
        scores[3] = -1.0;
        assert_eq!(tie(&tokens(), &scores), Some(("abc", "bc")));
    }
}
