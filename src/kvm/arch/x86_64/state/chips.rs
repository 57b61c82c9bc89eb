//! The interrupt controllers and the timer that all vCPUs share.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_ioapic_state,
    kvm_ioapic_state__bindgen_ty_1, kvm_irqchip, kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};

use super::mirror;
use crate::error::{Context, Result};
use crate::kvm::{VmFd, failed};

mirror! {
    /// One of the two legacy interrupt controllers (KVM API, 4.26).
    PicState of kvm_pic_state {
        last_irr: u8, irr: u8, imr: u8, isr: u8, priority_add: u8, irq_base: u8, read_reg_select: u8, poll: u8,
        special_mask: u8, init_state: u8, auto_eoi: u8, rotate_on_auto_eoi: u8, special_fully_nested_mode: u8,
        init4: u8, elcr: u8, elcr_mask: u8,
    }
}

mirror! {
    /// One counter of the timer.
    PitChannel of kvm_pit_channel_state {
        count: u32, latched_count: u16, count_latched: u8, status_latched: u8, status: u8, read_state: u8,
        write_state: u8, write_latch: u8, rw_mode: u8, mode: u8, bcd: u8, gate: u8,
        // In nanoseconds of the host's monotonic clock.
        count_load_time: i64,
    }
}

/// The I/O interrupt controller (KVM API, 4.26).
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct IoapicState {
    pub(crate) base_address: u64,
    pub(crate) ioregsel: u32,
    pub(crate) id: u32,
    pub(crate) irr: u32,
    pub(crate) redirections: [u64; 24],
}

/// The timer (KVM API, 4.72).
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct PitState {
    pub(crate) channels: [PitChannel; 3],
    pub(crate) flags: u32,
}

/// Both legacy controllers and the I/O interrupt controller.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct IrqchipState {
    pub(crate) pic_master: PicState,
    pub(crate) pic_slave: PicState,
    pub(crate) ioapic: IoapicState,
}

fn get_chip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.fd.get_irqchip(&mut chip).map_err(failed).doing(|| format!("reading interrupt controller {chip_id}"))?;
    Ok(chip)
}

fn set_chip(vm: &VmFd, chip: &kvm_irqchip) -> Result<()> {
    vm.fd.set_irqchip(chip).map_err(failed).doing(|| format!("setting interrupt controller {}", chip.chip_id))
}

fn get_pic(vm: &VmFd, chip_id: u32) -> Result<PicState> {
    let chip = get_chip(vm, chip_id)?;
    // SAFETY: `chip` began as zeroes, and KVM fills `pic` for these chips. It is bytes, of which any value is one.
    Ok(unsafe { chip.chip.pic }.into())
}

fn set_pic(vm: &VmFd, chip_id: u32, state: PicState) -> Result<()> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    chip.chip.pic = state.into();
    set_chip(vm, &chip)
}

impl IoapicState {
    fn save(vm: &VmFd) -> Result<Self> {
        let chip = get_chip(vm, KVM_IRQCHIP_IOAPIC)?;
        // SAFETY: `chip` began as zeroes, and KVM fills `ioapic` for this chip. It is integers, of which any value is one.
        let raw = unsafe { chip.chip.ioapic };
        // SAFETY: as above; `bits` is the whole of each.
        let redirections = raw.redirtbl.map(|it| unsafe { it.bits });
        Ok(Self { base_address: raw.base_address, ioregsel: raw.ioregsel, id: raw.id, irr: raw.irr, redirections })
    }

    fn restore(&self, vm: &VmFd) -> Result<()> {
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        chip.chip.ioapic = kvm_ioapic_state {
            base_address: self.base_address,
            ioregsel: self.ioregsel,
            id: self.id,
            irr: self.irr,
            redirtbl: self.redirections.map(|bits| kvm_ioapic_state__bindgen_ty_1 { bits }),
            ..Default::default()
        };
        set_chip(vm, &chip)
    }
}

impl IrqchipState {
    pub(super) fn save(vm: &VmFd) -> Result<Self> {
        Ok(Self {
            pic_master: get_pic(vm, KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: get_pic(vm, KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: IoapicState::save(vm)?,
        })
    }

    pub(super) fn restore(&self, vm: &VmFd) -> Result<()> {
        set_pic(vm, KVM_IRQCHIP_PIC_MASTER, self.pic_master)?;
        set_pic(vm, KVM_IRQCHIP_PIC_SLAVE, self.pic_slave)?;
        self.ioapic.restore(vm)
    }
}

impl PitState {
    pub(super) fn save(vm: &VmFd) -> Result<Self> {
        let raw = vm.fd.get_pit2().map_err(failed).doing(|| "reading the timer")?;
        Ok(Self { channels: raw.channels.map(PitChannel::from), flags: raw.flags })
    }

    pub(super) fn restore(&self, vm: &VmFd) -> Result<()> {
        let channels = self.channels.map(kvm_pit_channel_state::from);
        let raw = kvm_pit_state2 { channels, flags: self.flags, ..Default::default() };
        vm.fd.set_pit2(&raw).map_err(failed).doing(|| "setting the timer")
    }
}
