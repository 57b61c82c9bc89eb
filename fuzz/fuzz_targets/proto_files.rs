//! Fuzzes one entry point of the library; its code is in src/fuzzing.rs.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cofferdam::fuzzing::proto_files(data));
