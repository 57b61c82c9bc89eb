//! [`Kernel::find`]: where a kernel is looked for when the embedder names none.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Kernel, Modules};
use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// Where kernels may be.
#[derive(Debug)]
pub(super) struct Places {
    /// What the environment names.
    named: Option<PathBuf>,
    /// This crate's directory in the user's cache.
    cache: Option<PathBuf>,
    /// The root directory of the host.
    root: PathBuf,
    /// What `uname -r` says.
    release: String,
}

impl Places {
    /// Those of this process.
    pub(super) fn here() -> Self {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            named: std::env::var_os("COFFERDAM_KERNEL").filter(|name| !name.is_empty()).map(PathBuf::from),
            cache: sys::cache_dir(),
            root: PathBuf::from("/"),
            release: release.trim().to_owned(),
        }
    }

    /// Opens the first kernel that is there.
    ///
    /// # Errors
    /// `NotFound` or `PermissionDenied` names everything that was looked for; else as [`Kernel::open`].
    pub(super) fn open(&self) -> Result<Kernel> {
        let mut missed = Missed::default();
        if let Some(path) = &self.named {
            return Kernel::open(path).map_err(|error| match error.kind() {
                ErrorKind::NotFound => {
                    let text = format!("no kernel at {}, which COFFERDAM_KERNEL names: {REMEDY}", path.display());
                    Error::new(ErrorKind::NotFound, text)
                }
                _ => error,
            });
        }
        if let Some(cache) = &self.cache {
            let (small, stock) = (cache.join("kernel/vmlinux"), cache.join("kernels/cloud-6.12"));
            match Kernel::open(&small) {
                Err(error) if error.kind() == ErrorKind::NotFound => missed.add(&small, &error),
                result => return result,
            }
            if let Some(kernel) = missed.take(&stock.join("vmlinuz"), &[stock.join("modules")]) {
                return Ok(kernel);
            }
        }
        if let Some(kernel) = self.open_of_host(&mut missed) {
            return Ok(kernel);
        }
        Err(missed.into_error())
    }

    /// The kernel that runs the host, where its distribution keeps a copy: Debian, Ubuntu and older Fedoras in `/boot`,
    /// Fedora and Arch beside its modules.
    fn open_of_host(&self, missed: &mut Missed) -> Option<Kernel> {
        let release = self.release.as_str();
        // A name, and nothing that leads elsewhere.
        if release.is_empty() || release.contains('/') {
            return None;
        }
        let modules = ["usr/lib/modules", "lib/modules"].map(|directory| self.root.join(directory).join(release));
        let in_boot = self.root.join("boot").join(format!("vmlinuz-{release}"));
        let beside = modules.iter().map(|directory| directory.join("vmlinuz"));
        [in_boot].into_iter().chain(beside).find_map(|path| missed.take(&path, &modules))
    }
}

/// The remedies that work on any host.
const REMEDY: &str = "run guest/kernel/build of the cofferdam sources once, set COFFERDAM_KERNEL to a vmlinux or vmlinuz \
                      with built-in drivers, or give any kernel with `Kernel::open(..)?.modules(Modules::open(..)?)`";

/// What was looked for, and why it does not serve.
#[derive(Debug, Default)]
struct Missed {
    places: Vec<String>,
    /// Kernels that this user may not read.
    denied: Vec<PathBuf>,
}

impl Missed {
    fn add(&mut self, path: &Path, error: &Error) {
        match error.kind() {
            ErrorKind::NotFound => self.places.push(path.display().to_string()),
            // It names the path itself.
            _ => self.places.push(error.to_string()),
        }
    }

    /// Opens a distribution's kernel with the first of these directories of modules that is there. What fails is remembered.
    fn take(&mut self, path: &Path, modules: &[PathBuf]) -> Option<Kernel> {
        let kernel = match Kernel::open(path) {
            Ok(kernel) => kernel,
            Err(error) => {
                if error.kind() == ErrorKind::PermissionDenied {
                    self.denied.push(path.to_owned());
                }
                self.add(path, &error);
                return None;
            }
        };
        for directory in modules {
            match Modules::open(directory) {
                Ok(modules) => return Some(kernel.modules(modules)),
                Err(error) if directory.exists() => {
                    self.places.push(error.to_string());
                    return None;
                }
                Err(_) => {}
            }
        }
        // One with everything built in needs none.
        if kernel.has_built_in_transport() {
            return Some(kernel);
        }
        let directories: Vec<_> = modules.iter().map(|directory| directory.display().to_string()).collect();
        self.places.push(format!("{} without modules in {}", path.display(), directories.join(" or ")));
        None
    }

    fn into_error(self) -> Error {
        let mut text = "no kernel".to_owned();
        if !self.places.is_empty() {
            text.push_str(&format!("; looked for {}", self.places.join(", ")));
        }
        if let Some(path) = self.denied.first() {
            text.push_str(&format!(
                ". This user may not read {0}: run `sudo chmod a+r {0}`, which an update of the package undoes",
                path.display()
            ));
        }
        text.push_str(&format!(". Or {REMEDY}"));
        let kind = if self.denied.is_empty() { ErrorKind::NotFound } else { ErrorKind::PermissionDenied };
        Error::new(kind, text)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::tiny::{elf, vmlinuz};
    use super::*;

    const RELEASE: &str = "6.1.0-test-amd64";

    /// A directory that goes away with its test, with a root and a cache in it.
    struct Fake(PathBuf);

    impl Fake {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("cofferdam-find-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn places(&self) -> Places {
            Places {
                named: None,
                cache: Some(self.0.join("cache")),
                root: self.0.join("root"),
                release: RELEASE.to_owned(),
            }
        }

        fn write(&self, path: &str, bytes: &[u8]) -> PathBuf {
            let path = self.0.join(path.replace("RELEASE", RELEASE));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, bytes).unwrap();
            path
        }

        fn modules(&self, directory: &str) -> PathBuf {
            for list in ["modules.dep", "modules.builtin"] {
                self.write(&format!("{directory}/{list}"), b"");
            }
            self.0.join(directory.replace("RELEASE", RELEASE))
        }

        /// What is found: whether it unpacks itself, and where its modules lie.
        fn found(&self) -> (bool, Option<PathBuf>) {
            let kernel = self.places().open().unwrap();
            (kernel.loaded.entry.has_header(), kernel.modules_directory())
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_hosts_own_kernel_is_found_where_debian_and_ubuntu_keep_it() {
        let fake = Fake::new("debian");
        fake.write("root/boot/vmlinuz-RELEASE", &vmlinuz(b"\xf4"));
        let modules = fake.modules("root/usr/lib/modules/RELEASE");
        assert_eq!(fake.found(), (true, Some(modules)));
    }

    #[test]
    fn the_hosts_own_kernel_is_found_where_fedora_and_arch_keep_it() {
        let fake = Fake::new("arch");
        fake.write("root/usr/lib/modules/RELEASE/vmlinuz", &vmlinuz(b"\xf4"));
        let modules = fake.modules("root/usr/lib/modules/RELEASE");
        assert_eq!(fake.found(), (true, Some(modules)));
    }

    #[test]
    fn modules_are_found_where_lib_is_a_directory_of_its_own() {
        let fake = Fake::new("lib");
        fake.write("root/boot/vmlinuz-RELEASE", &vmlinuz(b"\xf4"));
        let modules = fake.modules("root/lib/modules/RELEASE");
        assert_eq!(fake.found(), (true, Some(modules)));
    }

    #[test]
    fn kernel_search_prefers_small_then_stock_then_host_kernel() {
        let fake = Fake::new("order");
        fake.write("root/boot/vmlinuz-RELEASE", &vmlinuz(b"\xf4"));
        fake.modules("root/usr/lib/modules/RELEASE");
        fake.write("cache/kernels/cloud-6.12/vmlinuz", &vmlinuz(b"\xf4"));
        let stock = fake.modules("cache/kernels/cloud-6.12/modules");
        assert_eq!(fake.found(), (true, Some(stock)));
        fake.write("cache/kernel/vmlinux", &elf(b"\xf4"));
        assert_eq!(fake.found(), (false, None));
        // And what the environment names before all.
        let named = fake.write("named", &vmlinuz(b"\xf4"));
        let places = Places { named: Some(named), ..fake.places() };
        assert!(places.open().unwrap().loaded.entry.has_header());
        let places = Places { named: Some(fake.0.join("absent")), ..fake.places() };
        let error = places.open().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("absent, which COFFERDAM_KERNEL names"), "{error}");
    }

    #[test]
    fn damaged_small_kernel_is_an_error() {
        let fake = Fake::new("damaged");
        fake.write("root/boot/vmlinuz-RELEASE", &vmlinuz(b"\xf4"));
        fake.modules("root/usr/lib/modules/RELEASE");
        fake.write("cache/kernel/vmlinux", b"not a kernel at all, though long enough");
        assert_eq!(fake.places().open().unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn an_error_names_all_that_was_looked_for_and_the_remedy() {
        let fake = Fake::new("nothing");
        let error = fake.places().open().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let text = error.to_string();
        for place in [
            "cache/kernel/vmlinux",
            "cache/kernels/cloud-6.12/vmlinuz",
            "root/boot/vmlinuz-6.1.0-test-amd64",
            "root/usr/lib/modules/6.1.0-test-amd64/vmlinuz",
            "guest/kernel/build",
            "COFFERDAM_KERNEL",
            "Kernel::open(..)?.modules(Modules::open(..)?)",
        ] {
            assert!(text.contains(place), "no {place} in: {text}");
        }
        // A release that is none, and no cache.
        let places = Places { named: None, cache: None, root: fake.0.clone(), release: "../..".to_owned() };
        assert!(places.open().unwrap_err().to_string().starts_with("no kernel. Or run "));
    }

    #[test]
    fn a_host_kernel_that_only_root_may_read_is_named_with_the_remedy() {
        let mut missed = Missed::default();
        let path = Path::new("/boot/vmlinuz-x");
        missed.denied.push(path.to_owned());
        missed.add(path, &Error::new(ErrorKind::PermissionDenied, "opening kernel /boot/vmlinuz-x: no"));
        let error = missed.into_error();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("sudo chmod a+r /boot/vmlinuz-x"), "{error}");
    }

    #[test]
    fn a_host_kernel_without_modules_serves_if_it_is_known_to_need_none() {
        let fake = Fake::new("monolithic");
        fake.write("root/boot/vmlinuz-RELEASE", &vmlinuz(b"\xf4"));
        let error = fake.places().open().unwrap_err().to_string();
        assert!(error.contains("without modules in "), "{error}");
        let config = "CONFIG_X86_64=y\nCONFIG_VIRTIO_MMIO=m\n";
        fake.write("root/boot/config-RELEASE", config.as_bytes());
        assert!(fake.places().open().is_err());
        fake.write("root/boot/config-RELEASE", config.replace("=m", "=y").as_bytes());
        assert_eq!(fake.found(), (true, None));
    }

    #[test]
    fn a_damaged_list_of_modules_is_named() {
        let fake = Fake::new("no-dep");
        fake.write("root/boot/vmlinuz-RELEASE", &vmlinuz(b"\xf4"));
        fake.write("root/usr/lib/modules/RELEASE/modules.builtin", b"");
        let error = fake.places().open().unwrap_err().to_string();
        assert!(error.contains("modules.dep") && error.contains("depmod"), "{error}");
    }

    #[test]
    fn a_link_to_a_kernel_is_followed() {
        let fake = Fake::new("link");
        let kernel = fake.write("root/usr/lib/modules/RELEASE/real", &vmlinuz(b"\xf4"));
        fs::create_dir_all(fake.0.join("root/boot")).unwrap();
        symlink(kernel, fake.0.join(format!("root/boot/vmlinuz-{RELEASE}"))).unwrap();
        fake.modules("root/usr/lib/modules/RELEASE");
        assert!(fake.found().0);
    }
}
