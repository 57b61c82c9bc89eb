//! Writes cpio archives for an initramfs (Linux, initramfs buffer format: "newc").

use crate::error::{Error, Result};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive under construction, in memory. Names are relative to the root, without a leading slash.
#[derive(Debug, Clone, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

/// One header's fields; what is not here is zero.
struct CpioHeader<'a> {
    name: &'a str,
    mode: u32,
    device: (u32, u32),
    len: usize,
}

impl Archive {
    pub(crate) fn directory(&mut self, name: &str, permissions: u32) -> Result<()> {
        self.entry(&CpioHeader { name, mode: DIRECTORY | permissions, device: (0, 0), len: 0 })
    }

    /// The header of a file whose `len` bytes follow the archive so far, padded to a multiple of four.
    pub(crate) fn file(&mut self, name: &str, permissions: u32, len: usize) -> Result<()> {
        self.entry(&CpioHeader { name, mode: FILE | permissions, device: (0, 0), len })
    }

    pub(crate) fn symlink(&mut self, name: &str, target: &str) -> Result<()> {
        self.entry(&CpioHeader { name, mode: SYMLINK | 0o777, device: (0, 0), len: target.len() })?;
        self.bytes.extend_from_slice(target.as_bytes());
        self.pad();
        Ok(())
    }

    pub(crate) fn character_device(&mut self, name: &str, permissions: u32, device: (u32, u32)) -> Result<()> {
        self.entry(&CpioHeader { name, mode: CHARACTER | permissions, device, len: 0 })
    }

    /// # Errors
    /// `InvalidConfig` for a name that the format or a tree cannot hold, or more data than 32 bits count.
    fn entry(&mut self, header: &CpioHeader<'_>) -> Result<()> {
        let CpioHeader { name, mode, device, len } = *header;
        let bad = |what: &str| Err(Error::invalid("Initramfs", format!("{name:?} {what}")));
        if name.is_empty() || name.starts_with('/') || name.contains('\0') || name.len() > 4095 {
            return bad("is not a name relative to the root");
        }
        if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return bad("has a part that is empty or leaves the tree");
        }
        let Ok(len) = u32::try_from(len) else {
            return bad("is larger than 4 GiB");
        };
        self.inode += 1;
        self.write_header(name, self.inode, mode, device, len);
        Ok(())
    }

    fn write_header(&mut self, name: &str, inode: u32, mode: u32, device: (u32, u32), len: u32) {
        let name_len = name.len() as u32 + 1;
        // inode, mode, uid, gid, links, mtime, size, device of the file system (2), own device (2), name's size, checksum
        let fields = [inode, mode, 0, 0, 1, 0, len, 0, 0, device.0, device.1, name_len, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The archive so far; what is added later goes on after it.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }

    /// The archive with its end mark.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.write_header("TRAILER!!!", 0, 0, (0, 0), 0);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn archive_paths_stay_inside_the_root() {
        for name in ["", "/etc", "a//b", "../x", "a/../b", "a/.", "nul\0"] {
            assert!(Archive::default().file(name, 0o644, 0).is_err(), "{name:?}");
        }
    }

    #[test]
    fn entries_are_aligned_and_end_with_the_trailer() {
        let mut archive = Archive::default();
        archive.file("abc", 0o755, 5).unwrap();
        let bytes = [archive.take(), b"12345\0\0\0".to_vec(), archive.finish()].concat();
        assert_eq!((&bytes[..6], bytes.len() % 4), (&b"070701"[..], 0));
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }

    #[test]
    fn gnu_cpio_reads_our_archives() {
        let mut archive = Archive::default();
        archive.directory("etc", 0o755).unwrap();
        archive.file("etc/motd", 0o644, 5).unwrap();
        let before = [archive.take(), b"hello\0\0\0".to_vec()].concat();
        archive.symlink("etc/link", "motd").unwrap();
        archive.character_device("console", 0o600, (5, 1)).unwrap();
        let bytes = [before, archive.finish()].concat();
        let Ok(mut cpio) =
            Command::new("cpio").args(["-tv", "--quiet"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
        else {
            return crate::sys::skip("cpio is not installed");
        };
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let listing = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        for line in ["drwxr-xr-x", "etc/motd", "etc/link -> motd", "5,   1"] {
            assert!(listing.contains(line), "{listing}");
        }
    }
}
