//! What a VM does about the events of its devices.

use std::sync::Arc;

use super::disk::{DiskError, ErrorAction};
use super::events::{EventKind, PauseCause, Throttled};
use super::exit::Reason;
use super::shared::VmShared;
use super::vcpu::LastExit;
use crate::boot::DirtyPageRecorder;
use crate::memory::GuestMemory;
use crate::size::Size;
use crate::virtio::{DeviceEvent, DeviceEventSink, DeviceId};

/// Carries out what events of devices ask for, and tells the embedder.
pub(super) struct DeviceEvents {
    pub shared: Arc<VmShared>,
    pub memory: GuestMemory,
    pub recorder: DirtyPageRecorder,
}

impl DeviceEventSink for DeviceEvents {
    fn take(&self, device: DeviceId, event: DeviceEvent) {
        let kind = match event {
            DeviceEvent::DriverReady if self.shared.marks.drivers_ready() => {
                self.recorder.record(&self.memory);
                EventKind::DriversReady
            }
            DeviceEvent::DriverReady => return,
            DeviceEvent::NeedsReset(message) => EventKind::DeviceError { device, message },
            DeviceEvent::Failed(why) => return self.shared.stop(Reason::Device(device, why), LastExit::default()),
            DeviceEvent::Throttled => EventKind::Throttled { what: Throttled::Device(device) },
            DeviceEvent::DiskError(error) => return self.take_disk_error(error),
            DeviceEvent::LowSpace(free) => EventKind::DiskSpaceLow { disk: device, free: Size::bytes(free) },
            DeviceEvent::BackendLost(error) => EventKind::Degraded { what: format!("{device}: {error}") },
            DeviceEvent::Denied(denial) => EventKind::Denied { denial },
            DeviceEvent::BalloonSettled(held) => EventKind::Balloon { size: Size::bytes(held) },
        };
        self.shared.log.push(kind);
    }
}

impl DeviceEvents {
    /// Carries out what is to be done about a host's error. On the disk's loop.
    fn take_disk_error(&self, error: DiskError) {
        let shared = &self.shared;
        shared.log.push(EventKind::DiskError { error: error.clone() });
        match error.action {
            ErrorAction::Pause => {
                shared.gate.hold();
                shared.kick();
                shared.log.push(EventKind::Paused { cause: PauseCause::Disk(error.disk) });
            }
            ErrorAction::Stop => shared.stop(Reason::Disk(error), LastExit::default()),
            _ => {}
        }
    }
}
