//! The throughput benchmark: what is measured ([`results`]), how it is printed ([`table`]) and how
//! it is drawn ([`plot`]). The runner itself is `src/bin/throughput.rs`.
#![forbid(unsafe_code)]

pub mod machine;
pub mod plot;
pub mod results;
pub mod table;
pub mod timing;
