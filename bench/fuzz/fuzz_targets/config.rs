#![no_main]

libfuzzer_sys::fuzz_target!(|data: &str| millrace_config::fuzz_config(data));
