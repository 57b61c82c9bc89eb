//! Exceptions and interrupts that a vCPU is about to take.

use kvm_bindings::kvm_vcpu_events;

/// What a vCPU is about to take, and what it has blocked (KVM API, 4.31).
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct VcpuEvents {
    /// Which of the fields KVM shall take.
    pub(crate) flags: u32,
    pub(crate) exception: PendingException,
    pub(crate) interrupt: PendingInterrupt,
    pub(crate) nmi: PendingNmi,
    pub(crate) smi: PendingSmi,
    pub(crate) sipi_vector: u32,
    pub(crate) triple_fault: u8,
}

/// An exception, injected or pending.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct PendingException {
    pub(crate) injected: u8,
    pub(crate) vector: u8,
    pub(crate) has_error_code: u8,
    pub(crate) pending: u8,
    pub(crate) error_code: u32,
    pub(crate) has_payload: u8,
    pub(crate) payload: u64,
}

/// An interrupt that was injected, and whether the next instruction is protected from interrupts.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct PendingInterrupt {
    pub(crate) injected: u8,
    pub(crate) vector: u8,
    pub(crate) soft: u8,
    pub(crate) shadow: u8,
}

/// A non-maskable interrupt.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct PendingNmi {
    pub(crate) injected: u8,
    pub(crate) pending: u8,
    pub(crate) masked: u8,
}

/// A system management interrupt, and an INIT that waits for its end.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct PendingSmi {
    pub(crate) smm: u8,
    pub(crate) pending: u8,
    pub(crate) smm_inside_nmi: u8,
    pub(crate) latched_init: u8,
}

impl From<kvm_vcpu_events> for VcpuEvents {
    fn from(raw: kvm_vcpu_events) -> Self {
        let (exception, interrupt, nmi, smi) = (raw.exception, raw.interrupt, raw.nmi, raw.smi);
        Self {
            flags: raw.flags,
            exception: PendingException {
                injected: exception.injected,
                vector: exception.nr,
                has_error_code: exception.has_error_code,
                pending: exception.pending,
                error_code: exception.error_code,
                has_payload: raw.exception_has_payload,
                payload: raw.exception_payload,
            },
            interrupt: PendingInterrupt {
                injected: interrupt.injected,
                vector: interrupt.nr,
                soft: interrupt.soft,
                shadow: interrupt.shadow,
            },
            nmi: PendingNmi { injected: nmi.injected, pending: nmi.pending, masked: nmi.masked },
            smi: PendingSmi {
                smm: smi.smm,
                pending: smi.pending,
                smm_inside_nmi: smi.smm_inside_nmi,
                latched_init: smi.latched_init,
            },
            sipi_vector: raw.sipi_vector,
            triple_fault: raw.triple_fault.pending,
        }
    }
}

impl From<&VcpuEvents> for kvm_vcpu_events {
    fn from(state: &VcpuEvents) -> Self {
        let mut raw = Self { flags: state.flags, sipi_vector: state.sipi_vector, ..Default::default() };
        raw.exception.injected = state.exception.injected;
        raw.exception.nr = state.exception.vector;
        raw.exception.has_error_code = state.exception.has_error_code;
        raw.exception.pending = state.exception.pending;
        raw.exception.error_code = state.exception.error_code;
        raw.exception_has_payload = state.exception.has_payload;
        raw.exception_payload = state.exception.payload;
        raw.interrupt.injected = state.interrupt.injected;
        raw.interrupt.nr = state.interrupt.vector;
        raw.interrupt.soft = state.interrupt.soft;
        raw.interrupt.shadow = state.interrupt.shadow;
        raw.nmi.injected = state.nmi.injected;
        raw.nmi.pending = state.nmi.pending;
        raw.nmi.masked = state.nmi.masked;
        raw.smi.smm = state.smi.smm;
        raw.smi.pending = state.smi.pending;
        raw.smi.smm_inside_nmi = state.smi.smm_inside_nmi;
        raw.smi.latched_init = state.smi.latched_init;
        raw.triple_fault.pending = state.triple_fault;
        raw
    }
}
