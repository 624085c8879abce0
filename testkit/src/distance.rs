//! How far two tensors are apart.

/// `|a - b| / |b|` over all elements, in f64; 0 if both are all zero, NaN if either holds a NaN.
///
/// # Panics
/// If the lengths differ.
pub fn relative_l2(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len(), "only tensors of the same length have a distance");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let distance = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
    match distance {
        0.0 => 0.0,
        d => d / norm(&mut b.iter().copied()),
    }
}
