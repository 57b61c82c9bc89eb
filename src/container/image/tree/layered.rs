//! How a layer changes what is below it (image-spec, layer.md).

use std::collections::HashSet;

use super::{Budget, EntryPath, GivesWay, InodeIndex, InodeKind, InodeTree, Metadata, ROOT, Route, RoutePart, lost};
use crate::error::Result;

/// Directories that the layer has itself. Where one takes the place of a link, marks below it are not for the link's target.
#[derive(Debug, Default)]
pub(in super::super) struct OwnDirectories(HashSet<Box<[u8]>>);

impl OwnDirectories {
    pub(in super::super) fn insert(&mut self, path: &EntryPath) {
        self.0.insert(path.as_bytes().into());
    }
}

impl InodeTree {
    /// Takes away what lower layers have at `path`, with all that is in it. What is not there needs no removal.
    ///
    /// # Errors
    /// `Corrupt` for a path through too many links.
    pub(in super::super) fn remove_lower(&mut self, path: &EntryPath, own: &OwnDirectories) -> Result<()> {
        let bytes = path.as_bytes();
        let cut = bytes.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        let (_, Some(name)) = path.split() else { return Ok(()) };
        match self.lower_directory(bytes.get(..cut).unwrap_or_default(), own)? {
            Some(parent) => self.remove_whole(parent, name),
            None => Ok(()),
        }
    }

    /// Takes away all that lower layers have in the directory at `path`.
    ///
    /// # Errors
    /// As [`InodeTree::remove_lower`].
    pub(in super::super) fn clear_lower(&mut self, path: &EntryPath, own: &OwnDirectories) -> Result<()> {
        let Some(index) = self.lower_directory(path.as_bytes(), own)? else { return Ok(()) };
        let children = std::mem::take(&mut self.directory_mut(index)?.children);
        self.unlink(children.into_values().collect())
    }

    /// Adds anything that is no directory. What is there gives way, with all that is in it.
    ///
    /// # Errors
    /// As [`super::EntrySink::add_directory`].
    pub(in super::super) fn put(
        &mut self,
        path: &EntryPath,
        kind: InodeKind,
        metadata: Metadata,
        budget: &Budget,
    ) -> Result<()> {
        self.insert(path, kind, metadata, GivesWay::Whole, budget)
    }

    /// The same of one more name of what is at `target`, in this layer or below.
    ///
    /// # Errors
    /// As [`super::EntrySink::add_link`].
    pub(in super::super) fn put_link(&mut self, path: &EntryPath, target: &EntryPath, budget: &Budget) -> Result<()> {
        self.insert_link(path, target, GivesWay::Whole, budget)
    }

    /// The directory at a path, through links. None where there is none, or where the layer's own takes its place.
    fn lower_directory(&self, path: &[u8], own: &OwnDirectories) -> Result<Option<InodeIndex>> {
        let mut route = Route::new(path.split(|byte| *byte == b'/'));
        // How much of the path itself was gone.
        let (mut at, mut gone) = (ROOT, 0);
        while let Some(RoutePart { name, linked }) = route.next() {
            if !linked {
                gone += name.len() + usize::from(gone > 0);
            }
            let directory = self.directory(at)?;
            if *name == *b".." {
                at = directory.parent;
                continue;
            }
            let Some(child) = directory.children.get(&*name).copied() else { return Ok(None) };
            match &self.get(child).ok_or_else(lost)?.kind {
                InodeKind::Directory(_) => at = child,
                InodeKind::Symlink(_) if !linked && own.0.contains(path.get(..gone).unwrap_or_default()) => {
                    return Ok(None);
                }
                InodeKind::Symlink(target) => at = route.follow(at, target)?,
                _ => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// Takes a name away with all that is in it, if it is there.
    pub(super) fn remove_whole(&mut self, parent: InodeIndex, name: &[u8]) -> Result<()> {
        let removed = self.directory_mut(parent)?.children.remove(name);
        self.unlink(removed.into_iter().collect())
    }

    /// Each of these has one name less.
    fn unlink(&mut self, mut waiting: Vec<InodeIndex>) -> Result<()> {
        while let Some(index) = waiting.pop() {
            let inode = self.get_mut(index)?;
            inode.nlink = inode.nlink.saturating_sub(1);
            if let InodeKind::Directory(directory) = &mut inode.kind {
                waiting.extend(std::mem::take(&mut directory.children).into_values());
                inode.nlink = 0;
            }
            if inode.nlink == 0 {
                inode.kind = InodeKind::Gone;
                inode.metadata = Metadata::default();
            }
        }
        Ok(())
    }
}
