//! Cosign's older form: certificate, chain and log entry in annotations of the payload's layer.
//!
//! The annotation `dev.sigstore.cosign/rfc3161timestamp` is not read. The entry has the log's promise, whose time counts, and a stranger may
//! leave out a timestamp.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::json;
use sigstore_verify::types::Bundle;

use super::super::payload::parse_json;
use crate::container::image::oci::Digest;

pub(super) const CERTIFICATE: &str = "dev.sigstore.cosign/certificate";
pub(super) const CHAIN: &str = "dev.sigstore.cosign/chain";
pub(super) const ENTRY: &str = "dev.sigstore.cosign/bundle";
/// The longest of them that is read.
const MAX_ANNOTATION: usize = 64 << 10;

/// An entry of a log, with the log's promise to keep it (cosign, pkg/cosign/bundle/rekor.go).
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PromisedEntry {
    signed_entry_timestamp: String,
    payload: EntryPayload,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct EntryPayload {
    body: String,
    integrated_time: i64,
    log_index: i64,
    #[serde(rename = "logID")]
    log_id: String,
}

/// What the body of an entry says of itself.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct EntryKind {
    kind: String,
    api_version: String,
}

/// The same as a bundle of version 0.1.
///
/// # Errors
/// Names the part that is missing, too long or malformed.
pub(super) fn bundle(
    payload: &[u8],
    signature: &str,
    annotations: &BTreeMap<String, String>,
) -> Result<Bundle, String> {
    let get = |name: &str| match annotations.get(name) {
        Some(text) if text.len() > MAX_ANNOTATION => Err(format!("with {name} of {} bytes", text.len())),
        found => Ok(found.map(String::as_str)),
    };
    let certificate = get(CERTIFICATE)?.ok_or("without a certificate")?;
    let entry = get(ENTRY)?.ok_or("without an entry of a transparency log")?;
    let mut certificates = certificates(certificate)?;
    if certificates.len() != 1 {
        return Err(format!("with {} certificates in the place of one", certificates.len()));
    }
    certificates.extend(self::certificates(get(CHAIN)?.unwrap_or_default())?);
    let entry: PromisedEntry = parse_json(entry.as_bytes(), "the log entry")?;
    let body = STANDARD.decode(&entry.payload.body).map_err(|_| "a log entry that is not base64")?;
    let kind: EntryKind = parse_json(&body, "the log entry's body")?;
    let log = hex(&entry.payload.log_id).ok_or("a log entry whose log has no name")?;
    let digest = Digest::sha256(payload);
    let digest = hex(digest.hex()).unwrap_or_default();
    let bundle = json!({
        "mediaType": "application/vnd.dev.sigstore.bundle+json;version=0.1",
        "verificationMaterial": {
            "x509CertificateChain": { "certificates": certificates },
            "tlogEntries": [{
                "logIndex": entry.payload.log_index.to_string(),
                "logId": { "keyId": STANDARD.encode(log) },
                "kindVersion": { "kind": kind.kind, "version": kind.api_version },
                "integratedTime": entry.payload.integrated_time.to_string(),
                "inclusionPromise": { "signedEntryTimestamp": entry.signed_entry_timestamp },
                "canonicalizedBody": entry.payload.body,
            }],
        },
        // Whatever the key, cosign hashes so.
        "messageSignature": {
            "messageDigest": { "algorithm": "SHA2_256", "digest": STANDARD.encode(digest) },
            "signature": signature,
        },
    });
    serde_json::from_value(bundle).map_err(|error| format!("annotations that cannot be read: {error}"))
}

/// The certificates of a PEM file, as bundles have them.
fn certificates(pem: &str) -> Result<Vec<serde_json::Value>, String> {
    let blocks = pem.split("-----BEGIN CERTIFICATE-----").skip(1);
    let encoded = blocks.map(|block| {
        let (body, _) = block.split_once("-----END CERTIFICATE-----").ok_or("a certificate without its end")?;
        let body: String = body.split_ascii_whitespace().collect();
        Ok(json!({ "rawBytes": body }))
    });
    encoded.collect()
}

fn hex(text: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let digits = text.bytes().all(|digit| digit.is_ascii_hexdigit());
    (rest.is_empty() && digits).then(|| pairs.iter().map(byte).collect()).flatten()
}
