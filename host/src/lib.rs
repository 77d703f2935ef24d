//! What every daemon needs of its host: the operator's signals, logs, the words of a failure, and
//! what the kernel says of networks. Small enough to be shared without tying the daemons to each other.

pub mod failure;
pub mod log;
pub mod monitor;
pub mod route_socket;
pub mod signals;
