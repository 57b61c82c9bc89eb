//! For fuzzing and tests only: archives of entries as they may be, or nearly.

use std::io::{Cursor, Read};
use std::time::Duration;

use super::budget::{Budget, PrepareDeadline};
use super::erofs::reader::Reader;
use super::layers::{self, Allowed};
use super::{ImageLimits, oci, write_archive};
use crate::size::Size;
use crate::sys;

/// Reads an archive into a temporary disk, within small limits and on a small stack. It reads back whole if made.
pub(crate) fn read_archive(source: &mut (dyn Read + Send)) {
    on_small_stack(|| {
        let file = sys::temp_file(&std::env::temp_dir()).ok()?;
        let outcome = write_archive(source, &file, &budget());
        let written = std::os::unix::fs::MetadataExt::blocks(&file.metadata().ok()?) * 512;
        assert!(written <= MAX_SIZE.as_bytes() + (1 << 20), "more was written than allowed");
        if outcome.is_ok() {
            Reader::open(&file).tree(4096);
        }
        Some(())
    });
}

const MAX_SIZE: Size = Size::mib(64);

fn limits() -> ImageLimits {
    ImageLimits::new().max_entries(4096).max_names(Size::mib(1)).xattrs(Size::mib(1)).header(Size::kib(64))
}

fn deadline() -> PrepareDeadline {
    PrepareDeadline::new(Duration::from_secs(60), None)
}

fn budget() -> Budget {
    Budget::new(&limits(), MAX_SIZE, &deadline())
}

/// As the thread that prepares images, or smaller.
fn on_small_stack(read: impl FnOnce() -> Option<()> + Send) {
    const STACK: usize = 256 << 10;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, read);
        if let Err(panic) = thread.map_or(Ok(None), std::thread::ScopedJoinHandle::join) {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Indexes, manifests and configurations of any bytes.
pub(crate) fn oci_manifest(data: &[u8]) {
    on_small_stack(|| {
        for media_type in std::iter::once("").chain(oci::accepted()) {
            let _ = oci::Manifest::parse(data, media_type);
        }
        let _ = oci::resolve_config(data, 1, Some(&oci::Platform::host()));
        let _ = std::str::from_utf8(data).ok()?.parse::<oci::Platform>();
        Some(())
    });
}

/// Up to four layers of entries that these bytes choose, on a disk that reads back whole.
pub(crate) fn oci_layer(data: &[u8]) {
    let mut choices = Choices(data);
    let mut layers = Vec::new();
    for _ in 0..=choices.byte() % 4 {
        let mut archive = Vec::new();
        for _ in 0..choices.byte() % 32 {
            choices.entry(&mut archive);
        }
        layers.push(archive);
    }
    let allowed = Allowed { limits: limits(), max_size: MAX_SIZE };
    on_small_stack(|| {
        let disk = layers::fuzzing::composed(&layers, &allowed, &deadline()).ok()?;
        Reader::open(&disk).tree(4096);
        Some(())
    });
}

/// A file of the store that should be a layer, of any bytes or with a log of them.
pub(crate) fn oci_layer_file(data: &[u8]) {
    let allowed = Allowed { limits: limits(), max_size: MAX_SIZE };
    on_small_stack(|| {
        let disk = layers::fuzzing::of_layer_file(data, &allowed, &deadline()).ok()?;
        Reader::open(&disk).tree(4096);
        Some(())
    });
}

/// An archive of any bytes, or one of entries that these bytes choose.
pub(crate) fn image_tar(data: &[u8]) {
    let mut choices = Choices(data);
    if choices.byte() % 8 == 0 {
        return read_archive(&mut Cursor::new(choices.0));
    }
    let mut archive = Vec::new();
    while !choices.0.is_empty() && archive.len() < 1 << 20 {
        choices.entry(&mut archive);
    }
    // Cut off, or with an end.
    if choices.byte() % 8 != 1 {
        archive.extend([0; 1024]);
    }
    read_archive(&mut Cursor::new(archive));
}

/// What is still to be decided; when nothing is left, all is 0.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let (now, later) = self.0.split_at(len.min(self.0.len()));
        self.0 = later;
        now.to_vec()
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        all.get(usize::from(self.byte()) % all.len().max(1)).copied()
    }

    /// Small ones, those around where something ends, and any.
    fn number(&mut self) -> u64 {
        match self.byte() % 8 {
            n @ 0..4 => u64::from(n),
            4 => u64::from(self.byte()) * 512,
            5 => 1u64.checked_shl(u32::from(self.byte() % 64)).unwrap_or(0).wrapping_sub(u64::from(self.byte() % 2)),
            6 => u64::from(self.byte()),
            _ => self.take(8).iter().fold(0, |n, byte| n << 8 | u64::from(*byte)),
        }
    }

    fn path(&mut self) -> Vec<u8> {
        const PATHS: [&[u8]; 16] = [
            b"a",
            b"b",
            b"a/b",
            b"a/b/c",
            b"./d/",
            b"d/e",
            b"../x",
            b"/",
            b"/a",
            b".",
            b"l/a",
            b"\xff",
            b".wh.a",
            b"a/.wh.b",
            b"a/.wh..wh..opq",
            b"l/.wh.a",
        ];
        match self.byte() % 20 {
            16 => b"a/".repeat(usize::from(self.byte()) * 9),
            17 => vec![b'n'; usize::from(self.byte()) * 18],
            18 | 19 => {
                let len = usize::from(self.byte() % 32);
                self.take(len)
            }
            n => PATHS.get(usize::from(n)).copied().unwrap_or_default().to_vec(),
        }
    }

    /// One record of an extended header, nearly always as long as it says.
    fn record(&mut self) -> Vec<u8> {
        const KEYS: [&str; 24] = [
            "path",
            "linkpath",
            "size",
            "uid",
            "gid",
            "mtime",
            "comment",
            "SCHILY.xattr.user.a",
            "SCHILY.xattr.trusted.b",
            "SCHILY.xattr.security.capability",
            "SCHILY.xattr.system.posix_acl_access",
            "SCHILY.xattr.trusted.overlay.x",
            "SCHILY.acl.access",
            "SCHILY.acl.default",
            "LIBARCHIVE.xattr.user.%41",
            "GNU.sparse.major",
            "GNU.sparse.minor",
            "GNU.sparse.name",
            "GNU.sparse.size",
            "GNU.sparse.realsize",
            "GNU.sparse.offset",
            "GNU.sparse.numbytes",
            "GNU.sparse.map",
            "GNU.sparse.numblocks",
        ];
        let key = self.of(&KEYS).unwrap_or_default();
        let value = match (key, self.byte() % 8) {
            (_, 0) => Vec::new(),
            (_, 1) => {
                let len = usize::from(self.byte()) * 8;
                self.take(len)
            }
            ("path" | "linkpath" | "GNU.sparse.name", _) => self.path(),
            ("SCHILY.acl.access" | "SCHILY.acl.default", n) => {
                let named = if n % 2 == 0 { "user:7:r-x,mask::rwx," } else { "" };
                format!("{named}user::rw-,group::r--,other::r--").into_bytes()
            }
            ("GNU.sparse.map", _) => {
                let numbers: Vec<String> = (0..self.byte() % 8).map(|_| self.number().to_string()).collect();
                numbers.join(",").into_bytes()
            }
            ("mtime", n) => format!("{}{}.{}", if n < 4 { "-" } else { "" }, self.number(), self.byte()).into_bytes(),
            _ => self.number().to_string().into_bytes(),
        };
        let rest = key.len() + value.len() + 3;
        let right = (1..6).map(|digits| rest + digits).find(|len| len.to_string().len() + rest == *len);
        let said = if self.byte() == 255 { self.number() } else { right.unwrap_or(rest) as u64 };
        [format!("{said} {key}=").as_bytes(), &value, b"\n"].concat()
    }

    /// A header and its data, with what extends it before.
    fn entry(&mut self, archive: &mut Vec<u8>) {
        const TYPES: &[u8] = b"00000\x00\x00555511122223467SSDVMNAxgLKXZ";
        match self.byte() % 8 {
            0 => {
                let records: Vec<u8> = (0..self.byte() % 8).flat_map(|_| self.record()).collect();
                self.header(b'x', &records, archive);
            }
            1 => {
                let records: Vec<u8> = (0..self.byte() % 4).flat_map(|_| self.record()).collect();
                self.header(b'g', &records, archive);
            }
            n @ 2..=3 => {
                let path = self.path();
                self.header(if n == 2 { b'L' } else { b'K' }, &path, archive);
            }
            _ => {}
        }
        let data = match self.byte() % 8 {
            0..4 => Vec::new(),
            // The map of a sparse file of version 1.0.
            4 => {
                let mut map: Vec<u8> =
                    (0..self.byte() % 12).flat_map(|_| format!("{}\n", self.number()).into_bytes()).collect();
                map.resize(map.len().next_multiple_of(512), 0);
                map.extend(vec![1; usize::from(self.byte())]);
                map
            }
            5 => vec![0; usize::from(self.byte()) * 64],
            6 => vec![1; usize::from(self.byte()) * 64],
            _ => {
                let len = usize::from(self.byte());
                self.take(len)
            }
        };
        let typeflag = self.of(TYPES).unwrap_or_default();
        self.header(typeflag, &data, archive);
    }

    fn header(&mut self, typeflag: u8, data: &[u8], archive: &mut Vec<u8>) {
        let mut header = [0; 512];
        let mut put = |at: usize, len: usize, field: &[u8]| {
            header.iter_mut().skip(at).zip(field.iter().take(len)).for_each(|(to, byte)| *to = *byte);
        };
        put(0, 100, &self.path());
        put(157, 100, &self.path());
        for (at, len) in [(100, 8), (108, 8), (116, 8), (136, 12), (329, 8), (337, 8)] {
            let number = self.number();
            match self.byte() % 8 {
                0 => put(at, len, [&[0xff; 4][..], &number.to_be_bytes()].concat().get(12 - len..).unwrap_or_default()),
                1 => put(at, len, &number.to_be_bytes()),
                _ => put(at, len, format!("{:0width$o}", number % (1 << 21), width = len - 1).as_bytes()),
            }
        }
        put(124, 12, format!("{:011o}", data.len()).as_bytes());
        put(156, 1, &[typeflag]);
        put(257, 8, self.of(&[b"ustar  \0", b"ustar\x0000", b"\0\0\0\0\0\0\0\0"]).unwrap_or(b"ustar  \0"));
        if typeflag == b'S' {
            for n in 0..usize::from(self.byte() % 5) {
                put(386 + 24 * n, 12, format!("{:011o}", self.number() % (1 << 33)).as_bytes());
                put(398 + 24 * n, 12, format!("{:011o}", self.number() % (1 << 33)).as_bytes());
            }
            put(482, 1, &[u8::from(self.byte().is_multiple_of(8))]);
            put(483, 12, format!("{:011o}", self.number() % (1 << 33)).as_bytes());
        }
        // Damage, before the sum is made.
        if self.byte() == 255 {
            let at = usize::from(self.byte()) * 2;
            put(at, 16, &self.take(16));
        }
        put(148, 8, b"        ");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header.iter_mut().skip(148).zip(format!("{sum:06o}\0").bytes()).for_each(|(to, byte)| *to = byte);
        archive.extend(header);
        archive.extend(data);
        archive.resize(archive.len().next_multiple_of(512), b'1');
    }
}
