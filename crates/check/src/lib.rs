//! What must hold of a model and of the backend that runs it, without anything to compare with.
