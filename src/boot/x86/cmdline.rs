//! What the machine adds to a kernel's command line.

use crate::arch::FirmwareTables;
use crate::arch::layout::MmioSlot;
use crate::boot::{Cmdline, Kernel};
use crate::error::Result;

/// Finishes the command line of `kernel` for a machine with these devices, and says by which tables it learns of them.
///
/// # Errors
/// `InvalidConfig` when the line is too long.
pub(crate) fn finish_cmdline(
    mut cmdline: Cmdline,
    kernel: &Kernel,
    slots: &[MmioSlot],
) -> Result<(String, FirmwareTables)> {
    // A reset by the keyboard controller is something we see; so the guest's end is never silent.
    cmdline.default("reboot", "k");
    cmdline.default("panic", "-1");
    // Taking the lock prefixes out for one processor would touch, and so copy, most pages of the shared image.
    cmdline.default("noreplace-smp", "");
    // There is no auxiliary port, no multiplexer and nothing to wait for.
    for option in ["i8042.noaux", "i8042.nomux", "i8042.dumbkbd"] {
        cmdline.default(option, "1");
    }
    // There is no PCI bus, and looking for one takes time.
    cmdline.default("pci", "off");
    // A kernel must learn of its devices in one way only, or it would find each of them twice.
    let by_acpi = match cmdline.value_of("acpi") {
        Some(value) => value != "off",
        None => !kernel.takes_devices_from_cmdline(),
    };
    if !by_acpi {
        // Nothing else is in the tables, and looking for them takes time.
        cmdline.default("acpi", "off");
        for MmioSlot { addr, irq } in slots {
            cmdline.push("virtio_mmio.device", &format!("4K@{addr:#x}:{irq}"));
        }
    }
    Ok((cmdline.finish()?, if by_acpi { FirmwareTables::Acpi } else { FirmwareTables::MultiProcessor }))
}

#[cfg(test)]
mod tests {
    use super::super::tiny;
    use super::*;
    use crate::arch::layout;

    /// The command line, with one device, of a kernel with this configuration beside it.
    fn finished(test: &str, configuration: &str, text: &str) -> (String, FirmwareTables) {
        let directory = std::env::temp_dir().join(format!("cofferdam-config-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("bzImage"), tiny::vmlinuz(b"\xf4")).unwrap();
        std::fs::write(directory.join("config"), configuration).unwrap();
        let kernel = Kernel::open(directory.join("bzImage")).unwrap().cmdline(text);
        std::fs::remove_dir_all(directory).unwrap();
        let cmdline = Cmdline::new(kernel.text(), layout::CMDLINE_MAX).unwrap();
        finish_cmdline(cmdline, &kernel, &[MmioSlot { addr: 0xd000_0000, irq: 5 }]).unwrap()
    }

    const DEVICE: &str = "virtio_mmio.device=4K@0xd0000000:5";

    #[test]
    fn kernels_that_take_devices_from_the_command_line_get_them_there() {
        let ours = "CONFIG_X86_64=y\nCONFIG_ACPI=y\nCONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y\n";
        let (line, tables) = finished("ours", ours, "quiet");
        assert_eq!(tables, FirmwareTables::MultiProcessor);
        assert!(line.starts_with("quiet reboot=k panic=-1 ") && line.contains(" pci=off acpi=off "), "{line}");
        assert!(line.ends_with(DEVICE), "{line}");
        let (line, tables) = finished("forced", ours, "acpi=force");
        assert_eq!(tables, FirmwareTables::Acpi);
        assert!(!line.contains("virtio_mmio") && !line.contains("acpi=off"), "{line}");
    }

    #[test]
    fn other_kernels_get_devices_by_acpi_unless_off() {
        for (n, theirs) in ["CONFIG_X86_64=y\nCONFIG_VIRTIO_MMIO=m\n", ""].iter().enumerate() {
            let (line, tables) = finished(&format!("theirs-{n}"), theirs, "quiet");
            assert_eq!(tables, FirmwareTables::Acpi);
            assert!(line.starts_with("quiet reboot=k panic=-1 noreplace-smp i8042.noaux=1"), "{line}");
            assert!(!line.contains("virtio_mmio") && !line.contains("acpi=off"), "{line}");
            let (line, tables) = finished(&format!("off-{n}"), theirs, "acpi=off");
            assert_eq!(tables, FirmwareTables::MultiProcessor);
            assert!(line.ends_with(DEVICE) && line.contains("pci=off"), "{line}");
        }
    }
}
