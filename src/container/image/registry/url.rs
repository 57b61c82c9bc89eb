//! [`Url`]: an absolute address of HTTP (RFC 3986).

use std::fmt;
use std::net::IpAddr;

use crate::error::{Error, ErrorKind, Result};

/// Longer addresses are refused. Those of signed blobs have up to about 2 KiB.
const MAX_URL: usize = 16 << 10;

/// Scheme, host, port, path and query. It has no user and no fragment.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Url {
    pub secure: bool,
    /// In lower case; an IPv6 address in brackets.
    pub host: String,
    pub port: u16,
    /// Begins with a slash, query included.
    pub path: String,
}

impl Url {
    /// # Errors
    /// `Corrupt` for what is no address, or none of HTTP.
    pub fn parse(text: &str) -> Result<Self> {
        // A user's password is not shown, nor is a query, which may be a signature.
        let shown = || brief(text.rsplit('@').next().and_then(|rest| rest.split('?').next()).unwrap_or_default());
        let wrong = |what: &str| Err(Error::new(ErrorKind::Corrupt, format!("{:?} {what}", shown())));
        if text.len() > MAX_URL {
            return wrong("is too long for an address");
        }
        let (scheme, rest) = text.split_once("://").unwrap_or_default();
        let secure = match scheme.to_ascii_lowercase().as_str() {
            "https" => true,
            "http" => false,
            _ => return wrong("is no address of HTTP"),
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at_checked(end).unwrap_or((rest, ""));
        let Some(at) = Authority::parse(authority, if secure { 443 } else { 80 }) else {
            return wrong("has no host, or one with a user");
        };
        if !path.bytes().all(|b| b.is_ascii_graphic()) {
            return wrong("has bytes that addresses have not");
        }
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        Ok(Self { secure, host: at.host, port: at.port, path })
    }

    /// Where a `Location` leads from here (RFC 9110, 10.2.2).
    ///
    /// # Errors
    /// `Corrupt` for one that is no address of HTTP.
    pub fn join(&self, location: &str) -> Result<Self> {
        let scheme = if self.secure { "https" } else { "http" };
        if location.starts_with("//") {
            return Self::parse(&format!("{scheme}:{location}"));
        }
        let base = format!("{scheme}://{}:{}", self.host, self.port);
        if location.starts_with('/') {
            return Self::parse(&format!("{base}{location}"));
        }
        let before_path = location.find(['/', '?', '#']).unwrap_or(location.len());
        if location.get(..before_path).is_some_and(|begin| begin.contains(':')) {
            return Self::parse(location);
        }
        let own = self.path.split('?').next().unwrap_or_default();
        let directory = own.rfind('/').and_then(|slash| own.get(..=slash)).unwrap_or("/");
        let begin = if location.starts_with('?') { own } else { directory };
        Self::parse(&format!("{base}{begin}{location}"))
    }

    /// Whether credentials for one may be sent to the other.
    pub fn same_origin(&self, other: &Self) -> bool {
        (self.secure, &self.host, self.port) == (other.secure, &other.host, other.port)
    }

    /// The host, and the port where it is not the scheme's own.
    pub fn authority(&self) -> String {
        match (self.secure, self.port) {
            (true, 443) | (false, 80) => self.host.clone(),
            (_, port) => format!("{}:{port}", self.host),
        }
    }

    /// For errors: without its query, which may be a signature that grants access.
    pub fn shown(&self) -> String {
        let scheme = if self.secure { "https" } else { "http" };
        format!("{scheme}://{}{}", self.authority(), brief(self.path.split('?').next().unwrap_or_default()))
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", if self.secure { "https" } else { "http" }, self.authority(), self.path)
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown())
    }
}

/// A host and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Authority {
    pub host: String,
    pub port: u16,
}

impl Authority {
    /// Parses `host`, `host:port` and `[address]:port`.
    pub fn parse(text: &str, default_port: u16) -> Option<Self> {
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (address, behind) = rest.split_once(']')?;
                address.parse::<std::net::Ipv6Addr>().ok()?;
                (format!("[{}]", address.to_ascii_lowercase()), behind)
            }
            None => {
                let end = text.find(':').unwrap_or(text.len());
                let (host, behind) = text.split_at_checked(end)?;
                let known = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
                if host.is_empty() || host.len() > 253 || !host.bytes().all(known) {
                    return None;
                }
                (host.to_ascii_lowercase(), behind)
            }
        };
        let port = match port.strip_prefix(':') {
            Some("") | None if port.len() <= 1 => default_port,
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().ok().filter(|n| *n > 0)?,
            _ => return None,
        };
        Some(Self { host, port })
    }

    /// Whether it is this machine itself, by name or address.
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.ip().is_some_and(|ip| ip.is_loopback())
    }

    pub fn ip(&self) -> Option<IpAddr> {
        self.host.trim_start_matches('[').trim_end_matches(']').parse().ok()
    }
}

/// Encodes a value for a query or a form (RFC 3986, 2.1).
pub(super) fn encode(value: &str) -> String {
    let mut encoded = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// The beginning of a text of a stranger's, printable, for errors.
pub(super) fn brief(text: &str) -> String {
    const MOST: usize = 300;
    let mut shown: String = text.chars().filter(|c| !c.is_control()).take(MOST).collect();
    if text.chars().nth(MOST).is_some() {
        shown.push_str("..");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_displayed() {
        let cases = [
            ("https://R.example", "https://r.example/"),
            ("https://r.example:443/v2/", "https://r.example/v2/"),
            ("http://r.example:5000/v2/?a=b#c", "http://r.example:5000/v2/?a=b"),
            ("http://[::1]:80/x", "http://[::1]/x"),
            ("https://r.example?x", "https://r.example/?x"),
        ];
        for (text, shown) in cases {
            assert_eq!(Url::parse(text).unwrap().to_string(), shown);
        }
        let hidden = Url::parse("https://r.example/a?signature=secret").unwrap();
        assert_eq!((hidden.shown().as_str(), format!("{hidden:?}").contains("secret")), ("https://r.example/a", false));
        for wrong in [
            "",
            "r.example",
            "ftp://r.example/",
            "https://",
            "https://:5/",
            "https://user:secret@r.example/",
            "https://r.example/ x",
        ] {
            assert_eq!(Url::parse(wrong).unwrap_err().kind(), ErrorKind::Corrupt, "{wrong}");
        }
        assert!(Url::parse(&format!("https://r.example/{}", "a".repeat(MAX_URL))).is_err());
    }

    #[test]
    fn locations_lead_on_from_where_they_were_given() {
        let from = Url::parse("https://r.example:8443/v2/a/blobs/x?q=1").unwrap();
        let cases = [
            ("https://cdn.example/y?s=1", "https://cdn.example/y?s=1"),
            ("//cdn.example/y", "https://cdn.example/y"),
            ("/y", "https://r.example:8443/y"),
            ("y?z", "https://r.example:8443/v2/a/blobs/y?z"),
            ("?z", "https://r.example:8443/v2/a/blobs/x?z"),
        ];
        for (location, to) in cases {
            assert_eq!(from.join(location).unwrap().to_string(), to, "{location}");
        }
        assert!(from.join("file:///etc/passwd").is_err());
        let same = |text: &str| from.same_origin(&Url::parse(text).unwrap());
        assert!(same("https://R.example:8443/other"));
        assert!(!same("http://r.example:8443/") && !same("https://r.example/") && !same("https://cdn.r.example:8443/"));
    }

    #[test]
    fn values_are_encoded() {
        assert_eq!(encode("repository:a/b:pull ä&"), "repository%3Aa%2Fb%3Apull%20%C3%A4%26");
    }
}
