//! States of a device, taken and given.

use super::*;

/// The state of a device that runs, with one buffer in its queue.
pub(super) fn saved() -> (Fixture, TransportState) {
    let mut rig = Fixture::new();
    let descriptor = [0x5000u64.to_le_bytes().as_slice(), &16u32.to_le_bytes(), &[2, 0, 0, 0]].concat();
    rig.memory.write(GuestAddress(0x1000), &descriptor).unwrap();
    rig.memory.write(GuestAddress(0x2002), &[1, 0, 0, 0]).unwrap();
    rig.drive(1, 8);
    assert_eq!(rig.transport.save().unwrap_err().kind(), crate::ErrorKind::InvalidState, "the device runs");
    assert!(rig._devices.remote().with(|slots| slots.pause(Duration::from_secs(10))).unwrap());
    let state = rig.transport.save().unwrap();
    (rig, state)
}

#[test]
fn a_paused_device_goes_on_here_and_from_its_state_elsewhere() {
    let (mut rig, state) = saved();
    let used = |memory: &GuestMemory| {
        let mut used = [0; 2];
        memory.read(GuestAddress(0x3002), &mut used).unwrap();
        u16::from_le_bytes(used)
    };
    assert_eq!((state.status, state.pending_interrupts, state.queues[0].size), (15, 1, 8));
    let device = state.device.as_ref().unwrap();
    assert_eq!((device.positions[0].next_available, device.positions[0].next_used), (1, 1));
    // A second buffer, for a kick that comes while it is paused.
    rig.memory.write(GuestAddress(0x2002), &[2, 0, 0, 0]).unwrap();
    rig.set(0x50, 0);
    rig._devices.remote().with(|_| ()).unwrap();
    assert_eq!(used(&rig.memory), 1, "guest memory stands still");
    let mut other = Fixture::of(Box::new(Rng), rig.memory.clone());
    other.transport.restore(&state).unwrap();
    assert_eq!((used(&rig.memory), other.get(0x70), other.get(0x60)), (2, 15, 1));
    other.set(0x70, 0);
    assert_eq!(other.get(0x70), 0);
    // The first has its own positions, and meets the same buffer.
    rig.memory.write(GuestAddress(0x3002), &[1, 0]).unwrap();
    rig._devices.remote().with(Slots::resume).unwrap();
    assert_eq!((used(&rig.memory), rig.get(0x70)), (2, 15));
}

#[test]
fn states_that_make_no_sense_are_refused() {
    let (rig, good) = saved();
    let broken: [fn(&mut TransportState); 12] = [
        |it| it.queues.clear(),
        |it| it.queues.push(QueueConfig::default()),
        |it| it.queues[0].size = 3,
        |it| it.queues[0].used = u64::MAX - 3,
        |it| it.driver_features = u64::MAX,
        |it| it.device = None,
        |it| it.status = 11,
        |it| it.status = 7,
        |it| it.device.as_mut().unwrap().positions.clear(),
        |it| it.device.as_mut().unwrap().positions[0].next_available = 9,
        |it| it.device.as_mut().unwrap().positions[0].in_flight = vec![0],
        |it| {
            let positions = &mut it.device.as_mut().unwrap().positions[0];
            (positions.next_available, positions.in_flight) = (2, vec![8]);
        },
    ];
    for (n, break_it) in broken.into_iter().enumerate() {
        let mut state = good.clone();
        break_it(&mut state);
        let mut other = Fixture::of(Box::new(Rng), rig.memory.clone());
        assert_eq!(other.transport.restore(&state).unwrap_err().kind(), crate::ErrorKind::Corrupt, "{n}");
        other.set(0x70, 0);
        assert_eq!(other.get(0x70), 0, "{n}: a reset makes it a device like any other");
    }
}

#[cfg(feature = "serde")]
#[test]
fn states_of_another_version_or_with_unknown_fields_are_refused() {
    let (_rig, good) = saved();
    crate::version::assert_versioned(&good);
    let text = serde_json::to_string(&good).unwrap();
    // In each of its structs.
    let places: Vec<_> = text.match_indices('{').map(|(at, _)| at).collect();
    assert!(places.len() >= 4, "{text}");
    for at in places {
        let wrong = format!("{}\"unknown\":1,{}", &text[..=at], &text[at + 1..]);
        assert!(serde_json::from_str::<TransportState>(&wrong).is_err(), "{wrong}");
    }
}
