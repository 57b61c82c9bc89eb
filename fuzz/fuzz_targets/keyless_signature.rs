//! Fuzzes one entry point of the library; its code is in src/container/image/signature/keyless/fuzzing.rs.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cofferdam::fuzzing::keyless_signature(data));
