//! The status document, made from an answer to `get=1` and the `mr_` lines in it.
