//! [`PublicKey`]: by whose signatures images are admitted.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use graviola::hashing::{Sha256, Sha384};
use graviola::signing::ecdsa::{self, VerifyingKey as EcdsaKey};
use graviola::signing::eddsa::Ed25519VerifyingKey;
use graviola::signing::rsa::VerifyingKey as RsaKey;

use crate::error::{Error, ErrorKind, Result};

/// The longest key that is read.
const MAX_PEM: usize = 16 << 10;

/// A public key, by whose signatures images are admitted.
///
/// Its kind is ECDSA P-256 or P-384, Ed25519, or RSA of 2048 bits and more. It is parsed from PEM (`-----BEGIN PUBLIC KEY-----`, RFC 7468), as `cosign generate-key-pair` writes it.
#[derive(Clone)]
pub struct PublicKey {
    /// `SubjectPublicKeyInfo` (RFC 5280).
    der: Vec<u8>,
    kind: KeyKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KeyKind {
    EcdsaP256,
    EcdsaP384,
    Ed25519,
    Rsa,
}

/// What the DER of keys with a fixed length begins with: all but the key itself.
const P256: &[u8] = &[
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
const P384: &[u8] = &[
    0x30, 0x76, 0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b, 0x81, 0x04, 0x00,
    0x22, 0x03, 0x62, 0x00,
];
const ED25519: &[u8] = &[0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// rsaEncryption, with no parameters.
const RSA: &[u8] = &[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;

impl PublicKey {
    /// Parses a key.
    ///
    /// # Errors
    /// `InvalidConfig` for what is no public key, and for one of another kind. `Unsupported` for RSA keys below 2048 bits.
    pub fn from_pem(pem: &str) -> Result<Self> {
        let invalid = |what: &str| Error::invalid("PublicKey::from_pem", what);
        if pem.len() > MAX_PEM {
            return Err(invalid("it is too long for a key"));
        }
        if pem.contains("PRIVATE KEY") {
            return Err(invalid("this is a private key: give its public part"));
        }
        let body = pem
            .split_once("-----BEGIN PUBLIC KEY-----")
            .and_then(|(_, rest)| rest.split_once("-----END PUBLIC KEY-----"));
        let Some((body, _)) = body else {
            return Err(invalid("there is no line -----BEGIN PUBLIC KEY----- with its end"));
        };
        let text: String = body.chars().filter(|c| !c.is_ascii_whitespace()).collect();
        let der = STANDARD.decode(text).map_err(|_| invalid("what is between its lines is not base64"))?;
        let kind =
            kind(&der).ok_or_else(|| invalid("neither ECDSA P-256 or P-384 (uncompressed), nor Ed25519, nor RSA"))?;
        let key = Self { der, kind };
        if !supported() {
            return Err(unsupported());
        }
        if rsa(&key.der).is_some_and(|pkcs1| rsa_bits(pkcs1) < 2048) {
            return Err(Error::new(ErrorKind::Unsupported, "an RSA key of less than 2048 bits"));
        }
        match key.check(&[], &[]) {
            Some(_) => Ok(key),
            None => Err(invalid("the key is not one of its kind: no point of its curve, or too large")),
        }
    }

    /// Whether this key made `signature` of `message`. Signatures of ECDSA are DER.
    pub(super) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        supported() && self.check(message, signature).unwrap_or(false)
    }

    /// None when the key is not one of its kind.
    fn check(&self, message: &[u8], signature: &[u8]) -> Option<bool> {
        let rest = |prefix: &[u8]| self.der.strip_prefix(prefix);
        Some(match self.kind {
            KeyKind::EcdsaP256 => {
                let key = EcdsaKey::<ecdsa::P256>::from_x962_uncompressed(rest(P256)?).ok()?;
                key.verify_asn1::<Sha256>(&[message], signature).is_ok()
            }
            // cosign hashes by SHA-256 for each kind of key; others take the hash that fits the curve.
            KeyKind::EcdsaP384 => {
                let key = EcdsaKey::<ecdsa::P384>::from_x962_uncompressed(rest(P384)?).ok()?;
                key.verify_asn1::<Sha384>(&[message], signature).is_ok()
                    || key.verify_asn1::<Sha256>(&[message], signature).is_ok()
            }
            KeyKind::Ed25519 => {
                Ed25519VerifyingKey::from_bytes(rest(ED25519)?).ok()?.verify(signature, message).is_ok()
            }
            KeyKind::Rsa => {
                RsaKey::from_pkcs1_der(rsa(&self.der)?).ok()?.verify_pkcs1_sha256(signature, message).is_ok()
            }
        })
    }
}

/// Whether the processor has what the arithmetic is written for.
pub(super) fn supported() -> bool {
    graviola::util::is_cpu_supported()
}

pub(super) fn unsupported() -> Error {
    let what =
        "signatures: the processor lacks instructions that their verification needs (AVX2, ADX, BMI2, AES, PCLMULQDQ)";
    Error::new(ErrorKind::Unsupported, what)
}

fn kind(der: &[u8]) -> Option<KeyKind> {
    let fixed = [(P256, 65, KeyKind::EcdsaP256), (P384, 97, KeyKind::EcdsaP384), (ED25519, 32, KeyKind::Ed25519)];
    let found = fixed.into_iter().find(|(prefix, len, _)| der.len() == prefix.len() + len && der.starts_with(prefix));
    found.map(|(.., kind)| kind).or_else(|| rsa(der).map(|_| KeyKind::Rsa))
}

/// The PKCS #1 key inside.
fn rsa(der: &[u8]) -> Option<&[u8]> {
    let (content, []) = tlv(SEQUENCE, der)? else { return None };
    let (algorithm, rest) = tlv(SEQUENCE, content)?;
    let (bits, []) = tlv(BIT_STRING, rest)? else { return None };
    (algorithm == RSA).then(|| bits.strip_prefix(&[0])).flatten()
}

/// The content of a value with this tag, and what follows it (ITU-T X.690).
fn tlv(tag: u8, der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (first, rest) = der.split_first()?;
    let (len, rest) = rest.split_first()?;
    let (len, rest) = match *len {
        0..=0x7f => (usize::from(*len), rest),
        0x81 => rest.split_first().map(|(a, rest)| (usize::from(*a), rest))?,
        0x82 => rest.split_first_chunk().map(|(len, rest)| (usize::from(u16::from_be_bytes(*len)), rest))?,
        _ => return None,
    };
    (*first == tag).then(|| rest.split_at_checked(len)).flatten()
}

/// The bits of the modulus, in whole bytes.
fn rsa_bits(pkcs1: &[u8]) -> usize {
    let modulus = tlv(SEQUENCE, pkcs1).and_then(|(key, _)| tlv(INTEGER, key)).map_or(&[][..], |(modulus, _)| modulus);
    modulus.iter().skip_while(|byte| **byte == 0).count() * 8
}

impl FromStr for PublicKey {
    type Err = Error;

    fn from_str(pem: &str) -> Result<Self> {
        Self::from_pem(pem)
    }
}

impl PartialEq for PublicKey {
    fn eq(&self, other: &Self) -> bool {
        self.der == other.der
    }
}

impl Eq for PublicKey {}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({:?}, {})", self.kind, super::super::oci::Digest::sha256(&self.der))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Made by OpenSSL, as are the signatures.
    pub(in super::super) const P256_PEM: &str = "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEzyWGr8kKBTWUKUkAa2ExohviZB6Q\n5PfuaDtBjZ2J/a0sz0AM53dMqta6SxpK3qlSqujMj1Zv69fPuM3I5zJWAQ==\n-----END PUBLIC KEY-----";
    pub(in super::super) const P384_PEM: &str = "-----BEGIN PUBLIC KEY-----\nMHYwEAYHKoZIzj0CAQYFK4EEACIDYgAE3NNww1+v+CMHOaUBb+kQkL4bfjL5NOWI\nC96uxi7XP/ocOwNjeb0dyG4Te1bm+1YESjfbP0Ld4beb8lniRX8nz/R2m5hbzydU\nF0CIij+nFyj085JzWhgtp7Eyn85xhONn\n-----END PUBLIC KEY-----";
    pub(in super::super) const ED25519_PEM: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEABCZOUhwpsOT8pw3DW12EfVTBRalmFwZ/ntUo5ULJR7E=\n-----END PUBLIC KEY-----";
    pub(in super::super) const RSA_PEM: &str = "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAr+lDM0Dhi/i3rf9fhGCT\nDctcDv8XiID4eIS9h9BKSfjIVU8KMyVYC2O4+gBlrxjsCRU3beyOnnXjCdVLSrtu\nXqWqK36rp6X+9zezL3/Q0DLEd1vrQdDxvgKxViF+Ry2JlIWmqdcdec57iwCsv1cL\nZ0CBTDWAB+HIhN0GdChUgS0bD8hi5cK3zRqXUc0YROIlyboz0vq4YsEKop9ti3Cj\naS7bVpCByFs+26DrjJqhfJJ3iflhg+XXUwq/w+/UzwoINUetQcNSj64j0S1vAJsQ\nkcdr7GfEHYFoaCNP5vnQTJBg3xfONiVRvhvlK4WK0JKlMnt+AgCMWKj8kLIOh5aD\nKwIDAQAB\n-----END PUBLIC KEY-----";
    pub(in super::super) const PAYLOAD: &str = r#"{"critical":{"identity":{"docker-reference":"registry.example/app"},"image":{"docker-manifest-digest":"sha256:05b3abf2579a5eb66403cd78be557fd860633a1fe2103c7642030defe32c657f"},"type":"cosign container image signature"},"optional":null}"#;
    pub(in super::super) const P256_SIGNATURE: &str =
        "MEQCIAFjKTvxgzvCn6lQ78UTiQthUtnIwsWmYBelX4oIJTbOAiBTWjbyiSbNi6q9mEM3OeeNVyHIV305x7v4Fza+W2oN/g==";
    pub(in super::super) const P384_SIGNATURES: [&str; 2] = [
        "MGQCMA6GE+BD5ONbJAqGnN9yfAsmyE8YF6XwvfQf93lZ+A5lh/zc9IWT4queTICLTbwfxAIwEQj8QG8wiKw2E/i/kmN/Tf/0HMh85UEs0iruR5eDLaRskbEx1AMBQe0gm/NqaJAS",
        "MGYCMQDSna3AFWqJNfzAR3fKOUGeV43aR/Dcasb1O22POePZzNRf1YqIuf2ULyq3H5AD97QCMQCKSBdSLY/nTHF288qmu00YFbSlG+gZ0/DfO8Y1Nv1EnohbxcjiiHfSaguZgZ6U7M4=",
    ];
    pub(in super::super) const ED25519_SIGNATURE: &str =
        "EdrVlK/Xamga2HXwS6kypSAiidLeUxLmSupzOqxIXTjMWRCmYGAn4sn33d/7/9Z5+BgO8qLfRLjLdZRB9cjhBw==";
    pub(in super::super) const RSA_SIGNATURE: &str = "VF6UwwZawGrBaImdoeKEaF3YlMBAvWQ2OGM0r9ZxdgDv2Q8ZuTTz5kWS5jypLnWqngHQA6P0PkYzLySGguxAmUuYMp7WDblSOrjj1ao2Vlra+c4z7lx8ejWMbibd2qhM7X70+8/fJPE3TMrKses/Loxph4/ci9ge88qWGjA7epmhF3aQxmJL6mh6VDCBKNHI9FEHD4WtyKst5BEJJ7Z7cJRU/b3db3BHR5/5/zFVlOooM6QFQC689qGdEX2uo60jYDbJP4oNQXZzZjcMUlXYwV27IRoa787FNfHeq9mZ+/13pvEFla4tME8Bs93T0OMYg6KTE/sOziIrW38nKAq0MA==";

    fn key(pem: &str) -> PublicKey {
        pem.parse().unwrap()
    }

    #[test]
    fn each_kind_of_key_verifies_its_signatures_alone() {
        let all = [
            (P256_PEM, P256_SIGNATURE),
            (P384_PEM, P384_SIGNATURES[0]),
            (P384_PEM, P384_SIGNATURES[1]),
            (ED25519_PEM, ED25519_SIGNATURE),
            (RSA_PEM, RSA_SIGNATURE),
        ];
        for (n, (pem, _)) in all.iter().enumerate() {
            for (m, (other, signature)) in all.iter().enumerate() {
                let mut signature = STANDARD.decode(signature).unwrap();
                assert_eq!(key(pem).verifies(PAYLOAD.as_bytes(), &signature), pem == other, "{n} {m}");
                assert!(!key(pem).verifies(&PAYLOAD.as_bytes()[1..], &signature));
                for at in 0..signature.len() {
                    signature[at] ^= 1;
                    assert!(!key(pem).verifies(PAYLOAD.as_bytes(), &signature), "{n} {m} {at}");
                    signature[at] ^= 1;
                }
                signature.push(0);
                assert!(!key(pem).verifies(PAYLOAD.as_bytes(), &signature));
            }
            assert!(!key(pem).verifies(PAYLOAD.as_bytes(), &[]));
        }
    }

    #[test]
    fn what_is_no_public_key_is_refused() {
        let compressed = "-----BEGIN PUBLIC KEY-----\nMDkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDIgADzyWGr8kKBTWUKUkAa2ExohviZB6Q\n5PfuaDtBjZ2J/a0=\n-----END PUBLIC KEY-----";
        let p521 = "-----BEGIN PUBLIC KEY-----\nMIGbMBAGByqGSM49AgEGBSuBBAAjA4GGAAQAouuRtQdEES3hkjCBc3b6o83dOOw5\nUvFrWktFivR2m3PKmL2vI1jivGjceM8PGyMAROBeHXMl8a97O/uIFnPmQBoBKqnv\nhi9r/r0Q/9P5Ra268mYfx0H1LWcWEsLUuiMWM2ljaSwNfDbF+/qC3dZ4JIk7vnAz\nZhVVTQ6faXXOX5wGvB4=\n-----END PUBLIC KEY-----";
        let private = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----";
        let off_the_curve = P256_PEM.replace("AEzyWG", "AEzyWH");
        let long = "x".repeat(MAX_PEM + 1);
        for pem in
            ["", "key", compressed, p521, private, &off_the_curve, &P256_PEM[..80], &long, &P256_PEM.replace('E', "!")]
        {
            assert_eq!(PublicKey::from_pem(pem).unwrap_err().kind(), ErrorKind::InvalidConfig, "{pem}");
        }
        let short = "-----BEGIN PUBLIC KEY-----\nMIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDPSToyFRreqgPGbZtpVY9GPh27\nLD8z9aWTa/htZH2U/lStZRWbMqqMNeiI3iWoZKNi+Mfolhqj64Ef+C1gDnXUQjGs\nyDxFf7OrYcn7QRuKuZ0MfFSQQHyLpuqEjEX15Vqj1jLvwlxpuxC5hYKK+8BGpbEr\nq1ZPliadUcmRTa6YVwIDAQAB\n-----END PUBLIC KEY-----";
        assert_eq!(PublicKey::from_pem(short).unwrap_err().kind(), ErrorKind::Unsupported);
        assert!(key(P256_PEM) == key(&format!("a line\n{P256_PEM}\nanother")) && key(P256_PEM) != key(P384_PEM));
    }
}
