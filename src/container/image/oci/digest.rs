//! [`Digest`]: by which content is found and checked.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use sha2::{Digest as _, Sha256, Sha512};

use crate::container::image::path::shown;
use crate::error::{Error, ErrorKind, Result};

/// The digest of a blob: `sha256:` or `sha512:`, and lowercase hexadecimal digits (image-spec, descriptor.md).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest {
    text: Box<str>,
}

/// What follows the names of algorithms.
const ALGORITHMS: [(&str, usize); 2] = [("sha256", 64), ("sha512", 128)];

impl Digest {
    /// Returns the name of its algorithm: `sha256` or `sha512`.
    pub fn algorithm(&self) -> &str {
        self.text.split_once(':').map_or("", |(algorithm, _)| algorithm)
    }

    /// Returns its value as hexadecimal digits.
    pub fn hex(&self) -> &str {
        self.text.split_once(':').map_or("", |(_, hex)| hex)
    }

    /// Returns the SHA-256 digest of `bytes`.
    pub fn sha256(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::Sha256(Sha256::new());
        hasher.update(bytes);
        hasher.finish()
    }

    /// The digest of what has gone into `hasher`.
    pub(in crate::container) fn of(hasher: Sha256) -> Self {
        Hasher::Sha256(hasher).finish()
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let known = text.split_once(':').is_some_and(|(algorithm, hex)| {
            let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
            ALGORITHMS.contains(&(algorithm, hex.len())) && hex.bytes().all(lower)
        });
        if !known {
            let shown = shown(text.as_bytes());
            let what = format!("{shown} is no digest: sha256 or sha512, a colon, and lowercase hexadecimal digits");
            return Err(Error::new(ErrorKind::InvalidConfig, what));
        }
        Ok(Self { text: text.into() })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

/// Computes a digest as bytes come.
#[derive(Debug, Clone)]
pub(in super::super) enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    /// Returns one of the algorithm of `digest`.
    pub(in super::super) fn like(digest: &Digest) -> Self {
        match digest.algorithm() {
            "sha512" => Self::Sha512(Sha512::new()),
            _ => Self::Sha256(Sha256::new()),
        }
    }

    pub(in super::super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Sha512(hash) => hash.update(bytes),
        }
    }

    pub(in super::super) fn finish(self) -> Digest {
        let (algorithm, hex) = match self {
            Self::Sha256(hash) => ("sha256", super::super::hex(&hash.finalize())),
            Self::Sha512(hash) => ("sha512", super::super::hex(&hash.finalize())),
        };
        Digest { text: format!("{algorithm}:{hex}").into() }
    }
}

/// Gives the bytes of a blob, and fails at their end unless size and digest are as they should be.
///
/// Nothing beyond the size is read. A reader that stops before the end has checked nothing.
pub(in super::super) struct Verified<R> {
    inner: R,
    hasher: Option<Hasher>,
    digest: Digest,
    left: u64,
}

impl<R: Read> Verified<R> {
    pub(in super::super) fn new(inner: R, digest: &Digest, size: u64) -> Self {
        Self { inner, hasher: Some(Hasher::like(digest)), digest: digest.clone(), left: size }
    }
}

impl<R: Read> Read for Verified<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let corrupt = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let Some(hasher) = &mut self.hasher else { return Ok(0) };
        if self.left > 0 {
            let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
            let room = buffer.get_mut(..most).unwrap_or_default();
            if room.is_empty() {
                return Ok(0);
            }
            let n = self.inner.read(room)?;
            if n == 0 {
                return Err(corrupt(format!("{} ends {} bytes before its size", self.digest, self.left)));
            }
            hasher.update(room.get(..n).unwrap_or_default());
            self.left = self.left.saturating_sub(n as u64);
            if self.left > 0 {
                return Ok(n);
            }
            // Checked with the last bytes, so no caller has them all unchecked.
            self.check()?;
            return Ok(n);
        }
        self.check()?;
        Ok(0)
    }
}

impl<R> Verified<R> {
    fn check(&mut self) -> io::Result<()> {
        let Some(hasher) = self.hasher.take() else { return Ok(()) };
        let found = hasher.finish();
        match found == self.digest {
            true => Ok(()),
            false => {
                let what = format!("its digest is {found} instead of {}", self.digest);
                Err(io::Error::new(io::ErrorKind::InvalidData, what))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_digests_are_parsed() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::sha256(b"").to_string(), empty);
        let digest: Digest = empty.parse().unwrap();
        assert_eq!((digest.algorithm(), digest.hex().len()), ("sha256", 64));
        let long = format!("sha512:{}", "0".repeat(128));
        assert_eq!(long.parse::<Digest>().unwrap().algorithm(), "sha512");
        for wrong in ["", ":", "sha256", "sha256:", &empty.to_uppercase(), &empty[..70], "md5:00", &format!("{empty}0")]
        {
            assert_eq!(wrong.parse::<Digest>().unwrap_err().kind(), ErrorKind::InvalidConfig, "{wrong}");
        }
    }

    #[test]
    fn bytes_that_are_not_those_of_the_digest_are_refused() {
        let digest = Digest::sha256(b"content");
        let read = |bytes: &[u8], size| {
            let mut got = Vec::new();
            Verified::new(bytes, &digest, size).read_to_end(&mut got).map(|_| got)
        };
        assert_eq!(read(b"content", 7).unwrap(), b"content");
        // What comes behind is not read.
        assert_eq!(read(b"content and more", 7).unwrap(), b"content");
        for (bytes, size) in [(&b"contend"[..], 7), (b"conten", 7), (b"content", 6), (b"content", 8), (b"", 0)] {
            assert_eq!(read(bytes, size).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let nothing = Digest::sha256(b"");
        assert_eq!(Verified::new(&b""[..], &nothing, 0).read(&mut [0; 8]).unwrap(), 0);
    }
}
