//! Admits images by the signatures of keys and of certificates' holders, as cosign makes them.
//!
//! A signature lies beside its image: under a tag that is made of the image's digest, or as a referrer of it (distribution-spec 1.1).
//! Whatever a registry gives is a stranger's until a signer of the policy has signed it.

mod key;
#[cfg(feature = "keyless")]
mod keyless;
mod payload;
mod policy;

pub use key::PublicKey;
#[cfg(all(feature = "keyless", any(test, feature = "internals")))]
pub(crate) use keyless::keyless_signature;
#[cfg(feature = "keyless")]
pub use keyless::{CertificateIdentity, TrustRoot};
pub use policy::SignaturePolicy;

use serde::Deserialize;

use super::oci::{Descriptor, Digest};
use crate::error::{Context, Error, ErrorKind, Result};
use payload::Signature;
use policy::Rule;

/// Signatures of one image that are looked at, and the longest statement that is read.
const MAX_SIGNATURES: usize = 64;
/// Manifests and statements that are fetched for them, whatever is in them.
const MAX_FETCHED: usize = 2 * MAX_SIGNATURES;
const MAX_STATEMENT: u64 = 1 << 20;

const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const SIGNATURE_ANNOTATION: &str = "dev.cosignproject.cosign/signature";
/// What the types of bundles begin with, whatever their version.
const BUNDLE: &str = "application/vnd.dev.sigstore.bundle";

/// Where signatures are looked for. All that it gives is of the digest that was asked for, and not trusted beyond that.
pub(super) trait SignatureSource {
    /// The manifest or index under a tag; none where there is no such tag.
    fn tagged(&self, tag: &str) -> Result<Option<Vec<u8>>>;

    /// The index of all that refers to this image; none where the registry keeps no such lists.
    fn referrers(&self, image: &Digest) -> Result<Option<Vec<u8>>>;

    /// A manifest or blob of at most [`MAX_STATEMENT`] bytes.
    fn fetch(&self, what: &Descriptor) -> Result<Vec<u8>>;
}

/// As far as signatures are found by it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReferrerList {
    #[serde(default)]
    manifests: Vec<Referrer>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Referrer {
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(flatten)]
    descriptor: Descriptor,
}

#[derive(Deserialize)]
struct SignatureManifest {
    #[serde(default)]
    layers: Vec<Descriptor>,
}

/// Looks whether the policy admits an image: `name` without tag and digest, `manifest` what its reference leads to.
///
/// # Errors
/// `PermissionDenied` for one that is not admitted, with what was found. `InvalidConfig` for a policy that cannot be. Else what the
/// source fails with.
pub(super) fn admit(
    policy: &SignaturePolicy,
    name: &str,
    manifest: &[u8],
    digest: &Digest,
    source: &dyn SignatureSource,
) -> Result<()> {
    policy.check()?;
    let rule = policy.of(name);
    let signers = match rule {
        Rule::Accept => return Ok(()),
        Rule::Refuse => {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                format!("the signature policy refuses images of {name}"),
            ));
        }
        Rule::Require(keys) => format!("one of {} keys", keys.len()),
        #[cfg(feature = "keyless")]
        Rule::RequireIdentity(signers) => signers.to_string(),
    };
    let mut search = Search { manifest, digest, rule, source, seen: 0, fetched: 0, refused: None };
    if search.by_tag().doing(|| "looking for signatures by tag")?
        || search.by_referrers().doing(|| "looking for signatures by referrers")?
    {
        return Ok(());
    }
    let found = match search.refused {
        None => "there is none".to_owned(),
        Some(first) => format!("of {} that were found the first is {first}", search.seen),
    };
    let what = format!("the signature policy asks for a signature of {name}@{digest} by {signers}: {found}");
    Err(Error::new(ErrorKind::PermissionDenied, what))
}

struct Search<'a> {
    manifest: &'a [u8],
    digest: &'a Digest,
    rule: &'a Rule,
    source: &'a dyn SignatureSource,
    /// Signatures that were looked at.
    seen: usize,
    fetched: usize,
    /// Why the first of them admits nothing.
    refused: Option<String>,
}

impl Search<'_> {
    /// Under the tag that cosign makes of a digest.
    fn by_tag(&mut self) -> Result<bool> {
        let tag = format!("{}-{}.sig", self.digest.algorithm(), self.digest.hex());
        match self.source.tagged(&tag)? {
            None => Ok(false),
            Some(manifest) => self.in_manifest(&manifest),
        }
    }

    /// In the list of what refers to the image, which old registries keep under a tag.
    fn by_referrers(&mut self) -> Result<bool> {
        let list = match self.source.referrers(self.digest)? {
            Some(list) => Some(list),
            None => self.source.tagged(&format!("{}-{}", self.digest.algorithm(), self.digest.hex()))?,
        };
        let Some(list) = list else { return Ok(false) };
        let list: ReferrerList = match serde_json::from_slice(&list) {
            Ok(list) => list,
            Err(error) => {
                self.refuse(format!("in a list that cannot be read: {error}"));
                return Ok(false);
            }
        };
        let signs = |referrer: &&Referrer| {
            referrer.artifact_type.as_deref().is_none_or(|kind| kind.starts_with(BUNDLE) || kind.contains("cosign"))
        };
        for Referrer { descriptor, .. } in list.manifests.iter().filter(signs) {
            if self.is_over() {
                break;
            }
            let Some(manifest) = self.fetch(descriptor)? else { continue };
            if self.in_manifest(&manifest)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn in_manifest(&mut self, manifest: &[u8]) -> Result<bool> {
        let manifest: SignatureManifest = match serde_json::from_slice(manifest) {
            Ok(manifest) => manifest,
            Err(error) => {
                self.refuse(format!("in a manifest that cannot be read: {error}"));
                return Ok(false);
            }
        };
        for layer in &manifest.layers {
            let simple = layer.media_type == SIMPLE_SIGNING;
            if !simple && !layer.media_type.starts_with(BUNDLE) {
                continue;
            }
            if self.is_over() {
                self.refuse(format!("behind {MAX_SIGNATURES} others"));
                return Ok(false);
            }
            let Some(statement) = self.fetch(layer)? else { continue };
            match self.check(layer, &statement) {
                Ok(()) => return Ok(true),
                Err(why) => self.refuse(why),
            }
        }
        Ok(false)
    }

    /// Whether what a layer holds is a signature that the rule asks for.
    fn check(&self, layer: &Descriptor, statement: &[u8]) -> Result<(), String> {
        let simple = match (layer.media_type == SIMPLE_SIGNING, layer.annotations.get(SIGNATURE_ANNOTATION)) {
            (true, Some(signature)) => Some(signature),
            (true, None) => return Err("a payload without its signature".into()),
            (false, _) => None,
        };
        match (self.rule, simple) {
            (Rule::Require(keys), Some(signature)) => Signature::simple(statement, signature)?.check(self.digest, keys),
            (Rule::Require(keys), None) => {
                Signature::bundle(statement, self.manifest, self.digest)?.check(self.digest, keys)
            }
            #[cfg(feature = "keyless")]
            (Rule::RequireIdentity(signers), Some(signature)) => {
                signers.check_simple(statement, signature, &layer.annotations, self.digest)
            }
            #[cfg(feature = "keyless")]
            (Rule::RequireIdentity(signers), None) => signers.check_bundle(statement, self.manifest, self.digest),
            (Rule::Accept | Rule::Refuse, _) => Err("a signature that no rule asks for".into()),
        }
    }

    fn is_over(&self) -> bool {
        self.seen >= MAX_SIGNATURES || self.fetched >= MAX_FETCHED
    }

    /// None for one that is refused, as it is too long, not there or damaged.
    fn fetch(&mut self, what: &Descriptor) -> Result<Option<Vec<u8>>> {
        if what.size > MAX_STATEMENT {
            self.refuse(format!("of {} bytes, more than {MAX_STATEMENT}", what.size));
            return Ok(None);
        }
        self.fetched += 1;
        match self.source.fetch(what) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Corrupt) => {
                self.refuse(format!("not to be had: {error}"));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn refuse(&mut self, why: String) {
        self.seen += 1;
        self.refused.get_or_insert(why);
    }
}

/// A key for tests elsewhere.
#[cfg(test)]
pub(super) fn tests_key() -> &'static str {
    key::tests::P256_PEM
}

#[cfg(test)]
mod tests;
