//! Admits images by the certificates of their signers, which last for minutes.
//!
//! A signer proves who it is to an authority (Fulcio), gets a certificate, signs, and lets a log (Rekor) keep that. So the log's word of the time
//! is what an expired certificate is believed by. All is verified by what the embedder trusts; nothing is fetched from an authority or a log.

mod annotations;
#[cfg(any(test, feature = "internals"))]
mod fuzzing;
mod identity;
mod provider;
mod root;

#[cfg(any(test, feature = "internals"))]
pub(crate) use fuzzing::keyless_signature;
pub use identity::CertificateIdentity;
pub use root::TrustRoot;

use std::collections::BTreeMap;
use std::fmt;

use sigstore_verify::types::{Bundle, SignatureContent};

use super::payload;
use crate::container::image::oci::Digest;

/// By whom an image is to be signed, and by what that is believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Signers {
    pub(super) root: TrustRoot,
    pub(super) identities: Vec<CertificateIdentity>,
}

impl Signers {
    /// Whether one of them says by a payload and the annotations of its layer that it made this image.
    ///
    /// # Errors
    /// Why none does.
    pub(super) fn check_simple(
        &self,
        payload: &[u8],
        signature: &str,
        annotations: &BTreeMap<String, String>,
        image: &Digest,
    ) -> Result<(), String> {
        let names = payload::simple_names(payload)?;
        if names != *image {
            return Err(format!("a signature of another image, {names}"));
        }
        self.check(&annotations::bundle(payload, signature, annotations)?, payload)
    }

    /// Whether one of them says so by a bundle. `manifest` is the image's, of this digest.
    ///
    /// # Errors
    /// Why none does.
    pub(super) fn check_bundle(&self, bundle: &[u8], manifest: &[u8], image: &Digest) -> Result<(), String> {
        let bundle: Bundle = payload::parse_json(bundle, "the bundle")?;
        if let SignatureContent::DsseEnvelope(envelope) = &bundle.content {
            payload::check_statement(&envelope.payload_type, envelope.payload.as_bytes(), image)?;
        }
        self.check(&bundle, manifest)
    }

    fn check(&self, bundle: &Bundle, message: &[u8]) -> Result<(), String> {
        let signer = self.root.signer(bundle, message)?;
        match self.identities.iter().any(|identity| identity.is_of(&signer)) {
            true => Ok(()),
            false => Err(format!("a signature by another identity, {signer}")),
        }
    }
}

impl fmt::Display for Signers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.identities.as_slice() {
            [] => f.write_str("one of 0 identities"),
            [one] => one.fmt(f),
            [first, rest @ ..] => write!(f, "{first}, or {} other identities", rest.len()),
        }
    }
}

#[cfg(test)]
mod authority;
#[cfg(test)]
mod stamps;
#[cfg(test)]
mod tests;
