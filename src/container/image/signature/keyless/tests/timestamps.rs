//! Timestamps of authorities: the time that counts where the log names none.

use std::path::PathBuf;
use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::super::stamps::TimestampAuthority;
use super::*;

const LONG_AGO: &str = "2023-01-01T00:00:00Z";
const BUNDLES: [Form; 2] = [Form::Statement, Form::Manifest];

/// The signature in a bundle.
fn signature(bundle: &Value) -> Vec<u8> {
    let place = match bundle.get("dsseEnvelope") {
        Some(envelope) => &envelope["signatures"][0]["sig"],
        None => &bundle["messageSignature"]["signature"],
    };
    STANDARD.decode(place.as_str().unwrap()).unwrap()
}

fn with_stamps(bundle: &Value, stamps: &[Vec<u8>]) -> Value {
    let stamps: Vec<_> = stamps.iter().map(|stamp| json!({ "signedTimestamp": base64(stamp) })).collect();
    let mut bundle = bundle.clone();
    bundle["verificationMaterial"]["timestampVerificationData"] = json!({ "rfc3161Timestamps": stamps });
    bundle
}

/// The same signature in a log of the second version, which names no time.
fn in_log_of_version_2(authority: &Authority, leaf: &Leaf, bundle: &Value) -> Value {
    let signed = match bundle.get("dsseEnvelope") {
        Some(envelope) => {
            let payload = STANDARD.decode(envelope["payload"].as_str().unwrap()).unwrap();
            encoded(&String::from_utf8(payload).unwrap()).into_bytes()
        }
        None => IMAGE.to_vec(),
    };
    let record = record_of_version_2(leaf, &signed, &signature(bundle));
    let mut entry = authority.proven_entry("hashedrekord", &record, 0);
    entry["kindVersion"]["version"] = json!("0.0.2");
    entry["logIndex"] = json!("0");
    let fields = entry.as_object_mut().unwrap();
    fields.remove("inclusionPromise");
    fields.remove("integratedTime");
    let mut bundle = bundle.clone();
    bundle["verificationMaterial"]["tlogEntries"] = json!([entry]);
    bundle
}

/// A trust root that has these authorities of timestamps too.
fn trusting(authority: &Authority, clocks: &[Value]) -> TrustRoot {
    let mut root = authority.trust_root();
    root["timestampAuthorities"] = json!(clocks);
    trust(&root)
}

/// Bundles without the log's word of the time, in both versions of logs.
fn untimed(authority: &Authority, form: Form) -> [Value; 2] {
    let signing = Signing { flaw: Flaw::NoPromise, ..Signing::good(authority, form) };
    let leaf = signing.leaf();
    let bundle = signing.bundle(&leaf);
    let newer = in_log_of_version_2(authority, &leaf, &bundle);
    [bundle, newer]
}

#[test]
fn timestamp_of_an_authority_proves_the_time() {
    let authority = Authority::new();
    for kind in [KeyKind::P256, KeyKind::P384] {
        let (clock, other) = (TimestampAuthority::new(kind), TimestampAuthority::new(kind));
        let root = trusting(&authority, &[other.trusted_from(LONG_AGO), clock.trusted_from(LONG_AGO)]);
        for bundle in BUNDLES.map(|form| untimed(&authority, form)).concat() {
            let stamped = |time| with_stamps(&bundle, &[clock.stamp(&signature(&bundle), time)]);
            for time in [ISSUED, ISSUED + 60, ISSUED + 600] {
                admit_by(&policy(&root, expected()), &with_bundle(&stamped(time))).unwrap();
            }
            let error = admit_by(&policy(&root, expected()), &with_bundle(&bundle)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
            for (time, word) in [(ISSUED - 1, "CertNotValidYet"), (ISSUED + 601, "CertExpired")] {
                let error = check(&root, &stamped(time)).unwrap_err();
                assert!(error.contains(word), "{error}");
            }
        }
    }
}

#[test]
fn timestamps_that_prove_nothing_are_refused() {
    let authority = Authority::new();
    let (clock, other) = (TimestampAuthority::new(KeyKind::P256), TimestampAuthority::new(KeyKind::P256));
    let known = clock.trusted_from(LONG_AGO);
    let root = trusting(&authority, std::slice::from_ref(&known));
    for bundle in BUNDLES.map(|form| untimed(&authority, form)).concat() {
        let good = clock.stamp(&signature(&bundle), ISSUED + 60);
        let refused = |root: &TrustRoot, stamps: &[Vec<u8>], word: &str| {
            let error = check(root, &with_stamps(&bundle, stamps)).unwrap_err();
            assert!(error.contains(word), "{word}: {error}");
        };
        refused(&root, &[], "timestamp");
        refused(&trust(&authority.trust_root()), std::slice::from_ref(&good), "no timestamp authorities");
        refused(&root, &[other.stamp(&signature(&bundle), ISSUED + 60)], "timestamp verification failed");
        refused(&root, &[clock.stamp(b"other", ISSUED + 60)], "timestamp verification failed");
        // Each that is there must be right.
        refused(&root, &[good.clone(), clock.stamp(&signature(&bundle), ISSUED + 601)], "CertExpired");
        refused(&root, &[good.clone(), clock.stamp(b"other", ISSUED + 60)], "timestamp verification failed");
        let date = good.windows(8).position(|it| it == b"20240101").unwrap();
        // The second, and the end of the authority's signature.
        for at in [date + 13, good.len() - 1] {
            let mut changed = good.clone();
            changed[at] ^= 1;
            refused(&root, &[changed], "timestamp verification failed");
        }
        // The authority counts in its own time alone.
        let late = trusting(&authority, &[clock.trusted_from("2024-01-01T00:01:01Z"), other.trusted_from(LONG_AGO)]);
        refused(&late, std::slice::from_ref(&good), "outside");
        let stamp = clock.stamp(&signature(&bundle), ISSUED + 61);
        assert_eq!(check(&late, &with_stamps(&bundle, &[stamp])), Ok(()));
    }
}

#[test]
fn timestamp_beside_the_time_of_the_log_must_be_right_too() {
    let authority = Authority::new();
    let clock = TimestampAuthority::new(KeyKind::P256);
    let root = trusting(&authority, &[clock.trusted_from(LONG_AGO)]);
    for form in BUNDLES {
        let signing = Signing::good(&authority, form);
        let bundle = signing.bundle(&signing.leaf());
        let stamped = |time| with_stamps(&bundle, &[clock.stamp(&signature(&bundle), time)]);
        assert_eq!(check(&root, &stamped(ISSUED + 120)), Ok(()));
        assert!(check(&root, &stamped(ISSUED + 601)).unwrap_err().contains("CertExpired"));
    }
}

/// The form in annotations has the log's promise, with its time. So a timestamp would prove nothing more.
#[test]
fn timestamp_in_annotations_is_not_read() {
    let authority = Authority::new();
    let signers = Signers { root: trust(&authority.trust_root()), identities: vec![expected()] };
    let source = Signing::good(&authority, Form::Annotations).source();
    let (payload, signature, mut annotations) = source.first_simple();
    let stamp = json!({ "SignedRFC3161Timestamp": base64("no timestamp") }).to_string();
    annotations.insert("dev.sigstore.cosign/rfc3161timestamp".into(), stamp);
    let mut check = |change: &dyn Fn(&mut BTreeMap<String, String>)| {
        change(&mut annotations);
        signers.check_simple(&payload, &signature, &annotations, &Digest::sha256(IMAGE))
    };
    assert_eq!(check(&|_| {}), Ok(()));
    // It is no substitute for the log's entry.
    let error = check(&|annotations| drop(annotations.remove("dev.sigstore.cosign/bundle")));
    assert_eq!(error, Err("without an entry of a transparency log".to_owned()));
}

/// A directory that goes away with its test.
struct Temp(PathBuf);

impl Temp {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("cofferdam-timestamps-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Another implementation believes the authority of these tests.
#[test]
fn openssl_verifies_the_same_timestamps() {
    let temp = Temp::new();
    let clock = TimestampAuthority::new(KeyKind::P256);
    let file = |name: &str, bytes: &[u8]| {
        let path = temp.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let root = file("root.pem", pem(&clock.root_der).as_bytes());
    let leaf = file("leaf.pem", pem(&clock.leaf_der).as_bytes());
    let stamp = file("stamp.tsr", &clock.stamp(b"signature", ISSUED));
    let verify = |data: &[u8]| {
        let data = file("data", data);
        let mut command = Command::new("openssl");
        command.args(["ts", "-verify", "-in"]).arg(&stamp).arg("-data").arg(data);
        command.arg("-CAfile").arg(&root).arg("-untrusted").arg(&leaf);
        command.output().expect("run `make setup` first: openssl")
    };
    let output = verify(b"signature");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!verify(b"other").status.success());
}
