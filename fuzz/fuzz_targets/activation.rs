//! Fuzzes `activation` of targets.rs; started by fuzz/run.
#![no_main]

#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::activation(data));
