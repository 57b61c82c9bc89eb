//! Fuzzes one entry point of the library; its code is in src/container/control/fuzzing.rs.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cofferdam::fuzzing::control_stream(data));
