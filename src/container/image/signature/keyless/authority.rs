//! A small Sigstore for tests: two authorities, a log of certificates, a log of signatures.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use graviola::hashing::{Sha256, Sha384};
use graviola::signing::ecdsa::{P256, P384, SigningKey};
use graviola::signing::eddsa::Ed25519SigningKey;
use graviola::signing::rsa;
use serde_json::{Value, json};
use sha2::Digest as _;

/// When certificates of signers begin, 2024-01-01, and how long they last.
pub(super) const ISSUED: i64 = 1_704_067_200;
const NOT_BEFORE: &str = "240101000000Z";
const NOT_AFTER: &str = "240101001000Z";

const EXTENSION_SAN: &[u8] = &[0x55, 0x1d, 0x11];
const EXTENSION_KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x25];
const EXTENSION_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];
const EXTENSION_SCT: &[u8] = &[0x2b, 0x06, 0x01, 0x04, 0x01, 0xd6, 0x79, 0x02, 0x04, 0x02];
/// 1.3.6.1.4.1.57264.1.1 and .8.
const EXTENSION_ISSUER: &[u8] = &[0x2b, 0x06, 0x01, 0x04, 0x01, 0x83, 0xbf, 0x30, 0x01, 0x01];
const EXTENSION_ISSUER_V2: &[u8] = &[0x2b, 0x06, 0x01, 0x04, 0x01, 0x83, 0xbf, 0x30, 0x01, 0x08];
const CODE_SIGNING: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x03];
const ECDSA_SHA256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

pub(super) const SEQUENCE: u8 = 0x30;
pub(super) const SET: u8 = 0x31;
pub(super) const OCTETS: u8 = 0x04;
pub(super) const OBJECT: u8 = 0x06;
const UTF8: u8 = 0x0c;

pub(super) fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    sha2::Sha256::digest(parts.concat()).into()
}

pub(super) fn base64(bytes: impl AsRef<[u8]>) -> String {
    STANDARD.encode(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One value of DER.
pub(super) fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let len = content.len();
    let head = match len {
        0..=0x7f => vec![tag, len as u8],
        0x80..=0xff => vec![tag, 0x81, len as u8],
        _ => vec![tag, 0x82, (len >> 8) as u8, len as u8],
    };
    [head, content].concat()
}

pub(super) fn algorithm() -> Vec<u8> {
    der(SEQUENCE, &[&der(OBJECT, &[ECDSA_SHA256])])
}

pub(super) fn name(common: &str) -> Vec<u8> {
    let part = der(SEQUENCE, &[&der(OBJECT, &[COMMON_NAME]), &der(UTF8, &[common.as_bytes()])]);
    der(SEQUENCE, &[&der(SET, &[&part])])
}

fn extension(id: &[u8], critical: bool, value: &[u8]) -> Vec<u8> {
    let critical: &[u8] = if critical { &[0x01, 0x01, 0xff] } else { &[] };
    der(SEQUENCE, &[&der(OBJECT, &[id]), critical, &der(OCTETS, &[value])])
}

/// The kinds of keys that a signer may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyKind {
    P256,
    P384,
    Ed25519,
    Rsa,
}

enum PrivateKey {
    P256(SigningKey<P256>),
    P384(SigningKey<P384>),
    Ed25519(Ed25519SigningKey),
    Rsa(Box<rsa::SigningKey>),
}

pub(super) struct Key {
    key: PrivateKey,
    pub(super) spki: Vec<u8>,
}

impl Key {
    pub(super) fn new(kind: KeyKind) -> Self {
        let mut buffer = [0; 512];
        let (key, spki) = match kind {
            KeyKind::P256 => {
                let key = SigningKey::generate().unwrap();
                let spki = key.to_spki_der(&mut buffer).unwrap().to_vec();
                (PrivateKey::P256(key), spki)
            }
            KeyKind::P384 => {
                let key = SigningKey::generate().unwrap();
                let spki = key.to_spki_der(&mut buffer).unwrap().to_vec();
                (PrivateKey::P384(key), spki)
            }
            KeyKind::Ed25519 => {
                let key = Ed25519SigningKey::generate().unwrap();
                let spki = key.public_key().to_spki_der(&mut buffer).unwrap().to_vec();
                (PrivateKey::Ed25519(key), spki)
            }
            KeyKind::Rsa => {
                let key = rsa::SigningKey::generate(rsa::KeySize::Rsa2048).unwrap();
                let spki = key.public_key().to_spki_der(&mut buffer).unwrap().to_vec();
                (PrivateKey::Rsa(Box::new(key)), spki)
            }
        };
        Self { key, spki }
    }

    /// With SHA-256, whatever the key, where it takes a hash.
    pub(super) fn sign(&self, message: &[u8]) -> Vec<u8> {
        let mut buffer = [0; 512];
        match &self.key {
            PrivateKey::P256(key) => key.sign_asn1::<Sha256>(&[message], &mut buffer).unwrap().to_vec(),
            PrivateKey::P384(key) => key.sign_asn1::<Sha256>(&[message], &mut buffer).unwrap().to_vec(),
            PrivateKey::Ed25519(key) => key.sign(message).to_vec(),
            PrivateKey::Rsa(key) => {
                let len = key.modulus_len_bytes();
                key.sign_pkcs1_sha256(&mut buffer[..len], message).unwrap().to_vec()
            }
        }
    }

    /// As envelopes are signed: with the hash that is the key's own.
    pub(super) fn sign_envelope(&self, encoded: &[u8]) -> Vec<u8> {
        match &self.key {
            PrivateKey::P384(key) => key.sign_asn1::<Sha384>(&[encoded], &mut [0; 256]).unwrap().to_vec(),
            _ => self.sign(encoded),
        }
    }

    /// By which logs are named.
    fn id(&self) -> [u8; 32] {
        sha256(&[&self.spki])
    }
}

/// The part of a certificate that is signed.
pub(super) fn to_be_signed(
    issuer: &str,
    subject: &[u8],
    validity: [&str; 2],
    key: &Key,
    extensions: &[&[u8]],
) -> Vec<u8> {
    let validity: Vec<u8> = validity.into_iter().flat_map(|time| der(0x17, &[time.as_bytes()])).collect();
    let parts: [&[u8]; 8] = [
        &der(0xa0, &[&[0x02, 0x01, 0x02]]),
        &[0x02, 0x01, 0x07],
        &algorithm(),
        &name(issuer),
        &der(SEQUENCE, &[&validity]),
        subject,
        &key.spki,
        &der(0xa3, &[&der(SEQUENCE, extensions)]),
    ];
    der(SEQUENCE, &parts)
}

pub(super) fn certificate(to_be_signed: &[u8], issuer: &Key) -> Vec<u8> {
    let signature = issuer.sign(to_be_signed);
    der(SEQUENCE, &[to_be_signed, &algorithm(), &der(0x03, &[&[0], &signature])])
}

/// When authorities are valid.
pub(super) const LONG: [&str; 2] = ["230101000000Z", "430101000000Z"];

/// That a key is for one purpose.
pub(super) fn usage(critical: bool, purpose: &[u8]) -> Vec<u8> {
    extension(EXTENSION_KEY_USAGE, critical, &der(SEQUENCE, &[&der(OBJECT, &[purpose])]))
}

pub(super) fn certificate_of_authority(issuer: (&str, &Key), subject: (&str, &Key), purpose: &[u8]) -> Vec<u8> {
    let constraints = extension(EXTENSION_CONSTRAINTS, true, &der(SEQUENCE, &[&[0x01, 0x01, 0xff]]));
    let extensions: [&[u8]; 2] = [&constraints, &usage(false, purpose)];
    certificate(&to_be_signed(issuer.0, &name(subject.0), LONG, subject.1, &extensions), issuer.1)
}

pub(super) fn pem(der: &[u8]) -> String {
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", base64(der))
}

/// Who signs, by a certificate.
pub(super) struct Leaf {
    pub(super) key: Key,
    pub(super) der: Vec<u8>,
}

pub(super) struct Authority {
    intermediate: Key,
    certificate_log: Key,
    log: Key,
    pub(super) root_der: Vec<u8>,
    pub(super) intermediate_der: Vec<u8>,
}

impl Authority {
    pub(super) fn new() -> Self {
        let [root, intermediate, certificate_log, log] = std::array::from_fn(|_| Key::new(KeyKind::P256));
        let of = |subject| certificate_of_authority(("root", &root), subject, CODE_SIGNING);
        let (root_der, intermediate_der) = (of(("root", &root)), of(("intermediate", &intermediate)));
        Self { intermediate, certificate_log, log, root_der, intermediate_der }
    }

    /// What an embedder has of it.
    pub(super) fn trust_root(&self) -> Value {
        let valid = json!({ "start": "2023-01-01T00:00:00Z" });
        let log = |key: &Key| {
            let public =
                json!({ "rawBytes": base64(&key.spki), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": valid });
            json!([{ "baseUrl": "https://log.example", "hashAlgorithm": "SHA2_256", "publicKey": public, "logId": { "keyId": base64(key.id()) } }])
        };
        let chain = [&self.intermediate_der, &self.root_der].map(|der| json!({ "rawBytes": base64(der) }));
        json!({
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": log(&self.log),
            "ctlogs": log(&self.certificate_log),
            "certificateAuthorities": [{ "uri": "https://ca.example", "certChain": { "certificates": chain }, "validFor": valid }],
            "timestampAuthorities": [],
        })
    }

    /// A certificate for an e-mail address or URI, which the log of certificates has, or not.
    pub(super) fn certify(&self, key: Key, identity: &str, issuer: &str, logged: bool) -> Leaf {
        let kind = if identity.contains("://") { 0x86 } else { 0x81 };
        let mut extensions = vec![
            usage(false, CODE_SIGNING),
            extension(EXTENSION_SAN, true, &der(SEQUENCE, &[&der(kind, &[identity.as_bytes()])])),
            extension(EXTENSION_ISSUER, false, issuer.as_bytes()),
            extension(EXTENSION_ISSUER_V2, false, &der(UTF8, &[issuer.as_bytes()])),
        ];
        let build = |extensions: &[Vec<u8>]| {
            let extensions: Vec<&[u8]> = extensions.iter().map(Vec::as_slice).collect();
            to_be_signed("intermediate", &der(SEQUENCE, &[]), [NOT_BEFORE, NOT_AFTER], &key, &extensions)
        };
        if logged {
            extensions.push(extension(EXTENSION_SCT, false, &der(OCTETS, &[&self.timestamp(&build(&extensions))])));
        }
        let der = certificate(&build(&extensions), &self.intermediate);
        Leaf { key, der }
    }

    /// The log of certificates' word that it has one (RFC 6962, 3.2 and 3.3).
    fn timestamp(&self, precertificate: &[u8]) -> Vec<u8> {
        let time = (ISSUED as u64 * 1000).to_be_bytes();
        let len = (precertificate.len() as u32).to_be_bytes();
        let issuer = sha256(&[&self.intermediate.spki]);
        let signed = [&[0, 0], &time[..], &[0, 1], &issuer, &len[1..], precertificate, &[0, 0]].concat();
        let signature = self.certificate_log.sign(&signed);
        let signature = [&(signature.len() as u16).to_be_bytes()[..], &signature].concat();
        let timestamp = [&[0], &self.certificate_log.id()[..], &time, &[0, 0, 4, 3], &signature].concat();
        let len = timestamp.len() as u16;
        [&(len + 2).to_be_bytes()[..], &len.to_be_bytes(), &timestamp].concat()
    }

    /// The log's promise to keep an entry, by which the time is known.
    fn promise(&self, body: &str, time: i64) -> String {
        let id = hex(&self.log.id());
        let signed = format!(r#"{{"body":"{}","integratedTime":{time},"logID":"{id}","logIndex":5}}"#, base64(body));
        base64(self.log.sign(signed.as_bytes()))
    }

    /// An entry as cosign's annotation has it.
    pub(super) fn promised_entry(&self, body: &str, time: i64) -> Value {
        let payload =
            json!({ "body": base64(body), "integratedTime": time, "logIndex": 5, "logID": hex(&self.log.id()) });
        json!({ "SignedEntryTimestamp": self.promise(body, time), "Payload": payload })
    }

    /// An entry as bundles have it, with promise and proof: the first of two in its log.
    pub(super) fn proven_entry(&self, kind: &str, body: &str, time: i64) -> Value {
        let other = sha256(&[&[0], b"another entry"]);
        let root = base64(sha256(&[&[1], &sha256(&[&[0], body.as_bytes()]), &other]));
        let note = format!("log.example\n2\n{root}\n");
        let signature = [&self.log.id()[..4], &self.log.sign(note.as_bytes())].concat();
        let checkpoint = format!("{note}\n\u{2014} log.example {}\n", base64(signature));
        json!({
            "logIndex": "5",
            "logId": { "keyId": base64(self.log.id()) },
            "kindVersion": { "kind": kind, "version": "0.0.1" },
            "integratedTime": time.to_string(),
            "inclusionPromise": { "signedEntryTimestamp": self.promise(body, time) },
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": root,
                "treeSize": "2",
                "hashes": [base64(other)],
                "checkpoint": { "envelope": checkpoint },
            },
            "canonicalizedBody": base64(body),
        })
    }
}

/// The body of an entry for a signature of a message.
pub(super) fn hashed_record(leaf: &Leaf, message: &[u8], signature: &[u8]) -> String {
    let hash = json!({ "algorithm": "sha256", "value": hex(&sha256(&[message])) });
    let signature = json!({ "content": base64(signature), "publicKey": { "content": base64(pem(&leaf.der)) } });
    let spec = json!({ "data": { "hash": hash }, "signature": signature });
    json!({ "apiVersion": "0.0.1", "kind": "hashedrekord", "spec": spec }).to_string()
}

/// The body of an entry for an envelope.
pub(super) fn envelope_record(leaf: &Leaf, payload: &[u8], signature: &[u8]) -> String {
    let hash = json!({ "algorithm": "sha256", "value": hex(&sha256(&[payload])) });
    let signature = json!({ "signature": base64(signature), "verifier": base64(pem(&leaf.der)) });
    let spec = json!({ "envelopeHash": hash, "payloadHash": hash, "signatures": [signature] });
    json!({ "apiVersion": "0.0.1", "kind": "dsse", "spec": spec }).to_string()
}

/// The body of an entry in a log of the second version, whatever was signed.
pub(super) fn record_of_version_2(leaf: &Leaf, signed: &[u8], signature: &[u8]) -> String {
    let data = json!({ "algorithm": "SHA2_256", "digest": base64(sha256(&[signed])) });
    let certificate = json!({ "rawBytes": base64(&leaf.der) });
    let verifier = json!({ "keyDetails": "PKIX_ECDSA_P256_SHA_256", "x509Certificate": certificate });
    let record = json!({ "data": data, "signature": { "content": base64(signature), "verifier": verifier } });
    json!({ "apiVersion": "0.0.2", "kind": "hashedrekord", "spec": { "hashedRekordV002": record } }).to_string()
}
