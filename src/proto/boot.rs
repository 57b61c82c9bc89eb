//! The configuration that the shim needs before it can ask. It is a file in the initramfs beside it. Written by the
//! library, read once by the shim.

use core::ffi::CStr;

use super::BOOT_CONFIG_MAX;
use super::alloc::vec::Vec;
use super::field::{Fields, Malformed, Writer};
use super::strings::Strings;

/// The file's first bytes: a shim of one build meets the file of another only by mistake, and then shall say so.
const MAGIC: &[u8] = b"cofferdam boot 1\n";

const HOSTNAME: u8 = 1;
const CONTROL_PORT: u8 = 2;
const ROOT: u8 = 3;
const READ_ONLY: u8 = 4;
const DEVICE: u8 = 5;
const FS: u8 = 6;
const UPPER_DEVICE: u8 = 7;
const UPPER_FS: u8 = 8;
const MODULES: u8 = 9;
/// 10 was the one network that there could be, 11 networks without IPv6, 12 the one resolver.
const NETWORKS: u8 = 13;
const RESOLV_CONF: u8 = 14;
const HOSTS: u8 = 15;
/// 16 was memory file systems alone.
const SYSCTLS: u8 = 17;
const SECRETS: u8 = 18;
const MOUNTS: u8 = 19;
const UPPER_GROW: u8 = 20;

const ROOT_INITRAMFS: u8 = 0;
const ROOT_DEVICE: u8 = 1;
const ROOT_OVERLAY: u8 = 2;

/// Where the shim finds things, and what the workloads' root is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct BootConfig<'a> {
    /// The guest's host name; empty leaves the kernel's.
    pub(crate) hostname: &'a [u8],
    /// The host's vsock port for the control stream, ordinarily [`super::CONTROL_PORT`].
    pub(crate) control_port: u32,
    /// The root file system of the workloads.
    pub(crate) root: Root<'a>,
    /// Files of kernel modules, in the order in which they are inserted before anything else is done; see [`OPTIONAL`].
    pub(crate) modules: Strings<'a>,
    /// How network cards are set up; those that are not named are left alone.
    pub(crate) networks: Networks<'a>,
    /// The content of `/etc/resolv.conf`; empty leaves that as it is.
    pub(crate) resolv_conf: &'a [u8],
    /// Lines for `/etc/hosts`.
    pub(crate) hosts: &'a [u8],
    /// File systems in memory and on disks: four texts each, see [`Mount`]. One inside another comes after it.
    pub(crate) mounts: Mounts<'a>,
    /// Parameters of the kernel: the path of each below `/proc/sys`, then its value.
    pub(crate) sysctls: Strings<'a>,
    /// Files for `/run/secrets`.
    pub(crate) secrets: Secrets<'a>,
}

/// A file system that is mounted for the workloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mount<'a> {
    /// The kernel's name of it: `tmpfs`, `ext4`, `erofs`.
    pub(crate) fs: &'a CStr,
    /// The device; what is in memory has none.
    pub(crate) device: &'a CStr,
    /// An absolute path.
    pub(crate) target: &'a CStr,
    /// Of a file system in memory, the kernel's own options. Of one on a disk, [`READ_ONLY_DISK`], [`GROW_DISK`] or nothing.
    pub(crate) options: &'a CStr,
}

/// A disk that is mounted read-only.
pub(crate) const READ_ONLY_DISK: &CStr = c"ro";
/// A disk that has become larger than its file system, which then takes all of it.
pub(crate) const GROW_DISK: &CStr = c"grow";

/// A list of mounts in someone else's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Mounts<'a>(pub(crate) Strings<'a>);

impl<'a> Mounts<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let list = Strings::parse(bytes, "list of mounts")?;
        if list.iter().count() % 4 == 0 { Ok(Self(list)) } else { Err(Malformed("list of mounts")) }
    }

    /// The mounts in their order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Mount<'a>> + use<'a> {
        let mut texts = self.0.iter();
        core::iter::from_fn(move || {
            Some(Mount { fs: texts.next()?, device: texts.next()?, target: texts.next()?, options: texts.next()? })
        })
    }
}

/// A file that is in memory alone.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Secret<'a> {
    /// The name of the file.
    pub(crate) name: &'a [u8],
    pub(crate) content: &'a [u8],
}

impl<'a> Secret<'a> {
    /// The first of a list, and the rest of it.
    fn split(list: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let part = |list: &'a [u8]| {
            let (length, rest) = list.split_first_chunk()?;
            rest.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)
        };
        let (name, rest) = part(list)?;
        let (content, rest) = part(rest)?;
        (!name.is_empty() && !name.contains(&0) && !name.contains(&b'/')).then_some((Self { name, content }, rest))
    }

    /// Appends it to a list.
    pub(crate) fn push(&self, to: &mut Vec<u8>) {
        for part in [self.name, self.content] {
            to.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
            to.extend_from_slice(part);
        }
    }
}

impl core::fmt::Debug for Secret<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Secret({} bytes)", self.content.len())
    }
}

/// A list of secrets in someone else's bytes, which [`Secret::push`] made.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Secrets<'a>(pub(crate) &'a [u8]);

impl core::fmt::Debug for Secrets<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Secrets({} bytes)", self.0.len())
    }
}

impl<'a> Secrets<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut rest = bytes;
        while !rest.is_empty() {
            (_, rest) = Secret::split(rest).ok_or(Malformed("list of secrets"))?;
        }
        Ok(Self(bytes))
    }

    /// The secrets in their order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Secret<'a>> + use<'a> {
        let mut rest = self.0;
        core::iter::from_fn(move || {
            let (secret, after) = Secret::split(rest)?;
            rest = after;
            Some(secret)
        })
    }
}

/// The addresses of one card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Network {
    /// The card: `eth0` is number 0.
    pub(crate) card: u8,
    /// The guest's IPv4 address.
    pub(crate) address4: [u8; 4],
    /// Bits of the IPv4 network, at most 32.
    pub(crate) prefix4: u8,
    /// The router; zeroes where there is none.
    pub(crate) gateway4: [u8; 4],
    /// The guest's IPv6 address; its network has 64 bits.
    pub(crate) address6: [u8; 16],
    /// The router; zeroes where there is none.
    pub(crate) gateway6: [u8; 16],
}

/// Bytes of one [`Network`], whose fields stand in their order.
const NETWORK_SIZE: usize = 42;

impl Network {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let ([card], rest) = bytes.split_first_chunk()?;
        let (address4, rest) = rest.split_first_chunk()?;
        let ([prefix4], rest) = rest.split_first_chunk()?;
        let (gateway4, rest) = rest.split_first_chunk()?;
        let (address6, rest) = rest.split_first_chunk()?;
        let gateway6 = rest.try_into().ok()?;
        let (card, prefix4) = (*card, *prefix4);
        (prefix4 <= 32).then_some(Self {
            card,
            address4: *address4,
            prefix4,
            gateway4: *gateway4,
            address6: *address6,
            gateway6,
        })
    }

    /// Appends it to a list.
    pub(crate) fn push(&self, to: &mut Vec<u8>) {
        to.push(self.card);
        to.extend_from_slice(&self.address4);
        to.push(self.prefix4);
        to.extend_from_slice(&self.gateway4);
        to.extend_from_slice(&self.address6);
        to.extend_from_slice(&self.gateway6);
    }
}

/// A list of networks in someone else's bytes, which [`Network::push`] made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Networks<'a>(pub(crate) &'a [u8]);

impl<'a> Networks<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let all = bytes.chunks(NETWORK_SIZE).all(|network| Network::parse(network).is_some());
        if all { Ok(Self(bytes)) } else { Err(Malformed("list of networks")) }
    }

    /// The networks in their order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Network> + use<'a> {
        self.0.chunks(NETWORK_SIZE).filter_map(Network::parse)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// How the path of a module begins that may fail to be inserted; the path proper follows.
pub(crate) const OPTIONAL: u8 = b'-';

/// The root file system of the workloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Root<'a> {
    /// The initramfs itself.
    #[default]
    Initramfs,
    /// One device.
    Device {
        /// The device.
        source: RootDisk<'a>,
        /// Mounted read-only; `/run` and `/tmp` are in memory then.
        read_only: bool,
    },
    /// A shared device below, only read, and a private one on top.
    Overlay {
        /// The device below.
        lower: RootDisk<'a>,
        /// The device on top.
        upper: RootDisk<'a>,
        /// It has become larger than its file system, which then takes all of it.
        grow: bool,
        /// Read-only once it is set up.
        read_only: bool,
    },
}

/// A block device and the file system on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RootDisk<'a> {
    /// Path of the device in the guest, such as `/dev/vda`.
    pub(crate) device: &'a [u8],
    /// The kernel's name of the file system, such as `ext4`.
    pub(crate) fs: &'a [u8],
}

impl<'a> BootConfig<'a> {
    /// The file's content. [`Malformed`] names a text with a NUL in it or one that makes the file too long.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, Malformed> {
        let mut out = Vec::from(MAGIC);
        let mut fields = Writer(&mut out);
        fields.bytes(HOSTNAME, self.hostname);
        fields.u32(CONTROL_PORT, self.control_port);
        match self.root {
            Root::Initramfs => fields.u8(ROOT, ROOT_INITRAMFS),
            Root::Device { source, read_only } => {
                fields.u8(ROOT, ROOT_DEVICE);
                fields.flag(READ_ONLY, read_only);
                fields.bytes(DEVICE, source.device);
                fields.bytes(FS, source.fs);
            }
            Root::Overlay { lower, upper, grow, read_only } => {
                fields.flag(READ_ONLY, read_only);
                fields.flag(UPPER_GROW, grow);
                fields.u8(ROOT, ROOT_OVERLAY);
                fields.bytes(DEVICE, lower.device);
                fields.bytes(FS, lower.fs);
                fields.bytes(UPPER_DEVICE, upper.device);
                fields.bytes(UPPER_FS, upper.fs);
            }
        }
        if !self.modules.is_empty() {
            fields.bytes(MODULES, self.modules.as_bytes());
        }
        if !self.networks.is_empty() {
            fields.bytes(NETWORKS, self.networks.0);
        }
        let lists = [
            (RESOLV_CONF, self.resolv_conf),
            (HOSTS, self.hosts),
            (SYSCTLS, self.sysctls.as_bytes()),
            (SECRETS, self.secrets.0),
            (MOUNTS, self.mounts.0.as_bytes()),
        ];
        for (tag, list) in lists.into_iter().filter(|(_, list)| !list.is_empty()) {
            fields.bytes(tag, list);
        }
        // The reader is the judge of what may stand in it.
        BootConfig::parse(&out)?;
        Ok(out)
    }

    /// Reads the file's content.
    pub(crate) fn parse(file: &'a [u8]) -> Result<Self, Malformed> {
        if file.len() > BOOT_CONFIG_MAX {
            return Err(Malformed("length of the boot configuration"));
        }
        let payload = file.strip_prefix(MAGIC).ok_or(Malformed("first line of the boot configuration"))?;
        let fields = Fields::parse(payload)?;
        let source = |device, fs| {
            Ok(RootDisk { device: text(&fields, device, "root device")?, fs: text(&fields, fs, "root file system")? })
        };
        let root = match fields.u8(ROOT, "root")?.unwrap_or(ROOT_INITRAMFS) {
            ROOT_INITRAMFS => Root::Initramfs,
            ROOT_DEVICE => {
                Root::Device { source: source(DEVICE, FS)?, read_only: fields.flag(READ_ONLY, "read-only")? }
            }
            ROOT_OVERLAY => Root::Overlay {
                lower: source(DEVICE, FS)?,
                upper: source(UPPER_DEVICE, UPPER_FS)?,
                grow: fields.flag(UPPER_GROW, "growth of the device on top")?,
                read_only: fields.flag(READ_ONLY, "read-only")?,
            },
            _ => return Err(Malformed("kind of root")),
        };
        let hostname = fields.get(HOSTNAME).unwrap_or_default();
        // Linux keeps 64 bytes of it (__NEW_UTS_LEN).
        if hostname.len() > 64 || hostname.contains(&0) {
            return Err(Malformed("host name"));
        }
        let control_port = fields.u32(CONTROL_PORT, "control port")?.unwrap_or(super::CONTROL_PORT);
        let modules = Strings::parse(fields.get(MODULES).unwrap_or_default(), "list of modules")?;
        let networks = Networks::parse(fields.get(NETWORKS).unwrap_or_default())?;
        let pairs = |tag, name| {
            let list = Strings::parse(fields.get(tag).unwrap_or_default(), name)?;
            if list.iter().count() % 2 == 0 { Ok(list) } else { Err(Malformed(name)) }
        };
        Ok(Self {
            hostname,
            control_port,
            root,
            modules,
            networks,
            resolv_conf: fields.get(RESOLV_CONF).unwrap_or_default(),
            hosts: fields.get(HOSTS).unwrap_or_default(),
            mounts: Mounts::parse(fields.get(MOUNTS).unwrap_or_default())?,
            sysctls: pairs(SYSCTLS, "list of kernel parameters")?,
            secrets: Secrets::parse(fields.get(SECRETS).unwrap_or_default())?,
        })
    }
}

/// A text that must be there.
fn text<'a>(fields: &Fields<'a>, tag: u8, name: &'static str) -> Result<&'a [u8], Malformed> {
    fields.get(tag).filter(|text| !text.is_empty() && !text.contains(&0)).ok_or(Malformed(name))
}
