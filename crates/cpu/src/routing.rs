//! Which experts a row goes to, and how much each counts. A row has some hundred logits at most, so one thread does it.

/// See [`Backend::top_k`](apr_model::Backend::top_k), of one row. `order` is as long as the row.
pub(crate) fn top_k(row: &[f32], order: &mut [usize], ids: &mut [f32]) {
    let k = ids.len();
    let value = |id: usize| if row[id].is_nan() { f32::NEG_INFINITY } else { row[id] };
    let before = |a: &usize, b: &usize| value(*b).total_cmp(&value(*a)).then(a.cmp(b));
    order.iter_mut().enumerate().for_each(|(id, place)| *place = id);
    if k < order.len() {
        order.select_nth_unstable_by(k, before);
    }
    order[..k].sort_unstable_by(before);
    ids.iter_mut().zip(&*order).for_each(|(out, &id)| *out = id as f32);
}

/// See [`Backend::route_weights`](apr_model::Backend::route_weights), of one row. Sums go over the slots in order.
pub(crate) fn weights(softmax: &[f32], ids: &[f32], normalize: bool, weights: &mut [f32]) {
    weights.iter_mut().zip(ids).for_each(|(weight, &id)| *weight = softmax[id as usize]);
    if normalize {
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equal_logits_the_smaller_id_comes_first_and_nan_last() {
        let ids = |row: &[f32], k: usize| {
            let mut ids = vec![f32::NAN; k];
            top_k(row, &mut vec![0; row.len()], &mut ids);
            ids
        };
        let row = [1.0, 3.0, f32::NAN, 3.0, -0.5];
        assert_eq!(ids(&row, 4), [1.0, 3.0, 0.0, 4.0]);
        assert_eq!(ids(&row, 5), [1.0, 3.0, 0.0, 4.0, 2.0]);
        let row = [f32::NAN, f32::NAN, 0.0, 0.0, 0.0];
        assert_eq!(ids(&row, 4), [2.0, 3.0, 4.0, 0.0]);
        assert_eq!(ids(&row, 5), [2.0, 3.0, 4.0, 0.0, 1.0]);
    }
}
