//! The obvious backend: plain loops, short enough to check against the paper. They run on all cores; the
//! product with a matrix alone is also arranged for speed.
//!
//! It is what every other backend is measured against. In f64 it is *exact* for our purposes: its rounding is
//! a billion times below that of any engine it judges. It can also *emulate*: round activations and
//! cached keys and values as another engine declares to, and compute everything else exactly, so that what
//! remains between the two is not explained by the declared arithmetic.

mod arithmetic;
mod backend;
mod experts;
mod linear;
mod real;
mod tensor;

pub use arithmetic::{Activations, Arithmetic};
pub use backend::{Kv, Reference};
pub use experts::{by_expert, expert, gather, scatter};
pub use linear::{Operand, dot, products};
pub use real::Real;
pub use tensor::Tensor;
