#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| millrace_control::relay_client::fuzz::relay(data));
