//! Operations on overlays that no VM has open. They freeze, and make new files that replace an old one whole or not at
//! all.

use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::OverlayFile;
use super::format::{CLUSTER, OverlayHeader};
use super::open::{BasePath, on, open_alone, open_on_changed, own_base, plan_again};
use super::states::ClusterState;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys;

/// Bytes that are looked at between two reports.
const STEP: u64 = 1 << 20;

/// How far it is: bytes of the disk that are done, and how many there are. `Break` ends it.
pub(crate) type OnStep<'a> = &'a mut dyn FnMut(u64, u64) -> ControlFlow<()>;

/// From now on it is only read, and may be a base. One sector is replaced, so it is frozen or it is not.
///
/// # Errors
/// As opening; freezing twice is none.
pub(crate) fn freeze(path: &Path) -> Result<()> {
    let mut disk = open_alone(path)?;
    disk.persist()?;
    disk.header.frozen = true;
    disk.file.write(&disk.header.sector(), 0)?;
    Ok(disk.file.sync()?)
}

/// Writes the whole disk as a raw image into a new file.
pub(crate) fn flatten(path: &Path, to: &Path, step: OnStep<'_>) -> Result<()> {
    let mut disk = OverlayFile::open(path, None, true)?;
    let size = disk.header.size;
    publish(to, false, |file| {
        file.set_len(size)?;
        each_piece(size, step, |at, bytes| {
            disk.read_bytes(bytes, at)?;
            for (n, cluster) in bytes.chunks(CLUSTER as usize).enumerate() {
                if cluster.iter().any(|byte| *byte != 0) {
                    file.write_all_at(cluster, at + n as u64 * CLUSTER)?;
                }
            }
            Ok(())
        })
    })
    .doing(|| format!("writing {}", to.display()))
}

/// Changes the disk's base; the disk's content stays.
///
/// With `same`, the new base is taken to have the content of the old one. The old one need not be there any more, and
/// only the overlay's own clusters are copied.
pub(crate) fn rebase(path: &Path, base: &BasePath, same: bool, step: OnStep<'_>) -> Result<()> {
    let mut disk = if same { open_on_changed(path, base) } else { open_alone(path) }?;
    let (header, layer) = plan_again(&disk, base)?;
    replace(path, header, layer, |new| {
        copy(&mut disk, new, step, |state| match (same, state) {
            (true, ClusterState::Base) => Look::Skip,
            (true, _) => Look::Copy,
            (false, _) => Look::Compare,
        })
    })
}

/// Writes it again without what is the same as in its base.
pub(crate) fn compact(path: &Path, step: OnStep<'_>) -> Result<()> {
    let mut disk = open_alone(path)?;
    let (header, layer) = plan_again(&disk, &own_base(&disk))?;
    replace(path, header, layer, |new| {
        copy(&mut disk, new, step, |state| if state == ClusterState::Base { Look::Skip } else { Look::Compare })
    })
}

/// What becomes of a cluster.
#[derive(PartialEq)]
enum Look {
    /// It is the same in the new base.
    Skip,
    /// It is copied.
    Copy,
    /// It is copied unless it is the same in the new base.
    Compare,
}

/// Copies clusters by their state, as data or as zeroes.
fn copy(
    disk: &mut OverlayFile,
    new: &mut OverlayFile,
    step: OnStep<'_>,
    look_at: impl Fn(ClusterState) -> Look,
) -> Result<()> {
    let mut theirs = [0; CLUSTER as usize];
    each_piece(disk.header.size, step, |at, bytes| {
        for (n, cluster) in bytes.chunks_mut(CLUSTER as usize).enumerate() {
            let at = at + n as u64 * CLUSTER;
            let theirs = theirs.get_mut(..cluster.len()).unwrap_or_default();
            let (state, _) = disk.run(at, cluster.len() as u64)?;
            let look = look_at(state);
            if look == Look::Skip {
                continue;
            }
            disk.read_bytes(cluster, at)?;
            if look == Look::Compare {
                new.base.read(theirs, at)?;
                if cluster == theirs {
                    continue;
                }
            }
            let this = at / CLUSTER..at / CLUSTER + 1;
            if cluster.iter().all(|byte| *byte == 0) {
                new.states.set(&*new.file, this, ClusterState::Zero)?;
            } else {
                new.file.write(cluster, new.place(at))?;
                new.states.set(&*new.file, this, ClusterState::Here)?;
            }
        }
        new.trim()
    })?;
    Ok(new.persist()?)
}

/// Calls `each` with a buffer for every piece of the disk.
fn each_piece(size: u64, step: OnStep<'_>, mut each: impl FnMut(u64, &mut [u8]) -> io::Result<()>) -> Result<()> {
    let mut bytes = vec![0; STEP as usize];
    for at in (0..size).step_by(STEP as usize) {
        if step(at, size).is_break() {
            return Err(Error::new(ErrorKind::Cancelled, format!("the caller stopped it after {at} of {size} bytes")));
        }
        let len = usize::try_from((size - at).min(STEP)).unwrap_or(0);
        each(at, bytes.get_mut(..len).unwrap_or_default())?;
    }
    let _ = step(size, size);
    Ok(())
}

/// Lets `fill` write a new overlay, which then takes the place of the one at `path`.
fn replace(
    path: &Path,
    header: OverlayHeader,
    base: Box<dyn super::Layer>,
    fill: impl FnOnce(&mut OverlayFile) -> Result<()>,
) -> Result<()> {
    publish(path, true, |file| fill(&mut on(file.try_clone()?, header, base)?))
}

/// Lets `fill` write a file in the directory of `path`, and gives it that name when it is durable: whole or not at all. Where
/// there is one already it takes its place, or fails.
pub(super) fn publish(path: &Path, over: bool, fill: impl FnOnce(&File) -> Result<()>) -> Result<()> {
    if !over && path.symlink_metadata().is_ok() {
        return Err(Error::from(io::Error::from_raw_os_error(libc::EEXIST)));
    }
    // A link to the overlay goes on leading to it.
    let path = if over { &fs::canonicalize(path)? } else { path };
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let draft = sys::AtomicFile::new(directory, 0o600)?;
    fill(draft.file())?;
    draft.file().sync_all()?;
    Ok(if over { draft.replace(path) } else { draft.publish(path) }?)
}
