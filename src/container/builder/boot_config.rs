//! [`ShimConfig`]: what the shim needs to know to set up the guest.

use super::disks::{RootDisks, RootPaths};
use super::guest_settings::{GuestFiles, GuestSettings};
use crate::boot::{Kernel, Packed};
use crate::container::shim;
use crate::error::{Context, Error, Result};
use crate::proto::{BootConfig, CONTROL_PORT, Mounts, Network, Networks, OPTIONAL, Secrets, StringBuf};
use crate::vm::{AddressConfig, Net};

/// Host name, root, networks and files of one container.
pub(super) struct ShimConfig {
    hostname: String,
    root: RootPaths,
    networks: Vec<u8>,
    files: GuestFiles,
    mounts: StringBuf,
}

impl ShimConfig {
    /// # Errors
    /// As [`GuestSettings::files`].
    pub(super) fn new(
        hostname: &str,
        root: &RootDisks,
        nets: &[Net],
        settings: &GuestSettings,
        mounts: StringBuf,
    ) -> Result<Self> {
        let (networks, resolver) = networks(nets);
        let files = settings.files(resolver)?;
        Ok(Self { hostname: hostname.to_owned(), root: root.paths().clone(), networks, files, mounts })
    }

    /// Adds these modules to the kernel, and an initramfs with the shim and this configuration.
    pub(super) fn add_to(&self, kernel: Kernel, packed: &Packed) -> Result<Kernel> {
        let modules = modules(packed)?;
        let config = BootConfig {
            hostname: self.hostname.as_bytes(),
            control_port: CONTROL_PORT,
            root: self.root.root(self.files.read_only),
            modules: modules.as_strings(),
            networks: Networks(&self.networks),
            resolv_conf: &self.files.resolv_conf,
            hosts: &self.files.hosts,
            mounts: Mounts(self.mounts.as_strings()),
            sysctls: self.files.sysctls.as_strings(),
            secrets: Secrets(&self.files.secrets.0),
        };
        let kernel = kernel.with_packed(packed);
        let initramfs = shim::initramfs(kernel.initramfs_or_default(), &config)?;
        Ok(kernel.initramfs(initramfs))
    }
}

/// Reserves the guest's addresses on each network.
pub(super) fn reserve_addresses(nets: Vec<Net>) -> Result<Vec<Net>> {
    // The shim lets gateways reach services on 127.0.0.1.
    let reserve =
        |(n, net): (usize, Net)| net.allow_loopback().reserve_address().doing(|| format!("attaching network {n}"));
    nets.into_iter().enumerate().map(reserve).collect()
}

/// The longest host name that Linux keeps, in bytes (hostname(7)).
const HOST_NAME_MAX: usize = 64;

/// What Linux and resolvers take for a host's name (hostname(7)), and underscores, which Docker takes too. It is written
/// into files of the guest.
pub(super) fn check_hostname(name: &str) -> Result<()> {
    check_host("hostname", name, HOST_NAME_MAX)
}

/// The same for what `method` was given.
pub(super) fn check_host(method: &'static str, name: &str, max: usize) -> Result<()> {
    let ends = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let fits = name.len() <= max
        && name.chars().all(|c| ends(c) || matches!(c, '-' | '.'))
        && name.split('.').all(|label| label.starts_with(ends) && label.ends_with(ends));
    match fits {
        true => Ok(()),
        false => Err(Error::invalid(
            method,
            format!(
                "{name:?}: 1 to {max} letters, digits, `-`, `_` and `.` are needed, without `-` and `.` at the ends of a part"
            ),
        )),
    }
}

/// Returns what the shim needs to know of the cards, and the resolver's address.
fn networks(nets: &[Net]) -> (Vec<u8>, Option<[u8; 4]>) {
    let (mut list, mut resolvers) = (Vec::new(), Vec::new());
    // No machine has as many.
    for (card, net) in (0..=u8::MAX).zip(nets) {
        let Some(AddressConfig { address4, prefix4, address6, gateways, resolver }) = net.link() else { continue };
        let network = Network {
            card,
            address4: address4.octets(),
            prefix4,
            gateway4: gateways.map_or([0; 4], |(gateway4, _)| gateway4.octets()),
            address6: address6.octets(),
            gateway6: gateways.map_or([0; 16], |(_, gateway6)| gateway6.octets()),
        };
        network.push(&mut list);
        resolvers.push((gateways.is_none(), resolver.octets()));
    }
    // One with a way out knows all names.
    resolvers.sort_by_key(|(inside, _)| *inside);
    (list, resolvers.first().map(|(_, resolver)| *resolver))
}

/// The list by which the shim inserts them.
fn modules(packed: &Packed) -> Result<StringBuf> {
    let mut list = StringBuf::new();
    for (path, required) in packed.paths() {
        let entry = if required { path } else { format!("{}{path}", char::from(OPTIONAL)) };
        list.push(entry.as_bytes()).map_err(|_| Error::invalid("Kernel::modules", format!("{entry:?} has a NUL")))?;
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn host_names_that_linux_and_resolvers_do_not_take_are_refused() {
        let longest = "x".repeat(HOST_NAME_MAX);
        for name in ["box", "a_b", "0", "one.two-three", &longest] {
            check_hostname(name).unwrap();
        }
        let longer = "x".repeat(HOST_NAME_MAX + 1);
        for name in ["", "-a", "a-", ".a", "a.", "a..b", "a.-b", "a b", "a\nb", "a\0", "ä", "127.0.0.1 a", &longer] {
            let error = check_hostname(name).unwrap_err();
            assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("hostname"), "{error}");
        }
    }
}
