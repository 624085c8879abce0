//! Planted faults, and a bench that scores who finds them.
