//! States without a host that has KVM.

use super::chips::{IoapicState, IrqchipState, PicState, PitChannel, PitState};
use super::clock::ClockState;
use super::events::VcpuEvents;
use super::msrs::MsrState;
use super::registers::{DebugRegisters, GeneralRegisters, SystemRegisters};
use super::vcpu::{CpuidLeaf, ExtendedControl, VcpuFormat, VcpuState};
use super::vm::VmState;
use crate::error::ErrorKind;
use crate::version::Version;
use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_pic_state, kvm_pit_channel_state, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events,
};

fn vcpu() -> VcpuState {
    let mut events = kvm_vcpu_events { flags: 13, sipi_vector: 1, exception_payload: 2, ..Default::default() };
    (events.exception.nr, events.exception.error_code, events.nmi.masked) = (14, 3, 1);
    (events.interrupt.shadow, events.smi.latched_init, events.triple_fault.pending) = (2, 1, 1);
    let cs = kvm_segment { base: 1, limit: 2, selector: 0x10, type_: 11, l: 1, ..Default::default() };
    let mut sregs = kvm_sregs { cs, cr3: 0x1000, interrupt_bitmap: [1, 2, 3, 4], ..Default::default() };
    sregs.gdt.limit = 0x27;
    let cpuid = kvm_cpuid_entry2 { function: 1, ebx: 7, ..Default::default() };
    VcpuState {
        version: Version::OURS,
        mp_state: 3,
        regs: kvm_regs { rip: 0xffff_ffff_8000_0000, rflags: 2, ..Default::default() }.into(),
        sregs: sregs.into(),
        xsave: (0..4096).map(|n| n as u8).collect(),
        xcrs: vec![ExtendedControl { index: 0, value: 7 }],
        debug: kvm_debugregs { db: [1, 2, 3, 4], dr7: 0x400, ..Default::default() }.into(),
        lapic: vec![5; 1024],
        tsc_khz: 2_500_000,
        tsc_offset: u64::MAX - 7,
        msrs: vec![MsrState { index: 0xc000_0080, value: 0xd01 }, MsrState { index: 0x6e0, value: 0 }],
        cpuid: vec![cpuid.into()],
        events: events.into(),
    }
}

fn vm() -> VmState {
    let channel =
        PitChannel::from(kvm_pit_channel_state { count: 0x1_0000, count_load_time: -1, ..Default::default() });
    let pic = |irq_base| PicState::from(kvm_pic_state { irq_base, imr: 0xff, ..Default::default() });
    let ioapic = IoapicState { base_address: 0xfec0_0000, ioregsel: 1, id: 2, irr: 3, redirections: [1 << 16; 24] };
    VmState {
        version: Version::OURS,
        clock: ClockState { clock: 5_000_000_000, realtime: Some(1), host_tsc: 7 },
        irqchip: IrqchipState { pic_master: pic(0x30), pic_slave: pic(0x38), ioapic },
        pit: PitState { channels: [channel; 3], flags: 1 },
    }
}

#[test]
fn register_structures_keep_every_field_both_ways() {
    let state = vcpu();
    assert_eq!(GeneralRegisters::from(kvm_regs::from(state.regs)), state.regs);
    assert_eq!(SystemRegisters::from(kvm_sregs::from(state.sregs)), state.sregs);
    assert_eq!(DebugRegisters::from(kvm_debugregs::from(state.debug)), state.debug);
    assert_eq!(VcpuEvents::from(kvm_vcpu_events::from(&state.events)), state.events);
    let [leaf] = state.cpuid[..] else { panic!("one leaf") };
    assert_eq!(CpuidLeaf::from(kvm_cpuid_entry2::from(leaf)), leaf);
    assert_eq!(PicState::from(kvm_pic_state::from(vm().irqchip.pic_slave)), vm().irqchip.pic_slave);
    let [channel, ..] = vm().pit.channels;
    assert_eq!(PitChannel::from(kvm_pit_channel_state::from(channel)), channel);
}

#[cfg(feature = "serde")]
#[test]
fn states_survive_serialization() {
    crate::version::assert_versioned(&vcpu());
    crate::version::assert_versioned(&vm());
    let text = serde_json::to_string(&vm()).unwrap();
    // A field too few or too many, and an array of another length.
    let (fewer, more) = (text.replace("\"irr\":3,", ""), text.replace("\"irr\":3,", "\"irr\":3,\"irr2\":3,"));
    let shorter = text.replacen("65536,", "", 1);
    for wrong in [fewer, more, shorter] {
        assert_ne!(wrong, text);
        assert!(serde_json::from_str::<VmState>(&wrong).is_err(), "{wrong}");
    }
    for end in 0..text.len() {
        assert!(serde_json::from_str::<VmState>(&text[..end]).is_err());
    }
}

#[test]
fn vcpu_states_with_wrong_lengths_are_refused() {
    let format = VcpuFormat::plain();
    vcpu().check(&format).unwrap();
    let wrong = |change: fn(&mut VcpuState)| {
        let mut state = vcpu();
        change(&mut state);
        state.check(&format).unwrap_err().kind()
    };
    let leaf = CpuidLeaf::from(kvm_cpuid_entry2::default());
    for change in [
        (|it| it.xsave.truncate(4095)) as fn(&mut VcpuState),
        |it| it.xsave.push(0),
        |it| it.xsave.clear(),
        |it| it.lapic.truncate(1023),
        |it| it.lapic.push(0),
        |it| it.xcrs = vec![ExtendedControl { index: 0, value: 1 }; 17],
        |it| it.msrs = vec![MsrState { index: 0, value: 0 }; 4097],
        |it| it.cpuid = vec![CpuidLeaf::from(kvm_cpuid_entry2::default()); 257],
    ] {
        assert_eq!(wrong(change), ErrorKind::Corrupt);
    }
    let mut nested = vcpu();
    nested.cpuid.push(CpuidLeaf { function: 0x8000_0001, ecx: 4, ..leaf });
    assert_eq!(nested.check(&format).unwrap_err().kind(), ErrorKind::Unsupported);
}
