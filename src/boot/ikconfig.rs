//! The configuration that a kernel was built with.
//!
//! It is embedded in the kernel (Linux, `CONFIG_IKCONFIG`), or lies in a file beside it.
//!
//! Read once, when the kernel is opened, and never trusted. What is damaged, too large or of another kind of kernel is
//! taken as absent, because a kernel boots without it just as well.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::bufread::GzDecoder;

use super::protocol::CONFIG_SYMBOL;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{GuestAddress, MemoryImage};

/// How an embedded configuration begins: a mark, then a gzip member (RFC 1952, 2.3) of deflated data.
const BEGIN: &[u8; 11] = b"IKCFG_ST\x1f\x8b\x08";
/// The length of the mark alone.
const MARK: usize = 8;
/// How it ends.
const END: &[u8] = b"IKCFG_ED";
/// The largest configuration that is read. Those of distributions have some 300 KiB.
const MAX: usize = 1 << 20;
/// How much of a kernel is searched at once.
const WINDOW: usize = 64 << 10;

/// What is known of a kernel's configuration.
#[derive(Debug, Default)]
pub(super) struct Configuration {
    /// Symbols that are built in or modules, without `CONFIG_`, and whether they are modules; `None` when they are not known.
    enabled: Option<BTreeMap<Box<str>, bool>>,
    /// The files that do not tell.
    looked: Vec<PathBuf>,
}

impl Configuration {
    /// The one embedded in an uncompressed kernel.
    pub(super) fn embedded(image: &MemoryImage) -> Self {
        let enabled = packed(image).and_then(|packed| unpack(&packed)).and_then(|text| parse(&text));
        Self { enabled, looked: Vec::new() }
    }

    /// This one when it is known, else that of a file beside the kernel at `path`: as distributions name it, or just
    /// `config`. A kernel that is reached by a symbolic link is looked for where it really lies too.
    pub(super) fn or_beside(mut self, path: &Path) -> Self {
        if self.enabled.is_none() {
            self.looked = candidates(path);
            let real = path.canonicalize().ok().filter(|real| real != path);
            self.looked.extend(real.map(|real| candidates(&real)).unwrap_or_default());
            self.enabled = self.looked.iter().find_map(|file| parse(&contents(file)?));
        }
        self
    }

    /// Whether anything is known of it.
    pub(super) fn is_known(&self) -> bool {
        self.enabled.is_some()
    }

    /// Whether `symbol`, with or without `CONFIG_`, is known to be built in or a module.
    pub(super) fn has(&self, symbol: &str) -> bool {
        let symbol = symbol.strip_prefix("CONFIG_").unwrap_or(symbol);
        self.enabled.as_ref().is_some_and(|enabled| enabled.contains_key(symbol))
    }

    /// Checks that drivers are there, each by its module's name and its symbol: built in, or as modules if there are
    /// `modules`. What is not known is not missed.
    ///
    /// # Errors
    /// `Unsupported` names what is missing.
    pub(super) fn check_drivers(&self, drivers: &[(&str, &str)], modules: bool) -> Result<()> {
        let Some(enabled) = &self.enabled else { return Ok(()) };
        for (name, symbol) in drivers {
            match enabled.get(*symbol) {
                Some(true) if !modules => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!("the kernel has {name} as a module only: give it its modules with `Kernel::modules`"),
                    ));
                }
                Some(_) => {}
                None => return self.check([symbol]),
            }
        }
        Ok(())
    }

    /// # Errors
    /// `Unsupported` names every symbol that is missing, `NotFound` the places that do not tell.
    pub(super) fn check(&self, needs: impl IntoIterator<Item = impl AsRef<str>>) -> Result<()> {
        if self.enabled.is_none() {
            let files = self.looked.iter().map(|file| format!(", {}", file.display())).collect::<String>();
            let text = format!(
                "the kernel's configuration is not known; it is looked for in an uncompressed kernel (CONFIG_IKCONFIG){files}"
            );
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        let name = |need: &str| format!("CONFIG_{}", need.strip_prefix("CONFIG_").unwrap_or(need));
        let lacks = |need: &str| (!self.has(need)).then(|| name(need));
        let missing: Vec<_> = needs.into_iter().filter_map(|need| lacks(need.as_ref())).collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unsupported, format!("the kernel was built without {}", missing.join(", "))))
    }
}

/// Where each byte that a window may end with lets the next window begin, at the earliest (Boyer-Moore-Horspool).
const SKIP: [u8; 256] = {
    let (mut skip, mut n) = ([BEGIN.len() as u8; 256], 0);
    while n < BEGIN.len() - 1 {
        skip[BEGIN[n] as usize] = (BEGIN.len() - 1 - n) as u8;
        n += 1;
    }
    skip
};

/// Where a configuration begins.
fn find(text: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let window: &[u8; BEGIN.len()] = text.get(at..)?.first_chunk()?;
        let [.., last] = *window;
        if last == BEGIN[BEGIN.len() - 1] && window == BEGIN {
            return Some(at);
        }
        at += usize::from(SKIP[usize::from(last)]);
    }
}

/// From a configuration's gzip member on, as much as is ever looked at.
fn packed(image: &MemoryImage) -> Option<Vec<u8>> {
    let read = |at: u64, len: u64| {
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        image.read(GuestAddress(at), &mut bytes).ok()?;
        Some(bytes)
    };
    for extent in image.extents() {
        let (mut at, end) = (extent.start, extent.end);
        while at < end {
            let window = read(at, (WINDOW as u64).min(end - at))?;
            if let Some(found) = find(&window) {
                let from = at + (found + MARK) as u64;
                return read(from, ((MAX + END.len()) as u64).min(end - from));
            }
            // One that lies across the border is found in the next window.
            at += WINDOW as u64 - (BEGIN.len() as u64 - 1);
        }
    }
    None
}

/// The text of a whole, undamaged configuration.
fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    let (mut text, mut gzip) = (Vec::new(), GzDecoder::new(packed));
    gzip.by_ref().take(MAX as u64 + 1).read_to_end(&mut text).ok()?;
    (text.len() <= MAX && gzip.into_inner().starts_with(END)).then_some(text)
}

/// What a configuration enables, if this is one.
fn parse(text: &[u8]) -> Option<BTreeMap<Box<str>, bool>> {
    let text = String::from_utf8_lossy(text);
    let enabled = |line: &str| match line.trim_end().strip_prefix("CONFIG_")?.split_once('=')? {
        (symbol, "y") => Some((symbol.into(), false)),
        (symbol, "m") => Some((symbol.into(), true)),
        _ => None,
    };
    let all: BTreeMap<Box<str>, bool> = text.lines().filter_map(enabled).collect();
    all.contains_key(CONFIG_SYMBOL).then_some(all)
}

/// `config-VERSION` for a file with a version after its first dash, such as `vmlinuz-VERSION`; then `config`.
fn candidates(kernel: &Path) -> Vec<PathBuf> {
    let name = kernel.file_name().unwrap_or_default().to_string_lossy();
    let version = name.split_once('-').map(|(_, version)| kernel.with_file_name(format!("config-{version}")));
    version.into_iter().chain([kernel.with_file_name("config")]).collect()
}

/// What is in a file, unless it is too large or none to be read at once.
fn contents(path: &Path) -> Option<Vec<u8>> {
    // Checked before it is opened, because opening a named pipe would wait for a writer.
    if !path.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX as u64 + 1).read_to_end(&mut bytes).ok()?;
    (bytes.len() <= MAX).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;

    use super::*;

    const TEXT: &str = "# Linux/x86 6.12.1\nCONFIG_X86_64=y\nCONFIG_VIRTIO_BLK=m\n# CONFIG_ACPI is not set\nCONFIG_HZ=250\nCONFIG_VIRTIO=y\n";

    fn embed(text: &[u8]) -> Vec<u8> {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(text).unwrap();
        [&BEGIN[..MARK], &gzip.finish().unwrap(), END].concat()
    }

    fn image(at: u64, bytes: &[u8]) -> MemoryImage {
        MemoryImage::build(1 << 30, |memory| Ok(memory.write(GuestAddress(at), bytes)?)).unwrap().0
    }

    fn known(bytes: &[u8]) -> bool {
        Configuration::embedded(&image(0x10_0000, bytes)).enabled.is_some()
    }

    /// A directory that goes away with its test.
    struct Temp(PathBuf);

    impl Temp {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("cofferdam-ikconfig-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn put(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
            std::fs::write(self.0.join(name), text).unwrap();
            self.0.join(name)
        }
    }

    impl Drop for Temp {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn embedded_config_says_what_is_built_in_or_a_module() {
        let config = Configuration::embedded(&image(0x10_0123, &embed(TEXT.as_bytes())));
        config.check(["CONFIG_VIRTIO", "VIRTIO_BLK", "X86_64"]).unwrap();
        config.check([""; 0]).unwrap();
        let error = config.check(["VIRTIO", "CONFIG_ACPI", "HZ", "NO_SUCH"]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert_eq!(error.to_string(), "the kernel was built without CONFIG_ACPI, CONFIG_HZ, CONFIG_NO_SUCH");
    }

    #[test]
    fn drivers_are_built_in_or_modules_that_were_given() {
        let config = Configuration::embedded(&image(0x10_0000, &embed(TEXT.as_bytes())));
        let drivers = [("virtio", "VIRTIO"), ("virtio_blk", "VIRTIO_BLK")];
        config.check_drivers(&drivers, true).unwrap();
        config.check_drivers(&drivers[..1], false).unwrap();
        let error = config.check_drivers(&drivers, false).unwrap_err();
        assert!(error.to_string().starts_with("the kernel has virtio_blk as a module only"), "{error}");
        let error = config.check_drivers(&[("ext4", "EXT4_FS")], true).unwrap_err();
        assert_eq!(error.to_string(), "the kernel was built without CONFIG_EXT4_FS");
        Configuration::default().check_drivers(&drivers, false).unwrap();
    }

    #[test]
    fn embedded_config_is_found_at_any_offset() {
        let packed = embed(TEXT.as_bytes());
        // Around the border of two windows, and at the end of what the kernel holds.
        for at in (WINDOW - 2 * packed.len()..WINDOW + 2).step_by(3) {
            let mut kernel = vec![b'I'; at];
            kernel.extend_from_slice(b"IKCFG_ST, but no gzip");
            kernel.extend_from_slice(&packed);
            assert!(known(&kernel), "{at}");
        }
        let mut kernel = vec![1; 3 * 4096 - packed.len()];
        kernel.extend_from_slice(&packed);
        assert!(known(&kernel));
    }

    #[test]
    fn damaged_embedded_config_is_ignored() {
        let whole = embed(TEXT.as_bytes());
        assert!(known(&whole));
        let mut flipped = whole.clone();
        flipped[30] ^= 1;
        let (unfinished, without_end) = (&whole[..whole.len() / 2], &whole[..whole.len() - END.len()]);
        let bomb = embed(&TEXT.as_bytes().iter().copied().cycle().take(64 << 20).collect::<Vec<_>>());
        let other = embed(b"CONFIG_ARM64=y\n");
        for (n, bytes) in
            [&flipped, unfinished, without_end, &bomb, &other, b"", b"IKCFG_STIKCFG_ED"].iter().enumerate()
        {
            assert!(!known(bytes), "case {n}");
        }
    }

    #[test]
    fn config_file_beside_the_kernel_is_read() {
        let temp = Temp::new("beside");
        let kernel = temp.put("vmlinuz-6.1.0-18-amd64", "");
        let look = |kernel: &Path| Configuration::default().or_beside(kernel);
        let error = look(&kernel).check(["VIRTIO"]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("/config-6.1.0-18-amd64, "), "{error}");
        temp.put("config", "[user]\nname = somebody\n");
        assert!(!look(&kernel).has("VIRTIO"), "another program's file");
        temp.put("config", TEXT);
        assert!(look(&kernel).has("VIRTIO"));
        temp.put("config-6.1.0-18-amd64", TEXT.replace("CONFIG_VIRTIO=y", ""));
        assert!(!look(&kernel).has("VIRTIO"), "the version's own comes first");
        let elsewhere = Temp::new("link");
        std::os::unix::fs::symlink(&kernel, elsewhere.0.join("vmlinuz")).unwrap();
        assert!(look(&elsewhere.0.join("vmlinuz")).has("VIRTIO_BLK"));
    }

    #[test]
    fn oversized_or_special_config_files_are_ignored() {
        let temp = Temp::new("large");
        let kernel = temp.put("bzImage", "");
        temp.put("config", TEXT.repeat(MAX / TEXT.len() + 1));
        assert!(!Configuration::default().or_beside(&kernel).has("VIRTIO"));
        std::fs::remove_file(temp.0.join("config")).unwrap();
        std::fs::create_dir(temp.0.join("config")).unwrap();
        assert!(!Configuration::default().or_beside(&kernel).has("VIRTIO"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn arbitrary_bytes_never_panic(noise in proptest::collection::vec(any::<u8>(), 0..400), at in 0usize..200) {
            let mut whole = embed(TEXT.as_bytes());
            whole.iter_mut().skip(at + BEGIN.len()).zip(&noise).for_each(|(to, byte)| *to ^= byte & 0x11);
            known(&whole);
            known(&[BEGIN, noise.as_slice(), END].concat());
            parse(&noise);
            unpack(&noise);
        }

        #[test]
        fn embedded_config_search_equals_exhaustive_search(text in proptest::collection::vec(proptest::sample::select(&BEGIN[..]), 0..300), at in 0usize..300, put in any::<bool>()) {
            let mut text = text;
            if put {
                text.splice(at.min(text.len())..at.min(text.len()), *BEGIN);
            }
            prop_assert_eq!(find(&text), text.windows(BEGIN.len()).position(|w| w == BEGIN));
        }
    }
}
