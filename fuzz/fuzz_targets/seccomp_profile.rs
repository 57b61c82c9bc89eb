//! Fuzzes one entry point of the library; its code is in src/container/exec/seccomp/interpreter.rs.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cofferdam::fuzzing::seccomp_profile(data));
