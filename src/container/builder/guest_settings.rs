//! Secrets, names of hosts and kernel parameters of a container.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::ContainerBuilder;
use super::boot_config::check_host;
use crate::error::{Error, Result};
use crate::proto::{Secret, StringBuf};
use crate::size::Size;

/// The content of a secret, which is never printed.
#[derive(Clone)]
struct SecretContent(Arc<[u8]>);

impl fmt::Debug for SecretContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// All secrets as the shim gets them, which are never printed either.
#[derive(Default)]
pub(super) struct SecretBytes(pub(super) Vec<u8>);

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// As the embedder set it.
#[derive(Debug, Clone, Default)]
pub(super) struct GuestSettings {
    pub(super) read_only: bool,
    secrets: Vec<(String, SecretContent)>,
    sysctls: Vec<(String, String)>,
    hosts: Vec<(String, IpAddr)>,
    dns_servers: Vec<IpAddr>,
    dns_search: Vec<String>,
}

/// As the shim gets it.
#[derive(Debug, Default)]
pub(super) struct GuestFiles {
    pub(super) read_only: bool,
    pub(super) secrets: SecretBytes,
    /// Paths below `/proc/sys` and values in turn.
    pub(super) sysctls: StringBuf,
    pub(super) hosts: Vec<u8>,
    pub(super) resolv_conf: Vec<u8>,
}

/// Where secrets are.
const SECRETS: &str = "/run/secrets";
/// What all secrets of a container may take together.
const MAX_SECRETS: usize = 512 << 10;
/// The most servers that resolvers ask (resolv.conf(5), `MAXNS`).
const MAX_DNS_SERVERS: usize = 3;
/// The longest name of a host, in bytes (RFC 1035, 2.3.4).
const MAX_DOMAIN: usize = 253;
/// The longest value of a sysctl that is taken.
const MAX_SYSCTL: usize = 4096;

impl GuestSettings {
    /// Checks everything. `resolver` is who answers where no server is named.
    ///
    /// # Errors
    /// `InvalidConfig`, naming the method, for what cannot be.
    pub(super) fn files(&self, resolver: Option<[u8; 4]>) -> Result<GuestFiles> {
        Ok(GuestFiles {
            read_only: self.read_only,
            secrets: self.secrets()?,
            sysctls: self.sysctls()?,
            hosts: self.hosts()?,
            resolv_conf: self.resolv_conf(resolver)?,
        })
    }

    /// Where the secrets are, if there are any.
    pub(super) fn secrets_path(&self) -> Option<&'static str> {
        (!self.secrets.is_empty()).then_some(SECRETS)
    }

    fn secrets(&self) -> Result<SecretBytes> {
        let (mut list, mut taken, mut total) = (Vec::new(), BTreeSet::new(), 0_usize);
        for (name, SecretContent(content)) in &self.secrets {
            let wrong = |what: &str| Error::invalid("secret", format!("{name:?} {what}"));
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            if name.is_empty() || name.len() > 255 || !name.chars().all(plain) || name.starts_with('.') {
                return Err(wrong("is no name: 1 to 255 letters, digits, `.`, `-` and `_` are, without `.` in front"));
            }
            if !taken.insert(name) {
                return Err(wrong("is there twice"));
            }
            total = total.saturating_add(content.len());
            if total > MAX_SECRETS {
                return Err(wrong(&format!(
                    "makes all secrets larger than {} together",
                    Size::bytes(MAX_SECRETS as u64)
                )));
            }
            Secret { name: name.as_bytes(), content }.push(&mut list);
        }
        Ok(SecretBytes(list))
    }

    fn sysctls(&self) -> Result<StringBuf> {
        let mut list = StringBuf::new();
        for (name, value) in &self.sysctls {
            let wrong = |what: &str| Error::invalid("sysctl", format!("{name:?} {what}"));
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/' | ':');
            let path = if name.contains('/') { name.clone() } else { name.replace('.', "/") };
            let parts = path.split('/').all(|part| !part.is_empty() && !part.chars().all(|c| c == '.'));
            if !name.chars().all(plain) || !parts || !path.contains('/') {
                return Err(wrong("is no name of a sysctl, such as \"net.ipv4.ip_forward\""));
            }
            if value.is_empty() || value.len() > MAX_SYSCTL {
                return Err(wrong("has an empty value, or one above 4096 bytes"));
            }
            for text in [&path, value] {
                list.push(text.as_bytes()).map_err(|_| wrong("has a NUL"))?;
            }
        }
        Ok(list)
    }

    fn hosts(&self) -> Result<Vec<u8>> {
        let mut lines = Vec::new();
        for (name, address) in &self.hosts {
            check_host("extra_host", name, MAX_DOMAIN)?;
            lines.extend_from_slice(format!("{address}\t{name}\n").as_bytes());
        }
        Ok(lines)
    }

    fn resolv_conf(&self, resolver: Option<[u8; 4]>) -> Result<Vec<u8>> {
        if self.dns_servers.len() > MAX_DNS_SERVERS {
            return Err(Error::invalid("dns_server", "resolvers ask at most three"));
        }
        let given: Vec<IpAddr> = match (self.dns_servers.as_slice(), resolver) {
            ([], Some(resolver)) => vec![resolver.into()],
            (servers, _) => servers.to_vec(),
        };
        let mut text: String = given.iter().map(|server| format!("nameserver {server}\n")).collect();
        for domain in &self.dns_search {
            check_host("dns_search", domain, MAX_DOMAIN)?;
        }
        if !self.dns_search.is_empty() {
            text += &format!("search {}\n", self.dns_search.join(" "));
        }
        Ok(text.into_bytes())
    }
}

impl ContainerBuilder {
    /// Sets whether the root file system is read-only; writable by default.
    ///
    /// Disks, `/dev` and what [`ContainerBuilder::tmpfs`] mounts can still be written. Most programs need `/tmp` and
    /// `/run` writable: mount both so. A working directory must then be there; none is made. Root of the container can
    /// mount it writable again, unless its program is [`Exec::hardened`](crate::Exec::hardened).
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.guest.read_only = read_only;
        self
    }

    /// Gives the container a secret, as the file `/run/secrets/NAME`.
    ///
    /// The file is in memory and read-only, and every user of the container can read it. Its content is on no disk, and
    /// in no error and no `Debug` text of this crate. Once the container has started, and the builder and its clones are
    /// dropped, this crate keeps no copy. Memory that it has freed is not overwritten, and a host that swaps may write it.
    ///
    /// A name has 1 to 255 letters, digits, `.`, `-` and `_`, without `.` in front. All secrets may take 512 KiB
    /// together. Anything else is `InvalidConfig` of [`ContainerBuilder::start`].
    pub fn secret(mut self, name: impl Into<String>, content: impl Into<Vec<u8>>) -> Self {
        self.guest.secrets.push((name.into(), SecretContent(content.into().into())));
        self
    }

    /// Sets a parameter of the container's kernel, such as `net.ipv4.ip_forward` to `1`; see sysctl(8).
    ///
    /// A name with a slash is a path below `/proc/sys`: `net/ipv4/conf/eth0/forwarding`. A value has 1 to 4,096 bytes.
    /// [`ContainerBuilder::start`] fails with `InvalidConfig` otherwise. It fails with `GuestFailed`, naming the
    /// parameter, where the kernel has none of that name or refuses the value.
    pub fn sysctl(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.guest.sysctls.push((name.into(), value.into()));
        self
    }

    /// Adds a name to `/etc/hosts`, for programs that look it up.
    ///
    /// One that is no host's name is `InvalidConfig` of [`ContainerBuilder::start`].
    pub fn extra_host(mut self, name: impl Into<String>, address: impl Into<IpAddr>) -> Self {
        self.guest.hosts.push((name.into(), address.into()));
        self
    }

    /// Adds a name server to `/etc/resolv.conf`, in place of the networks' own.
    ///
    /// More than three are `InvalidConfig` of [`ContainerBuilder::start`], as resolvers ask no more.
    pub fn dns_server(mut self, address: impl Into<IpAddr>) -> Self {
        self.guest.dns_servers.push(address.into());
        self
    }

    /// Adds a domain in which resolvers look for short names.
    ///
    /// `/etc/resolv.conf` is written anew, also where no server is named. A domain that is no host's name is
    /// `InvalidConfig` of [`ContainerBuilder::start`].
    pub fn dns_search(mut self, domain: impl Into<String>) -> Self {
        self.guest.dns_search.push(domain.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn refused(settings: GuestSettings, method: &str) -> String {
        let error = settings.files(None).map(drop).unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains(method), "{error}");
        error.to_string()
    }

    #[test]
    fn secrets_are_bounded_and_never_printed() {
        let secrets = |names: &[&str], len| GuestSettings {
            secrets: names.iter().map(|name| ((*name).into(), SecretContent(vec![b'x'; len].into()))).collect(),
            ..GuestSettings::default()
        };
        for name in ["", ".", "..", ".hidden", "a/b", "a b", "ä", "a\0"] {
            refused(secrets(&[name], 1), "secret");
        }
        refused(secrets(&["a", "a"], 1), "secret");
        let error = refused(secrets(&["a", "b"], MAX_SECRETS / 2 + 1), "secret");
        assert!(!error.contains("xx"), "{error}");
        assert!(!format!("{:?}", secrets(&["a"], 100)).contains("xx"));
        assert!(secrets(&["a", "b-c_d.e"], MAX_SECRETS / 2).files(None).is_ok());
    }

    #[test]
    fn sysctls_and_names_of_hosts_are_checked() {
        for (name, value) in [
            ("", "1"),
            ("a", "1"),
            ("a..b", "1"),
            ("../a", "1"),
            ("a/../b", "1"),
            ("a.b", ""),
            ("a b", "1"),
            ("a.b", "\0"),
        ] {
            refused(GuestSettings { sysctls: vec![(name.into(), value.into())], ..GuestSettings::default() }, "sysctl");
        }
        let address = IpAddr::from([10, 0, 0, 9]);
        for name in ["", "a b", "a\n", "-a"] {
            refused(GuestSettings { hosts: vec![(name.into(), address)], ..GuestSettings::default() }, "extra_host");
            refused(GuestSettings { dns_search: vec![name.into()], ..GuestSettings::default() }, "dns_search");
        }
        refused(GuestSettings { dns_servers: vec![address; 4], ..GuestSettings::default() }, "dns_server");
        let settings = GuestSettings {
            sysctls: vec![("net.ipv4.ip_forward".into(), "1".into()), ("net/ipv4/conf/a.b/x".into(), "0".into())],
            hosts: vec![("db".into(), address)],
            dns_search: vec!["one.example".into(), "two".into()],
            ..GuestSettings::default()
        };
        let files = settings.files(Some([10, 0, 0, 2])).unwrap();
        let sysctls: Vec<_> = files.sysctls.as_strings().iter().map(|text| text.to_str().unwrap()).collect();
        assert_eq!(sysctls, ["net/ipv4/ip_forward", "1", "net/ipv4/conf/a.b/x", "0"]);
        assert_eq!(files.hosts, b"10.0.0.9\tdb\n");
        assert_eq!(files.resolv_conf, b"nameserver 10.0.0.2\nsearch one.example two\n");
        let own = GuestSettings { dns_servers: vec![address], ..GuestSettings::default() };
        assert_eq!(own.files(Some([10, 0, 0, 2])).unwrap().resolv_conf, b"nameserver 10.0.0.9\n");
        assert!(GuestSettings::default().files(None).unwrap().resolv_conf.is_empty());
    }
}
