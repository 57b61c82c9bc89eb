//! The kernel modules that the library packed for this machine's devices. They are inserted in their order, then
//! removed, as the files take memory.
//!
//! Runs once, on the shim's one thread, before anything that needs a device.

use core::ffi::CStr;

use super::alloc::vec::Vec;
use super::control::Failure;
use super::files;
use super::sys::{self, Errno};
use crate::proto::{OPTIONAL, Stage, Strings};

/// The library packs none that is larger.
const MAX: usize = 64 << 20;

/// Inserts all, and returns the first that is required and fails. The others are tried too, as the console's driver may
/// be among them.
pub(super) fn insert_all(list: Strings<'_>) -> Result<(), Failure> {
    let mut outcome = Ok(());
    for entry in list.iter() {
        let (path, required) = parse(entry);
        match insert(path) {
            Err(errno) if required && outcome.is_ok() => {
                outcome = Err(Failure::new(Stage::Modules, errno, &[b"inserting ", path.to_bytes()]));
            }
            _ => {}
        }
        let _ = sys::unlink(path);
    }
    outcome
}

/// A module's path, and whether the machine is of no use without it.
fn parse(entry: &CStr) -> (&CStr, bool) {
    match entry.to_bytes_with_nul() {
        [OPTIONAL, path @ ..] => (CStr::from_bytes_with_nul(path).unwrap_or(entry), false),
        _ => (entry, true),
    }
}

fn insert(path: &CStr) -> Result<(), Errno> {
    let file = sys::open(None, path, sys::O_RDONLY)?;
    let inserted = match sys::insert_module_file(&file) {
        // A kernel from before that system call.
        Err(Errno::ENOSYS) => {
            let module: Vec<u8> = files::read(None, path, MAX)?;
            sys::insert_module(&module)
        }
        result => result,
    };
    match inserted {
        // It is there already.
        Err(Errno::EEXIST) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::StringBuf;

    #[test]
    fn dash_marks_an_optional_module() {
        assert_eq!(parse(c"/m/000-virtio.ko"), (c"/m/000-virtio.ko", true));
        assert_eq!(parse(c"-/m/001-virtio_rng.ko"), (c"/m/001-virtio_rng.ko", false));
        assert_eq!(parse(c"-"), (c"", false));
        assert_eq!(parse(c""), (c"", true));
    }

    #[test]
    fn first_failing_required_module_is_named() {
        let mut list = StringBuf::new();
        for path in ["-/nowhere/optional.ko", "/nowhere/first.ko", "/nowhere/second.ko"] {
            list.push(path.as_bytes()).unwrap();
        }
        let failure = insert_all(list.as_strings()).unwrap_err();
        let expected = (Stage::Modules, Errno::ENOENT, &b"inserting /nowhere/first.ko"[..]);
        assert_eq!((failure.stage, failure.errno, failure.text.as_slice()), expected);
        assert!(insert_all(Strings::default()).is_ok());
    }
}
