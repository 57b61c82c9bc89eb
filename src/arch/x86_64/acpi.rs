//! ACPI tables, for kernels that learn of the machine from firmware.
//!
//! They describe processors, interrupt controllers and devices, for kernels as those of distributions.
//!
//! Such kernels leave the legacy timer and interrupt controller alone. They use the serial port's interrupt only when
//! they take that port from the tables too (Linux: `SERIAL_8250_PNP`).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

use super::layout::{self, MmioSlot};
use crate::error::{Error, Result};
use crate::legacy::MachineEvent;
use crate::memory::{GuestAddress, GuestMemory};

/// Who made the tables.
const OEM_ID: [u8; 6] = *b"COFFER";
const OEM_TABLE_ID: [u8; 8] = *b"COFFERDM";
const OEM_REVISION: u32 = 1;
/// Where tables begin; the root pointer must (ACPI 6.5, 5.2.5.1: on 16 bytes), the rest merely should.
const ALIGNMENT: u64 = 64;
/// The length of a table's header (ACPI 6.5, 5.2.6).
const HEADER: u32 = 36;
/// Table revisions (ACPI 6.5, 5.2.11.1 and 5.2.12); that of the DSDT makes integers 64 bits wide.
const DSDT_REVISION: u8 = 2;
const MADT_REVISION: u8 = 6;

/// IAPC_BOOT_ARCH (ACPI 6.5, 5.2.9.3): there are ports of old, among them a keyboard controller, but no VGA and no
/// real-time clock.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 5;
/// The keyboard controller's command that pulses the reset line (IBM PC/AT Technical Reference, "Keyboard Controller").
const RESET_COMMAND: u8 = 0xfe;
/// The type of the sleep state S5, in which the machine is off, as the exit port knows it (ACPI 6.5, 4.8.3.7).
const POWER_OFF: u8 = 5;
/// MADT flag PCAT_COMPAT (ACPI 6.5, 5.2.12): there is a pair of 8259 interrupt controllers.
const PCAT_COMPAT: u32 = 1;

/// Writes all tables, for `vcpus` processors and virtio-mmio `devices`: their windows' addresses and interrupt lines.
///
/// # Errors
/// `InvalidConfig` when the tables do not fit their area.
pub(super) fn write(memory: &GuestMemory, vcpus: u8, devices: &[MmioSlot]) -> Result<()> {
    let mut next = (layout::ACPI.0 + Rsdp::len() as u64).next_multiple_of(ALIGNMENT);
    let mut place = |table: &[u8]| -> Result<u64> {
        let (at, end) = (next, next + table.len() as u64);
        if end > layout::ACPI_END.0 {
            let devices = devices.len();
            return Err(Error::invalid("vcpus", format!("{vcpus} and {devices} devices do not fit the ACPI tables")));
        }
        memory.write(GuestAddress(at), table)?;
        next = end.next_multiple_of(ALIGNMENT);
        Ok(at)
    };
    let dsdt = place(dsdt(devices).as_slice())?;
    let fadt = place(&bytes(&fadt(dsdt)))?;
    let madt = place(madt(vcpus).as_slice())?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&bytes(&xsdt))?;
    Ok(memory.write(layout::ACPI, &bytes(&Rsdp::new(OEM_ID, xsdt)))?)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// A table of `fields` after the header.
fn table(signature: [u8; 4], revision: u8, fields: &[u8]) -> Sdt {
    let mut table = Sdt::new(signature, HEADER, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    // In one piece, as the checksum is made anew for each.
    table.append_slice(fields);
    table
}

/// How the machine is switched off and reset, and what it lacks (ACPI 6.5, 5.2.9).
fn fadt(dsdt: u64) -> FADT {
    let port = |at: u64| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, at);
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // No buttons and no real-time clock among the fixed features: the power button is a device, and there are no others.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc);
    // Not used on such a machine, but old kernels set up the line that is named: better one that no device has.
    fadt.sci_int = layout::ACPI_IRQ.into();
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(layout::I8042_PORT + 4);
    fadt.reset_value = RESET_COMMAND;
    fadt.sleep_control_reg = port(layout::EXIT_PORT);
    fadt.sleep_status_reg = port(layout::EXIT_PORT + 1);
    fadt.finalize()
}

/// Processors and interrupt controllers, the same as in the MultiProcessor table (ACPI 6.5, 5.2.12).
fn madt(vcpus: u8) -> Sdt {
    let mut fields = Vec::new();
    fields.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    fields.extend_from_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..vcpus {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut fields);
    }
    let io_apic_id = vcpus;
    IoApic::new(io_apic_id, layout::IO_APIC, 0).to_aml_bytes(&mut fields);
    fields.extend_from_slice(&timer_override());
    fields.extend_from_slice(&nmi());
    table(*b"APIC", MADT_REVISION, &fields)
}

/// The timer's line 0 of the ISA bus arrives at input 2, with that bus's trigger and polarity (ACPI 6.5, 5.2.12.5).
fn timer_override() -> [u8; 10] {
    const ISA: u8 = 0;
    const LINE: u8 = 0;
    let [a, b, c, d] = 2u32.to_le_bytes();
    [2, 10, ISA, LINE, a, b, c, d, 0, 0]
}

/// Non-maskable interrupts arrive at LINT1 of all processors (ACPI 6.5, 5.2.12.7).
fn nmi() -> [u8; 6] {
    const ALL: u8 = 0xff;
    [4, 6, ALL, 0, 0, 1]
}

/// The devices, and the one state of sleep that there is (ACPI 6.5, 5.2.11.1 and 7.4.2).
fn dsdt(devices: &[MmioSlot]) -> Sdt {
    let mut all = Vec::new();
    for (n, slot) in devices.iter().enumerate() {
        virtio(n, *slot, &mut all);
    }
    serial(&mut all);
    keyboard(&mut all);
    panic_port(&mut all);
    generation(&mut all);
    power_button(&mut all);
    events(&mut all);
    let mut definitions = aml::Scope::raw("_SB_".into(), all);
    let off = aml::Package::new(vec![&POWER_OFF, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    aml::Name::new("_S5_".into(), &off).to_aml_bytes(&mut definitions);
    table(*b"DSDT", DSDT_REVISION, &definitions)
}

/// Returns an interrupt line as the hypervisor pulls it: an unshared pulse, thus an edge.
fn line(irq: u32) -> aml::Interrupt {
    let (consumer, edge_triggered, active_low, shared) = (true, true, false, false);
    aml::Interrupt::new(consumer, edge_triggered, active_low, shared, irq)
}

/// `len` ports from `at` on.
fn ports(at: u64, len: u8) -> aml::IO {
    aml::IO::new(at as u16, at as u16, 1, len)
}

/// The `n`th virtio-mmio window. By this name, which QEMU gave such devices, drivers know them.
fn virtio(n: usize, slot: MmioSlot, to: &mut Vec<u8>) {
    let window = aml::Memory32Fixed::new(true, slot.addr as u32, layout::MMIO_WINDOW as u32);
    device(&format!("V{n:03X}"), &"LNRO0005", n, vec![&window, &line(slot.irq)], to);
}

/// A 16550A serial port.
fn serial(to: &mut Vec<u8>) {
    let ports = ports(layout::SERIAL_PORT, 8);
    device("COM1", &aml::EISAName::new("PNP0501"), 0, vec![&ports, &line(layout::SERIAL_IRQ)], to);
}

/// A keyboard behind its controller.
fn keyboard(to: &mut Vec<u8>) {
    let (data, command) = (ports(layout::I8042_PORT, 1), ports(layout::I8042_PORT + 4, 1));
    device("KBD_", &aml::EISAName::new("PNP0303"), 0, vec![&data, &command, &line(layout::I8042_IRQ)], to);
}

/// The port that reports panics. Drivers know it by this name, which QEMU gave it.
fn panic_port(to: &mut Vec<u8>) {
    device("PEVT", &"QEMU0001", 0, vec![&ports(layout::PANIC_PORT, 1)], to);
}

/// Where the machine's generation is, by which a guest knows that it is a copy of itself (Microsoft, "Virtual Machine
/// Generation ID"). The first of the two names is the specification's, the second one that ACPI allows.
fn generation(to: &mut Vec<u8>) {
    let kind = aml::Name::new("_HID".into(), &"COFD0001");
    let names = aml::Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"]);
    let compatible = aml::Name::new("_CID".into(), &names);
    let description = aml::Name::new("_DDN".into(), &"VM_Gen_Counter");
    let (low, high) = (layout::VM_GENERATION.0 as u32, (layout::VM_GENERATION.0 >> 32) as u32);
    let at = aml::Package::new(vec![&low, &high]);
    let address = aml::Name::new("ADDR".into(), &at);
    aml::Device::new("VGEN".into(), vec![&kind, &compatible, &description, &address]).to_aml_bytes(to);
}

/// A power button, which is pressed by the event device (ACPI 6.5, 4.8.2.2.1.2).
fn power_button(to: &mut Vec<u8>) {
    device("PWRB", &aml::EISAName::new("PNP0C0C"), 0, vec![], to);
}

/// The Generic Event Device (ACPI 6.5, 5.6.9). At each interrupt, it reads which events there are, and notifies their devices.
fn events(to: &mut Vec<u8>) {
    let kind = aml::Name::new("_HID".into(), &"ACPI0013");
    let number = aml::Name::new("_UID".into(), &aml::ZERO);
    let line = line(layout::EVENT_IRQ);
    let resources = aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&line]));
    let (port, len) = (layout::EVENT_PORT as u16, aml::ONE);
    let region = aml::OpRegion::new("EREG".into(), aml::OpRegionSpace::SystemIO, &port, &len);
    let (access, lock, update) =
        (aml::FieldAccessType::Byte, aml::FieldLockRule::NoLock, aml::FieldUpdateRule::WriteAsZeroes);
    let field = aml::Field::new("EREG".into(), access, lock, update, vec![aml::FieldEntry::Named(*b"EVNT", 8)]);
    let pending = aml::Path::new("EVNT");
    let take = aml::Store::new(&aml::Local(0), &pending);
    let (generation, button) = (aml::Path::new("VGEN"), aml::Path::new("PWRB"));
    // Notification 0x80 is "status changed" to both (ACPI 6.5, 5.6.6).
    let changed = 0x80u8;
    let (to_generation, to_button) = (aml::Notify::new(&generation, &changed), aml::Notify::new(&button, &changed));
    let (new_generation, pressed) = (MachineEvent::NewGeneration as u8, MachineEvent::PowerButton as u8);
    let is_new = aml::And::new(&aml::ZERO, &aml::Local(0), &new_generation);
    let is_pressed = aml::And::new(&aml::ZERO, &aml::Local(0), &pressed);
    let renew = aml::If::new(&is_new, vec![&to_generation]);
    let press = aml::If::new(&is_pressed, vec![&to_button]);
    // Its argument is the interrupt, of which there is one.
    let handler = aml::Method::new("_EVT".into(), 1, true, vec![&take, &renew, &press]);
    let parts: Vec<&dyn Aml> = vec![&kind, &number, &resources, &region, &field, &handler];
    aml::Device::new("GED_".into(), parts).to_aml_bytes(to);
}

/// A device: its kind, which of that kind it is, and what it takes (ACPI 6.5, 6.1.5, 6.1.12 and 6.2.2).
fn device(name: &str, kind: &dyn Aml, n: usize, resources: Vec<&dyn Aml>, to: &mut Vec<u8>) {
    let kind = aml::Name::new("_HID".into(), kind);
    let n = aml::Name::new("_UID".into(), &n);
    let resources = aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(resources));
    aml::Device::new(name.into(), vec![&kind, &n, &resources]).to_aml_bytes(to);
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICES: [MmioSlot; 3] = [
        MmioSlot { addr: 0xd000_0000, irq: 5 },
        MmioSlot { addr: 0xd000_1000, irq: 6 },
        MmioSlot { addr: 0xd000_2000, irq: 7 },
    ];

    fn machine(vcpus: u8, devices: &[MmioSlot]) -> GuestMemory {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 2 << 20)]).unwrap();
        write(&memory, vcpus, devices).unwrap();
        memory
    }

    fn read(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read(GuestAddress(at), &mut bytes).unwrap();
        bytes
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at `at`, in its whole length, which adds up to zero.
    fn table_at(memory: &GuestMemory, at: u64, signature: &[u8; 4]) -> Vec<u8> {
        assert!(at.is_multiple_of(16) && at > layout::ACPI.0, "{at:#x}");
        let len = u32_at(&read(memory, at, 8), 4) as usize;
        assert!(at + len as u64 <= layout::ACPI_END.0, "{at:#x}+{len:#x}");
        let table = read(memory, at, len);
        assert_eq!((&table[..4], sum(&table)), (&signature[..], 0));
        table
    }

    /// From the root pointer: FADT, MADT and DSDT.
    fn tables(memory: &GuestMemory) -> [Vec<u8>; 3] {
        let root = read(memory, layout::ACPI.0, 36);
        assert_eq!((&root[..8], sum(&root[..20]), sum(&root), root[15]), (&b"RSD PTR "[..], 0, 0, 2));
        let xsdt = table_at(memory, u64_at(&root, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = table_at(memory, u64_at(&xsdt, 36), b"FACP");
        let madt = table_at(memory, u64_at(&xsdt, 44), b"APIC");
        let dsdt = table_at(memory, u64_at(&fadt, 140), b"DSDT");
        [fadt, madt, dsdt]
    }

    fn count(bytes: &[u8], word: &[u8]) -> usize {
        bytes.windows(word.len()).filter(|w| *w == word).count()
    }

    #[test]
    fn a_kernel_finds_every_table_from_the_root_pointer() {
        let [fadt, madt, dsdt] = tables(&machine(2, &DEVICES));
        assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 5), "revision 6.5");
        assert_eq!(madt.len(), 44 + 2 * 8 + 12 + 10 + 6);
        assert_eq!(count(&dsdt, b"LNRO0005\0"), 3);
    }

    #[test]
    fn fadt_names_reset_and_power_off_ports() {
        let [fadt, ..] = tables(&machine(1, &[]));
        assert_eq!(u32_at(&fadt, 112) & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10, "hardware-reduced, with a reset");
        // Port I/O, 8 bits, byte access.
        let port = |at: usize| (fadt[at..at + 4] == [1, 8, 0, 1]).then(|| u64_at(&fadt, at + 4));
        assert_eq!((port(116), fadt[128]), (Some(0x64), 0xfe));
        assert_eq!((port(244), port(256)), (Some(0x600), Some(0x601)));
    }

    #[test]
    fn madt_lists_the_same_processors_as_the_mp_table() {
        let [_, madt, _] = tables(&machine(3, &[]));
        assert_eq!(u32_at(&madt, 36), layout::LOCAL_APIC);
        let processors: Vec<_> = madt[44..68].chunks(8).map(|p| (p[0], p[1], p[2], p[3], p[4])).collect();
        assert_eq!(processors, [(0, 8, 0, 0, 1), (0, 8, 1, 1, 1), (0, 8, 2, 2, 1)]);
        assert_eq!((&madt[68..71], u32_at(&madt, 72)), (&[1, 12, 3][..], layout::IO_APIC));
        assert_eq!(madt[80..], [2, 10, 0, 0, 2, 0, 0, 0, 0, 0, 4, 6, 0xff, 0, 0, 1]);
    }

    #[test]
    fn dsdt_has_mmio_windows_and_interrupts_in_device_order() {
        let [.., dsdt] = tables(&machine(1, &DEVICES));
        for (n, MmioSlot { addr, irq }) in DEVICES.iter().enumerate() {
            let (name, mut resources) = (format!("V{n:03X}"), vec![0x86, 9, 0, 1]);
            resources.extend_from_slice(&(*addr as u32).to_le_bytes());
            resources.extend_from_slice(&[0, 0x10, 0, 0, 0x89, 6, 0, 0b0011, 1]);
            resources.extend_from_slice(&irq.to_le_bytes());
            let device = dsdt.windows(4).position(|w| w == name.as_bytes()).unwrap();
            let body = &dsdt[device..device + 80];
            assert_eq!(count(body, &resources), 1, "{name}: {body:x?}");
        }
        assert_eq!(count(&dsdt, b"_S5_\x12"), 1);
    }

    #[test]
    fn vm_generation_id_has_a_page_of_its_own() {
        let [.., dsdt] = tables(&machine(1, &[]));
        assert_eq!((count(&dsdt, b"VM_Gen_Counter\0"), count(&dsdt, b"VMGENCTR\0")), (2, 1));
        // A package of two: the address in 32 bits, and zero.
        let at = [&b"ADDR\x12\x08\x02\x0c"[..], &(layout::VM_GENERATION.0 as u32).to_le_bytes(), &[0]].concat();
        assert_eq!(count(&dsdt, &at), 1, "{dsdt:x?}");
        assert_eq!((layout::VM_GENERATION.0 % 4096, layout::MP_TABLE.0 - layout::VM_GENERATION.0), (0, 4096));
    }

    #[test]
    fn event_device_notifies_by_bits_of_its_register() {
        let [.., dsdt] = tables(&machine(1, &[]));
        // OperationRegion(EREG, SystemIO, 0x610, 1), and a field of a byte.
        assert_eq!(count(&dsdt, b"\x5b\x80EREG\x01\x0b\x10\x06\x01"), 1, "{dsdt:x?}");
        assert_eq!((count(&dsdt, b"ACPI0013\0"), count(&dsdt, b"PWRB\x08_HID\x0c\x41\xd0\x0c\x0c")), (1, 1));
        // Local0 = EVNT; If (Local0 & 1) { Notify (VGEN, 0x80) } If (Local0 & 2) { Notify (PWRB, 0x80) }
        let method =
            b"_EVT\x09\x70EVNT\x60\xa0\x0c\x7b\x60\x01\x00\x86VGEN\x0a\x80\xa0\x0d\x7b\x60\x0a\x02\x00\x86PWRB\x0a\x80";
        assert_eq!(count(&dsdt, method), 1, "{dsdt:x?}");
        let line = [&[0x89, 6, 0, 0b0011, 1][..], &layout::EVENT_IRQ.to_le_bytes()].concat();
        assert_eq!(count(&dsdt, &line), 1);
        assert!(!layout::DEVICE_IRQS.contains(&layout::EVENT_IRQ));
    }

    #[test]
    fn tables_of_the_largest_machine_fit() {
        let devices: Vec<_> =
            (0..24).map(|n| MmioSlot { addr: layout::MMIO.0 + n * layout::MMIO_WINDOW, irq: 23 }).collect();
        tables(&machine(super::super::MAX_VCPUS, &devices));
    }
}
