//! Which experts a row goes to, and how much each counts. A row has some hundred logits at most, so one thread does it.

use crate::{Tensor, kernels::Kernels};

/// See [`Backend::top_k`](apr_model::Backend::top_k).
pub(crate) fn top_k(x: &Tensor, k: usize) -> Tensor {
    let (n, experts) = (x.rows(), x.width());
    let mut ids = Vec::with_capacity(n * k);
    let mut order: Vec<usize> = Vec::with_capacity(experts);
    for row in x.values().chunks_exact(experts) {
        let value = |id: usize| if row[id].is_nan() { f32::NEG_INFINITY } else { row[id] };
        let before = |a: &usize, b: &usize| value(*b).total_cmp(&value(*a)).then(a.cmp(b));
        order.clear();
        order.extend(0..experts);
        if k < experts {
            order.select_nth_unstable_by(k, before);
        }
        order[..k].sort_unstable_by(before);
        ids.extend(order[..k].iter().map(|&id| id as f32));
    }
    Tensor::new([n, k], ids)
}

/// See [`Backend::route_weights`](apr_model::Backend::route_weights). Sums go over the slots in order.
pub(crate) fn weights(logits: &Tensor, ids: &Tensor, normalize: bool, kernels: &Kernels) -> Tensor {
    let (experts, k) = (logits.width(), ids.width());
    let mut softmax = vec![0.0; experts];
    let mut weights = Vec::with_capacity(ids.values().len());
    for (logits, ids) in logits.values().chunks_exact(experts).zip(ids.values().chunks_exact(k)) {
        softmax.copy_from_slice(logits);
        (kernels.softmax)(&mut softmax);
        let first = weights.len();
        weights.extend(ids.iter().map(|&id| softmax[id as usize]));
        if normalize {
            let sum: f32 = weights[first..].iter().sum();
            weights[first..].iter_mut().for_each(|weight| *weight /= sum);
        }
    }
    Tensor::new(ids.shape(), weights)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equal_logits_the_smaller_id_comes_first_and_nan_last() {
        let x = Tensor::new(
            [2, 5],
            vec![1.0, 3.0, f32::NAN, 3.0, -0.5, f32::NAN, f32::NAN, 0.0, 0.0, 0.0],
        );
        assert_eq!(top_k(&x, 4).values(), [1.0, 3.0, 0.0, 4.0, 2.0, 3.0, 4.0, 0.0]);
        assert_eq!(top_k(&x, 5).values(), [1.0, 3.0, 0.0, 4.0, 2.0, 2.0, 3.0, 4.0, 0.0, 1.0]);
    }
}
