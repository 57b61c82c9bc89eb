//! The signed statements that name an image's digest, in the forms that cosign writes.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::PublicKey;
use crate::container::image::oci::Digest;
use crate::container::image::path::shown;

/// The type of a simple signing payload (containers/image, docs/containers-signature.5.md; cosign, specs/SIGNATURE_SPEC.md).
const SIMPLE_SIGNING: &str = "cosign container image signature";
/// The type of an in-toto statement in an envelope, and what it must say to be an image's signature.
const IN_TOTO: &str = "application/vnd.in-toto+json";
const IMAGE_SIGNATURE: &str = "https://sigstore.dev/cosign/sign/v1";

/// One signature that was found, and what it is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Signature {
    /// The signed bytes.
    message: Vec<u8>,
    signature: Vec<u8>,
    /// The image that they name.
    names: Digest,
}

#[derive(Deserialize)]
struct SimpleSigning {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: CriticalImage,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct CriticalImage {
    #[serde(rename = "docker-manifest-digest")]
    digest: Digest,
}

/// A bundle of Sigstore (protobuf-specs, sigstore_bundle.proto), as far as keys need it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    message_signature: Option<MessageSignature>,
    dsse_envelope: Option<Envelope>,
}

#[derive(Deserialize)]
struct MessageSignature {
    signature: String,
}

/// DSSE, Dead Simple Signing Envelope (secure-systems-lab/dsse, envelope.md).
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<EnvelopeSignature>,
}

#[derive(Deserialize)]
struct EnvelopeSignature {
    sig: String,
}

/// An in-toto statement (in-toto/attestation, spec/v1/statement.md).
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Statement {
    subject: Vec<Subject>,
    predicate_type: String,
}

#[derive(Deserialize)]
struct Subject {
    digest: std::collections::BTreeMap<String, String>,
}

impl Signature {
    /// A payload with its signature in base64, as they lie under a tag.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn simple(payload: &[u8], signature: &str) -> Result<Self, String> {
        let names = simple_names(payload)?;
        Ok(Self { message: payload.to_vec(), signature: decode(signature)?, names })
    }

    /// What a bundle holds. `image` is the manifest or index of this digest, which a bundle may sign as it is.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn bundle(bundle: &[u8], image: &[u8], digest: &Digest) -> Result<Self, String> {
        let bundle: Bundle = parse_json(bundle, "the bundle")?;
        match (bundle.message_signature, bundle.dsse_envelope) {
            (Some(signed), None) => {
                let signature = decode(&signed.signature)?;
                Ok(Self { message: image.to_vec(), signature, names: digest.clone() })
            }
            (None, Some(envelope)) => Self::envelope(&envelope, digest),
            _ => Err("a bundle without one signature".into()),
        }
    }

    fn envelope(envelope: &Envelope, digest: &Digest) -> Result<Self, String> {
        let payload = decode(&envelope.payload)?;
        check_statement(&envelope.payload_type, &payload, digest)?;
        let [one] = envelope.signatures.as_slice() else {
            return Err("an envelope without exactly one signature".into());
        };
        let head = format!("DSSEv1 {} {IN_TOTO} {} ", IN_TOTO.len(), payload.len());
        Ok(Self { message: [head.as_bytes(), &payload].concat(), signature: decode(&one.sig)?, names: digest.clone() })
    }

    /// Whether one of `keys` says by it that it made this image.
    ///
    /// # Errors
    /// Why it does not.
    pub(super) fn check(&self, image: &Digest, keys: &[PublicKey]) -> Result<(), String> {
        if self.names != *image {
            return Err(format!("a signature of another image, {}", self.names));
        }
        match keys.iter().any(|key| key.verifies(&self.message, &self.signature)) {
            true => Ok(()),
            false => Err("a signature by another key".into()),
        }
    }
}

/// The image that a simple signing payload names. Its name of an image is not looked at, as cosign does not either.
///
/// # Errors
/// What is wrong with it.
pub(super) fn simple_names(payload: &[u8]) -> Result<Digest, String> {
    let SimpleSigning { critical } = parse_json(payload, "the payload")?;
    match critical.kind == SIMPLE_SIGNING {
        true => Ok(critical.image.digest),
        false => Err(format!("a payload of type {}", shown(critical.kind.as_bytes()))),
    }
}

/// Whether a statement in an envelope is a signature of this image.
///
/// # Errors
/// Why it is not.
pub(super) fn check_statement(kind: &str, payload: &[u8], image: &Digest) -> Result<(), String> {
    if kind != IN_TOTO {
        return Err(format!("an envelope of type {}", shown(kind.as_bytes())));
    }
    let statement: Statement = parse_json(payload, "the statement")?;
    // Other statements of the same signer, an inventory for instance, admit nothing.
    if statement.predicate_type != IMAGE_SIGNATURE {
        return Err(format!("a statement of type {}", shown(statement.predicate_type.as_bytes())));
    }
    let names = |subject: &Subject| subject.digest.get(image.algorithm()).is_some_and(|hex| hex == image.hex());
    match statement.subject.iter().any(names) {
        true => Ok(()),
        false => Err("a statement of another image".into()),
    }
}

pub(super) fn parse_json<'a, T: Deserialize<'a>>(bytes: &'a [u8], what: &str) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("{what} cannot be read: {error}"))
}

fn decode(text: &str) -> Result<Vec<u8>, String> {
    STANDARD.decode(text).map_err(|_| "a signature that is not base64".into())
}

#[cfg(test)]
mod tests {
    use super::super::key::tests::{P256_PEM, P256_SIGNATURE, PAYLOAD};
    use super::*;

    const STATEMENT: &str = "eyJfdHlwZSI6Imh0dHBzOi8vaW4tdG90by5pby9TdGF0ZW1lbnQvdjEiLCJzdWJqZWN0IjpbeyJkaWdlc3QiOnsic2hhMjU2IjoiMDViM2FiZjI1NzlhNWViNjY0MDNjZDc4YmU1NTdmZDg2MDYzM2ExZmUyMTAzYzc2NDIwMzBkZWZlMzJjNjU3ZiJ9fV0sInByZWRpY2F0ZVR5cGUiOiJodHRwczovL3NpZ3N0b3JlLmRldi9jb3NpZ24vc2lnbi92MSIsInByZWRpY2F0ZSI6e319";
    const STATEMENT_SIGNATURE: &str =
        "MEYCIQCLkBOBiOnJ8DR51mOQZzhL0N8ffOQTTxqQmV0bS7RK3AIhAP5JAUGoRD/3r2KBlG+WmLjjxnwTKpYEI3B4Hjc/IpRL";
    const OTHER_STATEMENT: &str = "eyJfdHlwZSI6Imh0dHBzOi8vaW4tdG90by5pby9TdGF0ZW1lbnQvdjEiLCJzdWJqZWN0IjpbeyJkaWdlc3QiOnsic2hhMjU2IjoiMDViM2FiZjI1NzlhNWViNjY0MDNjZDc4YmU1NTdmZDg2MDYzM2ExZmUyMTAzYzc2NDIwMzBkZWZlMzJjNjU3ZiJ9fV0sInByZWRpY2F0ZVR5cGUiOiJodHRwczovL3NpZ3N0b3JlLmRldi9jb3NpZ24vb3RoZXIvdjEiLCJwcmVkaWNhdGUiOnt9fQ==";
    const OTHER_SIGNATURE: &str =
        "MEUCIQDznLMLV2veVWDIJgekKsVZ3KIQ5AIsS/IIPN+pVklhXQIgOdS0TvIot+5IH/fEKeH9lLY27h39YR59ZWC2Tt09kI0=";
    const MANIFEST_SIGNATURE: &str =
        "MEUCIQDOzpiVy3QGunGjaulaIqsqR82IFEb14MdclsrTIs9J1QIgesS5a6N5nIL+bgLWwXTUuM7nv251d3L45iBlul5xM6A=";

    fn keys() -> Vec<PublicKey> {
        vec![P256_PEM.parse().unwrap()]
    }

    fn envelope(payload: &str, kind: &str, signatures: &[&str]) -> String {
        let signatures: Vec<_> = signatures.iter().map(|sig| serde_json::json!({ "sig": sig, "keyid": "" })).collect();
        let envelope = serde_json::json!({ "payload": payload, "payloadType": kind, "signatures": signatures });
        serde_json::json!({ "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": envelope })
            .to_string()
    }

    fn check(bundle: &str) -> Result<(), String> {
        let digest = Digest::sha256(b"manifest");
        Signature::bundle(bundle.as_bytes(), b"manifest", &digest)?.check(&digest, &keys())
    }

    #[test]
    fn simple_payload_admits_the_image_that_it_names() {
        let signature = Signature::simple(PAYLOAD.as_bytes(), P256_SIGNATURE).unwrap();
        assert_eq!(signature.check(&Digest::sha256(b"manifest"), &keys()), Ok(()));
        let other = signature.check(&Digest::sha256(b"other"), &keys()).unwrap_err();
        assert!(other.contains("another image"), "{other}");
        assert!(signature.check(&Digest::sha256(b"manifest"), &[]).unwrap_err().contains("another key"));
        // What is signed is the payload, not what it says.
        let other = PAYLOAD.replace("registry.example", "registry.exampl3");
        let changed = Signature::simple(other.as_bytes(), P256_SIGNATURE).unwrap();
        assert!(changed.check(&Digest::sha256(b"manifest"), &keys()).unwrap_err().contains("another key"));
        let kind = PAYLOAD.replace("cosign container", "atomic container");
        assert!(Signature::simple(kind.as_bytes(), P256_SIGNATURE).unwrap_err().contains("atomic container"));
        for broken in ["", "{}", "[]", "{\"critical\":1}"] {
            assert!(Signature::simple(broken.as_bytes(), P256_SIGNATURE).is_err(), "{broken}");
        }
        assert!(Signature::simple(PAYLOAD.as_bytes(), "!").unwrap_err().contains("base64"));
    }

    #[test]
    fn statement_in_a_bundle_admits_the_image_that_it_names() {
        assert_eq!(check(&envelope(STATEMENT, IN_TOTO, &[STATEMENT_SIGNATURE])), Ok(()));
        let digest = Digest::sha256(b"other");
        let bundle = envelope(STATEMENT, IN_TOTO, &[STATEMENT_SIGNATURE]);
        assert!(Signature::bundle(bundle.as_bytes(), b"other", &digest).unwrap_err().contains("another image"));
        assert!(check(&envelope(STATEMENT, "text/plain", &[STATEMENT_SIGNATURE])).unwrap_err().contains("text/plain"));
        assert!(check(&envelope(STATEMENT, IN_TOTO, &[OTHER_SIGNATURE])).unwrap_err().contains("another key"));
        // Well signed, and about something else than who made the image.
        assert!(check(&envelope(OTHER_STATEMENT, IN_TOTO, &[OTHER_SIGNATURE])).unwrap_err().contains("cosign/other"));
        for signatures in [&[][..], &[STATEMENT_SIGNATURE, STATEMENT_SIGNATURE]] {
            assert!(check(&envelope(STATEMENT, IN_TOTO, signatures)).unwrap_err().contains("exactly one"));
        }
    }

    #[test]
    fn bundle_may_sign_the_manifest_itself() {
        let bundle = |signature: &str| {
            let signed = serde_json::json!({ "messageDigest": { "algorithm": "SHA2_256", "digest": "" }, "signature": signature });
            serde_json::json!({ "messageSignature": signed }).to_string()
        };
        assert_eq!(check(&bundle(MANIFEST_SIGNATURE)), Ok(()));
        assert!(check(&bundle(P256_SIGNATURE)).unwrap_err().contains("another key"));
        for broken in ["{}", "", "{\"messageSignature\":{}}"] {
            assert!(check(broken).is_err(), "{broken}");
        }
    }
}
