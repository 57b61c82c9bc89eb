//! An echo device: answers each request with the request's own bytes. The example of ARCHITECTURE.md.

use super::{DeviceIo, DeviceType, EventSource, Profile, VirtioDevice, Work};

/// The largest request that is answered, in bytes.
const MAX_REQUEST: usize = 4096;

#[derive(Debug)]
struct Echo;

impl VirtioDevice for Echo {
    fn profile(&self) -> Profile {
        // Another's number, for the example; a device of yours adds its own to `spec.rs`.
        Profile::new(DeviceType::Entropy).queue(16)
    }

    fn ready(&mut self, io: &mut DeviceIo, _: EventSource) {
        io.for_each_request(0, |chain| {
            let mut bytes = vec![0; chain.readable_len().min(MAX_REQUEST)];
            // A request whose answer does not fit is given back empty.
            if chain.read_into(&mut bytes).is_ok() && chain.write(&bytes).is_err() {
                log::debug!("the driver left too little space for an answer");
            }
            Work::Bytes(bytes.len())
        });
    }
}

#[test]
fn a_request_is_answered_with_its_own_bytes() {
    let mut driver = super::testing::Driver::start(Echo);
    driver.send(0, &[b"hello"], &[5]);
    driver.dispatch(0);
    assert_eq!(driver.receive(0).unwrap(), (b"hello".to_vec(), 5));
    assert!(driver.interrupted());
}
