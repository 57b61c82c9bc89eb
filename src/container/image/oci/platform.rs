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
    ///
    /// A processor of a higher variant runs programs for a lower one. Other names of architectures count as those of Go.
    pub(super) fn distance(&self, other: &Self) -> Option<u8> {
        let ((wanted, level), (there, other_level)) = (self.canonical(), other.canonical());
        if self.os != other.os || wanted != there {
            return None;
        }
        match (level, other_level) {
            (Some(wanted), Some(there)) if there <= wanted => {
                let other_name = u8::from(self.variant() != other.variant());
                Some((wanted - there).saturating_mul(2).saturating_add(other_name))
            }
            _ if self.variant() == other.variant() => Some(0),
            // It may be for any of them.
            _ if other.variant().is_none() => Some(u8::MAX),
            _ => (level.is_none() && self.variant().is_none()).then_some(u8::MAX),
        }
    }

    /// The architecture as Go calls it, and the number of the variant. Where none is named, that is the least that is usual.
    fn canonical(&self) -> (&str, Option<u8>) {
        let (architecture, usual) = match self.architecture.as_str() {
            "armhf" | "arm" => ("arm", Some(7)),
            "armel" => ("arm", Some(6)),
            name if boot::OCI_ALIASES.contains(&name) => (boot::OCI_ARCHITECTURE, Some(boot::OCI_VARIANT)),
            name => (name, None),
        };
        let number = |variant: &str| variant.strip_prefix('v').unwrap_or(variant).parse().ok();
        (architecture, self.variant().map_or(usual, number))
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
            ("linux/arm/v6", "linux/arm/v7", None),
            ("linux/arm/v7", "linux/arm/v6", Some(3)),
            ("linux/arm/v6", "linux/arm", Some(255)),
            ("linux/arm", "linux/arm/v5", Some(5)),
            ("linux/armhf", "linux/arm/v7", Some(1)),
            ("linux/armel", "linux/arm/v7", None),
            ("linux/ppc64le", "linux/ppc64le", Some(0)),
            ("linux/ppc64le/power9", "linux/ppc64le", Some(255)),
            ("linux/ppc64le", "linux/ppc64le/power9", Some(255)),
            ("linux/ppc64le/power9", "linux/ppc64le/power8", None),
            ("linux/arm64", "linux/amd64", None),
            ("linux/arm64", "windows/arm64", None),
        ] {
            assert_eq!(platform(wanted).distance(&platform(there)), distance, "{wanted} {there}");
        }
        // The host's own, by all its names.
        let own = |level: u8| format!("{}/v{level}", Platform::host());
        for alias in boot::OCI_ALIASES {
            let host = platform(&format!("linux/{alias}"));
            assert_eq!(Platform::host().distance(&host), Some(0));
            assert_eq!(host.distance(&platform(&own(boot::OCI_VARIANT))), Some(1));
            assert_eq!(host.distance(&platform(&own(boot::OCI_VARIANT + 1))), None, "it may not run there");
            assert_eq!(platform(&own(boot::OCI_VARIANT + 1)).distance(&host), Some(3));
        }
        for wrong in ["", "linux", "linux/", "/arm", "a/b/c/d", "a/b/", "a/ b"] {
            assert!(wrong.parse::<Platform>().is_err(), "{wrong}");
        }
    }
}
