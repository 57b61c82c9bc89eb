//! One door of the library and any bytes; what it does with them is in src/container/image/doors.rs.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cofferdam::doors::image_tar(data));
