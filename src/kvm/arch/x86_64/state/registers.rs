//! Registers of a vCPU.

use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use super::mirror;

mirror! {
    /// The general registers (KVM API, 4.11).
    GeneralRegisters of kvm_regs {
        rax: u64, rbx: u64, rcx: u64, rdx: u64, rsi: u64, rdi: u64, rsp: u64, rbp: u64,
        r8: u64, r9: u64, r10: u64, r11: u64, r12: u64, r13: u64, r14: u64, r15: u64,
        rip: u64, rflags: u64,
    }
}

mirror! {
    /// A segment register with what the processor keeps hidden of it (Intel SDM vol. 3A, 3.4.3).
    Segment of kvm_segment {
        base: u64, limit: u32, selector: u16, type_: u8, present: u8, dpl: u8, db: u8, s: u8, l: u8, g: u8, avl: u8,
        unusable: u8,
    }
}

mirror! {
    /// Where a descriptor table lies (Intel SDM vol. 3A, 2.4).
    DescriptorTable of kvm_dtable { base: u64, limit: u16, }
}

mirror! {
    /// Segments, descriptor tables and control registers (KVM API, 4.13).
    SystemRegisters of kvm_sregs {
        cs: Segment, ds: Segment, es: Segment, fs: Segment, gs: Segment, ss: Segment, tr: Segment, ldt: Segment,
        gdt: DescriptorTable, idt: DescriptorTable,
        cr0: u64, cr2: u64, cr3: u64, cr4: u64, cr8: u64, efer: u64, apic_base: u64,
        interrupt_bitmap: [u64; 4],
    }
}

mirror! {
    /// The debug registers (KVM API, 4.33).
    DebugRegisters of kvm_debugregs { db: [u64; 4], dr6: u64, dr7: u64, flags: u64, }
}
