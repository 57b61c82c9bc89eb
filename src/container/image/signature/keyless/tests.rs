//! What keyless signatures prove, in each of their forms, and what they do not.

use serde_json::{Value, json};

use super::super::tests::{Fake, IMAGE, NAME, admit_by};
use super::super::{BUNDLE, SIGNATURE_ANNOTATION, SignaturePolicy};
use super::authority::*;
use super::*;
use crate::error::{ErrorKind, Result};

mod timestamps;

const WORKFLOW: &str = "https://git.example/team/app/ci.yml@refs/heads/main";
const ISSUER: &str = "https://issuer.example";
const STATEMENT: &str = "application/vnd.in-toto+json";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Under a tag, in annotations.
    Annotations,
    /// A bundle with a statement in an envelope.
    Statement,
    /// A bundle with a signature of the manifest.
    Manifest,
}

const FORMS: [Form; 3] = [Form::Annotations, Form::Statement, Form::Manifest];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    OtherEntry,
    Tampered,
    NoEntry,
    NoPromise,
    NoProof,
    BadPromise,
    BadProof,
}

/// How an image is signed.
#[derive(Clone, Copy)]
struct Signing<'a> {
    form: Form,
    key: KeyKind,
    certifier: &'a Authority,
    log: &'a Authority,
    identity: &'a str,
    issuer: &'a str,
    in_certificate_log: bool,
    time: i64,
    image: &'a [u8],
    flaw: Flaw,
}

impl<'a> Signing<'a> {
    fn good(authority: &'a Authority, form: Form) -> Self {
        Self {
            form,
            key: KeyKind::P256,
            certifier: authority,
            log: authority,
            identity: WORKFLOW,
            issuer: ISSUER,
            in_certificate_log: true,
            time: ISSUED + 60,
            image: IMAGE,
            flaw: Flaw::None,
        }
    }

    fn leaf(&self) -> Leaf {
        self.certifier.certify(Key::new(self.key), self.identity, self.issuer, self.in_certificate_log)
    }

    fn source(&self) -> Fake {
        match self.form {
            Form::Annotations => self.annotations(&self.leaf()),
            Form::Statement | Form::Manifest => with_bundle(&self.bundle(&self.leaf())),
        }
    }

    fn annotations(&self, leaf: &Leaf) -> Fake {
        let digest = Digest::sha256(self.image).to_string();
        let image = json!({ "docker-manifest-digest": digest });
        let identity = json!({ "docker-reference": "elsewhere.example/other" });
        let critical = json!({ "identity": identity, "image": image, "type": "cosign container image signature" });
        let mut payload = json!({ "critical": critical }).to_string();
        let signature = leaf.key.sign(payload.as_bytes());
        let body = match self.flaw {
            Flaw::OtherEntry => hashed_record(leaf, b"other", &leaf.key.sign(b"other")),
            _ => hashed_record(leaf, payload.as_bytes(), &signature),
        };
        let mut entry = self.log.promised_entry(&body, self.time);
        match self.flaw {
            Flaw::BadPromise => entry["Payload"]["integratedTime"] = json!(self.time + 1),
            Flaw::NoPromise => entry["SignedEntryTimestamp"] = json!(""),
            Flaw::Tampered => payload = payload.replace("other", "app"),
            _ => {}
        }
        let mut source = Fake::default();
        let mut layer = source.simple(&payload, &base64(signature));
        let annotations = &mut layer["annotations"];
        assert!(annotations[SIGNATURE_ANNOTATION].is_string());
        annotations["dev.sigstore.cosign/certificate"] = json!(pem(&leaf.der));
        annotations["dev.sigstore.cosign/chain"] =
            json!(pem(&self.certifier.intermediate_der) + &pem(&self.certifier.root_der));
        if self.flaw != Flaw::NoEntry {
            annotations["dev.sigstore.cosign/bundle"] = json!(entry.to_string());
        }
        source.tag(&[layer]);
        source
    }

    fn bundle(&self, leaf: &Leaf) -> Value {
        let (kind, body, name, content) = match self.form {
            Form::Statement => {
                let subject = json!([{ "digest": { "sha256": Digest::sha256(self.image).hex() } }]);
                let statement = json!({ "_type": "https://in-toto.io/Statement/v1", "subject": subject, "predicateType": "https://sigstore.dev/cosign/sign/v1", "predicate": {} });
                let mut payload = statement.to_string();
                let signature = leaf.key.sign_envelope(encoded(&payload).as_bytes());
                let body = match self.flaw {
                    Flaw::OtherEntry => envelope_record(leaf, b"other", &leaf.key.sign(b"other")),
                    _ => envelope_record(leaf, payload.as_bytes(), &signature),
                };
                if self.flaw == Flaw::Tampered {
                    payload = payload.replace("\"predicate\":{}", "\"predicate\":[]");
                }
                let content = json!({ "payload": base64(payload), "payloadType": STATEMENT, "signatures": [{ "sig": base64(signature) }] });
                ("dsse", body, "dsseEnvelope", content)
            }
            _ => {
                let signature = leaf.key.sign(self.image);
                let body = match self.flaw {
                    Flaw::OtherEntry => hashed_record(leaf, self.image, &leaf.key.sign(self.image)),
                    _ => hashed_record(leaf, self.image, &signature),
                };
                let mut digest = sha256(&[self.image]);
                if self.flaw == Flaw::Tampered {
                    digest[0] ^= 1;
                }
                let digest = json!({ "algorithm": "SHA2_256", "digest": base64(digest) });
                let content = json!({ "messageDigest": digest, "signature": base64(signature) });
                ("hashedrekord", body, "messageSignature", content)
            }
        };
        let mut entry = self.log.proven_entry(kind, &body, self.time);
        match self.flaw {
            Flaw::BadPromise => entry["integratedTime"] = json!((self.time + 1).to_string()),
            Flaw::BadProof => entry["inclusionProof"]["hashes"] = json!([base64([1; 32])]),
            Flaw::NoPromise => drop(entry.as_object_mut().unwrap().remove("inclusionPromise")),
            Flaw::NoProof => drop(entry.as_object_mut().unwrap().remove("inclusionProof")),
            _ => {}
        }
        let entries = if self.flaw == Flaw::NoEntry { json!([]) } else { json!([entry]) };
        let material = json!({ "certificate": { "rawBytes": base64(&leaf.der) }, "tlogEntries": entries });
        json!({ "mediaType": format!("{BUNDLE}.v0.3+json"), "verificationMaterial": material, name: content })
    }
}

/// What is signed of an envelope.
fn encoded(payload: &str) -> String {
    format!("DSSEv1 {} {STATEMENT} {} {payload}", STATEMENT.len(), payload.len())
}

/// A registry that has a bundle for the image.
fn with_bundle(bundle: &Value) -> Fake {
    let mut source = Fake::default();
    let kind = format!("{BUNDLE}.v0.3+json");
    let layer = source.blob(bundle.to_string().as_bytes(), &kind);
    source.referrers = Some(source.refer(&layer, &kind));
    source
}

fn trust(root: &Value) -> TrustRoot {
    TrustRoot::from_json(root.to_string().as_bytes()).unwrap()
}

fn policy(root: &TrustRoot, identity: CertificateIdentity) -> SignaturePolicy {
    SignaturePolicy::refuse_all().require_identity(NAME, root, [identity])
}

fn expected() -> CertificateIdentity {
    CertificateIdentity::new(WORKFLOW, ISSUER)
}

fn admitted(authority: &Authority, signing: Signing<'_>) -> Result<()> {
    admit_by(&policy(&trust(&authority.trust_root()), expected()), &signing.source())
}

/// The error's text of an image that is not admitted.
fn refused(authority: &Authority, signing: Signing<'_>) -> String {
    let error = admitted(authority, signing).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    error.to_string()
}

#[test]
fn good_signatures_are_admitted_in_each_form() {
    let authority = Authority::new();
    let root = trust(&authority.trust_root());
    for form in FORMS {
        let signing = Signing::good(&authority, form);
        admitted(&authority, signing).unwrap();
        for identity in [
            CertificateIdentity::uri_prefix("https://git.example/team/app/", ISSUER),
            CertificateIdentity::uri_prefix("https://git.example/team/app/ci.yml@", ISSUER),
        ] {
            admit_by(&policy(&root, identity), &signing.source()).unwrap();
        }
        // People have addresses.
        let signing = Signing { identity: "dev@team.example", ..signing };
        admit_by(&policy(&root, CertificateIdentity::email_domain("team.example", ISSUER)), &signing.source()).unwrap();
        // One of several is enough.
        let none = CertificateIdentity::new("ops@team.example", ISSUER);
        let both = [none.clone(), CertificateIdentity::new("dev@team.example", ISSUER)];
        let of = |identities: &[CertificateIdentity]| {
            let policy = SignaturePolicy::refuse_all().require_identity(NAME, &root, identities.to_vec());
            admit_by(&policy, &signing.source())
        };
        of(&both).unwrap();
        for identities in [&[][..], &[none]] {
            assert_eq!(of(identities).unwrap_err().kind(), ErrorKind::PermissionDenied);
        }
    }
}

#[test]
fn signers_may_have_keys_of_each_kind() {
    let authority = Authority::new();
    for key in [KeyKind::P384, KeyKind::Ed25519, KeyKind::Rsa] {
        for form in FORMS {
            let good = Signing { key, ..Signing::good(&authority, form) };
            let admitted = admitted(&authority, good);
            assert!(admitted.is_ok(), "{key:?} {form:?}: {admitted:?}");
            refused(&authority, Signing { flaw: Flaw::Tampered, ..good });
            // Another key of the kind has signed.
            if form != Form::Annotations {
                let (leaf, other) = (good.leaf(), good.leaf());
                let mixed = Leaf { key: other.key, der: leaf.der };
                let error = check(&trust(&authority.trust_root()), &good.bundle(&mixed)).unwrap_err();
                assert!(error.contains("signature verification failed"), "{key:?} {form:?}: {error}");
            }
        }
    }
}

#[test]
fn other_signers_are_refused_with_what_was_found() {
    let authority = Authority::new();
    for form in FORMS {
        let good = Signing::good(&authority, form);
        let text = refused(&authority, Signing { identity: "https://git.example/other/ci.yml@main", ..good });
        for word in [WORKFLOW, "another identity", "https://git.example/other/ci.yml@main", ISSUER] {
            assert!(text.contains(word), "{form:?}: {text}");
        }
        let text = refused(&authority, Signing { issuer: "https://other.example", ..good });
        for word in [ISSUER, "another identity", "https://other.example"] {
            assert!(text.contains(word), "{form:?}: {text}");
        }
    }
}

#[test]
fn what_is_not_proven_is_refused() {
    let (authority, other) = (Authority::new(), Authority::new());
    for form in FORMS {
        let good = Signing::good(&authority, form);
        let simple = form == Form::Annotations;
        let check = |signing: Signing<'_>, word: &str| {
            let text = refused(&authority, signing);
            assert!(text.contains(word), "{form:?} {:?}: {text}", signing.flaw);
        };
        check(Signing { certifier: &other, ..good }, "InvalidSignatureForPublicKey");
        check(Signing { log: &other, ..good }, "No log key");
        check(Signing { in_certificate_log: false, ..good }, "missing SCT");
        check(Signing { time: ISSUED + 601, ..good }, "CertExpired");
        check(Signing { time: ISSUED - 1, ..good }, "CertNotValidYet");
        let image = if form == Form::Manifest { "message digest in bundle" } else { "another image" };
        check(Signing { image: b"other", ..good }, image);
        let flaw = |flaw| Signing { flaw, ..good };
        let entry = match form {
            Form::Annotations => "artifact hash mismatch",
            Form::Statement => "payload hash mismatch",
            Form::Manifest => "does not match signature in Rekor entry",
        };
        check(flaw(Flaw::OtherEntry), entry);
        check(flaw(Flaw::Tampered), if form == Form::Manifest { "message digest" } else { "invalid signature" });
        check(flaw(Flaw::NoEntry), "without an entry of a transparency log");
        check(flaw(Flaw::BadPromise), "SET verification failed");
        check(flaw(Flaw::NoPromise), if simple { "SET verification failed" } else { "no verified timestamp" });
        if !simple {
            check(flaw(Flaw::NoProof), "inclusion proof");
            check(flaw(Flaw::BadProof), "inclusion proof");
        }
    }
}

#[test]
fn log_of_certificates_is_asked_where_the_root_has_one() {
    let authority = Authority::new();
    let mut root = authority.trust_root();
    let unlogged = Signing { in_certificate_log: false, ..Signing::good(&authority, Form::Annotations) }.source();
    assert!(admit_by(&policy(&trust(&root), expected()), &unlogged).is_err());
    root["ctlogs"] = json!([]);
    admit_by(&policy(&trust(&root), expected()), &unlogged).unwrap();
    // A key that signs for another log.
    let other = Authority::new().trust_root();
    root["ctlogs"] = other["ctlogs"].clone();
    let error = admit_by(&policy(&trust(&root), expected()), &Signing::good(&authority, Form::Statement).source());
    assert!(error.unwrap_err().to_string().contains("signed certificate timestamp"));
}

#[test]
fn chain_to_a_root_is_taken_from_the_annotations() {
    let authority = Authority::new();
    let mut root = authority.trust_root();
    root["certificateAuthorities"][0]["certChain"]["certificates"] =
        json!([{ "rawBytes": base64(&authority.root_der) }]);
    let policy = policy(&trust(&root), expected());
    admit_by(&policy, &Signing::good(&authority, Form::Annotations).source()).unwrap();
    // Bundles of version 0.3 have no chain.
    let error = admit_by(&policy, &Signing::good(&authority, Form::Statement).source()).unwrap_err();
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
}

#[test]
fn authority_counts_in_its_own_time_alone() {
    let authority = Authority::new();
    let mut root = authority.trust_root();
    root["certificateAuthorities"][0]["validFor"] = json!({ "start": "2024-01-01T00:05:00Z" });
    let of = |time| {
        let signing = Signing { time, ..Signing::good(&authority, Form::Annotations) };
        admit_by(&policy(&trust(&root), expected()), &signing.source())
    };
    of(ISSUED + 300).unwrap();
    assert!(of(ISSUED + 299).unwrap_err().to_string().contains("no trusted certificate authority"));
}

#[test]
fn key_of_a_policy_admits_no_certificate_and_a_certificate_no_key() {
    let authority = Authority::new();
    let key = super::super::tests_key().parse().unwrap();
    let keys = SignaturePolicy::refuse_all().require(NAME, [key]);
    for form in FORMS {
        let error = admit_by(&keys, &Signing::good(&authority, form).source()).unwrap_err();
        assert!(error.to_string().contains("another key"), "{error}");
    }
    let mut source = Fake::default();
    let layer = source.simple(super::super::key::tests::PAYLOAD, super::super::key::tests::P256_SIGNATURE);
    source.tag(&[layer]);
    let error = admit_by(&policy(&trust(&authority.trust_root()), expected()), &source).unwrap_err();
    assert!(error.to_string().contains("without a certificate"), "{error}");
    // The same certificate's key, and no certificate in the bundle.
    let root = trust(&authority.trust_root());
    let signing = Signing::good(&authority, Form::Manifest);
    let mut bundle = signing.bundle(&signing.leaf());
    let material = bundle["verificationMaterial"].as_object_mut().unwrap();
    material.remove("certificate");
    material.insert("publicKey".into(), json!({ "hint": "" }));
    assert_eq!(check(&root, &bundle).unwrap_err(), "without a certificate");
}

fn check(root: &TrustRoot, bundle: &Value) -> Result<(), String> {
    let signers = Signers { root: root.clone(), identities: vec![expected()] };
    signers.check_bundle(bundle.to_string().as_bytes(), IMAGE, &Digest::sha256(IMAGE))
}

#[test]
fn old_bundles_need_a_promise_with_the_time() {
    let authority = Authority::new();
    let root = trust(&authority.trust_root());
    let signing = Signing { flaw: Flaw::NoProof, ..Signing::good(&authority, Form::Manifest) };
    let mut bundle = signing.bundle(&signing.leaf());
    bundle["mediaType"] = json!("application/vnd.dev.sigstore.bundle+json;version=0.1");
    assert_eq!(check(&root, &bundle), Ok(()));
    let entry = bundle["verificationMaterial"]["tlogEntries"][0].clone();
    let mut changed = |change: &dyn Fn(&mut Value)| {
        let mut entry = entry.clone();
        change(&mut entry);
        bundle["verificationMaterial"]["tlogEntries"] = json!([entry]);
        check(&root, &bundle).unwrap_err()
    };
    let unpromised = changed(&|entry| drop(entry.as_object_mut().unwrap().remove("inclusionPromise")));
    assert!(unpromised.contains("promise"), "{unpromised}");
    let untimed = changed(&|entry| entry["integratedTime"] = json!("0"));
    assert!(untimed.contains("no verified timestamp"), "{untimed}");
    let other = changed(&|entry| entry["logIndex"] = json!("6"));
    assert!(other.contains("SET verification failed"), "{other}");
}

#[test]
fn work_for_a_bundle_is_bounded() {
    let authority = Authority::new();
    let root = trust(&authority.trust_root());
    let signing = Signing::good(&authority, Form::Statement);
    let good = signing.bundle(&signing.leaf());
    assert_eq!(check(&root, &good), Ok(()));
    let grown = |change: &dyn Fn(&mut Value)| {
        let mut bundle = good.clone();
        change(&mut bundle["verificationMaterial"]);
        check(&root, &bundle).unwrap_err()
    };
    let entries = grown(&|it| it["tlogEntries"] = json!(vec![it["tlogEntries"][0].clone(); 3]));
    assert_eq!(entries, "with 3 entries of logs, more than 2");
    let stamp = json!({ "signedTimestamp": "" });
    let stamps = grown(&|it| it["timestampVerificationData"] = json!({ "rfc3161Timestamps": vec![&stamp; 3] }));
    assert_eq!(stamps, "with 3 timestamps, more than 2");
    let hashes = grown(&|it| it["tlogEntries"][0]["inclusionProof"]["hashes"] = json!(vec![base64([1; 32]); 65]));
    assert_eq!(hashes, "with 65 hashes of a proof, more than 64");
    let signatures = grown(&|it| {
        let note = &mut it["tlogEntries"][0]["inclusionProof"]["checkpoint"]["envelope"];
        let text = note.as_str().unwrap().to_owned();
        let line = text.split_once("\n\n").unwrap().1.repeat(16);
        *note = json!(text + &line);
    });
    assert_eq!(signatures, "with 17 signatures of a checkpoint, more than 16");
    let chain = grown(&|it| {
        let certificate = it.as_object_mut().unwrap().remove("certificate").unwrap();
        it["x509CertificateChain"] = json!({ "certificates": vec![certificate; 7] });
    });
    assert_eq!(chain, "with 7 certificates, more than 6");
}

#[test]
fn annotations_that_cannot_be_are_refused() {
    let (image, authority) = (Digest::sha256(IMAGE), Authority::new());
    let root = trust(&authority.trust_root());
    let signers = Signers { root, identities: vec![expected()] };
    let source = Signing::good(&authority, Form::Annotations).source();
    let (payload, signature, annotations) = source.first_simple();
    let check =
        |annotations: &BTreeMap<String, String>| signers.check_simple(&payload, &signature, annotations, &image);
    assert_eq!(check(&annotations), Ok(()));
    let changed = |name: &str, value: &str| {
        let mut annotations = annotations.clone();
        annotations.insert(format!("dev.sigstore.cosign/{name}"), value.to_owned());
        check(&annotations).unwrap_err()
    };
    let certificate = annotations["dev.sigstore.cosign/certificate"].clone();
    assert_eq!(changed("certificate", &certificate.repeat(2)), "with 2 certificates in the place of one");
    assert_eq!(changed("certificate", ""), "with 0 certificates in the place of one");
    assert_eq!(changed("certificate", &certificate[..99]), "a certificate without its end");
    assert!(changed("certificate", &certificate.replace('M', "!")).contains("cannot be read"));
    assert!(changed("chain", &"x".repeat(65 << 10)).contains("of 66560 bytes"));
    assert_eq!(changed("chain", &certificate.repeat(6)), "with 7 certificates, more than 6");
    let entry = annotations["dev.sigstore.cosign/bundle"].clone();
    assert!(changed("bundle", "{}").contains("the log entry cannot be read"));
    assert!(changed("bundle", &entry.replace("\"logID\":\"", "\"logID\":\"+")).contains("has no name"));
    let body = format!("\"body\":\"{}\"", base64("{}"));
    let (start, rest) = entry.split_once("\"body\":\"").unwrap();
    let (_, end) = rest.split_once('"').unwrap();
    assert!(changed("bundle", &format!("{start}{body}{end}")).contains("the log entry's body"));
}

#[test]
fn trust_roots_that_trust_no_one_are_refused() {
    let authority = Authority::new();
    let good = authority.trust_root();
    let invalid = |root: &Value| {
        let error = TrustRoot::from_json(root.to_string().as_bytes()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
        error.to_string()
    };
    let without = |name: &str| {
        let mut root = good.clone();
        root[name] = json!([]);
        invalid(&root)
    };
    assert!(without("certificateAuthorities").contains("no certificate authority"));
    assert!(without("tlogs").contains("no transparency log"));
    let mut root = good.clone();
    root["tlogs"][0]["publicKey"]["rawBytes"] = json!(base64("key"));
    invalid(&root);
    let mut root = good.clone();
    root["certificateAuthorities"][0]["certChain"]["certificates"][0]["rawBytes"] = json!(base64("certificate"));
    invalid(&root);
    invalid(&json!({}));
    invalid(&json!("x".repeat(1 << 20)));
    assert_eq!(TrustRoot::from_json(b"\xff").unwrap_err().kind(), ErrorKind::InvalidConfig);
    assert!(trust(&good) == trust(&good) && trust(&good) != trust(&Authority::new().trust_root()));
    // An identity of too many is found before anything is asked.
    let identity = CertificateIdentity::uri_prefix("https://git.example/team", ISSUER);
    let error = admit_by(&policy(&trust(&good), identity), &Fake::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.to_string().contains("require_identity"), "{error}");
}

#[test]
fn roots_of_the_public_services_are_read() {
    use sigstore_verify::trust_root::{SIGSTORE_PRODUCTION_TRUSTED_ROOT, SIGSTORE_STAGING_TRUSTED_ROOT};
    let authority = Authority::new();
    for root in [SIGSTORE_PRODUCTION_TRUSTED_ROOT, SIGSTORE_STAGING_TRUSTED_ROOT] {
        let root = TrustRoot::from_json(root.as_bytes()).unwrap();
        let signature = Signing::good(&authority, Form::Annotations).source();
        let error = admit_by(&policy(&root, expected()), &signature).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(error.to_string().contains("not proven"), "{error}");
    }
}

/// Parsers of what is too long could be kept busy for minutes.
#[test]
fn long_parts_of_bundles_are_refused_before_they_are_parsed() {
    let sample = fuzzing::Sample::new().unwrap();
    let good: Value = serde_json::from_slice(&sample.bundle).unwrap();
    let refused = |place: &str, bytes: usize| {
        let mut bundle = good.clone();
        *bundle.pointer_mut(place).unwrap() = json!(base64(vec![0x30; bytes]));
        sample.check(bundle.to_string().as_bytes()).unwrap_err()
    };
    let certificate = match good.pointer("/verificationMaterial/certificate") {
        Some(_) => "/verificationMaterial/certificate/rawBytes",
        None => "/verificationMaterial/x509CertificateChain/certificates/0/rawBytes",
    };
    let body = "/verificationMaterial/tlogEntries/0/canonicalizedBody";
    for (place, most, what) in
        [(certificate, 8 << 10, "bytes of a certificate"), (body, 32 << 10, "bytes of a log entry")]
    {
        assert!(!refused(place, most).contains(what));
        assert_eq!(refused(place, most + 1), format!("with {} {what}, more than {most}", most + 1));
    }
    let mut bundle = good.clone();
    let stamp = json!({ "signedTimestamp": base64(vec![0x30; (16 << 10) + 1]) });
    bundle["verificationMaterial"]["timestampVerificationData"] = json!({ "rfc3161Timestamps": [stamp] });
    let error = sample.check(bundle.to_string().as_bytes()).unwrap_err();
    assert!(error.contains("16385 bytes of a timestamp"), "{error}");
}

#[test]
fn sample_of_the_fuzz_target_is_right() {
    let sample = fuzzing::Sample::new().unwrap();
    assert_eq!(sample.check(&sample.bundle), Ok(()));
    assert_eq!((fuzzing::MANIFEST, fuzzing::IDENTITY), (IMAGE, [WORKFLOW, ISSUER]));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn arbitrary_bytes_never_panic(data in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..600)) {
        keyless_signature(&data);
    }
}
