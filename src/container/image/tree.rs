//! [`InodeTree`]: an image in memory, and how entries change it. They change it as `tar -x` of GNU tar changes a file
//! system.
//!
//! Nothing here recurses: directories name their children by numbers.

mod layered;

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::budget::Budget;
use super::path::{EntryPath, shown};
use crate::error::{Error, ErrorKind, Result};
pub(super) use layered::OwnDirectories;

/// The number of an inode in [`InodeTree::inodes`].
pub(super) type InodeIndex = u32;

pub(super) const ROOT: InodeIndex = 0;

/// Links that a path may lead through, as on Linux, and parts that their targets may have in all.
const MAX_LINKS: usize = 40;
const MAX_LINKED_PARTS: usize = 1024;

/// What an entry says of its inode beside its type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Metadata {
    /// Permissions, set-id and sticky bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970, and the nanoseconds after them.
    pub mtime: i64,
    pub mtime_nsec: u32,
    /// As [`super::xattr::encode`] gives them.
    pub xattrs: Box<[u8]>,
}

impl Metadata {
    /// Of directories that no entry describes.
    fn of_made() -> Self {
        Self { mode: 0o755, ..Self::default() }
    }
}

#[derive(Debug)]
pub(super) struct Inode {
    pub kind: InodeKind,
    pub metadata: Metadata,
    /// How many names it has; of a directory this is counted later.
    pub nlink: u32,
}

#[derive(Debug)]
pub(super) enum InodeKind {
    Directory(Directory),
    File(FileData),
    Symlink(Box<[u8]>),
    /// With its number as Linux encodes it (`new_encode_dev`).
    CharacterDevice(u32),
    BlockDevice(u32),
    Fifo,
    /// Nothing names it any more.
    Gone,
}

#[derive(Debug)]
pub(super) struct Directory {
    pub children: BTreeMap<Box<[u8]>, InodeIndex>,
    pub parent: InodeIndex,
    depth: u32,
}

/// Where on the disk the content of a file lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileData {
    pub size: u64,
    pub layout: FileLayout,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FileLayout {
    /// In one piece from this block on.
    Flat(u32),
    /// In chunks of `1 << bits` blocks. Those that are not there are holes.
    Chunks(Box<Chunks>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chunks {
    pub bits: u8,
    /// The number of a chunk, and its first block, in order.
    pub present: Vec<(u32, u32)>,
}

/// Takes the entries of an archive or a directory, in their order.
pub(super) trait EntrySink {
    /// Takes a directory.
    fn add_directory(&mut self, path: &EntryPath, metadata: Metadata, budget: &Budget) -> Result<()>;

    /// Takes anything that is no directory.
    fn add(&mut self, path: &EntryPath, kind: InodeKind, metadata: Metadata, budget: &Budget) -> Result<()>;

    /// Takes one more name of what is at `target` already.
    fn add_link(&mut self, path: &EntryPath, target: &EntryPath, budget: &Budget) -> Result<()>;
}

/// All inodes and names. It always has a root.
#[derive(Debug)]
pub(super) struct InodeTree {
    inodes: Vec<Inode>,
}

/// What becomes of a directory on the way that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    Refuse,
}

/// What may give way to an entry that is no directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GivesWay {
    /// Anything but a directory with something in it.
    Single,
    /// Anything, with all that is in it.
    Whole,
}

fn corrupt(what: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

impl InodeTree {
    pub(super) fn new() -> Self {
        let root = Directory { children: BTreeMap::new(), parent: ROOT, depth: 0 };
        Self { inodes: vec![Inode { kind: InodeKind::Directory(root), metadata: Metadata::of_made(), nlink: 1 }] }
    }

    pub(super) fn len(&self) -> usize {
        self.inodes.len()
    }

    pub(super) fn get(&self, index: InodeIndex) -> Option<&Inode> {
        self.inodes.get(usize::try_from(index).ok()?)
    }

    fn get_mut(&mut self, index: InodeIndex) -> Result<&mut Inode> {
        usize::try_from(index).ok().and_then(|n| self.inodes.get_mut(n)).ok_or_else(lost)
    }

    pub(super) fn directory(&self, index: InodeIndex) -> Result<&Directory> {
        match self.get(index).map(|inode| &inode.kind) {
            Some(InodeKind::Directory(directory)) => Ok(directory),
            _ => Err(lost()),
        }
    }

    fn directory_mut(&mut self, index: InodeIndex) -> Result<&mut Directory> {
        match &mut self.get_mut(index)?.kind {
            InodeKind::Directory(directory) => Ok(directory),
            _ => Err(lost()),
        }
    }

    /// What is there by a name in the root itself.
    pub(super) fn at_top(&self, name: &[u8]) -> Option<&Inode> {
        self.get(*self.directory(ROOT).ok()?.children.get(name)?)
    }

    fn insert(
        &mut self,
        path: &EntryPath,
        kind: InodeKind,
        metadata: Metadata,
        gives_way: GivesWay,
        budget: &Budget,
    ) -> Result<()> {
        let (above, Some(name)) = path.split() else {
            return Err(corrupt("the root is not a directory"));
        };
        let parent = self.walk(above, Missing::Make, budget)?;
        self.give_way(parent, name, gives_way)?;
        budget.names(name.len())?;
        let index = self.push(Inode { kind, metadata, nlink: 1 })?;
        self.directory_mut(parent)?.children.insert(name.into(), index);
        Ok(())
    }

    fn insert_link(
        &mut self,
        path: &EntryPath,
        target: &EntryPath,
        gives_way: GivesWay,
        budget: &Budget,
    ) -> Result<()> {
        let to = shown(target.as_bytes());
        let missing = || corrupt(format!("a hard link to {to}, which is not in the image before it"));
        let (target_above, Some(target_name)) = target.split() else {
            return Err(corrupt("a hard link to the root"));
        };
        let target_parent =
            self.walk(target_above, Missing::Refuse, budget).map_err(|e| e.doing(format!("target {to}")))?;
        let index = self.directory(target_parent)?.children.get(target_name).copied().ok_or_else(missing)?;
        let (above, Some(name)) = path.split() else {
            return Err(corrupt("the root is not a directory"));
        };
        let parent = self.walk(above, Missing::Make, budget)?;
        if self.directory(parent)?.children.get(name) == Some(&index) {
            return Ok(());
        }
        if matches!(self.get_mut(index)?.kind, InodeKind::Directory(_)) {
            return Err(corrupt(format!("a hard link to {to}, which is a directory")));
        }
        self.give_way(parent, name, gives_way)?;
        budget.names(name.len())?;
        let inode = self.get_mut(index)?;
        // It lay in a directory that gave way.
        if inode.nlink == 0 {
            return Err(missing());
        }
        inode.nlink = inode.nlink.checked_add(1).ok_or_else(|| corrupt("it has too many names"))?;
        self.directory_mut(parent)?.children.insert(name.into(), index);
        Ok(())
    }

    fn give_way(&mut self, parent: InodeIndex, name: &[u8], gives_way: GivesWay) -> Result<()> {
        match gives_way {
            GivesWay::Single => self.remove(parent, name),
            GivesWay::Whole => self.remove_whole(parent, name),
        }
    }

    fn push(&mut self, inode: Inode) -> Result<InodeIndex> {
        let index = InodeIndex::try_from(self.inodes.len()).map_err(|_| corrupt("the image has too many entries"))?;
        self.inodes.push(inode);
        Ok(index)
    }

    fn make_directory(
        &mut self,
        parent: InodeIndex,
        name: &[u8],
        metadata: Metadata,
        budget: &Budget,
    ) -> Result<InodeIndex> {
        let depth = self.directory(parent)?.depth + 1;
        if depth > budget.limits.depth {
            let what = format!("more than {} directories lie in each other", budget.limits.depth);
            return Err(Error::invalid("ImageLimits::max_depth", what));
        }
        budget.names(name.len())?;
        let directory = Directory { children: BTreeMap::new(), parent, depth };
        let index = self.push(Inode { kind: InodeKind::Directory(directory), metadata, nlink: 1 })?;
        self.directory_mut(parent)?.children.insert(name.into(), index);
        Ok(index)
    }

    /// Takes a name away, if it is there.
    fn remove(&mut self, parent: InodeIndex, name: &[u8]) -> Result<()> {
        let Some(index) = self.directory(parent)?.children.get(name).copied() else {
            return Ok(());
        };
        let inode = self.get_mut(index)?;
        match &inode.kind {
            InodeKind::Directory(directory) if !directory.children.is_empty() => {
                return Err(corrupt("in its place is a directory that is not empty"));
            }
            _ => inode.nlink = inode.nlink.saturating_sub(1),
        }
        if inode.nlink == 0 {
            inode.kind = InodeKind::Gone;
            inode.metadata = Metadata::default();
        }
        self.directory_mut(parent)?.children.remove(name);
        Ok(())
    }

    /// Goes down the directories of a path, through links that are in the image, and finds the last.
    fn walk<'p>(
        &mut self,
        path: impl Iterator<Item = &'p [u8]>,
        missing: Missing,
        budget: &Budget,
    ) -> Result<InodeIndex> {
        let mut route = Route::new(path);
        let mut at = ROOT;
        loop {
            let Some(RoutePart { name, linked }) = route.next() else {
                return Ok(at);
            };
            let directory = self.directory(at)?;
            if *name == *b".." {
                at = directory.parent;
                continue;
            }
            let Some(child) = directory.children.get(&*name).copied() else {
                if linked || missing == Missing::Refuse {
                    return Err(corrupt(format!("{} on its path is not in the image", shown(&name))));
                }
                budget.entry()?;
                at = self.make_directory(at, &name, Metadata::of_made(), budget)?;
                continue;
            };
            match &self.get(child).ok_or_else(lost)?.kind {
                InodeKind::Directory(_) => at = child,
                InodeKind::Symlink(target) => at = route.follow(at, target)?,
                _ => return Err(corrupt(format!("{} on its path is no directory", shown(&name)))),
            }
        }
    }
}

/// What is still to go of a path, and of the targets of links that it leads through.
struct Route<'p, I> {
    path: I,
    /// Parts of targets, the next one last.
    detour: Vec<Cow<'p, [u8]>>,
    links: usize,
    linked_parts: usize,
}

struct RoutePart<'p> {
    name: Cow<'p, [u8]>,
    /// Whether it is of a link's target.
    linked: bool,
}

impl<'p, I: Iterator<Item = &'p [u8]>> Route<'p, I> {
    fn new(path: I) -> Self {
        Self { path, detour: Vec::new(), links: 0, linked_parts: 0 }
    }

    /// The next part that leads elsewhere.
    fn next(&mut self) -> Option<RoutePart<'p>> {
        loop {
            let linked = self.detour.pop().map(|name| RoutePart { name, linked: true });
            let part = linked.or_else(|| Some(RoutePart { name: Cow::Borrowed(self.path.next()?), linked: false }))?;
            if !matches!(&*part.name, b"" | b".") {
                return Some(part);
            }
        }
    }

    /// Takes the way of a link that lies in `at`, and returns where that begins.
    fn follow(&mut self, at: InodeIndex, target: &[u8]) -> Result<InodeIndex> {
        self.links += 1;
        self.linked_parts += target.split(|byte| *byte == b'/').count();
        if self.links > MAX_LINKS || self.linked_parts > MAX_LINKED_PARTS {
            return Err(corrupt("its path leads through too many links"));
        }
        self.detour.extend(target.rsplit(|byte| *byte == b'/').map(|part| Cow::Owned(part.to_vec())));
        Ok(if target.first() == Some(&b'/') { ROOT } else { at })
    }
}

impl EntrySink for InodeTree {
    /// Adds a directory. One that is there takes the later metadata and keeps what is in it; anything else gives way.
    ///
    /// # Errors
    /// `Corrupt` when a part of the way is no directory, `InvalidConfig` beyond a limit.
    fn add_directory(&mut self, path: &EntryPath, metadata: Metadata, budget: &Budget) -> Result<()> {
        let (above, Some(name)) = path.split() else {
            self.get_mut(ROOT)?.metadata = metadata;
            return Ok(());
        };
        let parent = self.walk(above, Missing::Make, budget)?;
        if let Some(old) = self.directory(parent)?.children.get(name).copied() {
            let inode = self.get_mut(old)?;
            if matches!(inode.kind, InodeKind::Directory(_)) {
                inode.metadata = metadata;
                return Ok(());
            }
            self.remove(parent, name)?;
        }
        self.make_directory(parent, name, metadata, budget).map(drop)
    }

    /// Adds anything that is no directory. What is there gives way, but not a directory that is not empty.
    ///
    /// # Errors
    /// As [`EntrySink::add_directory`].
    fn add(&mut self, path: &EntryPath, kind: InodeKind, metadata: Metadata, budget: &Budget) -> Result<()> {
        self.insert(path, kind, metadata, GivesWay::Single, budget)
    }

    /// Adds one more name of what is at `target` already.
    ///
    /// # Errors
    /// As [`EntrySink::add_directory`]; `Corrupt` for a target that is not there, or is a directory.
    fn add_link(&mut self, path: &EntryPath, target: &EntryPath, budget: &Budget) -> Result<()> {
        self.insert_link(path, target, GivesWay::Single, budget)
    }
}

/// What the tree itself rules out.
fn lost() -> Error {
    debug_assert!(false, "a number of the tree names nothing");
    Error::new(ErrorKind::Io, "the image's tree is damaged")
}
