//! An authority of timestamps for tests (RFC 3161): what it says in CMS (RFC 5652).

use serde_json::{Value, json};

use super::authority::*;

const SHA256: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01];
const TIME_STAMPING: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x08];
const SIGNED_DATA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x02];
const CONTENT_TYPE: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x03];
const MESSAGE_DIGEST: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x04];
const SIGNING_CERTIFICATE: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x10, 0x02, 0x2f];
const TIMESTAMP: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x10, 0x01, 0x04];
/// 1.3.6.1.4.1.57264.2, Sigstore's.
const POLICY: &[u8] = &[0x2b, 0x06, 0x01, 0x04, 0x01, 0x83, 0xbf, 0x30, 0x02];
const EXPLICIT: u8 = 0xa0;
const TIME: u8 = 0x18;

/// A key for timestamps, and the root that has certified it.
pub(super) struct TimestampAuthority {
    key: Key,
    pub(super) leaf_der: Vec<u8>,
    pub(super) root_der: Vec<u8>,
}

impl TimestampAuthority {
    pub(super) fn new(kind: KeyKind) -> Self {
        let (root, key) = (Key::new(KeyKind::P256), Key::new(kind));
        let root_der = certificate_of_authority(("clock root", &root), ("clock root", &root), TIME_STAMPING);
        let extensions: [&[u8]; 1] = [&usage(true, TIME_STAMPING)];
        let leaf_der = certificate(&to_be_signed("clock root", &name("clock"), LONG, &key, &extensions), &root);
        Self { key, leaf_der, root_der }
    }

    /// As a trust root has it, valid from a time on.
    pub(super) fn trusted_from(&self, start: &str) -> Value {
        let chain = [&self.leaf_der, &self.root_der].map(|der| json!({ "rawBytes": base64(der) }));
        json!({ "uri": "https://clock.example", "certChain": { "certificates": chain }, "validFor": { "start": start } })
    }

    /// The authority's answer: these bytes were there at that time, on the day before [`ISSUED`] or on its own.
    pub(super) fn stamp(&self, bytes: &[u8], time: i64) -> Vec<u8> {
        let object = |id| der(OBJECT, &[id]);
        let hash = der(SEQUENCE, &[&object(SHA256)]);
        let info = [
            &[0x02, 0x01, 0x01],
            &object(POLICY)[..],
            &der(SEQUENCE, &[&hash, &der(OCTETS, &[&sha256(&[bytes])])]),
            &[0x02, 0x01, 0x05],
            &der(TIME, &[date(time).as_bytes()]),
        ];
        let info = der(SEQUENCE, &info);
        let attribute = |id, value: &[u8]| der(SEQUENCE, &[&object(id), &der(SET, &[value])]);
        let certificate = der(SEQUENCE, &[&der(OCTETS, &[&sha256(&[&self.leaf_der])])]);
        // In the order of their encodings, as DER has sets.
        let attributes = [
            attribute(CONTENT_TYPE, &object(TIMESTAMP)),
            attribute(MESSAGE_DIGEST, &der(OCTETS, &[&sha256(&[&info])])),
            attribute(SIGNING_CERTIFICATE, &der(SEQUENCE, &[&der(SEQUENCE, &[&certificate])])),
        ];
        let attributes = attributes.concat();
        let signer = [
            &[0x02, 0x01, 0x01],
            &der(SEQUENCE, &[&name("clock root"), &[0x02, 0x01, 0x07]])[..],
            &hash,
            &der(EXPLICIT, &[&attributes]),
            &algorithm(),
            &der(OCTETS, &[&self.key.sign(&der(SET, &[&attributes]))]),
        ];
        let signed = [
            &[0x02, 0x01, 0x03],
            &der(SET, &[&hash])[..],
            &der(SEQUENCE, &[&object(TIMESTAMP), &der(EXPLICIT, &[&der(OCTETS, &[&info])])]),
            &der(SET, &[&der(SEQUENCE, &signer)]),
        ];
        let token = der(SEQUENCE, &[&object(SIGNED_DATA), &der(EXPLICIT, &[&der(SEQUENCE, &signed)])]);
        let granted = der(SEQUENCE, &[&[0x02, 0x01, 0x00]]);
        der(SEQUENCE, &[&granted, &token])
    }
}

fn date(time: i64) -> String {
    let (day, second) = match time - ISSUED {
        second @ 0.. => ("20240101", second),
        second => ("20231231", second + 86400),
    };
    format!("{day}{:02}{:02}{:02}Z", second / 3600, second / 60 % 60, second % 60)
}
