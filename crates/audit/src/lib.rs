//! Isolated replay: which stage of a capture is wrong, and whether arithmetic explains the rest.
