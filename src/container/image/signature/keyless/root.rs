//! [`TrustRoot`]: the authorities and logs by which certificates of signers are believed.

use std::fmt;
use std::sync::Arc;

use sigstore_verify::trust_root::TrustedRoot;
use sigstore_verify::types::Bundle;
use sigstore_verify::types::bundle::VerificationMaterialContent;
use sigstore_verify::{VerificationPolicy, Verifier};

use super::identity::Signer;
use super::provider;
use crate::container::image::oci::Digest;
use crate::container::image::path::shown;
use crate::error::{Error, Result};

/// The longest trust root that is read.
const MAX_TRUST_ROOT: usize = 1 << 20;
/// What a bundle may have of each: more would be work for nothing.
const MAX_LOG_ENTRIES: usize = 2;
const MAX_TIMESTAMPS: usize = 2;
const MAX_CERTIFICATES: usize = 6;
/// The longest proof of a log with 2^63 entries.
const MAX_PROOF: usize = 64;
/// Those of the log and of its witnesses.
const MAX_CHECKPOINT_SIGNATURES: usize = 16;
/// Bytes of each. Parsers of DER sort sets, so their work is the square of that. Real ones have 2, 6 and 5 KiB.
const MAX_CERTIFICATE: usize = 8 << 10;
const MAX_TIMESTAMP: usize = 16 << 10;
const MAX_BODY: usize = 32 << 10;

/// The authorities and logs of Sigstore, or of another that works as it does.
///
/// They are read from the file `trusted_root.json`, which `cosign trusted-root create` makes and Sigstore gives out by TUF. The embedder keeps it
/// current: nothing is fetched. A clone is cheap, and two are equal when their files are.
#[derive(Clone)]
pub struct TrustRoot(Arc<Trusted>);

struct Trusted {
    verifier: Verifier,
    /// Whether certificates must prove that a log of certificates has them.
    has_certificate_logs: bool,
    file: Digest,
}

impl TrustRoot {
    /// Parses the bytes of a `trusted_root.json` (Sigstore protobuf-specs, `sigstore_trustroot.proto`).
    ///
    /// The first call sets the process's arithmetic for the crate `sigstore-verify`, unless the embedder has set one. Other users of that crate
    /// in the process set theirs before: this one checks no signature of a bare hash.
    ///
    /// # Errors
    /// `InvalidConfig` for bytes that are no trust root, and for one without a certificate authority or a transparency log. The same for keys and
    /// certificates in it that cannot be. `Unsupported` when the processor lacks instructions that the arithmetic needs.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let invalid = |what: String| Error::invalid("TrustRoot::from_json", what);
        if json.len() > MAX_TRUST_ROOT {
            return Err(invalid(format!("{} bytes, more than {MAX_TRUST_ROOT}", json.len())));
        }
        if !super::super::key::supported() {
            return Err(super::super::key::unsupported());
        }
        provider::install();
        let text = std::str::from_utf8(json).map_err(|error| invalid(error.to_string()))?;
        let root = TrustedRoot::from_json(text).map_err(|error| invalid(error.to_string()))?;
        if root.certificate_authorities.is_empty() {
            return Err(invalid("no certificate authority is in it".into()));
        }
        if root.tlogs.is_empty() {
            return Err(invalid("no transparency log is in it".into()));
        }
        let verifier = Verifier::new(&root).map_err(|error| invalid(error.to_string()))?;
        let has_certificate_logs = !root.ctlogs.is_empty();
        Ok(Self(Arc::new(Trusted { verifier, has_certificate_logs, file: Digest::sha256(json) })))
    }

    /// Who has signed `message`, as far as a bundle proves it.
    ///
    /// # Errors
    /// What it does not prove.
    pub(super) fn signer(&self, bundle: &Bundle, message: &[u8]) -> Result<Signer, String> {
        check_size(bundle)?;
        let mut policy = VerificationPolicy::any_identity();
        if !self.0.has_certificate_logs {
            policy = policy.skip_sct();
        }
        let found = provider::with_message(message, || self.0.verifier.verify(message, bundle, &policy));
        let found = found.map_err(|error| format!("not proven: {}", shown(error.to_string().as_bytes())))?;
        Signer::new(found.identity(), found.issuer()).ok_or_else(|| "a certificate of no identity".to_owned())
    }
}

/// Bounds the work that a stranger's bundle makes.
fn check_size(bundle: &Bundle) -> Result<(), String> {
    let material = &bundle.verification_material;
    let certificates: Vec<usize> = match &material.content {
        VerificationMaterialContent::X509CertificateChain { certificates } => {
            certificates.iter().map(|it| it.raw_bytes.as_bytes().len()).collect()
        }
        VerificationMaterialContent::Certificate(it) => vec![it.raw_bytes.as_bytes().len()],
        _ => Vec::new(),
    };
    let timestamps = &material.timestamp_verification_data.rfc3161_timestamps;
    let timestamps: Vec<usize> = timestamps.iter().map(|it| it.signed_timestamp.as_bytes().len()).collect();
    let bodies: Vec<usize> = material.tlog_entries.iter().map(|it| it.canonicalized_body.as_bytes().len()).collect();
    let longest = |of: &[usize]| of.iter().copied().max().unwrap_or(0);
    let proofs = || material.tlog_entries.iter().filter_map(|entry| entry.inclusion_proof.as_ref());
    let hashes = proofs().map(|proof| proof.hashes.len()).max().unwrap_or(0);
    let signatures = proofs().filter_map(|proof| proof.checkpoint.checkpoint()).map(|it| it.signatures().len());
    let signatures = signatures.max().unwrap_or(0);
    if certificates.is_empty() {
        return Err("without a certificate".into());
    }
    if bodies.is_empty() {
        return Err("without an entry of a transparency log".into());
    }
    for (count, most, what) in [
        (certificates.len(), MAX_CERTIFICATES, "certificates"),
        (bodies.len(), MAX_LOG_ENTRIES, "entries of logs"),
        (timestamps.len(), MAX_TIMESTAMPS, "timestamps"),
        (longest(&certificates), MAX_CERTIFICATE, "bytes of a certificate"),
        (longest(&bodies), MAX_BODY, "bytes of a log entry"),
        (longest(&timestamps), MAX_TIMESTAMP, "bytes of a timestamp"),
        (hashes, MAX_PROOF, "hashes of a proof"),
        (signatures, MAX_CHECKPOINT_SIGNATURES, "signatures of a checkpoint"),
    ] {
        if count > most {
            return Err(format!("with {count} {what}, more than {most}"));
        }
    }
    Ok(())
}

impl PartialEq for TrustRoot {
    fn eq(&self, other: &Self) -> bool {
        self.0.file == other.0.file
    }
}

impl Eq for TrustRoot {}

impl fmt::Debug for TrustRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustRoot({})", self.0.file)
    }
}
