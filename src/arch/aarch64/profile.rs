//! [`CpuProfile`]: the processor that a guest sees.

/// The processor that a guest sees. There is only the host's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[must_use = "a config value does nothing by itself"]
#[non_exhaustive]
pub struct CpuProfile {}

impl CpuProfile {
    /// Shows the host's processor, as far as its KVM offers it to guests.
    pub fn host() -> Self {
        Self {}
    }
}
