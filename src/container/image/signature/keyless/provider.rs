//! [`Graviola`]: the arithmetic with which certificates, logs and signatures are verified.

use std::cell::RefCell;

use graviola::hashing::{self, Hash, Sha256, Sha384, Sha512};
use graviola::signing::ecdsa::{Curve, P256, P384, VerifyingKey};
use graviola::signing::eddsa::Ed25519VerifyingKey;
use graviola::signing::rsa::VerifyingKey as RsaKey;
use sigstore_verify::crypto::{CryptoProvider, Error, HashContext, Result, SigningScheme};
use sigstore_verify::crypto::{install_default_provider, try_default_provider};
use sigstore_verify::types::HashAlgorithm;

/// Verifies what the crate `sigstore-verify` asks for. It makes no keys.
#[derive(Debug)]
struct Graviola;

thread_local! {
    /// The message whose signature this thread is about to verify.
    static MESSAGE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Sets the provider, which is the process's. One that the embedder has set stays.
pub(super) fn install() {
    if try_default_provider().is_none() {
        // Another thread may have been faster, with the same.
        let _ = install_default_provider(&Graviola);
    }
}

/// Runs `verify` while signatures of hashes are looked up as signatures of this message.
///
/// The arithmetic hashes messages itself, and takes no hash.
pub(super) fn with_message<T>(message: &[u8], verify: impl FnOnce() -> T) -> T {
    MESSAGE.with_borrow_mut(|held| *held = message.to_vec());
    let result = verify();
    MESSAGE.take();
    result
}

impl CryptoProvider for Graviola {
    fn hash(&self, algorithm: HashAlgorithm) -> Result<Box<dyn HashContext>> {
        Ok(match algorithm {
            HashAlgorithm::Sha2256 => Box::new(Running(Sha256::new())),
            HashAlgorithm::Sha2384 => Box::new(Running(Sha384::new())),
            HashAlgorithm::Sha2512 => Box::new(Running(Sha512::new())),
            other => return Err(Error::UnsupportedAlgorithm(format!("hashing by {other}"))),
        })
    }

    fn verify_raw(&self, scheme: SigningScheme, key: &[u8], message: &[u8], signature: &[u8]) -> Result<()> {
        let rsa = || RsaKey::from_pkcs1_der(key);
        let verifies = match scheme {
            SigningScheme::EcdsaP256Sha256 => ecdsa::<P256, Sha256>(key, message, signature),
            SigningScheme::EcdsaP256Sha384 => ecdsa::<P256, Sha384>(key, message, signature),
            SigningScheme::EcdsaP384Sha256 => ecdsa::<P384, Sha256>(key, message, signature),
            SigningScheme::EcdsaP384Sha384 => ecdsa::<P384, Sha384>(key, message, signature),
            SigningScheme::Ed25519 => {
                Ed25519VerifyingKey::from_bytes(key).is_ok_and(|key| key.verify(signature, message).is_ok())
            }
            SigningScheme::RsaPkcs1Sha256 => rsa().is_ok_and(|it| it.verify_pkcs1_sha256(signature, message).is_ok()),
            SigningScheme::RsaPkcs1Sha384 => rsa().is_ok_and(|it| it.verify_pkcs1_sha384(signature, message).is_ok()),
            SigningScheme::RsaPkcs1Sha512 => rsa().is_ok_and(|it| it.verify_pkcs1_sha512(signature, message).is_ok()),
            SigningScheme::RsaPssSha256 => rsa().is_ok_and(|it| it.verify_pss_sha256(signature, message).is_ok()),
            SigningScheme::RsaPssSha384 => rsa().is_ok_and(|it| it.verify_pss_sha384(signature, message).is_ok()),
            SigningScheme::RsaPssSha512 => rsa().is_ok_and(|it| it.verify_pss_sha512(signature, message).is_ok()),
            other => return Err(Error::UnsupportedAlgorithm(format!("signatures of {}", other.name()))),
        };
        match verifies {
            true => Ok(()),
            false => Err(Error::Verification(format!("no signature of {} by this key", scheme.name()))),
        }
    }

    fn verify_prehashed(&self, scheme: SigningScheme, key: &[u8], digest: &[u8], signature: &[u8]) -> Result<()> {
        let unsupported = || Error::UnsupportedAlgorithm(format!("a hash alone by {}", scheme.name()));
        let algorithm = scheme.hash_algorithm().ok_or_else(unsupported)?;
        MESSAGE.with_borrow(|message| {
            let mut context = self.hash(algorithm)?;
            context.update(message);
            match context.finalize() == digest {
                true => self.verify_raw(scheme, key, message, signature),
                false => Err(unsupported()),
            }
        })
    }
}

fn ecdsa<C: Curve, H: Hash>(key: &[u8], message: &[u8], signature: &[u8]) -> bool {
    let key = VerifyingKey::<C>::from_x962_uncompressed(key);
    key.is_ok_and(|key| key.verify_asn1::<H>(&[message], signature).is_ok())
}

struct Running<C>(C);

impl<C: hashing::HashContext + Send> HashContext for Running<C> {
    fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    fn finalize(self: Box<Self>) -> Vec<u8> {
        self.0.finish().as_ref().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use sigstore_verify::crypto::VerificationKey;
    use sigstore_verify::types::{DerPublicKey, SignatureBytes};

    use super::super::super::key::tests::*;
    use super::*;

    /// As the crate calls it: keys of each kind, messages and their hashes.
    #[test]
    fn each_kind_of_key_verifies_messages_and_hashes() {
        install();
        let message = PAYLOAD.as_bytes();
        for (pem, signature, scheme) in [
            (P256_PEM, P256_SIGNATURE, SigningScheme::EcdsaP256Sha256),
            (P384_PEM, P384_SIGNATURES[0], SigningScheme::EcdsaP384Sha256),
            (P384_PEM, P384_SIGNATURES[1], SigningScheme::EcdsaP384Sha384),
            (ED25519_PEM, ED25519_SIGNATURE, SigningScheme::Ed25519),
            (RSA_PEM, RSA_SIGNATURE, SigningScheme::RsaPkcs1Sha256),
        ] {
            let key = DerPublicKey::from_pem(pem).unwrap();
            let key = VerificationKey::from_spki_with_scheme(&key, scheme).unwrap();
            let signature = SignatureBytes::new(STANDARD.decode(signature).unwrap());
            let name = scheme.name();
            assert!(key.verify(message, &signature).is_ok(), "{name}");
            assert!(key.verify(&message[1..], &signature).is_err(), "{name}");
            let Some(algorithm) = scheme.hash_algorithm() else { continue };
            let hash = |message: &[u8]| {
                let mut context = Graviola.hash(algorithm).unwrap();
                context.update(message);
                context.finalize()
            };
            let hashed = |held: &[u8], of: &[u8]| {
                with_message(held, || key.verify_prehashed(&hash(of), &signature).map_err(|error| error.to_string()))
            };
            assert_eq!(hashed(message, message), Ok(()), "{name}");
            assert!(hashed(b"other", b"other").unwrap_err().contains("no signature"), "{name}");
            // A hash of no message that is known.
            assert!(hashed(b"other", message).unwrap_err().contains("a hash alone"), "{name}");
            assert!(key.verify_prehashed(&hash(message), &signature).is_err(), "{name}");
        }
    }
}
