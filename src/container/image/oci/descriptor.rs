//! [`Descriptor`]: what a manifest says of a blob (image-spec, descriptor.md).

use std::collections::BTreeMap;

use super::Digest;

/// What a manifest or an index says of a blob that it names. Not trusted.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in super::super) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// Of a blob of which no manifest says more.
    pub(in super::super) fn of(digest: Digest, size: u64) -> Self {
        Self { media_type: String::new(), digest, size, annotations: BTreeMap::new() }
    }
}
