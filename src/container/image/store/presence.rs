//! [`Presence`]: the lock of all who use a store.
//!
//! What a pull or a preparation has found there stays as long as it needs it.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::time::{Duration, Instant};

use super::{FILE_MODE, MAX_PAUSE, Shelf, check_private};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{self, CloseOnFork, LockKind};

/// How long files may take to be removed while others wait.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(20);

/// A lock that ends with its process, however that ends. All who use a store share it; who removes from it has it alone.
#[derive(Debug)]
pub(super) struct Presence {
    _lock: CloseOnFork<File>,
}

impl Presence {
    /// Waits while another process or thread removes files. A store that this user may only read needs no such lock.
    ///
    /// # Errors
    /// `ResourceBusy` when that takes too long.
    pub(super) fn shared(store: &Shelf) -> Result<Option<Self>> {
        let doing = || format!("locking {}", store.shown.join("users").display());
        let Some(lock) = open(store).doing(doing)? else { return Ok(None) };
        let begun = Instant::now();
        while !sys::try_lock(&lock, LockKind::Shared).doing(doing)? {
            if begun.elapsed() > REMOVAL_TIMEOUT {
                let what = format!("another process removes files for {} s already", REMOVAL_TIMEOUT.as_secs());
                return Err(Error::new(ErrorKind::ResourceBusy, what).doing(doing()));
            }
            std::thread::sleep(MAX_PAUSE);
        }
        Ok(Some(Self { _lock: CloseOnFork::new(lock) }))
    }

    /// The lock for one that removes files, unless the store is used just now.
    pub(super) fn alone(store: &Shelf) -> Result<Option<Self>> {
        let doing = || format!("locking {}", store.shown.join("users").display());
        let Some(lock) = open(store).doing(doing)? else { return Ok(None) };
        Ok(match sys::try_lock(&lock, LockKind::Exclusive).doing(doing)? {
            true => Some(Self { _lock: CloseOnFork::new(lock) }),
            false => None,
        })
    }
}

fn open(store: &Shelf) -> Result<Option<File>> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(FILE_MODE);
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let lock = match options.open(store.path().join("users")) {
        Ok(lock) => lock,
        Err(error) if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS)) => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    check_private(&lock)?;
    // A user that can read it can hold it.
    let _: io::Result<()> = lock.set_permissions(Permissions::from_mode(FILE_MODE));
    Ok(Some(lock))
}
