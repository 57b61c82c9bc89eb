//! [`Modules`]: the modules of a kernel, of which guests get those that their devices need.
//!
//! The directory may be hostile: its lists and files are bounded, no path leaves it, and nothing in it is run.

mod packing;
#[cfg(test)]
mod tests;
mod tree;

use std::path::Path;
use std::sync::Arc;

use super::Initramfs;
use crate::error::{Context, Error, ErrorKind, Result};
use tree::ModuleTree;

/// Where packed modules lie in an initramfs.
pub(crate) const MODULES_DIRECTORY: &str = "/cofferdam.modules";
/// The most that one machine gets, unpacked; it needs one or two MiB.
const MAX_SIZE: usize = 256 << 20;

/// The directory of a kernel's modules, such as `/lib/modules/6.12.9`.
///
/// A config value; cloning is cheap. It may also be a directory into which a package was unpacked.
///
/// A guest whose kernel has them by [`Kernel::modules`](crate::Kernel::modules) gets those that its devices need, with
/// their dependencies, and without those built into the kernel. They are unpacked from `.ko`, `.ko.gz`, `.ko.xz`
/// (feature `xz`) or `.ko.zst` (feature `zstd`). A container inserts them by itself. In any other guest they lie in the
/// initramfs as `/cofferdam.modules/000-NAME.ko` and so on. Its init inserts them in the order of their names before it
/// uses devices:
///
/// ```sh
/// for module in /cofferdam.modules/*; do insmod "$module"; done
/// ```
///
/// Until then, the serial port (`console=ttyS0`) is the only console of a kernel that has these drivers in modules.
///
/// Each module is read once, when the first guest needs it, and shared by all later guests.
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct Modules {
    tree: Arc<ModuleTree>,
    also: Vec<String>,
}

impl Modules {
    /// Opens a directory of modules and reads its lists.
    ///
    /// `modules.dep` and `modules.builtin` must be there; `modules.softdep` and `modules.alias` may be. Packages carry
    /// no `modules.dep`: `depmod` makes it on installation. For a package that was only unpacked, run `depmod -b
    /// DIRECTORY VERSION`.
    ///
    /// # Errors
    /// - `NotFound` when the directory or one of the two lists is not there.
    /// - `PermissionDenied` when it cannot be read.
    /// - `InvalidConfig` when it is not a directory.
    /// - `Corrupt` when a list is damaged, too large or names files outside.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let tree = ModuleTree::open(path).doing(|| format!("opening modules {}", path.display()))?;
        Ok(Self { tree: Arc::new(tree), also: Vec::new() })
    }

    /// Where they lie.
    #[cfg(test)]
    pub(super) fn root(&self) -> &Path {
        self.tree.root()
    }

    /// Packs one more module beside those that devices need, such as a file system.
    ///
    /// It must be there or built in. Dashes and underscores in its name are the same. May be called again for others.
    pub fn with(mut self, name: impl Into<String>) -> Self {
        self.also.push(name.into());
        self
    }

    /// Returns the modules that `needs` takes, in the order in which they are to be inserted.
    ///
    /// `release` is the kernel's own version, where it is known.
    ///
    /// # Errors
    /// `Unsupported` names a required module that is neither there nor built in. `Incompatible` names both versions
    /// when the modules are another kernel's. `Corrupt` names what is damaged or depends on itself.
    pub(crate) fn pack(&self, needs: &[Need], release: Option<&str>) -> Result<Packed> {
        let also = self.also.iter().map(|name| (name.as_str(), true));
        // What is required goes first, so that what it depends on counts as required too.
        let mut wanted: Vec<_> = needs.iter().map(|need| (need.name, need.required)).chain(also).collect();
        wanted.sort_by_key(|(_, required)| !required);
        let (mut packed, mut size) = (Packed::default(), 0);
        for (n, step) in self.tree.order(&wanted)?.into_iter().enumerate() {
            let contents = step.module.contents(self.tree.root())?;
            // All of a directory are of one kernel.
            if n == 0 {
                same_release(release, packing::release(&contents))?;
            }
            size += contents.len();
            if size > MAX_SIZE {
                let text = format!("the modules that are needed have more than {} MiB", MAX_SIZE >> 20);
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
            packed.0.push(PackedModule { name: format!("{n:03}-{}.ko", step.name), contents, required: step.required });
        }
        Ok(packed)
    }
}

fn same_release(kernel: Option<&str>, modules: Option<&str>) -> Result<()> {
    match (kernel, modules) {
        (Some(kernel), Some(modules)) if kernel != modules => Err(Error::new(
            ErrorKind::Incompatible,
            format!("the kernel is {kernel}, but these modules are for {modules}"),
        )),
        _ => Ok(()),
    }
}

/// Unpacks a module of any bytes, and reads any lists and finds an order in them.
#[cfg(any(test, feature = "internals"))]
pub(crate) fn read(module: Vec<u8>, [dep, softdep, alias]: [&str; 3]) {
    let _ = packing::unpacked(module).map(|module| packing::release(&module).map(str::len));
    if let Ok(tree) = ModuleTree::parse(Default::default(), dep, "", softdep, alias) {
        let _ = tree.order(&[("a", true), ("b", false), ("c", true)]);
    }
}

/// A module that something needs, by its name with underscores, and the symbol that configures it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    name: &'static str,
    symbol: &'static str,
    required: bool,
}

impl Need {
    /// Without it the machine is of no use.
    pub(crate) const fn required(name: &'static str, symbol: &'static str) -> Self {
        Self { name, symbol, required: true }
    }

    /// A machine without it does all but one thing.
    pub(crate) const fn nice(name: &'static str, symbol: &'static str) -> Self {
        Self { name, symbol, required: false }
    }

    /// Name and symbol of those that are required.
    pub(super) fn drivers(needs: &[Self]) -> Vec<(&'static str, &'static str)> {
        needs.iter().filter(|need| need.required).map(|need| (need.name, need.symbol)).collect()
    }
}

/// Modules ready to be inserted, in their order.
#[derive(Debug, Default)]
pub(crate) struct Packed(Vec<PackedModule>);

#[derive(Debug)]
struct PackedModule {
    name: String,
    contents: Arc<Vec<u8>>,
    required: bool,
}

impl Packed {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts them into an initramfs.
    pub(crate) fn add_to(&self, initramfs: Initramfs) -> Initramfs {
        let directory = initramfs.directory(MODULES_DIRECTORY, 0o755);
        self.0.iter().fold(directory, |initramfs, module| {
            initramfs.shared_file(format!("{MODULES_DIRECTORY}/{}", module.name), 0o644, module.contents.clone())
        })
    }

    /// Their paths there, and whether each is required.
    pub(crate) fn paths(&self) -> impl Iterator<Item = (String, bool)> {
        self.0.iter().map(|module| (format!("{MODULES_DIRECTORY}/{}", module.name), module.required))
    }
}
