//! What a PC has beside processors, memory and virtio devices, at its ports.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::i8042::I8042;
use super::layout::{EVENT_IRQ, EVENT_PORT, EXIT_PORT, I8042_IRQ, I8042_PORT, PANIC_PORT, SERIAL_IRQ, SERIAL_PORT};
use crate::bus::{Attached, Bus, BusDevice};
use crate::error::Result;
use crate::kvm::Irqfd;
use crate::legacy::{EventDevice, EventSender, ExitPort, GuestEnd, Keys, PanicPort, SerialPort};

/// A serial port, a keyboard controller, an event device, and the ports by which a guest ends or reports a panic.
pub(crate) struct Platform {
    /// What answers at ports.
    pub ports: Bus,
    /// By which the guest can be asked to shut down.
    pub keyboard: Keyboard,
    /// By which kernels with ACPI learn what happens to the machine.
    pub events: EventSender,
    pub lines: Vec<Irqfd>,
}

impl Platform {
    /// Makes the devices of one machine. `console` gets what the serial port prints; `on_end` gets how the guest ends,
    /// on the vCPU's thread.
    ///
    /// # Errors
    /// `ResourceExhausted` when the process has no descriptors left.
    pub(crate) fn new(
        console: impl io::Write + Send + 'static,
        on_end: impl Fn(GuestEnd) + Clone + Send + 'static,
    ) -> Result<Self> {
        let ports = Bus::default();
        let (serial, fd) = SerialPort::new(console)?;
        let serial_line = Irqfd { fd, gsi: SERIAL_IRQ };
        attach(&ports, SERIAL_PORT, SerialPort::<io::Sink>::LEN, serial)?;

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
        Ok(Self { ports, keyboard, events, lines: vec![serial_line, keyboard_line, event_line] })
    }
}

fn attach(ports: &Bus, port: u64, len: u64, device: impl BusDevice + 'static) -> Result<()> {
    let device: Attached = Arc::new(Mutex::new(device));
    ports.attach(port..port + len, device)
}

type OnReset = Box<dyn FnMut() + Send>;

/// The keyboard of one machine. Clones are the same.
#[derive(Clone)]
pub(crate) struct Keyboard(Arc<Mutex<I8042<OnReset>>>);

impl Keyboard {
    /// Presses keys. False when the guest has no keyboard driver to hear it.
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
    use crate::legacy::MachineEvent;

    #[test]
    fn guest_end_arrives_by_port() {
        let ends = Arc::new(Mutex::new(Vec::new()));
        let seen = ends.clone();
        let platform = Platform::new(io::sink(), move |end| seen.lock().unwrap().push(end)).unwrap();
        assert_eq!(platform.lines.iter().map(|line| line.gsi).collect::<Vec<_>>(), [SERIAL_IRQ, I8042_IRQ, EVENT_IRQ]);
        let mut ports = platform.ports.view();
        for (port, value) in [(PANIC_PORT, 1), (EXIT_PORT, 0x34), (I8042_PORT + 4, 0xfe)] {
            assert!(ports.write(port, &[value]), "{port:#x}");
        }
        assert_eq!(*ends.lock().unwrap(), [GuestEnd::Panic, GuestEnd::PowerOff, GuestEnd::Reset]);
        assert!(!platform.keyboard.press(Keys::Power), "no driver listens");
        platform.events.raise(MachineEvent::PowerButton);
        let mut pending = [0];
        assert!(ports.read(EVENT_PORT, &mut pending) && pending == [MachineEvent::PowerButton as u8]);
    }
}
