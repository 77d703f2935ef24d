//! The millrace data plane as a library; `main.rs` is the thin binary.

pub mod by_socket;
pub mod clock;
pub mod connects;
pub mod control;
pub mod device_uapi;
pub mod endpoint_table;
pub mod facts;
pub mod failure;
pub mod interface;
pub mod io;
pub mod link;
pub mod link_file;
pub mod look_up;
pub mod observer;
pub mod offload;
pub mod privileges;
pub mod queue;
pub mod run;
pub mod service;
pub mod settings;
pub mod slow;
pub mod state;
pub mod steering;
pub mod uapi_server;
pub mod watchdog;
pub mod worker;
