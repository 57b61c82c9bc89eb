//! What a PC has beside processors, memory and virtio devices, at its ports.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::i8042::{I8042, KeyboardState};
use super::layout::{EVENT_IRQ, EVENT_PORT, EXIT_PORT, I8042_IRQ, I8042_PORT, PANIC_PORT, SERIAL_IRQ, SERIAL_PORT};
use super::ports::PlatformBus;
use crate::bus::{Attached, BusDevice};
use crate::error::Result;
use crate::kvm::Irqfd;
use crate::legacy::{EventDevice, EventSender, ExitPort, GuestEnd, Keys, PanicPort, SerialPort, SerialPortState};
use crate::version::{Version, Versioned};

/// A serial port, a keyboard controller, an event device, and the ports by which a guest ends or reports a panic.
pub(crate) struct Platform {
    /// What answers at ports.
    pub bus: PlatformBus,
    /// By which the guest can be asked to shut down.
    pub keyboard: Keyboard,
    /// By which kernels with ACPI learn what happens to the machine.
    pub events: EventSender,
    pub lines: Vec<Irqfd>,
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "no machine is saved yet"))]
    pub devices: PlatformDevices,
}

/// The devices that have a state. Clones are the same.
#[derive(Clone)]
pub(crate) struct PlatformDevices {
    serial: Arc<Mutex<dyn Serial>>,
    keyboard: Keyboard,
    events: EventSender,
}

/// A serial port, whatever it prints to.
trait Serial: Send {
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "no machine is saved yet"))]
    fn save(&self) -> SerialPortState;
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "no machine is saved yet"))]
    fn restore(&mut self, state: &SerialPortState) -> Result<()>;
}

impl<W: io::Write + Clone + Send> Serial for SerialPort<W> {
    fn save(&self) -> SerialPortState {
        self.save()
    }

    fn restore(&mut self, state: &SerialPortState) -> Result<()> {
        self.restore(state)
    }
}

/// Where the devices of a platform stand. Not trusted when it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct PlatformState {
    pub version: Version<Self>,
    pub serial: SerialPortState,
    pub keyboard: KeyboardState,
    /// Events that the guest has not read, as bits of the event device's register.
    pub events: u8,
}

impl Versioned for PlatformState {
    const NAME: &'static str = "the state of a platform";
    const VERSION: u32 = 1;
}

/// Devices that no guest has used.
impl Default for PlatformState {
    fn default() -> Self {
        Self {
            version: Version::OURS,
            serial: SerialPortState::default(),
            keyboard: KeyboardState::default(),
            events: 0,
        }
    }
}

#[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "no machine is saved yet"))]
impl PlatformDevices {
    /// Returns where they stand. No vCPU runs meanwhile.
    pub(crate) fn save(&self) -> PlatformState {
        PlatformState {
            version: Version::OURS,
            serial: self.serial.lock().unwrap_or_else(PoisonError::into_inner).save(),
            keyboard: self.keyboard.0.lock().unwrap_or_else(PoisonError::into_inner).save(),
            events: self.events.pending(),
        }
    }

    /// Has them go on from `state`, and raises the interrupts that are pending in it. No vCPU runs meanwhile.
    ///
    /// # Errors
    /// `Corrupt` for a state that cannot be.
    pub(crate) fn restore(&self, state: &PlatformState) -> Result<()> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).restore(&state.serial)?;
        self.keyboard.0.lock().unwrap_or_else(PoisonError::into_inner).restore(&state.keyboard)?;
        self.events.set_pending(state.events);
        Ok(())
    }
}

impl Platform {
    /// Makes the devices of one machine. `console` gets what the serial port prints; `on_end` gets how the guest ends,
    /// on the vCPU's thread.
    ///
    /// # Errors
    /// `ResourceExhausted` when the process has no descriptors left.
    pub(crate) fn new(
        console: impl io::Write + Clone + Send + 'static,
        on_end: impl Fn(GuestEnd) + Clone + Send + 'static,
    ) -> Result<Self> {
        let ports = PlatformBus::default();
        let (serial, fd) = SerialPort::new(console)?;
        let serial_line = Irqfd { fd, gsi: SERIAL_IRQ };
        let serial = Arc::new(Mutex::new(serial));
        ports.attach(SERIAL_PORT..SERIAL_PORT + SerialPort::<io::Sink>::LEN, serial.clone())?;

        let on_reset = on_end.clone();
        let (controller, fd) = I8042::new(Box::new(move || on_reset(GuestEnd::Reset)) as OnReset)?;
        let keyboard_line = Irqfd { fd, gsi: I8042_IRQ };
        let keyboard = Keyboard(Arc::new(Mutex::new(controller)));
        ports.attach(I8042_PORT..I8042_PORT + I8042::<OnReset>::LEN, keyboard.0.clone())?;

        let on_panic = on_end.clone();
        let panic = PanicPort::new(move || on_panic(GuestEnd::Panic));
        attach(&ports, PANIC_PORT, PanicPort::<fn()>::LEN, panic)?;
        attach(&ports, EXIT_PORT, ExitPort::<fn(GuestEnd)>::LEN, ExitPort::new(on_end))?;

        let (device, events, fd) = EventDevice::new()?;
        let event_line = Irqfd { fd, gsi: EVENT_IRQ };
        attach(&ports, EVENT_PORT, EventDevice::LEN, device)?;
        let lines = vec![serial_line, keyboard_line, event_line];
        let devices = PlatformDevices { serial, keyboard: keyboard.clone(), events: events.clone() };
        Ok(Self { bus: ports, keyboard, events, lines, devices })
    }
}

fn attach(ports: &PlatformBus, port: u64, len: u64, device: impl BusDevice + 'static) -> Result<()> {
    let device: Attached = Arc::new(Mutex::new(device));
    ports.attach(port..port + len, device)
}

type OnReset = Box<dyn FnMut() + Send>;

/// The keyboard of one machine. Clones are the same.
#[derive(Clone)]
pub(crate) struct Keyboard(Arc<Mutex<I8042<OnReset>>>);

impl Keyboard {
    /// Presses keys. False when the guest has no keyboard driver.
    pub(crate) fn press(&self, keys: Keys) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).press(keys)
    }
}

impl fmt::Debug for Keyboard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keyboard")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::legacy::MachineEvent;

    #[test]
    fn guest_end_arrives_by_port() {
        let ends = Arc::new(Mutex::new(Vec::new()));
        let seen = ends.clone();
        let platform = Platform::new(io::sink(), move |end| seen.lock().unwrap().push(end)).unwrap();
        assert_eq!(platform.lines.iter().map(|line| line.gsi).collect::<Vec<_>>(), [SERIAL_IRQ, I8042_IRQ, EVENT_IRQ]);
        let mut ports = platform.bus.ports();
        for (port, value) in [(PANIC_PORT, 1), (EXIT_PORT, 0x34), (I8042_PORT + 4, 0xfe)] {
            assert!(ports.write(port, &[value]), "{port:#x}");
        }
        assert_eq!(*ends.lock().unwrap(), [GuestEnd::Panic, GuestEnd::PowerOff, GuestEnd::Reset]);
        assert!(!platform.keyboard.press(Keys::Power), "no driver listens");
        platform.events.raise(MachineEvent::PowerButton);
        let mut pending = [0];
        assert!(ports.read(EVENT_PORT, &mut pending) && pending == [MachineEvent::PowerButton as u8]);
    }

    fn platform() -> (Platform, Vec<Arc<crate::sys::EventFd>>) {
        let platform = Platform::new(io::sink(), |_| ()).unwrap();
        let lines = platform.lines.iter().map(|line| line.fd.clone()).collect();
        (platform, lines)
    }

    /// A platform in the middle of everything: a divisor, a scratch byte, keys that were not read, half a command, an event.
    fn used() -> Platform {
        let (platform, _) = platform();
        let mut ports = platform.bus.ports();
        let writes = [(3, 0x80), (0, 0x0c), (1, 0x01), (3, 0x03), (7, 0x5a), (4, 0x0b), (1, 0x02)];
        writes.iter().for_each(|(at, value)| assert!(ports.write(SERIAL_PORT + at, &[*value])));
        for (port, value) in [(4, 0x60), (0, 0x01)] {
            assert!(ports.write(I8042_PORT + port, &[value]));
        }
        assert!(platform.keyboard.press(Keys::Power));
        assert!(ports.write(I8042_PORT + 4, &[0x60]));
        platform.events.raise(MachineEvent::NewGeneration);
        platform
    }

    #[test]
    fn a_platform_goes_on_from_its_state_elsewhere() {
        let first = used();
        let state = first.devices.save();
        let (second, lines) = platform();
        assert_ne!(second.devices.save(), state);
        second.devices.restore(&state).unwrap();
        assert_eq!(second.devices.save(), state);
        // What was pending is raised again: the transmitter's, the keyboard's and the event's.
        assert!(lines.iter().all(|line| line.read().unwrap() > 0));
        let mut ports = [first.bus.ports(), second.bus.ports()];
        let mut read = |port: u64| {
            ports.each_mut().map(|ports| {
                let mut byte = [0];
                assert!(ports.read(port, &mut byte));
                byte[0]
            })
        };
        let keys: Vec<_> = (0..4).map(|_| read(I8042_PORT)).collect();
        assert_eq!(keys, [[0xe0; 2], [0x5e; 2], [0xe0; 2], [0xde; 2]]);
        assert_eq!((read(SERIAL_PORT + 7), read(EVENT_PORT)), ([0x5a; 2], [1; 2]));
        // The argument of the command that was half done.
        for ports in &mut ports {
            assert!(ports.write(I8042_PORT, &[0x10]));
        }
        assert!(first.devices.save() == second.devices.save() && first.devices.save().keyboard.command_byte == 0x10);
    }

    #[test]
    fn default_state_is_that_of_a_new_platform() {
        let (new, lines) = platform();
        assert_eq!(new.devices.save(), PlatformState::default());
        used().devices.restore(&PlatformState::default()).unwrap();
        assert!(lines.iter().all(|line| line.read().is_err()), "nothing is pending");
    }

    #[test]
    fn platform_states_that_cannot_be_are_refused() {
        let state = used().devices.save();
        let wrong = |change: fn(&mut PlatformState)| {
            let mut wrong = state.clone();
            change(&mut wrong);
            platform().0.devices.restore(&wrong).unwrap_err().kind()
        };
        assert_eq!(wrong(|it| it.keyboard.output = vec![0; 33]), ErrorKind::Corrupt);
        assert_eq!(wrong(|it| it.serial.received = vec![0; 65]), ErrorKind::Corrupt);
        #[cfg(feature = "serde")]
        {
            let text = serde_json::to_string(&state).unwrap();
            crate::version::assert_versioned(&state);
            for (at, _) in text.match_indices('{') {
                let wrong = format!("{}\"unknown\":1,{}", &text[..=at], &text[at + 1..]);
                assert!(serde_json::from_str::<PlatformState>(&wrong).is_err(), "{wrong}");
            }
        }
    }
}
