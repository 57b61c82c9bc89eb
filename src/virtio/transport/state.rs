//! [`TransportState`]: a device with its transport as plain data, and the way there and back.
#![cfg_attr(not(test), allow(dead_code, reason = "so far tests alone save a device and restore it elsewhere"))]

use super::host::StoppedDevice;
use super::{DeviceHost, Transport};
use crate::error::{Error, ErrorKind, Result};
use crate::version::{Version, Versioned};
use crate::virtio::Profile;
use crate::virtio::queue::QueueConfig;
use crate::virtio::spec::status;

/// What a driver has set up, and where the device stands. Not trusted when it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct TransportState {
    /// Of the states of transport and device.
    pub version: Version<Self>,
    /// All bits (Virtio 1.3, 2.1).
    pub status: u32,
    /// Interrupts that the driver has not acknowledged (Virtio 1.3, 4.2.2, InterruptStatus).
    pub pending_interrupts: u32,
    pub config_generation: u32,
    /// What the driver may write in configuration space.
    pub config: Vec<u8>,
    pub device_features_sel: u32,
    pub driver_features_sel: u32,
    pub queue_sel: u32,
    pub driver_features: u64,
    /// In the order of the device's queues.
    pub queues: Vec<QueueConfig>,
    /// `None` when the device did not run.
    pub device: Option<StoppedDevice>,
}

impl Versioned for TransportState {
    const NAME: &'static str = "the state of a device";
    const VERSION: u32 = 1;
}

impl TransportState {
    /// Returns the device's part of a state that can be of a device with this profile.
    ///
    /// # Errors
    /// Says what makes no sense.
    pub(super) fn check(&self, profile: &Profile) -> std::result::Result<Option<&StoppedDevice>, String> {
        if self.queues.len() != profile.queues.len() {
            return Err(format!("{} queues, not {}", self.queues.len(), profile.queues.len()));
        }
        let runs = self.status & status::DRIVER_OK != 0;
        let needs_reset = self.status & status::NEEDS_RESET != 0;
        match &self.device {
            Some(_) if self.status & status::FEATURES_OK == 0 => Err("a device that runs without features".into()),
            // One whose thread was busy for too long may run without DRIVER_OK, and needs a reset then.
            Some(_) if !runs && !needs_reset => Err("a device that runs without its driver".into()),
            None if runs && !needs_reset => Err("a driver whose device does not run".into()),
            Some(device) if device.positions.len() != profile.queues.len() => {
                Err(format!("positions in {} queues, not {}", device.positions.len(), profile.queues.len()))
            }
            device => Ok(device.as_ref()),
        }
    }
}

impl<H: DeviceHost> Transport<H> {
    /// Returns the state of transport and device, while the VM is paused.
    ///
    /// # Errors
    /// As [`DeviceHost::start`]; `InvalidState` when the device runs, as no pause has stopped it.
    pub(super) fn save(&self) -> Result<TransportState> {
        Ok(TransportState {
            version: Version::OURS,
            status: self.interrupt.status(),
            pending_interrupts: self.interrupt.pending(),
            config_generation: self.profile.config.generation(),
            config: self.profile.config.written(),
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            queue_sel: self.queue_sel,
            driver_features: self.driver_features,
            queues: self.queues.clone(),
            device: self.host.save()?,
        })
    }

    /// Takes a state, as a transport that was never used, and starts the device if it ran.
    ///
    /// # Errors
    /// `Corrupt` for a state that makes no sense for this device. Otherwise as [`DeviceHost::start`].
    pub(super) fn restore(&mut self, state: &TransportState) -> Result<()> {
        let corrupt = |what: String| Error::new(ErrorKind::Corrupt, format!("the state of a device: {what}"));
        let device = state.check(&self.profile).map_err(corrupt)?;
        (self.device_features_sel, self.driver_features_sel) = (state.device_features_sel, state.driver_features_sel);
        (self.queue_sel, self.driver_features) = (state.queue_sel, state.driver_features);
        self.queues.clone_from(&state.queues);
        if state.status & status::FEATURES_OK != 0 && !self.features_acceptable() {
            return Err(corrupt(format!("features {:#x} were not offered", state.driver_features)));
        }
        self.profile.config.restore(&state.config, state.config_generation);
        self.interrupt.add_status(state.status);
        if let Some(device) = device {
            let queues = self.make_queues(Some(&device.positions)).map_err(corrupt)?;
            if !self.start(Ok(queues), Some(device.state.clone()))? {
                return Err(corrupt("the device cannot go on from it".into()));
            }
        }
        self.interrupt.set_pending(state.pending_interrupts);
        Ok(())
    }
}
