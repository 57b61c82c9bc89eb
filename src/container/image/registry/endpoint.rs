//! [`Endpoint`]: where a registry or a mirror of it is asked.

use super::url::{Authority, Url};
use crate::container::image::oci::Reference;
use crate::error::{Error, Result};

/// Where Docker Hub's images are asked for.
const HUB: &str = "registry-1.docker.io";

/// Hosts that may be asked by plain HTTP: as they are named in references, in lower case.
#[derive(Debug, Clone, Default)]
pub(super) struct PlainHosts(pub Vec<String>);

impl PlainHosts {
    pub fn allow(&self, authority: &str) -> bool {
        let bare = |name: &str| name.trim_end_matches(":80").to_owned();
        self.0.iter().any(|name| bare(name) == bare(&authority.to_ascii_lowercase()))
    }
}

/// A server with images.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    /// As credentials are kept for it.
    pub name: String,
    /// Ends before `v2/`.
    base: Url,
}

impl Endpoint {
    /// The registry of a reference itself.
    ///
    /// # Errors
    /// `Corrupt` for a name that is no host.
    pub fn of(reference: &Reference, plain: &PlainHosts) -> Result<Self> {
        let name = reference.registry().to_ascii_lowercase();
        let host = if name == "docker.io" { HUB } else { &name };
        let scheme = if plain.allow(&name) { "http" } else { "https" };
        Ok(Self { base: Url::parse(&format!("{scheme}://{host}/"))?, name })
    }

    /// A mirror: an address, or a host.
    ///
    /// # Errors
    /// `InvalidConfig` for what is neither.
    pub fn mirror(text: &str, plain: &PlainHosts) -> Result<Self> {
        let bare = text.split('/').next().unwrap_or_default();
        let address = match text.contains("://") {
            true => text.to_owned(),
            false if plain.allow(bare) => format!("http://{text}"),
            false => format!("https://{text}"),
        };
        let mut base = Url::parse(&address).map_err(|error| Error::invalid("Registry::mirror", error))?;
        if base.path.contains('?') {
            return Err(Error::invalid("Registry::mirror", "an address without a query is needed"));
        }
        if !base.path.ends_with('/') {
            base.path.push('/');
        }
        let name = Authority { host: base.host.clone(), port: base.port };
        let name = if name.port == 443 || !base.secure && name.port == 80 { name.host } else { base.authority() };
        Ok(Self { base, name })
    }

    /// The address of what is at `path` behind `v2/`.
    pub fn url(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        url.path = format!("{}v2/{path}", url.path);
        url
    }

    /// For errors.
    pub fn shown(&self) -> &str {
        &self.name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_are_asked_by_tls_unless_allowed_by_name() {
        let plain = PlainHosts(vec!["localhost:5000".into(), "plain.example".into()]);
        let url = |text: &str| Endpoint::of(&text.parse().unwrap(), &plain).unwrap().url("a/b").to_string();
        assert_eq!(url("debian"), "https://registry-1.docker.io/v2/a/b");
        assert_eq!(url("localhost:5000/x"), "http://localhost:5000/v2/a/b");
        assert_eq!(url("localhost:5001/x"), "https://localhost:5001/v2/a/b");
        assert_eq!(url("PLAIN.example:80/x"), "http://plain.example/v2/a/b");
        assert_eq!(url("127.0.0.1/x"), "https://127.0.0.1/v2/a/b");
    }

    #[test]
    fn mirrors_are_hosts_or_addresses() {
        let plain = PlainHosts(vec!["localhost:5000".into()]);
        let mirror = |text: &str| Endpoint::mirror(text, &plain).map(|it| (it.url("a").to_string(), it.name));
        let is = |text: &str, url: &str, name: &str| assert_eq!(mirror(text).unwrap(), (url.into(), name.into()));
        is("m.example", "https://m.example/v2/a", "m.example");
        is("https://m.example:8443/proxy", "https://m.example:8443/proxy/v2/a", "m.example:8443");
        is("localhost:5000/hub/", "http://localhost:5000/hub/v2/a", "localhost:5000");
        for wrong in ["", "ftp://m.example", "https://user:hunter2@m.example/", "m.example/?x"] {
            let error = mirror(wrong).unwrap_err().to_string();
            assert!(error.contains("Registry::mirror") && !error.contains("hunter2"), "{error}");
        }
    }
}
