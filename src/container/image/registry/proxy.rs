//! [`Proxies`]: through which server requests go, as the environment says (`HTTP_PROXY`, `HTTPS_PROXY`, `NO_PROXY`).

use std::net::IpAddr;

use super::url::{Authority, Url};

/// Read as Go's `httpproxy` reads them, which Docker has.
#[derive(Clone, Default)]
pub(super) struct Proxies {
    plain: Option<String>,
    secure: Option<String>,
    /// Hosts that are asked directly.
    direct: Vec<String>,
}

impl Proxies {
    /// Reads them from variables, here the process's or a test's. Each may be in capitals or not.
    pub fn new(variable: impl Fn(&str) -> Option<String>) -> Self {
        let either = |name: &str| {
            let value = variable(name).filter(|value| !value.is_empty());
            value.or_else(|| variable(&name.to_ascii_lowercase()).filter(|value| !value.is_empty()))
        };
        // Of a CGI program it may be a header of its client's.
        let plain = if variable("REQUEST_METHOD").is_some() { None } else { either("HTTP_PROXY") };
        let direct = either("NO_PROXY").unwrap_or_default();
        let direct = direct.split(',').map(|it| it.trim().to_ascii_lowercase()).filter(|it| !it.is_empty()).collect();
        Self { plain, secure: either("HTTPS_PROXY"), direct }
    }

    /// The proxy for an address. This machine itself is always asked directly.
    pub fn of(&self, url: &Url) -> Option<&str> {
        let proxy = if url.secure { &self.secure } else { &self.plain }.as_deref()?;
        let host = Authority { host: url.host.clone(), port: url.port };
        let direct = host.is_loopback() || self.direct.iter().any(|pattern| is_direct(pattern, &host));
        (!direct).then_some(proxy)
    }
}

fn is_direct(pattern: &str, host: &Authority) -> bool {
    if pattern == "*" {
        return true;
    }
    if let Some((network, bits)) = pattern.split_once('/')
        && let (Ok(network), Ok(bits), Some(ip)) = (network.parse(), bits.parse(), host.ip())
    {
        return within(ip, network, bits);
    }
    let bare = pattern.trim_start_matches("*.").trim_start_matches('.');
    if let (Ok(ip), Some(own)) = (bare.parse::<IpAddr>(), host.ip()) {
        return ip == own;
    }
    let Some(named) = Authority::parse(bare, host.port) else { return false };
    if named.port != host.port {
        return false;
    }
    // A name stands for what is below it too; with a dot before it, for that alone.
    let below = host.host.strip_suffix(&named.host).is_some_and(|before| before.ends_with('.'));
    below || host.host == named.host && bare == pattern
}

fn within(ip: IpAddr, network: IpAddr, bits: u32) -> bool {
    let (ip, network, width) = match (ip, network) {
        (IpAddr::V4(ip), IpAddr::V4(network)) => (u128::from(u32::from(ip)), u128::from(u32::from(network)), 32),
        (IpAddr::V6(ip), IpAddr::V6(network)) => (u128::from(ip), u128::from(network), 128),
        _ => return false,
    };
    let shift = |n: u128| n.checked_shr(width - bits.min(width)).unwrap_or(0);
    bits <= width && shift(ip) == shift(network)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(set: &[(&str, &str)]) -> Proxies {
        Proxies::new(|name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).into()))
    }

    #[test]
    fn proxy_is_that_of_the_scheme() {
        let some = proxies(&[("HTTP_PROXY", "http://a:1"), ("https_proxy", "b:2"), ("NO_PROXY", "")]);
        let of = |url: &str| some.of(&Url::parse(url).unwrap()).map(str::to_owned);
        assert_eq!(of("http://r.example/").as_deref(), Some("http://a:1"));
        assert_eq!(of("https://r.example/").as_deref(), Some("b:2"));
        for own in ["https://localhost:5000/", "http://127.0.0.9/", "https://[::1]/"] {
            assert_eq!(of(own), None, "{own}");
        }
        let program = proxies(&[("HTTP_PROXY", "http://a:1"), ("REQUEST_METHOD", "GET")]);
        assert!(program.of(&Url::parse("http://r.example/").unwrap()).is_none());
    }

    #[test]
    fn named_hosts_are_asked_directly() {
        let cases = [
            ("*", "r.example", true),
            ("example", "r.example", true),
            ("r.example", "r.example", true),
            ("r.example", "other.example", false),
            ("example", "notexample", false),
            (".example", "r.example", true),
            (".r.example", "r.example", false),
            ("*.example", "r.example", true),
            ("r.example:443", "r.example", true),
            ("r.example:5000", "r.example", false),
            ("10.0.0.0/8", "10.1.2.3", true),
            ("10.0.0.0/8", "11.1.2.3", false),
            ("10.0.0.0/99", "10.1.2.3", false),
            ("0.0.0.0/0", "10.1.2.3", true),
            ("fd00::/8", "[fd12::1]", true),
            ("10.1.2.3", "10.1.2.3", true),
            ("a, b ,R.EXAMPLE", "r.example", true),
        ];
        for (pattern, host, direct) in cases {
            let some = proxies(&[("HTTPS_PROXY", "p:1"), ("NO_PROXY", pattern)]);
            let url = Url::parse(&format!("https://{host}/")).unwrap();
            assert_eq!(some.of(&url).is_none(), direct, "{pattern} {host}");
        }
    }
}
