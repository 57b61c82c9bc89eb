//! [`Platform`]: for which machines an image is (image-spec, image-index.md).

use std::fmt;
use std::str::FromStr;

use crate::boot;
use crate::container::image::path::shown;
use crate::error::{Error, Result};

/// Names an operating system, a processor architecture and its variant, as Go does.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub struct Platform {
    os: String,
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
}

impl Platform {
    /// Returns Linux on the architecture of this host.
    pub fn host() -> Self {
        Self::new("linux", boot::OCI_ARCHITECTURE, None)
    }

    pub(in super::super) fn new(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        Self { os: os.into(), architecture: architecture.into(), variant: variant.map(Into::into) }
    }

    /// Returns the operating system: `linux`.
    pub fn os(&self) -> &str {
        &self.os
    }

    /// Returns the architecture of the processor.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// Returns the variant of the architecture, where one is named.
    pub fn variant(&self) -> Option<&str> {
        self.variant.as_deref().filter(|variant| !variant.is_empty())
    }

    /// How well an image for `other` fits where this one is asked for; less is better.
    pub(super) fn distance(&self, other: &Self) -> Option<u8> {
        if (&self.os, &self.architecture) != (&other.os, &other.architecture) {
            return None;
        }
        match (self.variant(), other.variant()) {
            (wanted, there) if wanted == there => Some(0),
            (_, None) => Some(1),
            (None, Some(_)) => Some(2),
            (Some(_), Some(_)) => None,
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |text: &str| text.chars().take(50).flat_map(char::escape_default).collect::<String>();
        write!(f, "{}/{}", shown(&self.os), shown(&self.architecture))?;
        self.variant().map_or(Ok(()), |variant| write!(f, "/{}", shown(variant)))
    }
}

impl FromStr for Platform {
    type Err = Error;

    /// Parses `os/architecture` or `os/architecture/variant`.
    fn from_str(text: &str) -> Result<Self> {
        let parts: Vec<&str> = text.split('/').collect();
        let fine =
            |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        match *parts.as_slice() {
            [os, architecture] if parts.iter().all(fine) => Ok(Self::new(os, architecture, None)),
            [os, architecture, variant] if parts.iter().all(fine) => Ok(Self::new(os, architecture, Some(variant))),
            _ => {
                let shown = shown(text.as_bytes());
                Err(Error::invalid(
                    "platform",
                    format!("{shown}: it has the form os/architecture or os/architecture/variant"),
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_are_parsed_and_compared() {
        let platform = |text: &str| text.parse::<Platform>().unwrap();
        assert_eq!(platform("linux/arm64/v8").to_string(), "linux/arm64/v8");
        assert_eq!(Platform::host().os(), "linux");
        for (wanted, there, distance) in [
            ("linux/arm64", "linux/arm64", Some(0)),
            ("linux/arm64/v8", "linux/arm64", Some(1)),
            ("linux/arm64", "linux/arm64/v8", Some(2)),
            ("linux/arm/v6", "linux/arm/v7", None),
            ("linux/arm64", "linux/amd64", None),
            ("linux/arm64", "windows/arm64", None),
        ] {
            assert_eq!(platform(wanted).distance(&platform(there)), distance, "{wanted} {there}");
        }
        for wrong in ["", "linux", "linux/", "/arm", "a/b/c/d", "a/b/", "a/ b"] {
            assert!(wrong.parse::<Platform>().is_err(), "{wrong}");
        }
    }
}
