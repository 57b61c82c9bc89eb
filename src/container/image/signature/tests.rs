//! What is found of signatures, and what is not believed.

use std::cell::RefCell;
use std::collections::BTreeMap;

use serde_json::json;

use super::key::tests::{P256_PEM, P256_SIGNATURE, PAYLOAD};
use super::*;

pub(super) const NAME: &str = "registry.example/app";
pub(super) const IMAGE: &[u8] = b"manifest";

/// A registry in memory.
#[derive(Default)]
pub(super) struct Fake {
    tags: BTreeMap<String, Vec<u8>>,
    pub(super) referrers: Option<Vec<u8>>,
    blobs: BTreeMap<String, Vec<u8>>,
    fetched: RefCell<usize>,
}

impl SignatureSource for Fake {
    fn tagged(&self, tag: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.tags.get(tag).cloned())
    }

    fn referrers(&self, image: &Digest) -> Result<Option<Vec<u8>>> {
        assert_eq!(*image, Digest::sha256(IMAGE));
        Ok(self.referrers.clone())
    }

    fn fetch(&self, what: &Descriptor) -> Result<Vec<u8>> {
        *self.fetched.borrow_mut() += 1;
        let missing = || Error::new(ErrorKind::NotFound, "no such blob");
        self.blobs.get(&what.digest.to_string()).cloned().ok_or_else(missing)
    }
}

impl Fake {
    pub(super) fn blob(&mut self, bytes: &[u8], kind: &str) -> serde_json::Value {
        let digest = Digest::sha256(bytes).to_string();
        self.blobs.insert(digest.clone(), bytes.to_vec());
        json!({ "mediaType": kind, "digest": digest, "size": bytes.len() })
    }

    /// A layer of a simple signing manifest.
    pub(super) fn simple(&mut self, payload: &str, signature: &str) -> serde_json::Value {
        let mut layer = self.blob(payload.as_bytes(), SIMPLE_SIGNING);
        layer["annotations"] = json!({ SIGNATURE_ANNOTATION: signature });
        layer
    }

    /// The payload, signature and annotations of the first layer under a tag.
    #[cfg(feature = "keyless")]
    pub(super) fn first_simple(&self) -> (Vec<u8>, String, BTreeMap<String, String>) {
        let manifest: SignatureManifest = serde_json::from_slice(self.tags.values().next().unwrap()).unwrap();
        let layer = &manifest.layers[0];
        let payload = self.blobs[&layer.digest.to_string()].clone();
        (payload, layer.annotations[SIGNATURE_ANNOTATION].clone(), layer.annotations.clone())
    }

    pub(super) fn tag(&mut self, layers: &[serde_json::Value]) {
        let tag = Digest::sha256(IMAGE).to_string().replace(':', "-") + ".sig";
        self.tags.insert(tag, json!({ "schemaVersion": 2, "layers": layers }).to_string().into());
    }

    pub(super) fn refer(&mut self, layer: &serde_json::Value, kind: &str) -> Vec<u8> {
        let manifest = json!({ "schemaVersion": 2, "layers": [layer] }).to_string();
        let mut referrer = self.blob(manifest.as_bytes(), "application/vnd.oci.image.manifest.v1+json");
        referrer["artifactType"] = json!(kind);
        json!({ "schemaVersion": 2, "manifests": [referrer] }).to_string().into()
    }
}

fn required() -> SignaturePolicy {
    SignaturePolicy::refuse_all().require(NAME, [P256_PEM.parse().unwrap()])
}

pub(super) fn admit_by(policy: &SignaturePolicy, source: &Fake) -> Result<()> {
    admit(policy, NAME, IMAGE, &Digest::sha256(IMAGE), source)
}

/// The error's text of an image that is not admitted.
fn refused(source: &Fake) -> String {
    let error = admit_by(&required(), source).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    error.to_string()
}

#[test]
fn accepted_and_refused_names_need_no_signature() {
    let source = Fake::default();
    assert!(admit_by(&SignaturePolicy::accept_all(), &source).is_ok());
    let error = admit_by(&SignaturePolicy::refuse_all(), &source).unwrap_err();
    assert!(error.kind() == ErrorKind::PermissionDenied && error.to_string().contains(NAME), "{error}");
    assert!(refused(&source).contains("there is none"));
    let keyless = SignaturePolicy::accept_all().require(NAME, []);
    assert_eq!(admit_by(&keyless, &source).unwrap_err().kind(), ErrorKind::PermissionDenied);
    let wrong = SignaturePolicy::accept_all().accept("debian");
    assert_eq!(admit_by(&wrong, &source).unwrap_err().kind(), ErrorKind::InvalidConfig);
}

#[test]
fn signature_under_a_tag_is_found_among_others() {
    let mut source = Fake::default();
    let bad = source.simple(PAYLOAD, "AAAA");
    let other = source.blob(b"inventory", "text/spdx");
    let good = source.simple(PAYLOAD, P256_SIGNATURE);
    source.tag(&[bad.clone(), other]);
    assert!(refused(&source).contains("another key"));
    source.tag(&[bad, good]);
    admit_by(&required(), &source).unwrap();
}

#[test]
fn signature_is_found_as_a_referrer_with_and_without_the_list() {
    let mut source = Fake::default();
    let layer = source.simple(PAYLOAD, P256_SIGNATURE);
    let list = source.refer(&layer, "application/vnd.dev.cosign.artifact.sig.v1+json");
    source.referrers = Some(list.clone());
    admit_by(&required(), &source).unwrap();
    // Where the registry keeps no lists, an index under a tag.
    source.referrers = None;
    assert!(refused(&source).contains("there is none"));
    source.tags.insert(Digest::sha256(IMAGE).to_string().replace(':', "-"), list);
    admit_by(&required(), &source).unwrap();
    // Other things that refer to the image are not even fetched.
    let mut source = Fake::default();
    let layer = source.simple(PAYLOAD, P256_SIGNATURE);
    source.referrers = Some(source.refer(&layer, "application/spdx+json"));
    assert!(refused(&source).contains("there is none") && *source.fetched.borrow() == 0);
}

#[test]
fn damaged_lists_and_manifests_admit_nothing() {
    let mut source = Fake { referrers: Some(b"[".to_vec()), ..Fake::default() };
    assert!(refused(&source).contains("list that cannot be read"));
    source.tag(&[]);
    source.tags.values_mut().for_each(|manifest| manifest.truncate(9));
    assert!(refused(&source).contains("manifest that cannot be read"));
    let mut source = Fake::default();
    let mut layer = source.simple(PAYLOAD, P256_SIGNATURE);
    layer["annotations"] = json!({});
    source.tag(&[layer]);
    assert!(refused(&source).contains("without its signature"));
}

#[test]
fn search_for_signatures_is_bounded() {
    let mut source = Fake::default();
    let mut large = source.simple(PAYLOAD, P256_SIGNATURE);
    large["size"] = json!(MAX_STATEMENT + 1);
    source.tag(&[large]);
    assert!(refused(&source).contains("bytes, more than") && *source.fetched.borrow() == 0);
    let bad = source.simple(PAYLOAD, "AAAA");
    let good = source.simple(PAYLOAD, P256_SIGNATURE);
    let mut layers = vec![bad; MAX_SIGNATURES];
    layers.push(good.clone());
    source.tag(&layers);
    assert!(refused(&source).contains(&format!("of {} that were found", MAX_SIGNATURES + 1)));
    assert_eq!(*source.fetched.borrow(), MAX_SIGNATURES);
    // As many referrers.
    let manifest = json!({ "layers": layers[..1] }).to_string();
    let referrer = source.blob(manifest.as_bytes(), "application/vnd.oci.image.manifest.v1+json");
    source.tags.clear();
    *source.fetched.borrow_mut() = 0;
    source.referrers = Some(json!({ "manifests": vec![referrer; 10 * MAX_SIGNATURES] }).to_string().into());
    refused(&source);
    assert_eq!(*source.fetched.borrow(), 2 * MAX_SIGNATURES);
}

#[test]
fn referrers_without_signatures_are_fetched_up_to_a_bound() {
    let mut source = Fake::default();
    let empty = source.blob(b"{}", "application/vnd.oci.image.manifest.v1+json");
    source.referrers = Some(json!({ "manifests": vec![empty; 10 * MAX_FETCHED] }).to_string().into());
    refused(&source);
    assert_eq!(*source.fetched.borrow(), MAX_FETCHED);
}

#[test]
fn referrer_that_is_not_there_does_not_end_the_search() {
    let mut source = Fake::default();
    let layer = source.simple(PAYLOAD, P256_SIGNATURE);
    let list = source.refer(&layer, "application/vnd.dev.cosign.artifact.sig.v1+json");
    let mut list: serde_json::Value = serde_json::from_slice(&list).unwrap();
    let good = list["manifests"][0].clone();
    let missing = json!({ "mediaType": good["mediaType"], "digest": Digest::sha256(b"none").to_string(), "size": 4 });
    list["manifests"] = json!([missing, good]);
    source.referrers = Some(list.to_string().into());
    admit_by(&required(), &source).unwrap();
    list["manifests"] = json!([missing]);
    source.referrers = Some(list.to_string().into());
    assert!(refused(&source).contains("not to be had"));
}
