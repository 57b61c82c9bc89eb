//! The lists of a modules directory, as depmod and the kernel's build write them.
//!
//! They say which modules there are, what each needs, and what is built in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::packing;
use crate::error::{Context, Error, ErrorKind, Result};

/// The largest list that is read. The longest of a distribution's, with every device there is, has some 2 MiB.
const MAX_LIST: u64 = 16 << 20;
/// The most modules that one machine gets; it needs a dozen.
const MAX_ORDER: usize = 256;

/// Everything that is known of a directory.
#[derive(Debug)]
pub(super) struct ModuleTree {
    /// Without symbolic links.
    root: PathBuf,
    modules: BTreeMap<String, Module>,
    builtin: BTreeSet<String>,
    /// What is to be inserted before a module, if it can be: names of modules or aliases.
    before: BTreeMap<String, Vec<String>>,
    /// The modules behind other names.
    aliases: BTreeMap<String, Vec<String>>,
}

/// One module.
#[derive(Debug)]
pub(super) struct Module {
    /// Below the root.
    path: String,
    /// The names of those that it uses.
    needs: Vec<String>,
    contents: OnceLock<Arc<Vec<u8>>>,
}

/// A module in its place.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoadStep<'a> {
    pub(super) name: &'a str,
    pub(super) module: &'a Module,
    pub(super) required: bool,
}

impl ModuleTree {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let root = path.canonicalize()?;
        if !root.is_dir() {
            return Err(Error::new(ErrorKind::InvalidConfig, "not a directory"));
        }
        let needed = |name: &str| match list(&root, name) {
            Ok(Some(text)) => Ok(text),
            Ok(None) => Err(Error::new(ErrorKind::NotFound, format!("there is no {name}{}", hint(name)))),
            Err(error) => Err(error.doing(format!("reading {name}"))),
        };
        let optional =
            |name: &str| list(&root, name).doing(|| format!("reading {name}")).map(Option::unwrap_or_default);
        let (dep, builtin) = (needed("modules.dep")?, needed("modules.builtin")?);
        let (softdep, alias) = (optional("modules.softdep")?, optional("modules.alias")?);
        Self::parse(root, &dep, &builtin, &softdep, &alias)
    }

    /// From the texts of its lists.
    pub(super) fn parse(root: PathBuf, dep: &str, builtin: &str, softdep: &str, alias: &str) -> Result<Self> {
        let modules = modules(dep).doing(|| "reading modules.dep")?;
        let builtin = builtin.lines().filter_map(name_of).collect();
        Ok(Self { root, modules, builtin, before: softdeps(softdep), aliases: aliases(alias) })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// The modules by these names and all that they use, each after what it uses; nothing twice and nothing that is built in.
    ///
    /// # Errors
    /// `Unsupported` names one that is required and neither there nor built in, `Corrupt` what depends on itself.
    pub(super) fn order(&self, wanted: &[(&str, bool)]) -> Result<Vec<LoadStep<'_>>> {
        let mut order = LoadOrder { tree: self, steps: Vec::new(), path: Vec::new() };
        for &(name, required) in wanted {
            let name = normal(name);
            match self.modules.get_key_value(&name) {
                _ if self.builtin.contains(&name) => {}
                Some((name, module)) => order.visit(name, module, required)?,
                None if required => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!("the kernel has no module {name}, neither built in nor in {}", self.root.display()),
                    ));
                }
                None => {}
            }
        }
        Ok(order.steps)
    }
}

/// An order in the making.
struct LoadOrder<'a> {
    tree: &'a ModuleTree,
    steps: Vec<LoadStep<'a>>,
    /// From what was asked for to what is looked at now.
    path: Vec<&'a str>,
}

impl<'a> LoadOrder<'a> {
    /// Its depth is bounded like the number of modules.
    fn visit(&mut self, name: &'a str, module: &'a Module, required: bool) -> Result<()> {
        if self.steps.iter().any(|step| step.name == name) {
            return Ok(());
        }
        if self.path.contains(&name) {
            let circle = self.path.join(" needs ");
            return Err(Error::new(ErrorKind::Corrupt, format!("modules.dep: {circle} needs {name}, a circle")));
        }
        if self.path.len() + self.steps.len() >= MAX_ORDER {
            let text = format!("modules.dep: {name} is one of more than {MAX_ORDER} modules that need each other");
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        self.path.push(name);
        for need in &module.needs {
            match self.tree.modules.get_key_value(need) {
                Some((need, module)) => self.visit(need, module, required)?,
                None if self.tree.builtin.contains(need) => {}
                None => {
                    let text = format!("modules.dep: {name} needs {need}, which is not there");
                    return Err(Error::new(ErrorKind::Corrupt, text));
                }
            }
        }
        for before in self.tree.before.get(name).into_iter().flatten() {
            self.visit_by_any_name(before)?;
        }
        self.path.pop();
        self.steps.push(LoadStep { name, module, required });
        Ok(())
    }

    /// What should be there before, but need not.
    fn visit_by_any_name(&mut self, name: &'a str) -> Result<()> {
        let behind = self.tree.aliases.get(name).into_iter().flatten().map(String::as_str);
        for name in [name].into_iter().chain(behind) {
            if let Some((name, module)) = self.tree.modules.get_key_value(name)
                && !self.path.contains(&name.as_str())
            {
                self.visit(name, module, false)?;
            }
        }
        Ok(())
    }
}

impl Module {
    /// The module itself, unpacked. Read at the first call; all others get the same bytes.
    ///
    /// # Errors
    /// `Corrupt` when it is damaged, too large, or lies outside of `root` by a symbolic link.
    pub(super) fn contents(&self, root: &Path) -> Result<Arc<Vec<u8>>> {
        if let Some(contents) = self.contents.get() {
            return Ok(contents.clone());
        }
        let read = || {
            let path = root.join(&self.path).canonicalize()?;
            if !path.starts_with(root) {
                return Err(Error::new(ErrorKind::Corrupt, "a symbolic link out of the directory"));
            }
            packing::unpack(&path)
        };
        let contents = read().doing(|| format!("reading module {}", root.join(&self.path).display()))?;
        // Of two that read at once, one result is kept.
        Ok(self.contents.get_or_init(|| Arc::new(contents)).clone())
    }
}

fn hint(list: &str) -> &'static str {
    match list {
        "modules.dep" => "; depmod makes it (of a package that was only unpacked, `depmod -b DIRECTORY VERSION`)",
        _ => "",
    }
}

/// A whole list; `None` when there is none.
fn list(root: &Path, name: &str) -> Result<Option<String>> {
    let path = match root.join(name).canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        path => path?,
    };
    // Checked before it is opened, because opening a named pipe would wait for a writer.
    if !path.starts_with(root) || !path.is_file() {
        return Err(Error::new(ErrorKind::Corrupt, "not a file of this directory"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_LIST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_LIST {
        return Err(Error::new(ErrorKind::Corrupt, format!("larger than {} MiB", MAX_LIST >> 20)));
    }
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Dashes and underscores are the same.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The name of the module in a file: `kernel/fs/ext4/ext4.ko.xz` is `ext4`.
fn name_of(path: &str) -> Option<String> {
    let (_, file) = path.trim_end().rsplit_once('/').unwrap_or(("", path.trim_end()));
    let (name, packing) = file.split_once(".ko")?;
    (matches!(packing, "" | ".gz" | ".xz" | ".zst") && !name.is_empty()).then(|| normal(name))
}

/// `PATH: PATH...` (depmod: modules.dep).
fn modules(text: &str) -> Result<BTreeMap<String, Module>> {
    let mut modules = BTreeMap::new();
    for (number, line) in (1..).zip(text.lines()) {
        let bad = |what: &str| Error::new(ErrorKind::Corrupt, format!("line {number}: {what}"));
        let (path, needs) = line.split_once(':').ok_or_else(|| bad("no colon"))?;
        let outside = |path: &str| path.split('/').any(|part| matches!(part, "" | "." | ".."));
        if outside(path) {
            return Err(bad(&format!("{path:?} is not a path inside the directory")));
        }
        let name = |path| name_of(path).ok_or_else(|| bad(&format!("{path:?} is not the name of a module")));
        let needs = needs.split_ascii_whitespace().map(name).collect::<Result<_>>()?;
        let module = Module { path: path.to_owned(), needs, contents: OnceLock::new() };
        // Of two with the same name depmod puts that first which counts.
        modules.entry(name(path)?).or_insert(module);
    }
    Ok(modules)
}

/// `softdep NAME pre: NAME... post: NAME...` (modprobe.d). What else there is says nothing about order.
fn softdeps(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut before = BTreeMap::<String, Vec<String>>::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some("softdep"), Some(name)) = (words.next(), words.next()) else { continue };
        let pre = words.skip_while(|word| *word != "pre:").skip(1).take_while(|word| *word != "post:");
        before.entry(normal(name)).or_default().extend(pre.map(normal));
    }
    before
}

/// `alias NAME MODULE` (modprobe.d). Patterns are for devices, which ask by themselves.
fn aliases(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut aliases = BTreeMap::<String, Vec<String>>::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some("alias"), Some(alias), Some(module)) = (words.next(), words.next(), words.next()) else { continue };
        if !alias.contains(['*', '?', '[']) {
            aliases.entry(normal(alias)).or_default().push(normal(module));
        }
    }
    aliases
}
