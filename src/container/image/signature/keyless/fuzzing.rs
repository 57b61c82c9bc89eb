//! For fuzzing and tests only: what a registry gives as a keyless signature.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde_json::Value;

use super::annotations::{CERTIFICATE, CHAIN, ENTRY};
use super::*;

/// A trust root, and a bundle of [`MANIFEST`] that is right by it, as `authority.rs` makes them.
const SAMPLE: &str = include_str!("sample.json");
/// What the bundle signs, and by whom.
pub(super) const MANIFEST: &[u8] = b"manifest";
pub(super) const IDENTITY: [&str; 2] =
    ["https://git.example/team/app/ci.yml@refs/heads/main", "https://issuer.example"];
const PAYLOAD: &[u8] = br#"{"critical":{"image":{"docker-manifest-digest":"sha256:05b3abf2579a5eb66403cd78be557fd860633a1fe2103c7642030defe32c657f"},"type":"cosign container image signature"}}"#;

pub(super) struct Sample {
    pub(super) signers: Signers,
    pub(super) bundle: Vec<u8>,
}

impl Sample {
    /// None where the processor lacks what the arithmetic needs.
    pub(super) fn new() -> Option<Self> {
        let sample: Value = serde_json::from_str(SAMPLE).ok()?;
        let root = TrustRoot::from_json(sample.get("trustRoot")?.to_string().as_bytes()).ok()?;
        let identities = vec![CertificateIdentity::new(IDENTITY[0], IDENTITY[1])];
        Some(Self { signers: Signers { root, identities }, bundle: sample.get("bundle")?.to_string().into() })
    }

    pub(super) fn check(&self, bundle: &[u8]) -> Result<(), String> {
        self.signers.check_bundle(bundle, MANIFEST, &Digest::sha256(MANIFEST))
    }
}

/// A bundle of any bytes, or a good one with some of them changed; annotations of any text; a trust root.
pub(crate) fn keyless_signature(data: &[u8]) {
    static SAMPLE: LazyLock<Option<Sample>> = LazyLock::new(Sample::new);
    let Some((kind, data)) = data.split_first() else { return };
    let Some(sample) = &*SAMPLE else {
        assert!(!super::super::key::supported(), "the sample cannot be read");
        return;
    };
    match kind % 4 {
        0 => assert!(sample.check(data).is_err(), "a bundle was made without its keys"),
        1 => {
            let mut bundle = sample.bundle.clone();
            for change in data.as_chunks::<3>().0 {
                let at = usize::from(u16::from_le_bytes([change[0], change[1]]));
                if let Some(byte) = bundle.get_mut(at) {
                    *byte = change[2];
                }
            }
            // Parts that are not signed may change, such as white space.
            let _ = sample.check(&bundle);
        }
        2 => {
            let parts = data.splitn(3, |byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned());
            let annotations: BTreeMap<String, String> =
                [CERTIFICATE, CHAIN, ENTRY].into_iter().map(str::to_owned).zip(parts).collect();
            let found = sample.signers.check_simple(PAYLOAD, "AAAA", &annotations, &Digest::sha256(MANIFEST));
            assert!(found.is_err(), "annotations were made without their keys");
        }
        _ => drop(TrustRoot::from_json(data)),
    }
}
