//! The MultiProcessor table: which processors, interrupt controllers and lines there are.
//!
//! MultiProcessor Specification 1.4, chapter 4. Kernels that find ACPI tables use those instead.

use super::layout::{self, IO_APIC, LOCAL_APIC};
use crate::error::{Error, Result};
use crate::memory::{GuestAddress, GuestMemory};

/// The in-kernel I/O APIC has 24 inputs.
const LINES: u8 = 24;
const APIC_VERSION: u8 = 0x14;

/// Writes what a kernel reads about the machine's `vcpus` processors.
///
/// # Errors
/// `InvalidConfig` when the tables do not fit their area.
pub(super) fn write(memory: &GuestMemory, vcpus: u8) -> Result<()> {
    let table = configuration(vcpus);
    let at = GuestAddress(layout::MP_TABLE.0 + 16);
    if at.0 + table.len() as u64 > layout::MP_TABLE_END.0 {
        return Err(Error::invalid("vcpus", format!("{vcpus} do not fit the MultiProcessor table")));
    }
    memory.write(layout::MP_TABLE, &floating_pointer(at))?;
    Ok(memory.write(at, &table)?)
}

/// Makes all bytes add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// MP 1.4, 4.1.
fn floating_pointer(table: GuestAddress) -> [u8; 16] {
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(table.0 as u32).to_le_bytes());
    (pointer[8], pointer[9]) = (1, 4);
    pointer[10] = checksum(&pointer);
    pointer
}

/// MP 1.4, 4.2 and 4.3.
fn configuration(vcpus: u8) -> Vec<u8> {
    let (mut entries, mut count) = (Vec::new(), 0u16);
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        // Enabled; the first is the boot processor. Signature and features are CPUID's business.
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[0, id, APIC_VERSION, if id == 0 { 3 } else { 1 }]);
        add(&processor);
    }
    add(b"\x01\x00ISA   ");
    let io_apic = IO_APIC.to_le_bytes();
    let io_apic_id = vcpus;
    add(&[2, io_apic_id, APIC_VERSION, 1, io_apic[0], io_apic[1], io_apic[2], io_apic[3]]);
    for line in 0..LINES {
        // The timer's line 0 arrives at input 2, as on every PC; line 2 is the cascade and arrives nowhere.
        let input = match line {
            0 => 2,
            2 => continue,
            line => line,
        };
        add(&[3, 0, 0, 0, 0, line, io_apic_id, input]);
    }
    // Local interrupts: the legacy controller at LINT0 of the boot processor, NMI at LINT1 of all.
    add(&[4, 3, 0, 0, 0, 0, 0, 0]);
    add(&[4, 1, 0, 0, 0, 0, 0xff, 1]);

    let mut table = vec![0; 44];
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&((44 + entries.len()) as u16).to_le_bytes());
    table[6] = 4;
    table[8..16].copy_from_slice(b"COFFERDM");
    table[16..28].copy_from_slice(b"MICROVM     ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mp_table_checksums_are_zero() {
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |a, b| a.wrapping_add(*b));
        assert_eq!(sum(&floating_pointer(GuestAddress(0xf0010))), 0);
        for vcpus in [1, 2, 254] {
            let table = configuration(vcpus);
            assert_eq!(sum(&table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let entries = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(entries, u16::from(vcpus) + 1 + 1 + 23 + 2);
        }
    }

    #[test]
    fn tables_of_the_largest_machine_fit() {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 2 << 20)]).unwrap();
        write(&memory, super::super::MAX_VCPUS).unwrap();
    }
}
