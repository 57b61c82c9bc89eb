//! Registers with which a vCPU enters the kernel.
//!
//! By the 64-bit entry point: 64-bit mode, flat segments, identity-mapped memory (Linux x86 boot protocol, 1.15,
//! "64-bit Boot Protocol"). By the PVH entry point: 32-bit mode without paging (Xen, docs/misc/pvh, "x86/HVM direct
//! boot ABI").

use std::fmt;

use kvm_bindings::{kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};

use super::layout;
use crate::error::Result;
use crate::kvm::VcpuFd;
use crate::memory::{GuestAddress, GuestMemory};

/// Where and how a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryPoint {
    /// In 64-bit mode, with Linux's boot parameters.
    Linux64(GuestAddress),
    /// In 32-bit mode, with a start info.
    Pvh(GuestAddress),
}

/// Flags of segments: code of 64 bits, code of 32 bits, data, task state (Intel SDM vol. 3A, 3.4.5 and 3.5).
const CODE_64: u16 = 0xa09b;
const CODE_32: u16 = 0xc09b;
const DATA: u16 = 0xc093;
const TASK: u16 = 0x808b;
/// A task state of no more than its size, as the direct boot ABI wants it: flags, and the size less one.
const SMALL_TASK: (u16, u32) = (0x008b, 0x67);

/// Null, unused, code at 0x10, data at 0x18, task state at 0x20: as both protocols want or allow.
const fn gdt(code: u16, task: (u16, u32)) -> [u64; 5] {
    [0, 0, descriptor(code, 0, 0xf_ffff), descriptor(DATA, 0, 0xf_ffff), descriptor(task.0, 0, task.1)]
}

/// A segment descriptor (Intel SDM vol. 3A, 3.4.5) from its flags, base and limit.
const fn descriptor(flags: u16, base: u64, limit: u32) -> u64 {
    let (flags, limit) = (flags as u64, limit as u64);
    (base & 0xff00_0000) << 32
        | (base & 0x00ff_ffff) << 16
        | limit & 0xffff
        | (limit & 0xf_0000) << 32
        | (flags & 0xf0ff) << 40
}

fn segment(selector: u16, flags: u16) -> kvm_segment {
    let bit = |n: u16| (flags >> n & 1) as u8;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: (flags & 0xf) as u8,
        s: bit(4),
        dpl: (flags >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        ..Default::default()
    }
}

/// Protection enable, extension type, paging (Intel SDM vol. 3A, 2.5).
const CR0: u64 = 1 | 1 << 4 | 1 << 31;
/// The same without paging.
const CR0_PROTECTED: u64 = 1 | 1 << 4;
/// Physical address extension.
const CR4: u64 = 1 << 5;
/// Long mode enabled and active (Intel SDM vol. 3A, 2.2.1).
const EFER: u64 = 1 << 8 | 1 << 10;

/// Writes the descriptor tables and page tables that [`boot_vcpu`] points at: the first GiB, mapped onto itself.
pub(crate) fn write_boot_tables(memory: &GuestMemory, entry: EntryPoint) -> Result<()> {
    let gdt = match entry {
        EntryPoint::Linux64(_) => gdt(CODE_64, (TASK, 0xf_ffff)),
        EntryPoint::Pvh(_) => gdt(CODE_32, SMALL_TASK),
    };
    for (n, entry) in (0..).zip(gdt) {
        memory.write(GuestAddress(layout::GDT.0 + 8 * n), &entry.to_le_bytes())?;
    }
    memory.write(layout::IDT, &[0; 8])?;
    let (level4, level3, level2) =
        (layout::PAGE_TABLES.0, layout::PAGE_TABLES.0 + 0x1000, layout::PAGE_TABLES.0 + 0x2000);
    // Present and writable; the lowest level maps large pages of 2 MiB (Intel SDM vol. 3A, 4.5).
    memory.write(GuestAddress(level4), &(level3 | 3).to_le_bytes())?;
    memory.write(GuestAddress(level3), &(level2 | 3).to_le_bytes())?;
    let large: Vec<u8> = (0..512u64).flat_map(|n| (n << 21 | 0x83).to_le_bytes()).collect();
    Ok(memory.write(GuestAddress(level2), &large)?)
}

/// Makes the next instruction of `vcpu` the kernel's `entry`. Only for the first vCPU: the others wait for it.
pub(crate) fn boot_vcpu(vcpu: &VcpuFd, entry: EntryPoint) -> Result<()> {
    let mut sregs: kvm_sregs = vcpu.sregs()?;
    let data = segment(0x18, DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (layout::GDT.0, size_of_val(&gdt(0, (0, 0))) as u16 - 1);
    (sregs.idt.base, sregs.idt.limit) = (layout::IDT.0, 7);
    // Reserved bit 1 set, interrupts off; the stack grows down below the zero page's neighbours.
    let stack = layout::PAGE_TABLES.0 - 16;
    let mut regs = kvm_regs { rsp: stack, rbp: stack, rflags: 2, ..Default::default() };
    match entry {
        EntryPoint::Linux64(at) => {
            (sregs.cs, sregs.tr) = (segment(0x10, CODE_64), segment(0x20, TASK));
            (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, layout::PAGE_TABLES.0, CR4, EFER);
            (regs.rip, regs.rsi) = (at.0, layout::ZERO_PAGE.0);
        }
        EntryPoint::Pvh(at) => {
            (sregs.cs, sregs.tr) = (segment(0x10, CODE_32), segment(0x20, SMALL_TASK.0));
            sregs.tr.limit = SMALL_TASK.1;
            (sregs.cr0, sregs.cr4, sregs.efer) = (CR0_PROTECTED, 0, 0);
            (regs.rip, regs.rbx) = (at.0, layout::PVH_START_INFO.0);
        }
    }
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&regs)?;
    let mut lapic = vcpu.lapic()?;
    route_legacy_interrupts(&mut lapic);
    vcpu.set_lapic(&lapic)
}

/// As firmware leaves it: LINT0 takes the legacy controller's interrupts, LINT1 non-maskable ones
/// (Intel SDM vol. 3A, 11.5.1).
fn route_legacy_interrupts(lapic: &mut kvm_lapic_state) {
    const DELIVERY_EXTINT: u8 = 7;
    const DELIVERY_NMI: u8 = 4;
    for (register, mode) in [(0x350, DELIVERY_EXTINT), (0x360, DELIVERY_NMI)] {
        // Bits 8 to 10 of the register: the low three of its second byte.
        if let Some(byte) = lapic.regs.get_mut(register + 1) {
            *byte = (*byte as u8 & !7 | mode) as _;
        }
    }
}

/// A vCPU's registers, to find out why a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Registers {
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Flags.
    pub rflags: u64,
    /// RAX, RBX, RCX, RDX, RSI, RDI, RBP, R8 to R15.
    pub general: [u64; 15],
    /// Control register 0: protection, paging.
    pub cr0: u64,
    /// The address of the last page fault.
    pub cr2: u64,
    /// The root of the page tables.
    pub cr3: u64,
    /// Control register 4: extensions.
    pub cr4: u64,
    /// The extended feature register.
    pub efer: u64,
}

impl Registers {
    pub(crate) fn of(vcpu: &VcpuFd) -> Result<Self> {
        let (r, s) = (vcpu.regs()?, vcpu.sregs()?);
        Ok(Self {
            rip: r.rip,
            rsp: r.rsp,
            rflags: r.rflags,
            general: [
                r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15,
            ],
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            efer: s.efer,
        })
    }
}

impl Registers {
    /// Whether they are those of a reset processor. KVM on AMD resets a vCPU at a triple fault, so nothing of the fault is
    /// left to tell.
    pub(crate) fn are_reset(&self) -> bool {
        self.rip == RESET_VECTOR
    }
}

/// Where a reset processor begins (Intel SDM vol. 3A, 10.1.4).
const RESET_VECTOR: u64 = 0xfff0;

impl fmt::Display for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rip={:#x} rsp={:#x} rflags={:#x}", self.rip, self.rsp, self.rflags)?;
        let names =
            ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
        for (name, value) in names.iter().zip(self.general) {
            write!(f, " {name}={value:#x}")?;
        }
        write!(
            f,
            " cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x}",
            self.cr0, self.cr2, self.cr3, self.cr4, self.efer
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_match_the_boot_protocol() {
        let gdt = gdt(CODE_64, (TASK, 0xf_ffff));
        assert_eq!(gdt[2], 0x00af_9b00_0000_ffff);
        assert_eq!(gdt[3], 0x00cf_9300_0000_ffff);
        let code = segment(0x10, CODE_64);
        assert_eq!((code.type_, code.s, code.present, code.l, code.db, code.g), (0xb, 1, 1, 1, 0, 1));
    }

    #[test]
    fn pvh_entry_has_a_32_bit_code_segment() {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_boot_tables(&memory, EntryPoint::Pvh(GuestAddress(0x10_0000))).unwrap();
        let mut gdt = [0; 40];
        memory.read(layout::GDT, &mut gdt).unwrap();
        assert_eq!(gdt[16..24], 0x00cf_9b00_0000_ffff_u64.to_le_bytes());
        assert_eq!(gdt[32..], 0x0000_8b00_0000_0067_u64.to_le_bytes()[..]);
        let code = segment(0x10, CODE_32);
        assert_eq!((code.type_, code.s, code.present, code.l, code.db, code.g), (0xb, 1, 1, 0, 1, 1));
    }

    #[test]
    fn first_gibibyte_is_identity_mapped() {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_boot_tables(&memory, EntryPoint::Linux64(GuestAddress(0x10_0000))).unwrap();
        let entry = |at: u64| {
            let mut bytes = [0; 8];
            memory.read(GuestAddress(at), &mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        };
        let level2 = entry(entry(layout::PAGE_TABLES.0) & !0xfff) & !0xfff;
        assert_eq!(entry(level2 + 8 * 511), 511 << 21 | 0x83);
    }
}
