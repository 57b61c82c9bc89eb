//! Devices that come to and go from a loop that runs.

use super::*;

/// A device whose drop panics.
struct PanicsWhenDropped;

impl Drop for PanicsWhenDropped {
    fn drop(&mut self) {
        // Without the panic hook.
        std::panic::resume_unwind(Box::new("on purpose"));
    }
}

impl VirtioDevice for PanicsWhenDropped {
    fn profile(&self) -> Profile {
        Rng.profile()
    }

    fn start(&mut self, _: &mut DeviceIo, _: Option<&DeviceState>) -> std::io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, _: &mut DeviceIo, _: EventSource) {}

    fn stop(&mut self, _: &mut DeviceIo) -> DeviceState {
        DeviceState::Stateless
    }
}

#[test]
fn devices_come_and_go_on_a_loop_that_runs() {
    let mut rig = Fixture::new();
    rig.drive(1, 8);
    let remote = rig._devices.remote();
    let (reporter, _) = KeptEvents::reporter();
    let added = remote.with(move |slots| slots.add(Box::new(PanicsWhenDropped), reporter)).unwrap();
    assert_ne!(added, rig.slot);
    assert!(remote.with(move |slots| slots.remove(added).is_some()).unwrap(), "a panic there ends no loop");
    // One that runs is stopped, and its driver's registers lead nowhere.
    let (first, kick) = (rig.slot, rig.transport.kicks()[0].try_clone().unwrap());
    let device = crate::virtio::DeviceHandle::<Rng>::new(rig._devices.remote(), first);
    assert!(device.with(|_, io| io.is_some()).unwrap());
    let unfinished = remote.with(move |slots| slots.remove(first).map(|removed| removed.unfinished.is_some()));
    assert_eq!(unfinished.unwrap(), Some(false));
    kick.write(1).unwrap();
    let gone = device.with(|_, _| ()).unwrap_err();
    assert!(gone.kind() == ErrorKind::InvalidState && gone.to_string().contains("detached"), "{gone}");
    assert!(remote.with(move |slots| slots.remove(first).is_none()).unwrap());
    rig.set(0x70, 0);
    assert_eq!(rig.get(0x70), 0);
    // No number is given twice, so that what comes late for one device never reaches another.
    let (reporter, _) = KeptEvents::reporter();
    let next = remote.with(move |slots| slots.add(Box::new(Rng), reporter)).unwrap();
    assert!(next > added && next > first);
}
